"""The plan: from the data, the machine and the budget to sizes, steps and rates. After it a run is deterministic.

What decides:

* What a kind of data wants stands in its row of the table of modalities: the codec above all.
* The codec gets the row's share of the time, if there is anything to learn in it.
* Up to `MLP_LIMIT` latent numbers the denoiser is a residual perceptron, beyond that a transformer; it is the largest
  that still sees 20 times the data (of 5,000 to 60,000 items).
* How much is seen in the time, and how many steps there are, is measured on real steps.
"""

import math
from typing import Any, TypeVar

import torch

from sfumato.codecs import Codec
from sfumato.config import DenoiserSettings, SampleSettings, Section, Settings, StageSettings
from sfumato.modality import Facts, Modality
from sfumato.nn import net_size
from sfumato.types import at_once

NOMINAL_RATE = 150e9  # operations a second, where steps are given: the plan must not depend on the machine then
ADVERSARIAL_START = 0.5  # share of the codec's steps before the adversarial loss begins
PERCEPTUAL_START = 0.7  # and before the perceptual one does: about half of the time
WARMUP = 100  # steps of linear warm-up, at most a tenth of the stage
FEATURE_STEPS, FEATURE_SHARE = 400, 0.08  # most steps of the feature network, and most of the budget it takes
GUESS_STEPS, GUESS_SHARE = 2_400, 0.2  # the same where it has to guess labels that are left open
MLP_LIMIT = 256
MOST_PLACES = 2**17  # of the latents of a batch together
GAIN = 1.5  # operations a second that the next larger network has at most, for each of this one: else it is not tried

S = TypeVar("S", bound=Section)


def blank_codec(row: Modality[Any], settings: Settings, facts: Facts) -> Codec:
    """The codec without its numbers: to see what it is."""
    with torch.device("meta"):
        return row.codec(**row.codec_options(settings.codec, facts.shape, facts.mode))


def plan_denoiser(
    settings: Settings, facts: Facts, latent_size: int, seconds: float, size: str | None
) -> DenoiserSettings:
    """Network, sizes and objective of the denoiser, when the codec is decided; what is given stands."""
    given = settings.denoiser
    net = given.net or ("mlp" if latent_size <= MLP_LIMIT else "dit")
    sizes = {
        "mlp": [(512, 4), (768, 4), (1024, 6), (1536, 6)],
        "dit": [(128, 4), (256, 6), (384, 8)],
        "unet": [(32, 1), (64, 1)],
    }
    seen = 20 * min(max(facts.count, 5_000), 60_000)
    tokens = 64 if net == "dit" else 1
    flops = lambda w, d: 6 * {"mlp": 2 * d * w * w + 2 * w * latent_size, "dit": 18 * d * w * w}.get(net, 3e6) * tokens

    def pace(width: int, depth: int) -> float:
        if facts.pace is None:
            return NOMINAL_RATE / flops(width, depth)
        wanted = DenoiserSettings(net=net, width=width, depth=depth)
        return facts.pace("denoiser", settings.model_copy(update={"denoiser": wanted}))

    (width, depth), *larger = sizes[net]
    if size is not None:
        chosen = net_size(net, size)
        width, depth = chosen["width"], chosen["depth"]
    elif given.width is None:
        rate = math.inf  # operations a second of the one before
        for wider, deeper in larger:
            work = flops(wider, deeper)
            if seconds * GAIN * rate / work < seen or seconds * (speed := pace(wider, deeper)) < seen:
                break
            width, depth, rate = wider, deeper, speed * work
    planned = DenoiserSettings(
        net=net,
        width=width,
        depth=depth,
        heads=max(1, (given.width or width) // 64),
        embed=128,
        gated=False,
        patch=1,
        schedule="flow",
        predict="flow",
        weight="uniform",
        times="logit_normal",
        class_dropout=0.1,
    )
    return filled(given, planned)


def plan_stage(given: StageSettings, stage: str, facts: Facts, places: int = 1) -> StageSettings:
    """Batch, rates and averages of a stage; the number of steps is set once a step has been measured.

    Args:
        given: What stands.
        stage: Which.
        facts: Of data and machine.
        places: Of a latent, where the denoiser looks at each: large images and grids make small batches, for memory.
    """
    small = max(8, 2 ** int(math.log2(max(8, facts.count // 8))))
    most = at_once(facts.shape, 64) if stage == "codec" else min(512, max(8, MOST_PLACES // places))
    codec = StageSettings(lr=2e-3, optimizer="adamw", decay=0.4, clip=1.0, ema=0.05)
    denoiser = StageSettings(lr=2e-3, optimizer="adamw", decay=0.3, clip=1.0, ema=0.1)
    rest = {"batch": min(most, small), "weight_decay": 0.0}
    return filled(given, (codec if stage == "codec" else denoiser).model_copy(update=rest))


def most_steps(stage: StageSettings, count: int) -> float:
    """Steps that go as often through `count` items as the stage may, if that is limited."""
    return math.inf if stage.passes is None else max(1, stage.passes * count // (stage.batch or 1))


def plan_sample(given: SampleSettings, precision: str) -> SampleSettings:
    """How samples are drawn; the guidance that is left open is chosen by measurement at the end."""
    planned = {"sampler": "abm2", "steps": 10, "grid": "ends", "autoguidance": 1.5, "precision": precision}
    return filled(given, SampleSettings.model_validate(planned))


def filled(given: S, planned: S) -> S:
    """`given`, with what it leaves open taken from `planned`, section by section.

    Numbers that belong to a name (`times_settings` to `times`) are taken with that name only.
    """
    other = [name for name, value in given if value not in (None, getattr(planned, name))]
    strange = {f"{name}_settings": None for name in other if hasattr(planned, f"{name}_settings")}
    values = {
        name: filled(value, getattr(planned, name)) if isinstance(value, Section) else value
        for name, value in given
        if value is not None
    }
    return planned.model_copy(update=strange | values)


def make_plan(
    row: Modality[Any], settings: Settings, facts: Facts, seconds: float, size: str | None = None
) -> Settings:
    """Every setting decided, but for the numbers of steps.

    Args:
        row: Of the table of modalities.
        settings: What the user fixed.
        facts: Of data and machine.
        seconds: Wall clock for both stages; where steps are given instead, a usual amount.
        size: Size of the denoiser, in place of the plan's.
    """
    usual = row.plan(settings, facts, seconds * row.codec_share)
    if size is not None:
        usual.denoiser.width = usual.denoiser.depth = None  # the size says them
    settings = filled(settings, usual)
    codec = blank_codec(row, settings, facts)
    share = row.codec_share if codec.learns else 0.0
    precision = facts.precision if settings.train.precision == "auto" else settings.train.precision
    denoiser = plan_denoiser(settings, facts, codec.latent_size, seconds * (1 - share), size)
    places = 1 if denoiser.net == "mlp" else math.prod(codec.latent_shape[1:])
    return settings.model_copy(
        update={
            "denoiser": denoiser,
            "train": settings.train.model_copy(
                update={
                    "codec": plan_stage(settings.train.codec, "codec", facts),
                    "denoiser": plan_stage(settings.train.denoiser, "denoiser", facts, places),
                    "precision": precision,
                    "watch": bool(settings.train.watch),
                }
            ),
            "sample": plan_sample(settings.sample, precision),
        }
    )
