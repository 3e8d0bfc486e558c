"""The plan: sizes from data, machine and time; and how steps and seconds are shared out."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.config import Settings, StageSettings, apply_overrides
from sfumato.data import Column, Data
from sfumato.errors import UserError
from sfumato.modality import Facts
from sfumato.modality.image import IMAGE, latent_grid
from sfumato.modality.table import TABLE
from sfumato.training import fit, planning
from sfumato.training.job import Job
from sfumato.training.measure import Speed
from sfumato.training.plan import make_plan, most_steps
from tests.training.common import record, small_fit

MNIST, CIFAR, FLOWERS = (1, 28, 28), (3, 32, 32), (3, 128, 128)
FACTS = Facts(MNIST, "L", 60_000, 10, "fp32")


def numbers(shape: tuple[int, int, int]) -> tuple[int, ...]:
    f, c = latent_grid(shape)
    return (c, *(math.ceil(n / f) for n in shape[1:]))


def planned(
    seconds: float = 600.0, shape: tuple[int, int, int] = MNIST, size: str | None = None, *overrides: str
) -> Settings:
    return make_plan(IMAGE, apply_overrides(Settings(), overrides), replace(FACTS, shape=shape), seconds, size)


def paced(by: float) -> Callable[[str, Settings], float]:
    """A machine on which steps of 64-channel codecs see 1,000 items a second, of perceptrons 512 wide 10,000, `by`."""

    def pace(stage: str, settings: Settings) -> float:
        if stage == "denoiser":
            return by * 1e4 * (512 / settings.denoiser.width) ** 2 * 4 / settings.denoiser.depth
        return by * 1e3 * (64 / settings.codec.width) ** 2

    return pace


def test_guessing_labels_is_measured_on_few_images(monkeypatch: pytest.MonkeyPatch):
    """Looking at an image takes a millisecond, a step a tenth of a second, comparing two images a nanosecond."""
    clock = SimpleNamespace(now=0.0)

    def network(job: Any, steps: int, most: int) -> None:
        assert most >= len(job.train)
        count = len(job.train)
        clock.now += 0.1 * steps + 1e-3 * count + 3e-9 * count**2

    labels = np.full(20_000, -1)
    labels[:40] = np.arange(40) % 4
    data = Data(np.zeros((20_000, 16, 16, 1), np.uint8), "L", labels=labels, label_names=list("abcd"))
    job: Any = Job("x", None, Settings(), IMAGE, data, data, None, None, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(planning, "feature_network", network)
    monkeypatch.setattr(planning, "comparing", lambda count: 1e-9 * count**2)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    features = planning.measure_network(job)[1]
    assert features.step == pytest.approx(0.1)
    assert features.seconds(200) == pytest.approx(20 + 20 + 1.2)
    few = (40 + 10 * 192) / 20_000  # ten steps see so many of the images without a label
    assert features.seconds(10) == pytest.approx(1 + 20 * few + 1.2 * few**2)


def test_mnist_gets_4_by_4_by_8():
    assert numbers(MNIST) == (8, 4, 4)


@pytest.mark.parametrize(
    "shape", [MNIST, CIFAR, FLOWERS, (1, 32, 32), (3, 64, 64), (3, 96, 64), (4, 100, 140), (1, 512, 512), (3, 256, 64)]
)
def test_latents_hold_a_twelfth_at_most_or_of_gray_images_a_sixth(shape: tuple[int, int, int]):
    assert math.prod(numbers(shape)) <= math.prod(shape) / (6 if shape[0] == 1 else 12)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 8, 8), (1, 5, 64), (3, 17, 9), (1, 16, 16)])
def test_small_and_odd_shapes_have_a_grid(shape: tuple[int, int, int]):
    f, c = latent_grid(shape)
    assert f & (f - 1) == 0 and f >= 1 and c >= 1
    assert math.prod(numbers(shape)) <= math.prod(shape)


@pytest.mark.parametrize(
    ("given", "left"), [(None, {"mean", "std"}), ("logit_normal", {"mean", "std"}), ("uniform", set())]
)
def test_another_density_of_times_gets_no_settings_of_a_tables_own(given: str | None, left: set[str]):
    overrides = [f"denoiser.times={given}"] if given else []
    facts = replace(FACTS, shape=(3,), mode={"columns": [asdict(Column(name, "number")) for name in "abc"]})
    table = make_plan(TABLE, apply_overrides(Settings(), overrides), facts, 60.0).denoiser
    assert set(table.times_settings or {}) == left


def test_a_table_gets_the_size_that_is_asked_for():
    facts = replace(FACTS, shape=(3,), mode={"columns": [asdict(Column(name, "number")) for name in "abc"]})
    wide = [
        make_plan(TABLE, apply_overrides(Settings(), fixed), facts, 60.0, size).denoiser.width
        for size, fixed in ((None, []), ("xs", []), ("xs", ["denoiser.width=96"]))
    ]
    assert wide == [512, 256, 96]


def test_sizes_grow_with_the_budget():
    plans = [planned(seconds) for seconds in (30, 300, 3_000, 30_000, 300_000)]
    for width in ([p.codec.width for p in plans], [p.denoiser.width for p in plans]):
        assert width == sorted(width) and width[0] < width[-1]


def test_a_codec_sees_images_as_the_square_of_its_width():
    """On this machine one of 64 channels sees 1,000 in each of half of the seconds, one of 128 a quarter of that."""
    for seconds, width in ((250, 48), (300, 64), (2_400, 96), (4_800, 128)):
        assert make_plan(IMAGE, Settings(), replace(FACTS, pace=paced(1)), seconds, None).codec.width == width


def test_sizes_grow_with_the_machine():
    slow, fast = (make_plan(IMAGE, Settings(), replace(FACTS, pace=paced(by)), 300, None) for by in (1e-2, 1e2))
    assert slow.codec.width < fast.codec.width and slow.denoiser.width < fast.denoiser.width


def test_the_size_dial_wins_over_the_budget():
    widths = [planned(600, MNIST, size).denoiser.width for size in ("xs", "s", "m", "l", "xl")]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize(
    "override",
    ["codec.width=40", "codec.bottleneck=vq", "codec.channels=2", "denoiser.net=dit", "denoiser.width=320",
     "denoiser.depth=3", "train.codec.batch=7", "train.denoiser.lr=0.5", "train.denoiser.optimizer=muon",
     "train.codec.weight_decay=0.1", "sample.steps=3", "sample.guidance=0", "train.codec.warmup=0",
     "codec.kl_weight=0", "denoiser.class_dropout=0", "train.precision=bf16", "sample.grid=karras",
     "sample.precision=fp32", "sample.autoguidance=3"],
)  # fmt: skip
def test_overrides_win(override: str):
    given = apply_overrides(Settings(), [override])
    plan = make_plan(IMAGE, given, FACTS, 600, "m")
    value, wanted = (plan, given)
    for key in override.partition("=")[0].split("."):
        value, wanted = getattr(value, key), getattr(wanted, key)
    assert value == wanted and wanted is not None


def open_settings(section: Any, prefix: str = "") -> set[str]:
    """Settings that are still None."""
    inner = {f"{prefix}{k}": v for k, v in section}
    return {k for k, v in inner.items() if v is None}.union(
        *(open_settings(v, f"{k}.") for k, v in inner.items() if hasattr(v, "model_dump"))
    )


def test_items_are_gone_through_so_often_at_most():
    stage = StageSettings(batch=64, passes=10)
    assert most_steps(stage, 1_000) == 156 and most_steps(stage, 3) == 1
    assert most_steps(StageSettings(batch=64), 1_000) == math.inf


def test_everything_but_the_steps_is_decided():
    left = open_settings(planned())
    assert {key for key in left if key.startswith(("train.", "codec.", "denoiser."))} == {
        "train.codec.steps", "train.denoiser.steps", "codec.perceptual_steps", "codec.levels",
        "train.codec.warmup", "train.denoiser.warmup", "train.encoded", "train.codec.passes", "train.denoiser.passes",
        "denoiser.schedule_settings", "denoiser.weight_settings", "denoiser.times_settings",
    }  # fmt: skip


def test_new_items_are_drawn_in_the_precision_of_training():
    precisions = {s: planned(600, MNIST, None, *s.split()).sample.precision for s in ("train.precision=bf16", "")}
    assert precisions == {"train.precision=bf16": "bf16", "": FACTS.precision}
    assert planned(600, MNIST, None, "train.precision=bf16", "sample.precision=fp32").sample.precision == "fp32"


def test_many_latent_numbers_call_for_a_transformer():
    assert planned(600, MNIST).denoiser.net == "mlp"
    assert planned(600, FLOWERS).denoiser.net == "dit"
    assert planned(600, FLOWERS, None, "codec.latent=vector", "codec.latent_dim=100").denoiser.net == "mlp"


@pytest.mark.parametrize(("rows", "passes"), [(100, 75), (1_999, 75), (2_000, None)])
def test_few_rows_are_not_gone_through_for_ever(rows: int, passes: int | None):
    facts = Facts((4,), {"columns": []}, rows, 0, "fp32")
    plan = TABLE.plan(Settings(), facts, 600)
    assert plan.train.denoiser.passes == passes and plan.train.watch


def test_large_images_and_grids_make_small_batches():
    codec = lambda side: planned(600, (3, side, side)).train.codec.batch
    assert [codec(side) for side in (32, 256, 512, 1024)] == [64, 64, 21, 5]
    grid = planned(600, (3, 256, 256), None, "codec.downsample=8", "codec.channels=4", "denoiser.net=dit")
    assert grid.train.denoiser.batch == 128  # of 1,024 places each


def test_few_images_make_small_batches():
    few = make_plan(IMAGE, Settings(), replace(FACTS, count=100), 600, None)
    assert few.train.denoiser.batch < 100 and few.train.codec.batch < 100


def test_images_too_small_for_features_do_without():
    assert planned(600, (1, 6, 6)).codec.perceptual == "none"
    assert planned(600, (1, 8, 8)).codec.perceptual == "auto"


def test_the_largest_is_taken_that_is_fast_enough():
    """On a machine where width costs nothing but the perceptual term nearly all, no term and no width are taken."""
    asked: list[tuple[str, Any, Any]] = []

    def pace(stage: str, settings: Settings) -> float:
        asked.append((stage, settings.codec.width, settings.codec.perceptual))
        slow = settings.codec.perceptual == "auto" if stage == "codec" else settings.denoiser.width > 768
        return 1.0 if slow else 1e6

    plan = make_plan(IMAGE, Settings(), replace(FACTS, pace=pace), 600, None)
    assert (plan.codec.width, plan.codec.perceptual, plan.denoiser.width) == (32, "none", 768)
    assert asked == [("codec", 32, "auto"), *[("denoiser", 32, "none")] * 2]  # the first misfit ends the search


def test_what_is_hopeless_is_not_tried():
    """One of 64 channels sees 280,000 images, fewer than one of 96 needs; a perceptron 1024 wide is too much work."""
    asked: list[tuple[str, Any]] = []

    def pace(stage: str, settings: Settings) -> float:
        asked.append((stage, settings.codec.width if stage == "codec" else settings.denoiser.width))
        return paced(1)(stage, settings)

    plan = make_plan(IMAGE, Settings(), replace(FACTS, pace=pace), 560, None)
    assert (plan.codec.width, plan.denoiser.width) == (64, 768)
    assert asked == [("codec", 32), ("codec", 48), ("codec", 64), ("denoiser", 768)]


def test_sizes_are_tried_as_they_would_be_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With what the user fixed; the codec of width 128, twice as wide inside, is the first that is too slow here."""
    tried: list[tuple[str, int | None, int]] = []
    begun: list[int] = []

    def measure_step(step: torch.nn.Module, settings: StageSettings, feed: Any, **kit: Any) -> Speed:
        trained = [p for p in step.parameters() if p.ndim == 4 and p.requires_grad]
        channels = max((p.shape[0] for p in trained), default=0)
        tried.append((kit["stage"], settings.batch, channels))
        begun.append(kit["first"])
        return Speed(1e-6 if channels < 256 else 1e6, 1.0)

    monkeypatch.setattr(planning, "measure_step", measure_step)
    fixed = ["train.codec.batch=7", "train.codec.steps=2", "train.denoiser.steps=2", "denoiser.width=32"]
    fit(str(source), out=tmp_path / "run", device="cpu", budget="600s", overrides=fixed)
    codecs = [channels for stage, _, channels in tried if stage == "codec"]
    assert codecs[::2] == codecs[1::2] == [64, 96, 128, 192, 256]  # up to the first misfit; none is measured again
    assert begun[:4] == [0, 700_000, 0, 700_000]  # without the perceptual term, and with it
    assert {batch for stage, batch, _ in tried if stage == "codec"} == {7}
    plan = record(tmp_path / "run")["plan"]
    assert (plan["codec"]["width"], plan["codec"]["perceptual"], plan["denoiser"]["width"]) == (96, "auto", 32)


