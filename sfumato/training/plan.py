"""The plan: all settings from the data, the machine and the budget. Once it is made, a run is deterministic.

* The modality plans what depends on the kind of data, above all the codec.
* The codec gets the modality's share of the time, if it has trainable weights.
* The denoiser is a residual MLP for latents of up to `MAX_MLP_LATENT` numbers and a transformer beyond that; it is the
  largest size that still sees the data 20 times (5,000 to 60,000 items).
* Training speed, and with it the number of steps, is measured on real steps.
"""

import math
from typing import Any, TypeVar

import torch

from sfumato.codecs import Codec
from sfumato.config import DenoiserSettings, Net, SampleSettings, Section, Settings, StageSettings
from sfumato.modalities.base import Modality, PlanContext
from sfumato.nn import net_size
from sfumato.types import batch_limit

NOMINAL_FLOPS = 150e9  # operations per second assumed if steps are given: the plan must not depend on the machine then
ADVERSARIAL_START = 0.5  # share of the codec's steps before the adversarial term starts
PERCEPTUAL_START = 0.7  # share of the codec's steps before the perceptual term starts: about half of the time
WARMUP_STEPS = 100  # steps of linear warm-up, at most a tenth of the stage
MAX_FEATURE_STEPS, FEATURE_SHARE = 400, 0.08  # limits of the feature network: steps, and share of the budget
MAX_PSEUDO_LABEL_STEPS, PSEUDO_LABEL_SHARE = 2_400, 0.2  # the same limits if it also predicts pseudo-labels
MAX_MLP_LATENT = 256  # numbers in a latent up to which the denoiser is an MLP
MAX_POSITIONS = 2**17  # latent positions per batch of a transformer or U-Net
MAX_SPEEDUP = 1.5  # assumed maximum of operations per second of the next larger network, relative to this one
NETWORK_SIZES = {  # (width, depth) that the plan chooses from
    "mlp": [(512, 4), (768, 4), (1024, 6), (1536, 6)],
    "dit": [(128, 4), (256, 6), (384, 8)],
    "unet": [(32, 1), (64, 1)],
}

SectionT = TypeVar("SectionT", bound=Section)


def meta_codec(modality: Modality[Any], settings: Settings, context: PlanContext) -> Codec:
    """The codec on the meta device, without weights."""
    with torch.device("meta"):
        return modality.codec_class(**modality.codec_config(settings.codec, context.shape, context.spec))


def plan_size(settings: Settings, context: PlanContext, net: Net, latent_size: int, seconds: float) -> tuple[int, int]:
    """Width and depth of the largest network that sees enough items in the given seconds.

    Args:
        settings: Settings with the codec decided.
        context: Data and machine.
        net: Name of the network.
        latent_size: Numbers in a latent.
        seconds: Training time of the denoiser.
    """
    items = 20 * min(max(context.count, 5_000), 60_000)
    tokens = 64 if net == "dit" else 1
    flops = lambda w, d: 6 * {"mlp": 2 * d * w * w + 2 * w * latent_size, "dit": 18 * d * w * w}.get(net, 3e6) * tokens

    def throughput(width: int, depth: int) -> float:
        if context.throughput is None:
            return NOMINAL_FLOPS / flops(width, depth)
        candidate = DenoiserSettings(net=net, width=width, depth=depth)
        return context.throughput("denoiser", settings.model_copy(update={"denoiser": candidate}))

    (width, depth), *larger = NETWORK_SIZES[net]
    rate = math.inf  # operations per second of the previous size
    for wider, deeper in larger:
        work = flops(wider, deeper)
        if seconds * MAX_SPEEDUP * rate / work < items or seconds * (speed := throughput(wider, deeper)) < items:
            break
        width, depth, rate = wider, deeper, speed * work
    return width, depth


