"""The settings of a run: one validated schema, written beside every run.

`None` means "from the plan": the plan, which knows the data, the machine and the budget, fills it in. Every number the
plan decides can be fixed instead, by `--set train.denoiser.lr=3e-4` or `overrides=["train.denoiser.lr=3e-4"]`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sfumato.errors import UserError

SMALLEST_BUDGET = 20.0  # seconds: below this nothing but the measuring of the machine would happen

Bottleneck = Literal["kl", "vq", "fsq", "none", "identity"]
LatentKind = Literal["grid", "vector"]
Perceptual = Literal["auto", "none", "features", "lpips"]
Net = Literal["mlp", "dit", "unet"]
ScheduleName = Literal["flow", "cosine", "linear", "edm", "walk"]
Predict = Literal["z", "eps", "v", "flow"]
Weight = Literal["uniform", "min_snr", "sigmoid", "edm", "learned"]
Times = Literal["uniform", "logit_normal", "lognormal", "adaptive"]
SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc", "abm2", "sde"]
Grid = Literal["uniform", "ends", "early", "late", "logsnr", "karras"]
Precision = Literal["auto", "fp32", "bf16"]


def _split(value: Any) -> Any:
    """Lists may be typed as `8,5,5`."""
    return (
        [part.strip() for part in value.strip("[]() ").split(",") if part.strip()] if isinstance(value, str) else value
    )


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Levels = Annotated[tuple[int, ...], BeforeValidator(_split)]
Interval = Annotated[tuple[float, float], BeforeValidator(_split)]
Numbers = dict[str, float]


class Section(BaseModel):
    """A group of settings; unknown names are refused, and what is assigned later is checked as well."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataSettings(Section):
    """What is read, and how."""

    resolution: int | None = Field(default=None, ge=4, le=4096, description="side of the (square) images, in pixels")
    mode: Literal["L", "RGB", "RGBA", "I;16"] | None = Field(
        default=None, description="colour mode; recognised when not given"
    )
    label_from: str | None = Field(
        default=None, description="regular expression over the file's name; its first group is the label"
    )
    categorical: Names = Field(
        default=(), description="columns that are categories though they look like numbers, such as zip,grade"
    )
    numeric: Names = Field(
        default=(), description="columns that are numbers though they look like categories or names of the rows"
    )
    exclude: Names = Field(default=(), description="columns that are left out")
    skip_bad: bool = Field(default=False, description="leave out files that cannot be read, instead of stopping")
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="share kept for measuring, where the data has no test part"
    )


class CodecSettings(Section):
    """The first stage: data to latents of zero mean and unit variance, and back."""

    bottleneck: Bottleneck | None = Field(
        default=None, description="kl (continuous), vq or fsq (discrete), none; identity: a table's own features"
    )
    latent: LatentKind | None = Field(default=None, description="a grid of positions, or one vector")
    downsample: int | None = Field(default=None, ge=1, description="pixels per latent position, along a side")
    channels: int | None = Field(default=None, ge=1, description="numbers per latent position")
    latent_dim: int | None = Field(default=None, ge=1, description="numbers of a latent vector")
    width: int | None = Field(default=None, ge=1, description="channels of the first level")
    depth: int | None = Field(default=None, ge=0, description="residual blocks per level")
    kl_weight: float | None = Field(default=None, ge=0, description="weight of the KL term")
    perceptual: Perceptual | None = Field(default=None, description="features that images are compared on")
    perceptual_weight: float | None = Field(default=None, ge=0, description="weight of the perceptual term")
    adversarial_weight: float | None = Field(
        default=None, ge=0, description="weight of the discriminator; 0 leaves it out"
    )
    perceptual_steps: int | None = Field(
        default=None,
        ge=1,
        description="training steps of the small network whose features are compared, and which guesses open labels",
    )
    reconstruction: Literal["l1", "l2"] | None = Field(default=None, description="distance between pixels")
    codebook_size: int | None = Field(default=None, ge=2, description="codes of a vq bottleneck")
    groups: int | None = Field(default=None, ge=1, description="codes per latent position of a vq bottleneck")
    levels: Levels | None = Field(default=None, description="levels per channel of an fsq bottleneck, such as 8,5,5")


class DenoiserSettings(Section):
    """The second stage: diffusion in the latent space."""

    net: Net | None = Field(default=None, description="the network")
    width: int | None = Field(default=None, ge=1, description="channels of the network")
    depth: int | None = Field(default=None, ge=1, description="blocks of the network")
    heads: int | None = Field(default=None, ge=1, description="attention heads")
    embed: int | None = Field(default=None, ge=1, description="numbers that the time and the condition become")
    gated: bool | None = Field(default=None, description="whether a perceptron's hidden layers are products")
    patch: int | None = Field(default=None, ge=1, description="latent positions per token, along a side")
    schedule: ScheduleName | None = Field(default=None, description="t -> (alpha, sigma)")
    schedule_settings: Numbers | None = Field(default=None, description="numbers of the schedule, such as beta_max")
    predict: Predict | None = Field(default=None, description="what the network's output means")
    weight: Weight | None = Field(default=None, description="loss weight over log-SNR")
    weight_settings: Numbers | None = Field(default=None, description="numbers of the weight, such as gamma")
    times: Times | None = Field(default=None, description="density of t in training")
    times_settings: Numbers | None = Field(
        default=None, description="numbers of the time density, such as mean and std"
    )
    class_dropout: float | None = Field(
        default=None, ge=0, le=1, description="share of items trained without their condition"
    )