def test_speed_of_a_stage_counts_each_turn_by_its_length(monkeypatch: pytest.MonkeyPatch):
    step = SimpleNamespace(turns=[0, 500_000, 700_000])
    costs = {0: Speed(1.0, 10.0), 500_000: Speed(2.0, 30.0), 700_000: Speed(4.0, 50.0)}
    monkeypatch.setattr(planning, "measure_step", lambda *_, first: costs[first])
    found = planning.mean_speed(step, StageSettings(), None)  # type: ignore[arg-type]
    assert found == pytest.approx((0.5 * 1 + 0.2 * 2 + 0.3 * 4, 0.5 * 10 + 0.2 * 30 + 0.3 * 50))


def test_perceptual_term_comes_in_with_time():
    assert [planned(seconds, CIFAR).codec.perceptual for seconds in (60, 120, 3_000)] == ["none", "none", "auto"]
    assert planned(120, CIFAR, None, "codec.perceptual=features").codec.perceptual == "features"


# sharing out


def job(seconds_used: float = 0.0, *overrides: str) -> Any:
    """As much of a job as sharing out needs: a budget of 100 s, of which some is used."""
    settings = make_plan(IMAGE, apply_overrides(Settings(budget_seconds=100), overrides), FACTS, 100, None)
    left = lambda: 100 * 0.99 - 6 - seconds_used
    return SimpleNamespace(
        settings=settings, record={}, train=range(6_000), classes=0, seconds_left=left, started=time.monotonic()
    )


