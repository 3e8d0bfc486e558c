"""The settings of a run: one validated schema, stored in every run folder.

`None` means "from the plan": the plan derives the value from the data, the machine and the budget. Any of these values
can be fixed instead, with `--set train.denoiser.lr=3e-4` or `overrides=["train.denoiser.lr=3e-4"]`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sfumato.errors import UserError

MIN_BUDGET = 20.0  # seconds; a shorter run would only measure the machine

BottleneckName = Literal["kl", "vq", "fsq", "none", "identity"]
LatentKind = Literal["grid", "vector"]
PerceptualKind = Literal["auto", "none", "features", "lpips"]
Net = Literal["mlp", "dit", "unet"]
ScheduleName = Literal["flow", "cosine", "linear", "edm", "walk"]
Predict = Literal["z", "eps", "v", "flow"]
Weight = Literal["uniform", "min_snr", "sigmoid", "edm", "learned"]
TimeSamplingName = Literal["uniform", "logit_normal", "lognormal", "adaptive"]
SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc", "abm2", "sde"]
GridName = Literal["uniform", "both_ends", "noise", "data", "logsnr", "karras"]
Precision = Literal["auto", "fp32", "bf16"]

RENAMED = {  # old name of a setting -> its name now
    "codec.perceptual_steps": "codec.feature_steps",
    "denoiser.embed": "denoiser.embedding_dim",
    "denoiser.gated": "denoiser.swiglu",
    "denoiser.times": "denoiser.time_sampling",
    "denoiser.times_settings": "denoiser.time_sampling_settings",
    "train.codec.passes": "train.codec.max_epochs",
    "train.denoiser.passes": "train.denoiser.max_epochs",
    "train.encoded": "train.max_encoded",
    "train.watch": "train.early_stopping",
}
RENAMED_VALUES = {"sample.grid": {"ends": "both_ends", "early": "noise", "late": "data"}}  # setting -> old -> new


def _split(value: Any) -> Any:
    """Parse a list typed as `8,5,5`."""
    return (
        [part.strip() for part in value.strip("[]() ").split(",") if part.strip()] if isinstance(value, str) else value
    )


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Levels = Annotated[tuple[int, ...], BeforeValidator(_split)]
Interval = Annotated[tuple[float, float], BeforeValidator(_split)]
Numbers = dict[str, float]


class Section(BaseModel):
    """A group of settings; refuses unknown names and validates later assignments too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataSettings(Section):
    """How the source is read."""

    resolution: int | None = Field(default=None, ge=4, le=4096, description="side of the (square) images, in pixels")
    mode: Literal["L", "RGB", "RGBA", "I;16"] | None = Field(
        default=None, description="Pillow colour mode; detected when not given"
    )
    label_from: str | None = Field(
        default=None,
        description="regular expression for file names; its first group is the label, its named groups are conditions",
    )
    label_column: Names = Field(
        default=(), description="columns of the images' metadata that are conditions, such as digit,age; default label"
    )
    categorical: Names = Field(
        default=(), description="columns to treat as categorical although they hold numbers, such as zip,grade"
    )
    numeric: Names = Field(
        default=(), description="columns to treat as numeric although they look like categories or row identifiers"
    )
    exclude: Names = Field(default=(), description="columns to ignore")
    skip_bad: bool = Field(default=False, description="skip unreadable files instead of stopping")
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="fraction of items held out for evaluation if the source has no test set"
    )


