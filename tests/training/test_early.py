"""The early average: kept at its step, through a checkpoint, into the model's folder and out of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.model import load
from sfumato.training.early import Early
from sfumato.training.loop import Trainer
from tests.training.common import PLAIN, pictures, small_fit
from tests.training.test_loop import Feed, Line, batch, make_trainer

MANY = ("train.codec.steps=1", *PLAIN)  # steps of the denoiser


def line(early: Early | None) -> Trainer:
    """The same line each time."""
    torch.manual_seed(0)
    return make_trainer(Line(), steps=12, early=early)


def finished(trainer: Trainer) -> Trainer:
    for _ in trainer.run(Feed(), lambda: None):
        pass
    return trainer


def test_it_is_of_its_step():
    early = Early(0.25)
    trainer = line(early)
    for _ in range(3):
        assert not early.step
        trainer.advance(batch(trainer.done))
    wanted = trainer.ema.copy()
    finished(trainer)
    assert early.step == 3
    assert all(torch.equal(early.weights[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(trainer.ema.weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("cut", [2, 8])
def test_it_goes_through_a_checkpoint(cut: int):
    whole, first, second = Early(0.25), Early(0.25), Early(0.25)
    finished(line(whole))
    trainer = line(first)
    for _ in range(cut):
        trainer.advance(batch(trainer.done))
    resumed = line(second)
    resumed.load(*trainer.state())
    finished(resumed)
    assert second.step == whole.step == 3 and second.weights.keys() == whole.weights.keys()
    assert all(torch.equal(second.weights[name], value) for name, value in whole.weights.items())


# in a run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    x, label = pictures(40, (1, 8, 8))
    np.savez(tmp_path / "x.npz", images=x, labels=label)
    return tmp_path / "x.npz"


def test_a_weaker_self_is_written_and_read_again(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=2", steps=40)
    assert model.card.guide == 5  # an eighth of the denoiser's 39 steps
    kept, final = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("guide", "denoiser"))
    assert any(not torch.equal(kept[f"net.{name}"], value) for name, value in final.items())
    again = load(tmp_path / "run", device="cpu")
    assert again.sampling.autoguidance == 2 and again.card.guide == 5
    ours, theirs, plain = (m.generate(4, autoguidance=w).items for m, w in ((model, None), (again, 2.0), (again, 1.0)))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)


def test_none_is_kept_unless_it_is_used(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *MANY, steps=40)
    assert model.guide is None and not (tmp_path / "run" / "guide").exists()