def measured(
    monkeypatch: pytest.MonkeyPatch, codec: float = 0.01, denoiser: float = 0.02, features: float = 0.0
) -> None:
    speeds = {"codec": Speed(codec, 1e9), "denoiser": Speed(denoiser, 2e9)}
    monkeypatch.setattr(planning, "measure_stages", lambda *_: (planning.Features(features), dict(speeds)))


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
def test_steps_are_shared_out(overrides: tuple[str, ...], steps: int):
    shared = job(0, *overrides)
    planning.divide_steps(shared, 50 if steps > 50 else steps, 0.5)
    stages = shared.settings.train
    assert stages.codec.steps + stages.denoiser.steps == steps
    assert min(stages.codec.steps, stages.denoiser.steps) >= 1
    for override in overrides:
        key, _, value = override.partition("=")
        assert getattr(stages, key.split(".")[1]).steps == int(value)


def test_time_is_shared_out_by_what_steps_take(monkeypatch: pytest.MonkeyPatch):
    measured(monkeypatch)
    shared = job(10.0)
    planning.divide_time(shared, 100, 0.5, {})
    stages, seconds = shared.settings.train, shared.record["seconds"]
    assert stages.codec.steps == pytest.approx(seconds["codec"] / 0.01, rel=0.01)
    assert stages.denoiser.steps == pytest.approx(seconds["denoiser"] / 0.02, rel=0.01)
    assert 70 < sum(seconds.values()) < 100 - 10
    assert shared.record["measured"]["denoiser"] == {"seconds": 0.02, "flops": 2e9}