class CodecSettings(Section):
    """The first stage: an autoencoder between data and latents of zero mean and unit variance."""

    bottleneck: BottleneckName | None = Field(
        default=None, description="kl, vq, fsq, none, or identity (a table's features without an autoencoder)"
    )
    latent: LatentKind | None = Field(default=None, description="shape of the latent: a spatial grid or one vector")
    downsample: int | None = Field(default=None, ge=1, description="pixels per latent position, per side")
    channels: int | None = Field(default=None, ge=1, description="latent channels")
    latent_dim: int | None = Field(default=None, ge=1, description="dimension of a vector latent")
    width: int | None = Field(default=None, ge=1, description="channels at the first resolution")
    depth: int | None = Field(default=None, ge=0, description="residual blocks per resolution")
    kl_weight: float | None = Field(default=None, ge=0, description="weight of the KL term")
    perceptual: PerceptualKind | None = Field(default=None, description="features of the perceptual loss")
    perceptual_weight: float | None = Field(default=None, ge=0, description="weight of the perceptual loss")
    adversarial_weight: float | None = Field(
        default=None, ge=0, description="weight of the adversarial loss; 0 disables it"
    )
    feature_steps: int | None = Field(
        default=None,
        ge=1,
        description="training steps of the feature network, used for the perceptual loss and for pseudo-labels",
    )
    reconstruction: Literal["l1", "l2"] | None = Field(default=None, description="pixel loss")
    codebook_size: int | None = Field(default=None, ge=2, description="codebook size of a vq bottleneck")
    groups: int | None = Field(default=None, ge=1, description="codes per latent position of a vq bottleneck")
    levels: Levels | None = Field(default=None, description="levels per channel of an fsq bottleneck, such as 8,5,5")


class DenoiserSettings(Section):
    """The second stage: diffusion in the latent space."""

    net: Net | None = Field(default=None, description="the network")
    width: int | None = Field(default=None, ge=1, description="hidden width")
    depth: int | None = Field(default=None, ge=1, description="number of blocks")
    heads: int | None = Field(default=None, ge=1, description="attention heads")
    embedding_dim: int | None = Field(default=None, ge=1, description="embedding dimension of time and condition")
    swiglu: bool | None = Field(default=None, description="use SwiGLU blocks in the MLP")
    patch: int | None = Field(default=None, ge=1, description="patch size: latent positions per token and side")
    schedule: ScheduleName | None = Field(default=None, description="noise schedule t -> (alpha, sigma)")
    schedule_settings: Numbers | None = Field(default=None, description="parameters of the schedule, such as beta_max")
    predict: Predict | None = Field(default=None, description="parametrisation of the network's output")
    weight: Weight | None = Field(default=None, description="loss weight as a function of log-SNR")
    weight_settings: Numbers | None = Field(default=None, description="parameters of the loss weight, such as gamma")
    time_sampling: TimeSamplingName | None = Field(default=None, description="distribution of training times t")
    time_sampling_settings: Numbers | None = Field(
        default=None, description="parameters of the time distribution, such as mean and std"
    )
    class_dropout: float | None = Field(
        default=None, ge=0, le=1, description="probability of dropping the condition (for classifier-free guidance)"
    )


class StageSettings(Section):
    """Training of one stage."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    max_epochs: int | None = Field(
        default=None, ge=1, description="maximum number of epochs when a budget sets the number of steps"
    )
    batch: int | None = Field(default=None, ge=1, description="batch size")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] | None = Field(default=None, description="optimizer")
    warmup: int | None = Field(default=None, ge=0, description="optimizer steps of linear warm-up")
    decay: float | None = Field(
        default=None, ge=0, le=1, description="final fraction of the steps over which the learning rate decays to zero"
    )
    clip: float | None = Field(default=None, gt=0, description="maximum gradient norm")
    ema: float | None = Field(
        default=None, ge=0, lt=0.28, description="relative width sigma_rel of the weight EMA; 0 keeps the last weights"
    )
    weight_decay: float | None = Field(default=None, ge=0, description="decoupled weight decay")


class TrainSettings(Section):
    """Training of both stages."""

    codec: StageSettings = Field(default_factory=StageSettings, description="the first stage")
    denoiser: StageSettings = Field(default_factory=StageSettings, description="the second stage")
    precision: Precision = Field(default="auto", description="auto: bf16 where it is faster on this machine")
    max_encoded: int | None = Field(
        default=None, ge=1, description="maximum number of training items that are encoded for the second stage"
    )
    early_stopping: bool | None = Field(
        default=None,
        description="stop training the denoiser early when the held-out loss rises",
    )


class SampleSettings(Section):
    """Sampling defaults of the trained model."""

    sampler: SamplerName | None = Field(default=None, description="sampler")
    steps: int | None = Field(default=None, ge=1, description="sampling steps")
    grid: GridName | None = Field(default=None, description="spacing of the time grid")
    guidance: float | None = Field(default=None, ge=0, description="classifier-free guidance weight; 1 disables it")
    autoguidance: float | None = Field(
        default=None, ge=0, description="autoguidance weight; 1 disables it and halves the network evaluations"
    )
    interval: Interval | None = Field(default=None, description="times lo,hi between which guidance is applied")
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="precision of the networks; bf16 only where the device supports it natively"
    )


class Settings(Section):
    """All settings of a run."""

    modality: str | None = Field(default=None, description="kind of data; detected when not given")
    seed: int = Field(default=0, ge=0, description="random seed")
    budget_seconds: float | None = Field(
        default=None, ge=MIN_BUDGET, description="wall-clock budget of the whole fit, in seconds"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="how the source is read")
    codec: CodecSettings = Field(default_factory=CodecSettings, description="the first stage")
    denoiser: DenoiserSettings = Field(default_factory=DenoiserSettings, description="the second stage")
    train: TrainSettings = Field(default_factory=TrainSettings, description="training of both stages")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="sampling defaults")


def setting_keys(section: type[Section] = Settings, prefix: str = "") -> Iterator[str]:
    """All keys that `--set` accepts, such as `train.denoiser.lr`."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from setting_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def setting(settings: Settings, key: str) -> Any:
    """The value of a dotted key, such as `train.denoiser.lr`."""
    return reduce(getattr, key.split("."), settings)