def plan_denoiser(
    settings: Settings, context: PlanContext, codec: Codec, seconds: float, size: str | None
) -> DenoiserSettings:
    """Network, size and objective of the denoiser once the codec is decided; the user's settings take precedence."""
    given = settings.denoiser
    net = given.net or ("mlp" if codec.latent_size <= MAX_MLP_LATENT and not codec.tokens else "dit")
    if size is not None:
        preset = net_size(net, size)
        width, depth = preset["width"], preset["depth"]
    elif given.width is None:
        width, depth = plan_size(settings, context, net, codec.latent_size, seconds)
    else:
        width, depth = NETWORK_SIZES[net][0]
    planned = DenoiserSettings(
        net=net,
        width=width,
        depth=depth,
        heads=max(1, (given.width or width) // 64),
        embedding_dim=128,
        swiglu=False,
        patch=1,
        schedule="flow",
        predict="flow",
        weight="uniform",
        time_sampling="logit_normal",
        class_dropout=0.1,
    )
    return merge(given, planned)


def plan_stage(given: StageSettings, stage: str, context: PlanContext, positions: int = 1) -> StageSettings:
    """Batch size, learning rate and averaging of a stage; the steps are set once a step has been measured.

    Args:
        given: The user's settings, which take precedence.
        stage: Name of the stage.
        context: Data and machine.
        positions: Positions of a latent that the denoiser processes one by one; large images and grids get small
            batches, to limit memory.
    """
    small = max(8, 2 ** int(math.log2(max(8, context.count // 8))))
    limit = batch_limit(context.shape, 64) if stage == "codec" else min(512, max(8, MAX_POSITIONS // positions))
    codec = StageSettings(lr=2e-3, optimizer="adamw", decay=0.4, clip=1.0, ema=0.05)
    denoiser = StageSettings(lr=2e-3, optimizer="adamw", decay=0.3, clip=1.0, ema=0.1)
    shared = {"batch": min(limit, small), "weight_decay": 0.0}
    return merge(given, (codec if stage == "codec" else denoiser).model_copy(update=shared))


def max_steps(stage: StageSettings, count: int) -> float:
    """Number of steps in the stage's `max_epochs` over `count` items; infinite without a limit."""
    return math.inf if stage.max_epochs is None else max(1, stage.max_epochs * count // (stage.batch or 1))


def plan_sample(given: SampleSettings, precision: str) -> SampleSettings:
    """Sampling defaults; a guidance weight that the user does not fix is searched for at the end of training."""
    planned = {"sampler": "abm2", "steps": 10, "grid": "both_ends", "autoguidance": 1.5, "precision": precision}
    return merge(given, SampleSettings.model_validate(planned))


def merge(given: SectionT, planned: SectionT) -> SectionT:
    """`given`, with its open values (None) taken from `planned`, section by section.

    The parameters of a choice (`time_sampling_settings` of `time_sampling`) are only taken along with that choice.
    """
    changed = [name for name, value in given if value not in (None, getattr(planned, name))]
    unrelated = {f"{name}_settings": None for name in changed if hasattr(planned, f"{name}_settings")}
    values = {
        name: merge(value, getattr(planned, name)) if isinstance(value, Section) else value
        for name, value in given
        if value is not None
    }
    return planned.model_copy(update=unrelated | values)


def make_plan(
    modality: Modality[Any], settings: Settings, context: PlanContext, seconds: float, size: str | None = None
) -> Settings:
    """Decide every setting except the numbers of steps.

    Args:
        modality: Modality of the data.
        settings: What the user fixed.
        context: Data and machine.
        seconds: Training time of both stages; a nominal one if steps are given instead.
        size: Size preset of the denoiser, in place of the plan's choice.
    """
    defaults = modality.plan(settings, context, seconds * modality.codec_share)
    if size is not None:
        defaults.denoiser.width = defaults.denoiser.depth = None  # the preset sets them
    settings = merge(settings, defaults)
    codec = meta_codec(modality, settings, context)
    share = modality.codec_share if codec.trainable else 0.0
    precision = context.precision if settings.train.precision == "auto" else settings.train.precision
    denoiser = plan_denoiser(settings, context, codec, seconds * (1 - share), size)
    positions = 1 if denoiser.net == "mlp" else codec.positions
    return settings.model_copy(
        update={
            "denoiser": denoiser,
            "train": settings.train.model_copy(
                update={
                    "codec": plan_stage(settings.train.codec, "codec", context),
                    "denoiser": plan_stage(settings.train.denoiser, "denoiser", context, positions),
                    "precision": precision,
                    "early_stopping": bool(settings.train.early_stopping),
                }
            ),
            "sample": plan_sample(settings.sample, precision),
        }
    )