def test_more_items_than_can_be_encoded_do_not_need_a_larger_budget(monkeypatch: pytest.MonkeyPatch):
    """Ten million at a millisecond each would take a hundred times the budget: some are drawn."""
    measured(monkeypatch, codec=5e-3 * 64)  # encoding is a fifth of a step of 64
    for count, given, encoded in ((10**7, (), 15_000), (6_000, (), 6_000), (10**7, ("train.encoded=20000",), 20_000)):
        shared = job(0.0, *given)
        shared.train = range(count)
        planning.divide_time(shared, 100, 0.5, {})
        assert shared.settings.train.encoded == encoded
        left = 93 - encoded * 1e-3  # 100 s, less what is kept for the end
        assert sum(shared.record["seconds"].values()) == pytest.approx(left, abs=0.1)


def test_the_clock_does_not_amend_what_the_user_fixed(monkeypatch: pytest.MonkeyPatch):
    measured(monkeypatch)
    shared = job(0.0, "train.codec.steps=123")
    planning.divide_time(shared, 100, 0.5, {})
    assert shared.settings.train.codec.steps == 123
    assert list(shared.record["seconds"]) == ["denoiser"]
    assert shared.record["seconds"]["denoiser"] == pytest.approx(93 - 123 * 0.01 - 6_000 * 0.01 / 5 / 64, abs=0.1)


