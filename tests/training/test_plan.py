"""The plan: sizes from data, machine and time, and the split of steps and seconds between the stages."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.config import Settings, StageSettings, apply_overrides
from sfumato.data.conditions import Labels
from sfumato.modalities.base import PlanContext
from sfumato.modalities.image import features as image_features
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.modality import ImageModality, downsample_and_channels
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.modality import TableModality
from sfumato.training import fit, profile
from sfumato.training.plan import make_plan, max_steps
from sfumato.training.profile import StepCost
from sfumato.training.run import Run
from tests.training.common import open_settings, record

MNIST, CIFAR, FLOWERS = (1, 28, 28), (3, 32, 32), (3, 128, 128)
IMAGE, TABLE = ImageModality(), TableModality()
CONTEXT = PlanContext(MNIST, "L", 60_000, 10, "fp32")


def latent_shape(shape: tuple[int, int, int]) -> tuple[int, ...]:
    f, c = downsample_and_channels(shape)
    return (c, *(math.ceil(n / f) for n in shape[1:]))


def planned(
    seconds: float = 600.0, shape: tuple[int, int, int] = MNIST, size: str | None = None, *overrides: str
) -> Settings:
    return make_plan(IMAGE, apply_overrides(Settings(), overrides), replace(CONTEXT, shape=shape), seconds, size)


def throughput_at(speed: float) -> Callable[[str, Settings], float]:
    """A machine that trains 64-channel codecs on 1,000 items per second and MLPs of width 512 on 10,000, scaled."""

    def throughput(stage: str, settings: Settings) -> float:
        if stage == "denoiser":
            return speed * 1e4 * (512 / settings.denoiser.width) ** 2 * 4 / settings.denoiser.depth
        return speed * 1e3 * (64 / settings.codec.width) ** 2

    return throughput


def test_the_cost_of_pseudo_labels_is_measured_on_a_sample(monkeypatch: pytest.MonkeyPatch):
    """An item takes a millisecond, a step a tenth of a second, comparing two items a nanosecond."""
    clock = SimpleNamespace(now=0.0)

    def network(run: Any, steps: int, max_unlabelled: int) -> None:
        assert max_unlabelled >= len(run.train)
        count = len(run.train)
        clock.now += 0.1 * steps + 1e-3 * count + 3e-9 * count**2

    labels = np.full(20_000, -1)
    labels[:40] = np.arange(40) % 4
    data = ImageDataset(
        np.zeros((20_000, 16, 16, 1), np.uint8), "L", conditions={"label": Labels(labels, list("abcd"))}
    )
    run: Any = Run("x", None, Settings(), IMAGE, data, data, None, None, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(profile, "train_feature_network", network)
    monkeypatch.setattr(image_features, "comparison_seconds", lambda count: 1e-9 * count**2)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    features = profile.measure_feature_cost(run)[1]
    assert features.step_seconds == pytest.approx(0.1)
    assert features.seconds(200) == pytest.approx(20 + 20 + 1.2)
    share = (40 + 10 * 192) / 20_000  # ten steps see 192 unlabelled images each
    assert features.seconds(10) == pytest.approx(1 + 20 * share + 1.2 * share**2)


def test_the_latent_of_mnist_is_4_by_4_by_8():
    assert latent_shape(MNIST) == (8, 4, 4)


@pytest.mark.parametrize(
    "shape", [MNIST, CIFAR, FLOWERS, (1, 32, 32), (3, 64, 64), (3, 96, 64), (4, 100, 140), (1, 512, 512), (3, 256, 64)]
)
def test_latents_are_a_twelfth_of_colour_and_a_sixth_of_gray_images_at_most(shape: tuple[int, int, int]):
    assert math.prod(latent_shape(shape)) <= math.prod(shape) / (6 if shape[0] == 1 else 12)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 8, 8), (1, 5, 64), (3, 17, 9), (1, 16, 16)])
def test_small_and_odd_shapes_have_a_grid(shape: tuple[int, int, int]):
    f, c = downsample_and_channels(shape)
    assert f & (f - 1) == 0 and f >= 1 and c >= 1
    assert math.prod(latent_shape(shape)) <= math.prod(shape)


@pytest.mark.parametrize(
    ("time_sampling", "parameters"), [(None, {"mean", "std"}), ("logit_normal", {"mean", "std"}), ("uniform", set())]
)
def test_parameters_of_the_time_sampling_are_dropped_with_it(time_sampling: str | None, parameters: set[str]):
    overrides = [f"denoiser.time_sampling={time_sampling}"] if time_sampling else []
    context = replace(CONTEXT, shape=(3,), spec={"columns": [asdict(Column(name, "number")) for name in "abc"]})
    table = make_plan(TABLE, apply_overrides(Settings(), overrides), context, 60.0).denoiser
    assert set(table.time_sampling_settings or {}) == parameters


def test_a_size_preset_applies_to_tables():
    context = replace(CONTEXT, shape=(3,), spec={"columns": [asdict(Column(name, "number")) for name in "abc"]})
    widths = [
        make_plan(TABLE, apply_overrides(Settings(), fixed), context, 60.0, size).denoiser.width
        for size, fixed in ((None, []), ("xs", []), ("xs", ["denoiser.width=96"]))
    ]
    assert widths == [512, 256, 96]


def test_sizes_grow_with_the_budget():
    plans = [planned(seconds) for seconds in (30, 300, 3_000, 30_000, 300_000)]
    for width in ([p.codec.width for p in plans], [p.denoiser.width for p in plans]):
        assert width == sorted(width) and width[0] < width[-1]


def test_a_codec_needs_items_as_the_square_of_its_width():
    """Here a codec of 64 channels sees 1,000 items per second in half of the time, one of 128 a quarter of that."""
    for seconds, width in ((250, 48), (300, 64), (2_400, 96), (4_800, 128)):
        assert (
            make_plan(IMAGE, Settings(), replace(CONTEXT, throughput=throughput_at(1)), seconds, None).codec.width
            == width
        )


def test_sizes_grow_with_the_machine():
    slow, fast = (
        make_plan(IMAGE, Settings(), replace(CONTEXT, throughput=throughput_at(speed)), 300, None)
        for speed in (1e-2, 1e2)
    )
    assert slow.codec.width < fast.codec.width and slow.denoiser.width < fast.denoiser.width


def test_a_size_preset_overrides_the_budget():
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
def test_overrides_take_precedence(override: str):
    given = apply_overrides(Settings(), [override])
    plan = make_plan(IMAGE, given, CONTEXT, 600, "m")
    value, expected = (plan, given)
    for key in override.partition("=")[0].split("."):
        value, expected = getattr(value, key), getattr(expected, key)
    assert value == expected and expected is not None


def test_max_epochs_limits_the_steps():
    stage = StageSettings(batch=64, max_epochs=10)
    assert max_steps(stage, 1_000) == 156 and max_steps(stage, 3) == 1
    assert max_steps(StageSettings(batch=64), 1_000) == math.inf


def test_everything_but_the_steps_is_decided():
    undecided = open_settings(planned())
    assert {key for key in undecided if key.startswith(("train.", "codec.", "denoiser."))} == {
        "train.codec.steps", "train.denoiser.steps", "codec.feature_steps", "codec.levels",
        "train.codec.warmup", "train.denoiser.warmup", "train.max_encoded", "train.codec.max_epochs",
        "train.denoiser.max_epochs",
        "denoiser.schedule_settings", "denoiser.weight_settings", "denoiser.time_sampling_settings",
    }  # fmt: skip


def test_sampling_has_the_precision_of_training():
    precisions = {s: planned(600, MNIST, None, *s.split()).sample.precision for s in ("train.precision=bf16", "")}
    assert precisions == {"train.precision=bf16": "bf16", "": CONTEXT.precision}
    assert planned(600, MNIST, None, "train.precision=bf16", "sample.precision=fp32").sample.precision == "fp32"


def test_large_latents_get_a_transformer():
    assert planned(600, MNIST).denoiser.net == "mlp"
    assert planned(600, FLOWERS).denoiser.net == "dit"
    assert planned(600, FLOWERS, None, "codec.latent=vector", "codec.latent_dim=100").denoiser.net == "mlp"


@pytest.mark.parametrize(("rows", "max_epochs"), [(100, 75), (1_999, 75), (2_000, None)])
def test_the_epochs_of_a_small_table_are_limited(rows: int, max_epochs: int | None):
    context = PlanContext((4,), {"columns": []}, rows, 0, "fp32")
    plan = TABLE.plan(Settings(), context, 600)
    assert plan.train.denoiser.max_epochs == max_epochs and plan.train.early_stopping


def test_large_images_and_grids_make_small_batches():
    codec = lambda side: planned(600, (3, side, side)).train.codec.batch
    assert [codec(side) for side in (32, 256, 512, 1024)] == [64, 64, 21, 5]
    grid = planned(600, (3, 256, 256), None, "codec.downsample=8", "codec.channels=4", "denoiser.net=dit")
    assert grid.train.denoiser.batch == 128  # of 1,024 positions each


def test_few_images_make_small_batches():
    train = make_plan(IMAGE, Settings(), replace(CONTEXT, count=100), 600, None).train
    assert train.denoiser.batch < 100 and train.codec.batch < 100


def test_images_too_small_for_features_get_no_perceptual_loss():
    assert planned(600, (1, 6, 6)).codec.perceptual == "none"
    assert planned(600, (1, 8, 8)).codec.perceptual == "auto"


def test_the_largest_size_that_is_fast_enough_is_chosen():
    """The perceptual loss is too slow on this machine at any width, and the denoiser beyond a width of 768."""
    requests: list[tuple[str, Any, Any]] = []

    def throughput(stage: str, settings: Settings) -> float:
        requests.append((stage, settings.codec.width, settings.codec.perceptual))
        slow = settings.codec.perceptual == "auto" if stage == "codec" else settings.denoiser.width > 768
        return 1.0 if slow else 1e6

    plan = make_plan(IMAGE, Settings(), replace(CONTEXT, throughput=throughput), 600, None)
    assert (plan.codec.width, plan.codec.perceptual, plan.denoiser.width) == (32, "none", 768)
    # the first candidate that is too slow ends the search
    assert requests == [("codec", 32, "auto"), *[("denoiser", 32, "none")] * 2]


def test_hopeless_sizes_are_not_measured():
    """A codec of 64 channels sees 280,000 images, fewer than one of 96 needs; an MLP of width 1024 is too expensive."""
    requests: list[tuple[str, Any]] = []

    def throughput(stage: str, settings: Settings) -> float:
        requests.append((stage, settings.codec.width if stage == "codec" else settings.denoiser.width))
        return throughput_at(1)(stage, settings)

    plan = make_plan(IMAGE, Settings(), replace(CONTEXT, throughput=throughput), 560, None)
    assert (plan.codec.width, plan.denoiser.width) == (64, 768)
    assert requests == [("codec", 32), ("codec", 48), ("codec", 64), ("denoiser", 768)]


def test_sizes_are_measured_with_the_settings_of_the_user(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The codec of width 128, twice as wide inside, is the first that is too slow here."""
    measured: list[tuple[str, int | None, int]] = []
    first_steps: list[int] = []

    def measure_step(step: torch.nn.Module, settings: StageSettings, batches: Any, **options: Any) -> StepCost:
        trained = [p for p in step.parameters() if p.ndim == 4 and p.requires_grad]
        channels = max((p.shape[0] for p in trained), default=0)
        measured.append((options["stage"], settings.batch, channels))
        first_steps.append(options["first"])
        return StepCost(1e-6 if channels < 256 else 1e6, 1.0)

    monkeypatch.setattr(profile, "measure_step", measure_step)
    fixed = ["train.codec.batch=7", "train.codec.steps=2", "train.denoiser.steps=2", "denoiser.width=32"]
    fit(str(source), out=tmp_path / "run", device="cpu", budget="600s", overrides=fixed)
    codecs = [channels for stage, _, channels in measured if stage == "codec"]
    assert codecs[::2] == codecs[1::2] == [64, 96, 128, 192, 256]  # up to the first too slow one; none twice
    assert first_steps[:4] == [0, 700_000, 0, 700_000]  # without the perceptual term, and with it
    assert {batch for stage, batch, _ in measured if stage == "codec"} == {7}
    plan = record(tmp_path / "run")["plan"]
    assert (plan["codec"]["width"], plan["codec"]["perceptual"], plan["denoiser"]["width"]) == (96, "auto", 32)


def test_the_mean_cost_weights_each_span_by_its_length(monkeypatch: pytest.MonkeyPatch):
    step = SimpleNamespace(cost_breakpoints=[0, 500_000, 700_000])
    costs = {0: StepCost(1.0, 10.0), 500_000: StepCost(2.0, 30.0), 700_000: StepCost(4.0, 50.0)}
    monkeypatch.setattr(profile, "measure_step", lambda *_, first: costs[first])
    mean = profile.mean_cost(step, StageSettings(), None)  # type: ignore[arg-type]
    assert mean == pytest.approx((0.5 * 1 + 0.2 * 2 + 0.3 * 4, 0.5 * 10 + 0.2 * 30 + 0.3 * 50))


def test_a_longer_budget_adds_the_perceptual_loss():
    assert [planned(seconds, CIFAR).codec.perceptual for seconds in (60, 120, 3_000)] == ["none", "none", "auto"]
    assert planned(120, CIFAR, None, "codec.perceptual=features").codec.perceptual == "features"


# the split of steps and seconds
