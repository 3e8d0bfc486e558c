"""Measuring steps and dividing a budget among the stages."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfumato.config import Settings, apply_overrides
from sfumato.errors import UserError
from sfumato.modalities.base import PlanContext
from sfumato.modalities.image.modality import ImageModality
from sfumato.modalities.table.modality import TableModality
from sfumato.training import profile
from sfumato.training.plan import make_plan
from sfumato.training.profile import StepCost
from tests.training.common import open_settings, record, small_fit

MNIST, CIFAR, FLOWERS = (1, 28, 28), (3, 32, 32), (3, 128, 128)
IMAGE, TABLE = ImageModality(), TableModality()
CONTEXT = PlanContext(MNIST, "L", 60_000, 10, "fp32")


def run(seconds_used: float = 0.0, *overrides: str) -> Any:
    """The parts of a run that the split needs: a budget of 100 s, partly used."""
    settings = make_plan(IMAGE, apply_overrides(Settings(budget_seconds=100), overrides), CONTEXT, 100, None)
    left = lambda: 100 * 0.99 - 6 - seconds_used
    return SimpleNamespace(
        settings=settings,
        record={},
        modality=IMAGE,
        train=range(6_000),
        classes=0,
        seconds_left=left,
        started=time.monotonic(),
    )


def patch_costs(
    monkeypatch: pytest.MonkeyPatch, codec: float = 0.01, denoiser: float = 0.02, features: float = 0.0
) -> None:
    costs = {"codec": StepCost(codec, 1e9), "denoiser": StepCost(denoiser, 2e9)}
    monkeypatch.setattr(profile, "measure_stages", lambda *_: (profile.FeatureCost(features), dict(costs)))


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((), 50),
        (("train.codec.steps=30",), 50),
        (("train.denoiser.steps=45",), 50),
        ((), 2),
        (("train.codec.steps=60",), 61),
    ],
)
def test_steps_are_split(overrides: tuple[str, ...], steps: int):
    planned_run = run(0, *overrides)
    profile.split_steps(planned_run, 50 if steps > 50 else steps, 0.5)
    stages = planned_run.settings.train
    assert stages.codec.steps + stages.denoiser.steps == steps
    assert min(stages.codec.steps, stages.denoiser.steps) >= 1
    for override in overrides:
        key, _, value = override.partition("=")
        assert getattr(stages, key.split(".")[1]).steps == int(value)


def test_time_is_split_by_the_cost_of_steps(monkeypatch: pytest.MonkeyPatch):
    patch_costs(monkeypatch)
    planned_run = run(10.0)
    profile.split_time(planned_run, 100, 0.5, {})
    stages, seconds = planned_run.settings.train, planned_run.record["seconds"]
    assert stages.codec.steps == pytest.approx(seconds["codec"] / 0.01, rel=0.01)
    assert stages.denoiser.steps == pytest.approx(seconds["denoiser"] / 0.02, rel=0.01)
    assert 70 < sum(seconds.values()) < 100 - 10
    assert planned_run.record["measured"]["denoiser"] == {"seconds": 0.02, "flops": 2e9}


def test_more_items_than_can_be_encoded_are_subsampled(monkeypatch: pytest.MonkeyPatch):
    """Ten million items at a millisecond each would take a hundred times the budget."""
    patch_costs(monkeypatch, codec=5e-3 * 64)  # encoding is a fifth of a step of 64
    for count, overrides, encoded in (
        (10**7, (), 15_000),
        (6_000, (), 6_000),
        (10**7, ("train.max_encoded=20000",), 20_000),
    ):
        planned_run = run(0.0, *overrides)
        planned_run.train = range(count)
        profile.split_time(planned_run, 100, 0.5, {})
        assert planned_run.settings.train.max_encoded == encoded
        left = 93 - encoded * 1e-3  # 100 s, less the reserve
        assert sum(planned_run.record["seconds"].values()) == pytest.approx(left, abs=0.1)


def test_the_clock_does_not_amend_what_the_user_fixed(monkeypatch: pytest.MonkeyPatch):
    patch_costs(monkeypatch)
    planned_run = run(0.0, "train.codec.steps=123")
    profile.split_time(planned_run, 100, 0.5, {})
    assert planned_run.settings.train.codec.steps == 123
    assert list(planned_run.record["seconds"]) == ["denoiser"]
    assert planned_run.record["seconds"]["denoiser"] == pytest.approx(93 - 123 * 0.01 - 6_000 * 0.01 / 5 / 64, abs=0.1)


@pytest.mark.parametrize("fixed", [("codec",), ("denoiser",), ("codec", "denoiser")])
def test_steps_that_do_not_fit_the_budget_are_refused(monkeypatch: pytest.MonkeyPatch, fixed: tuple[str, ...]):
    patch_costs(monkeypatch, codec=0.01, denoiser=0.01)
    with pytest.raises(UserError, match=r"--budget 100s is too small"):
        profile.split_time(run(0.0, *(f"train.{stage}.steps=9000" for stage in fixed)), 100, 0.5, {})
    planned_run = run(0.0, *(f"train.{stage}.steps=4000" for stage in fixed))
    profile.split_time(planned_run, 100, 0.5, {})
    assert list(planned_run.record["seconds"]) == [stage for stage in ("codec", "denoiser") if stage not in fixed]


def test_an_error_names_a_sufficient_budget(monkeypatch: pytest.MonkeyPatch):
    patch_costs(monkeypatch)
    with pytest.raises(UserError, match=r"--budget 100s is too small .* at least (\d+)s"):
        profile.split_time(run(80.0), 100, 0.5, {})


def test_a_run_that_cannot_be_planned_leaves_no_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    patch_costs(monkeypatch, codec=100.0, features=10.0)
    with pytest.raises(UserError, match="too small"):
        small_fit(source, tmp_path / "run", steps=None, budget="30s")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_fails_keeps_the_existing_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_fit(source, tmp_path, "codec.perceptual=none")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    patch_costs(monkeypatch, codec=100.0, features=10.0)
    with pytest.raises(UserError, match="too small"):
        small_fit(source, tmp_path, steps=None, budget="30s", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_complete_plan_is_written(source: Path, tmp_path: Path):
    small_fit(source, tmp_path, "codec.perceptual=none")
    plan = record(tmp_path)["plan"]
    assert plan["train"]["codec"]["steps"] == 10 and plan["train"]["denoiser"]["steps"] == 10
    assert open_settings(Settings.model_validate(plan)) >= {"sample.interval"}
    assert record(tmp_path)["data"] | {"fingerprint": 0} == {
        "fingerprint": 0, "items": 86, "held_out": 10, "shape": [1, 16, 16], "spec": "L", "classes": 3,
    }  # fmt: skip