class StageSettings(Section):
    """How one stage is trained."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    passes: int | None = Field(
        default=None, ge=1, description="times that a budget lets the training items be gone through, at most"
    )
    batch: int | None = Field(default=None, ge=1, description="items per step")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] | None = Field(default=None, description="optimizer of the weights")
    warmup: int | None = Field(default=None, ge=0, description="optimizer steps of linear warm-up")
    decay: float | None = Field(
        default=None, ge=0, le=1, description="share of the steps, at the end, over which lr decays"
    )
    clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(
        default=None, ge=0, lt=0.28, description="width of the weight average, relative to training's length"
    )
    weight_decay: float | None = Field(default=None, ge=0, description="decoupled weight decay")


class TrainSettings(Section):
    """How both stages are trained."""

    codec: StageSettings = Field(default_factory=StageSettings, description="the first stage")
    denoiser: StageSettings = Field(default_factory=StageSettings, description="the second stage")
    precision: Precision = Field(default="auto", description="auto: bf16 where the machine is faster with it")
    encoded: int | None = Field(default=None, ge=1, description="training items that are encoded for the second stage")
    watch: bool | None = Field(
        default=None,
        description="end the denoiser's training when the loss of held-out items has risen",
    )


class SampleSettings(Section):
    """What `generate` does unless told otherwise."""

    sampler: SamplerName | None = Field(default=None, description="step rule")
    steps: int | None = Field(default=None, ge=1, description="steps of the sampler")
    grid: Grid | None = Field(default=None, description="how the times of the steps are spaced")
    guidance: float | None = Field(default=None, ge=0, description="guidance weight w; 1 is off")
    autoguidance: float | None = Field(
        default=None, ge=0, description="weight by which an early average of the denoiser is left behind; 1 is off"
    )
    interval: Interval | None = Field(default=None, description="times lo,hi between which guidance is on")
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="of the networks; bf16 is taken where the device computes in it"
    )


class Settings(Section):
    """All settings of a run."""

    modality: str | None = Field(default=None, description="kind of data; recognised when not given")
    seed: int = Field(default=0, ge=0, description="seed of everything that is drawn")
    budget_seconds: float | None = Field(
        default=None, ge=SMALLEST_BUDGET, description="wall clock for all of fit, in seconds"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="what is read")
    codec: CodecSettings = Field(default_factory=CodecSettings, description="the first stage")
    denoiser: DenoiserSettings = Field(default_factory=DenoiserSettings, description="the second stage")
    train: TrainSettings = Field(default_factory=TrainSettings, description="how both are trained")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="how new items are drawn")


def setting_keys(section: type[Section] = Settings, prefix: str = "") -> Iterator[str]:
    """Every key that `--set` takes, such as `train.denoiser.lr`."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from setting_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def setting(settings: Settings, key: str) -> Any:
    """The value of a dotted key, such as `train.denoiser.lr`."""
    return reduce(getattr, key.split("."), settings)


def nearest(name: str, names: Sequence[str]) -> str:
    """The valid name most like `name`; for dotted keys the last part counts as much as the whole."""

    def likeness(valid: str) -> float:
        whole = difflib.SequenceMatcher(None, name, valid).ratio()
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], valid.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return max(names, key=likeness)


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from plain values, such as those of a `run.json`.

    Raises:
        UserError: Naming the key, what is wrong with it and, if it is unknown, the nearest valid one.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def apply_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """New settings, with `a.b=c` each set. `null` gives a setting back to the plan; lists are typed `8,5,5`.

    Raises:
        UserError: For an override that is no `key=value`, an unknown key (names the nearest) or an unfit value.
    """
    values = settings.model_dump()
    keys = list(setting_keys())
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise UserError(f"'{override}' is no setting: write key=value, such as train.denoiser.lr=3e-4")
        if key not in keys and key.rpartition(".")[0] not in _open_keys(keys):
            raise UserError(_unknown(key))
        _put(values, key.split("."), None if value == "null" else value)
    return read_settings(values)


def _open_keys(keys: Sequence[str]) -> list[str]:
    """Keys whose value is itself a table of numbers, under names that only their owner knows."""
    return [key for key in keys if key.endswith("_settings")]


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        values[name] = values.get(name) or {}
        values = values[name]
    values[path[-1]] = value


def _unknown(key: str) -> str:
    return f"unknown setting '{key}': did you mean '{nearest(key, list(setting_keys()))}'?"


def _explain(error: ValidationError) -> str:
    """One line about the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    places = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return _unknown(".".join(places))
    wish = first["msg"].replace("Input should be", "should be").replace("Field required", "one more number is needed")
    return f"setting {'.'.join(places)}={first['input']}: {wish}"


_BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_budget(text: str, least: float = SMALLEST_BUDGET) -> float:
    """Seconds of `10m`, `90s`, `1h30m` or plain `300`.

    Raises:
        UserError: If it cannot be read, or is less than `least` seconds.
    """
    match = _BUDGET.fullmatch(text.replace(" ", "").lower())
    if match is None or not any(match.groups()):
        raise UserError(f"budget '{text}' cannot be read: write it as 10m, 90s, 1h30m or a number of seconds")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if total < least:
        raise UserError(f"budget '{text}' is too small: {least:.0f} s is the least")
    return total
