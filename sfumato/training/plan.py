"""The plan: from the data, the machine and the budget to sizes, steps and rates. After it a run is deterministic.

What decides:

* A latent holds at most 1/12 of the item's numbers, on a grid of about 4 × 4 positions (8 × 8 from 64 pixels on).
* The codec gets `CODEC_SHARE` of the time, and the widest network that still sees `CODEC_ITEMS` images in it.
* Up to `MLP_LIMIT` latent numbers the denoiser is a residual perceptron, beyond that a transformer; it is the largest
  that still sees `DENOISER_EPOCHS` times the data, and at least `DENOISER_ITEMS` items.
* Steps are time divided by the measured time of a real step.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

from sfumato.config import CodecSettings, DenoiserSettings, SampleSettings, Settings, StageSettings
from sfumato.nn import net_size
from sfumato.nn.classifier import SMALLEST

CODEC_SHARE = 0.5
NOMINAL_RATE = 150e9  # operations a second, where steps are given: the plan must not depend on the machine then
EFFICIENCY = 0.45  # share of the matrix peak that a training step reaches
ADVERSARIAL_START = 0.5  # share of the codec's steps before the adversarial loss begins
WARMUP = 100  # steps of linear warm-up, at most a tenth of the stage
FEATURE_STEPS = 400  # training steps of the feature network
CODEC_ITEMS = 200_000
MLP_LIMIT = 256
FEWEST_NUMBERS = 16  # of a latent, however small the item
CODEC_WIDTHS = (32, 48, 64, 96, 128)


S = TypeVar("S", CodecSettings, DenoiserSettings, StageSettings, SampleSettings)


@dataclass(frozen=True)
class Facts:
    """What the plan knows of the data and the machine.

    Args:
        shape: (C, H, W) of an item.
        count: Training items.
        classes: Number of classes; 0 without labels.
        precision: `bf16` or `fp32`.
        rate: Floating-point operations per second that training reaches.
    """

    shape: tuple[int, int, int]
    count: int
    classes: int
    precision: str
    rate: float


def latent_grid(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Downsampling f and channels c: a grid of about 4 (from 64 pixels: 8) positions a side, numbers ≤ 1/12."""
    channels, height, width = shape
    side = max(height, width)
    aim = 4 if side < 64 else 8
    f = 2 ** max(1, math.ceil(math.log2(side / aim)))
    if side < 16:  # tiny images: few positions with several numbers each work better than many with one
        f = min(2 * f, 2 ** math.ceil(math.log2(side)))
    positions = math.ceil(height / f) * math.ceil(width / f)
    numbers = max(FEWEST_NUMBERS, channels * height * width // 12)
    return f, max(1, min(16, numbers // positions))


def codec_flops(width: int, shape: tuple[int, int, int]) -> float:
    """About how many operations a training step of the codec takes per image (forward and backward)."""
    return 150e3 * (width / 64) ** 2 * shape[1] * shape[2] * 1.3


def plan_codec(given: CodecSettings, facts: Facts, seconds: float) -> CodecSettings:
    """Sizes and loss weights of the codec; what is `given` stands."""
    f, c = latent_grid(facts.shape)
    fits = [w for w in CODEC_WIDTHS if seconds * facts.rate / codec_flops(w, facts.shape) >= CODEC_ITEMS]
    planned = CodecSettings(
        bottleneck="kl",
        latent="grid",
        downsample=f,
        channels=c,
        latent_dim=c * 16,
        width=max(fits, default=CODEC_WIDTHS[0]),
        depth=1,
        kl_weight=1e-3,
        perceptual="auto" if min(facts.shape[1:]) >= SMALLEST else "none",  # the feature network needs some pixels
        perceptual_weight=2.0,
        adversarial_weight=0.0,
        reconstruction="l1",
        codebook_size=512,
        groups=2 if c % 2 == 0 and not (given.channels or 0) % 2 else 1,
    )
    return filled(given, planned)


def plan_denoiser(
    given: DenoiserSettings, facts: Facts, latent_size: int, seconds: float, size: str | None
) -> DenoiserSettings:
    """Network, sizes and objective of the denoiser; what is `given` stands."""
    net = given.net or ("mlp" if latent_size <= MLP_LIMIT else "dit")
    sizes = {
        "mlp": [(512, 4), (768, 4), (1024, 6), (1536, 6)],
        "dit": [(128, 4), (256, 6), (384, 8)],
        "unet": [(32, 1), (64, 1)],
    }
    seen = 20 * min(max(facts.count, 5_000), 60_000)
    tokens = 64 if net == "dit" else 1
    flops = lambda w, d: 6 * {"mlp": 2 * d * w * w + 2 * w * latent_size, "dit": 18 * d * w * w}.get(net, 3e6) * tokens
    fits = [(w, d) for w, d in sizes[net] if seconds * facts.rate / flops(w, d) >= seen]
    width, depth = (fits or sizes[net][:1])[-1]
    if size is not None:
        chosen = net_size(net, size)
        width, depth = chosen["width"], chosen["depth"]
    planned = DenoiserSettings(
        net=net,
        width=width,
        depth=depth,
        heads=max(1, (given.width or width) // 64),
        patch=1,
        schedule="flow",
        predict="flow",
        weight="uniform",
        times="logit_normal",
        class_dropout=0.1,
    )
    return filled(given, planned)


def plan_stage(given: StageSettings, stage: str, facts: Facts) -> StageSettings:
    """Batch, rates and averages of a stage; the number of steps is set once a step has been measured."""
    small = max(8, 2 ** int(math.log2(max(8, facts.count // 8))))
    codec = StageSettings(batch=min(64, small), lr=2e-3, optimizer="adamw", decay=0.4, clip=1.0, ema=0.05)
    denoiser = StageSettings(batch=min(512, small), lr=2e-3, optimizer="adamw", decay=0.3, clip=1.0, ema=0.1)
    return filled(given, (codec if stage == "codec" else denoiser).model_copy(update={"weight_decay": 0.0}))


def plan_sample(given: SampleSettings) -> SampleSettings:
    """How samples are drawn; the guidance that is left open is chosen by measurement at the end."""
    return filled(given, SampleSettings(sampler="heun", steps=15))


def filled(given: S, planned: S) -> S:
    """`given`, with what it leaves open taken from `planned`."""
    return planned.model_copy(update={k: v for k, v in given if v is not None})


def make_plan(settings: Settings, facts: Facts, seconds: float, size: str | None = None) -> Settings:
    """Every setting decided, but for the numbers of steps.

    Args:
        settings: What the user fixed.
        facts: Of data and machine.
        seconds: Wall clock for both stages; where steps are given instead, a usual amount.
        size: Size of the denoiser, in place of the plan's.
    """
    codec = plan_codec(settings.codec, facts, seconds * CODEC_SHARE)
    f, c = codec.downsample or 1, codec.channels or 1
    numbers = (
        (codec.latent_dim or 1) if codec.latent == "vector" else c * math.prod(-(-n // f) for n in facts.shape[1:])
    )
    return settings.model_copy(
        update={
            "codec": codec,
            "denoiser": plan_denoiser(settings.denoiser, facts, numbers, seconds * (1 - CODEC_SHARE), size),
            "train": settings.train.model_copy(
                update={
                    "codec": plan_stage(settings.train.codec, "codec", facts),
                    "denoiser": plan_stage(settings.train.denoiser, "denoiser", facts),
                    "precision": facts.precision if settings.train.precision == "auto" else settings.train.precision,
                }
            ),
            "sample": plan_sample(settings.sample),
        }
    )