def nearest_key(name: str, names: Sequence[str]) -> str:
    """The valid name most similar to `name`; in dotted keys the last part counts as much as the whole."""

    def similarity(valid: str) -> float:
        whole = difflib.SequenceMatcher(None, name, valid).ratio()
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], valid.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return max(names, key=similarity)


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Validated settings from plain values, such as the plan in a `run.json`.

    Raises:
        UserError: A value is invalid, or a key is unknown or renamed; the message names the valid one.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def apply_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """New settings with each override `a.b=c` applied; `null` leaves a setting to the plan, lists are typed `8,5,5`.

    Raises:
        UserError: An override is not `key=value`, its key is unknown or renamed, or its value is invalid.
    """
    values = settings.model_dump()
    keys = list(setting_keys())
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise UserError(f"'{override}' is not a setting: write key=value, such as train.denoiser.lr=3e-4")
        if key not in keys and key.rpartition(".")[0] not in _open_keys(keys):
            raise UserError(_unknown(key))
        _put(values, key.split("."), None if value == "null" else value)
    return read_settings(values)


def _open_keys(keys: Sequence[str]) -> list[str]:
    """Keys whose value is a table of named numbers; the schedule, weight or time sampling checks the names."""
    return [key for key in keys if key.endswith("_settings")]


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        values[name] = values.get(name) or {}
        values = values[name]
    values[path[-1]] = value


def _unknown(key: str) -> str:
    for old, new in RENAMED.items():
        if key == old or key.startswith(old + "."):
            return f"setting '{key}' is now '{new}{key.removeprefix(old)}'"
    return f"unknown setting '{key}': did you mean '{nearest_key(key, list(setting_keys()))}'?"


def _explain(error: ValidationError) -> str:
    """One line about the first invalid setting."""
    first = error.errors(include_url=False)[0]
    key, value = ".".join(str(part) for part in first["loc"]), first["input"]
    if first["type"] == "extra_forbidden":
        return _unknown(key)
    new = RENAMED_VALUES.get(key, {}).get(str(value))
    if new is not None:
        return f"{key}={value} is now {new}"
    reason = first["msg"].replace("Input should be", "should be").replace("Field required", "one more number is needed")
    return f"setting {key}={value}: {reason}"


_BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_budget(text: str, minimum: float = MIN_BUDGET) -> float:
    """Seconds in a duration such as `10m`, `90s`, `1h30m` or plain `300`.

    Raises:
        UserError: The text is not a duration, or is shorter than `minimum` seconds.
    """
    match = _BUDGET.fullmatch(text.replace(" ", "").lower())
    if match is None or not any(match.groups()):
        raise UserError(f"budget '{text}' cannot be read: write it as 10m, 90s, 1h30m or a number of seconds")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if total < minimum:
        raise UserError(f"budget '{text}' is too small: the minimum is {minimum:.0f} s")
    return total
