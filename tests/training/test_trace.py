"""How many files a training step and a sample pass through, and how often they evaluate the schedule."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import sfumato
from sfumato.config import Settings
from sfumato.core import Schedule
from sfumato.model import Model
from sfumato.training.build import denoiser_step
from sfumato.types import Batch, Raw
from tests.training.teachers import new_model

PACKAGE = Path(sfumato.__file__).parent
LABELS = Raw({"label": torch.arange(6) % 3})


def files_entered(call: Callable[[], object]) -> set[str]:
    """The files of the package that have a function which the call enters."""
    entered = set[str]()

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            entered.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


@pytest.fixture(params=["mlp", "dit", "unet"])
def model(request: pytest.FixtureRequest) -> Model:
    """A labelled image model with the sampling that `fit` chooses for images."""
    net = {} if request.param == "mlp" else {"name": request.param, "heads": 2}
    model = new_model(width=32, depth=2, **net, **({"patch": 1} if request.param == "dit" else {}))
    model.config.sample |= {"sampler": "abm2", "steps": 10, "grid": "both_ends", "guidance": 1.5, "precision": "fp32"}
    return model


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that gets the time of every evaluation of a schedule."""
    times, call = list[object](), Schedule.__call__
    monkeypatch.setattr(Schedule, "__call__", lambda self, t: (times.append(t), call(self, t))[1])
    return times


def training_step(model: Model) -> Callable[[], object]:
    """What the trainer calls in each step."""
    step, z = denoiser_step(model, Settings()), torch.randn(6, *model.codec.latent_shape)
    batch = Batch(z, torch.arange(6), LABELS)
    return lambda: step(batch, "denoiser", 0, torch.Generator())


def test_a_training_step_enters_seven_files_below_the_trainer(model: Model):
    entered = files_entered(training_step(model))
    assert {"training/steps.py", "core/denoiser.py"} < entered and len(entered) <= 7, sorted(entered)


def test_a_guided_sample_enters_eight_files_below_the_model(model: Model):
    entered = files_entered(lambda: model.sample(range(6), LABELS)) - {"model.py"}
    assert {"core/guidance.py", "core/sampler.py"} < entered and len(entered) <= 8, sorted(entered)


def test_a_training_step_evaluates_the_schedule_once(model: Model, evaluations: list[object]):
    training_step(model)()
    assert len(evaluations) == 1


@pytest.mark.parametrize("sampler", ["abm2", "heun", "unipc", "sde"])
def test_a_sample_evaluates_the_schedule_once_at_each_time(model: Model, evaluations: list[object], sampler: str):
    model.sample(range(6), LABELS, sampling=model.choose_sampling(10, 1.5, sampler))
    assert len(evaluations) == 11