@pytest.mark.parametrize("fixed", [("codec",), ("denoiser",), ("codec", "denoiser")])
def test_steps_that_do_not_fit_the_budget_are_refused(monkeypatch: pytest.MonkeyPatch, fixed: tuple[str, ...]):
    measured(monkeypatch, codec=0.01, denoiser=0.01)
    with pytest.raises(UserError, match=r"--budget 100s is too small"):
        planning.divide_time(job(0.0, *(f"train.{stage}.steps=9000" for stage in fixed)), 100, 0.5, {})
    shared = job(0.0, *(f"train.{stage}.steps=4000" for stage in fixed))
    planning.divide_time(shared, 100, 0.5, {})
    assert list(shared.record["seconds"]) == [stage for stage in ("codec", "denoiser") if stage not in fixed]


def test_a_budget_too_small_says_which_would_do(monkeypatch: pytest.MonkeyPatch):
    measured(monkeypatch)
    with pytest.raises(UserError, match=r"--budget 100s is too small .* at least (\d+)s"):
        planning.divide_time(job(80.0), 100, 0.5, {})


def test_nothing_is_left_of_a_run_without_a_plan(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured(monkeypatch, codec=100.0, features=10.0)
    with pytest.raises(UserError, match="too small"):
        small_fit(source, tmp_path / "run", steps=None, budget="30s")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_fails_spares_the_run_it_was_to_replace(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small_fit(source, tmp_path, "codec.perceptual=none")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    measured(monkeypatch, codec=100.0, features=10.0)
    with pytest.raises(UserError, match="too small"):
        small_fit(source, tmp_path, steps=None, budget="30s", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_plan_is_written_with_every_number(source: Path, tmp_path: Path):
    small_fit(source, tmp_path, "codec.perceptual=none")
    plan = record(tmp_path)["plan"]
    assert plan["train"]["codec"]["steps"] == 10 and plan["train"]["denoiser"]["steps"] == 10
    assert open_settings(Settings.model_validate(plan)) >= {"sample.interval"}
    assert record(tmp_path)["data"] | {"fingerprint": 0} == {
        "fingerprint": 0, "items": 86, "held_out": 10, "shape": [1, 16, 16], "mode": "L", "classes": 3,
    }  # fmt: skip
