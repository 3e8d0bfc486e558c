"""A model: codec, conditioner and denoiser, built from one folder's JSON and safetensors."""

# torch's and safetensors' own annotations are incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import __version__
from sfumato.codecs import Codec
from sfumato.conditioners import Conditioner, make_conditioner
from sfumato.core import (
    SAMPLERS,
    ConsistencyStep,
    Denoiser,
    GuideTerm,
    Noise,
    Step,
    cfg,
    initial_noise,
    interval,
    make_schedule,
    sample,
    time_grid,
)
from sfumato.core.rng import item_generator
from sfumato.core.sampler import Denoise, NoiseFn, StepCallback
from sfumato.errors import UserError
from sfumato.hardware import default_device, has_bf16
from sfumato.modalities import find_modality
from sfumato.modalities.base import Modality
from sfumato.nn import make_net
from sfumato.registry import choose
from sfumato.sampling import JUMP, Sampling, choose_sampling
from sfumato.storage import load_part, read_json, save_part, write_json, write_tensors
from sfumato.types import Latent, batch_limit

FORMAT_VERSION = 2  # version of `model.json`; in version 1, `spec` was called `mode`
PARTS = ("codec", "conditioner", "denoiser")
CODEC_BATCH = 256  # items per call of the codec; fewer where items are large


@dataclass
class ModelConfig:
    """The contents of `model.json` and the configuration of each part.

    Args:
        modality: Name of the modality.
        shape: Shape of an item.
        spec: What an item's numbers mean, JSON-compatible ("L", "RGB", the columns of a table).
        label_names: Class names; empty without classes.
        codec: Constructor arguments of the codec.
        conditioner: Name and constructor arguments of the conditioner.
        denoiser: `net` (name and arguments), `schedule` (name and arguments) and `predict`.
        sample: Sampling defaults: the fields of `Sampling`.
        distilled: The teacher's sampler, steps, grid, guidance and autoguidance if this is a few-step model, else None.
        guide: Training step of the guide (a weaker denoiser, for autoguidance); None without one.
    """

    modality: str
    shape: tuple[int, ...]
    spec: Any
    label_names: list[str]
    codec: dict[str, Any]
    conditioner: dict[str, Any]
    denoiser: dict[str, Any]
    sample: dict[str, Any] = field(default_factory=dict[str, Any])
    distilled: dict[str, Any] | None = None
    guide: int | None = None


class Model:
    """Codec, conditioner and denoiser: encodes, decodes and samples. Every task is a method of it.

    Args:
        config: Configuration of the parts. Weights are random until loaded or trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.modality: Modality[Any] = find_modality(config.modality)
        self.codec: Codec = self.modality.codec_class(**config.codec)
        self.conditioner: Conditioner = make_conditioner(**config.conditioner)
        schedule, predict = make_schedule(**config.denoiser["schedule"]), config.denoiser["predict"]
        two_times = config.distilled is not None
        self.denoiser = Denoiser(
            self._net(), schedule, predict, two_times=two_times, layout=self.codec.categorical_layout
        )
        self.guide = None if config.guide is None else self._new_guide()
        self.device = torch.device("cpu")
        self.folder: Path | None = None  # the folder it was loaded from or trained in

    def _net(self) -> nn.Module:
        """A new network, as configured."""
        options = {key: value for key, value in self.config.denoiser["net"].items() if key != "name"}
        name, shape = self.config.denoiser["net"]["name"], self.codec.latent_shape
        return make_net(name, latent_shape=shape, cond_dim=self.conditioner.dim, **options)

    def _new_guide(self) -> nn.ModuleDict:
        return nn.ModuleDict({"net": self._net(), "conditioner": make_conditioner(**self.config.conditioner)})

    def add_guide(self, weights: dict[str, Tensor], step: int) -> None:
        """Add a guide: the averaged weights of `net` and `conditioner` after training step `step`."""
        self.config.guide, self.guide = step, self._new_guide().to(self.device)
        self.guide.load_state_dict(weights)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by the names of their folders."""
        guide = {} if self.guide is None else {"guide": self.guide}
        return {"codec": self.codec, "conditioner": self.conditioner, "denoiser": self.denoiser.net, **guide}

    @property
    def sampling(self) -> Sampling:
        """The sampling defaults chosen by `fit`."""
        return Sampling(**{key: value for key, value in self.config.sample.items() if value is not None})

    def choose_sampling(
        self,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
        autoguidance: float | None = 1.0,
    ) -> Sampling:
        """The sampling defaults, overridden by the arguments that are not None, validated.

        Autoguidance is off by default, so that edited items stay as likely as they were. For new items, pass None to
        use the default chosen by `fit`.
        """
        return choose_sampling(
            self.sampling,
            self.config.distilled,
            self.guide is not None,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            autoguidance=autoguidance,
        )

    def to(self, device: str | torch.device) -> "Model":
        """Move the model to a device, in place."""
        self.device = torch.device(device)
        for part in self.parts.values():
            part.to(self.device)
        return self

    def eval(self) -> "Model":
        """Evaluation mode, with all parameters frozen."""
        for part in self.parts.values():
            part.eval().requires_grad_(False)
        return self

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast context of sampling: bfloat16 where `fit` chose it and the device supports it natively."""
        if self.sampling.precision == "bf16" and has_bf16(str(self.device)):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Encode data x (N, ...) to latents (N, *latent_shape), on the CPU."""
        parts = x.split(batch_limit(self.config.shape, CODEC_BATCH))
        return torch.cat([self.codec.encode(part.to(self.device)).z.cpu() for part in parts])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents z (N, *latent_shape) to data (N, ...), on the CPU."""
        parts = z.split(batch_limit(self.config.shape, CODEC_BATCH))
        with self.autocast():
            return torch.cat([self.codec.decode(Latent(part.to(self.device))).cpu() for part in parts])

    def autoencode(self, x: Tensor) -> Tensor:
        """Encode and decode data x (N, ...): its reconstruction."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(
        self,
        items: Sequence[int],
        label: Tensor | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Sample latents z (B, *latent_shape) of new items.

        Args:
            items: Item numbers (B,); item i gets the same noise whatever the batch, the device or the processes.
            label: Class numbers (B,); None for the null condition.
            seed: Seed of the noise.
            sampling: Sampler, steps and guidance (default: those chosen by `fit`).
            on_step: Called as (i, t, z, ẑ) after each step.
        """
        sampling = sampling or self.sampling
        schedule = self.denoiser.schedule
        noise = self.noise(items, seed)
        denoise = self.denoise(label, len(items), sampling)
        grid = time_grid(schedule, sampling.steps, sampling.grid)
        rule = self.step_rule(label, len(items), sampling)
        with self.autocast():
            return sample(denoise, schedule, initial_noise(schedule, noise), grid, rule, noise, on_step)

    def noise(self, items: Sequence[int], seed: int = 0, stream: str = "noise") -> NoiseFn:
        """The noise source of items: each call draws new noise (B, *latent_shape) on the model's device.

        Args:
            items: Item numbers (B,).
            seed: Seed of the noise.
            stream: Name of the random stream; "noise" is the one of new items, others are independent of it.
        """
        noise = Noise(seed, items, self.codec.latent_shape, stream)
        return lambda: noise().to(self.device)

    def denoise(self, label: Tensor | None, count: int, sampling: Sampling | None = None) -> Denoise:
        """The denoiser (z, t) -> ẑ of a batch, with its condition and guidance bound.

        Args:
            label: Class numbers (B,); None for the null condition.
            count: Batch size B.
            sampling: Its guidance, interval and autoguidance apply (default: those chosen by `fit`).
        """
        sampling = sampling or self.sampling
        if sampling.guidance == 1 or label is None:
            return self._denoise(label, count, sampling.autoguidance)
        weight = interval(sampling.guidance, *sampling.interval) if sampling.interval else sampling.guidance
        null = self._denoise(None, count, sampling.autoguidance)
        return cfg(self._denoise(label, count, sampling.autoguidance), null, weight)

    def step_rule(self, label: Tensor | None, count: int, sampling: Sampling | None = None) -> Step:
        """The step rule of a sampler for a batch; that of a few-step model has the condition bound.

        Args:
            label: Class numbers (B,); None for the null condition.
            count: Batch size B.
            sampling: Its sampler applies (default: the one chosen by `fit`).
        """
        name = (sampling or self.sampling).sampler
        if name != JUMP or not self.denoiser.two_times:
            return choose(SAMPLERS, "sampler", name)
        return self.consistency_step(label, count)

    def consistency_step(self, label: Tensor | None, count: int) -> ConsistencyStep:
        """The consistency step of a few-step model for a batch of `count` items with labels (B,) or None."""
        cond = self.conditioner(label, count)
        return ConsistencyStep(lambda z, t: self.denoiser(z, t, cond, s=torch.zeros_like(t)))

    def _denoise(self, label: Tensor | None, count: int, autoguidance: float) -> Denoise:
        """The denoiser with its condition bound, with autoguidance and without classifier-free guidance."""
        cond, guide = self.conditioner(label, count), None
        if self.guide is not None and autoguidance != 1:
            guide = GuideTerm(self.guide["net"], self.guide["conditioner"](label, count), autoguidance)
        return lambda z, t: self.denoiser(z, t, cond, guide=guide)

    def balanced_labels(self, items: Sequence[int], seed: int) -> Tensor | None:
        """Class-balanced labels (B,): every class once per round, in random order; None without classes.

        An item's class depends on the seed and its number alone.
        """
        classes = self.conditioner.classes
        if not classes:
            return None
        rounds = {
            k: torch.randperm(classes, generator=item_generator(seed, k, "label"))
            for k in {item // classes for item in items}
        }
        return torch.tensor([int(rounds[item // classes][item % classes]) for item in items])

    def class_number(self, label: str) -> int:
        """The number of the class named (or numbered) `label`."""
        names = self.config.label_names
        if not names:
            raise UserError(f"label '{label}': this model was trained without labels")
        number = find_class(names, label)
        if number is not None:
            return number
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UserError(f"label '{label}' is unknown to the model: it knows {shown}")

    def save(self, folder: str | Path) -> None:
        """Write `model.json`, and `config.json` and `model.safetensors` of each part."""
        folder = Path(folder)
        for name in PARTS:
            save_part(folder / name, self.parts[name], getattr(self.config, name))
        if self.guide is not None:
            (folder / "guide").mkdir(exist_ok=True)
            write_tensors(folder / "guide" / "model.safetensors", self.guide.state_dict())
        metadata = {
            "format": FORMAT_VERSION,
            "sfumato": __version__,
            "modality": self.config.modality,
            "shape": list(self.config.shape),
            "spec": self.config.spec,
            "label_names": self.config.label_names,
            "latent_shape": list(self.codec.latent_shape),
            "sample": self.config.sample,
            **({"distilled": self.config.distilled} if self.config.distilled else {}),
            **({} if self.config.guide is None else {"guide": self.config.guide}),
        }
        write_json(folder / "model.json", metadata)

    def generate(self, n: int = 64, **settings: Any) -> Any:
        """Generate new items; see `sfumato.generate`."""
        return self._task("generate", n=n, **settings)

    def interpolate(self, a: Any, b: Any, **settings: Any) -> Any:
        """Interpolate between two items; see `sfumato.interpolate`."""
        return self._task("interpolate", a, b, **settings)

    def reconstruct(self, source: Any, **settings: Any) -> Any:
        """Encode and decode items; see `sfumato.reconstruct`."""
        return self._task("reconstruct", source, **settings)

    def edit(self, source: Any, **settings: Any) -> Any:
        """Edit items, for instance under a new label; see `sfumato.edit`."""
        return self._task("edit", source, **settings)

    def inpaint(self, source: Any, **settings: Any) -> Any:
        """Inpaint masked parts of items; see `sfumato.inpaint`."""
        return self._task("inpaint", source, **settings)

    def outpaint(self, source: Any, **settings: Any) -> Any:
        """Extend images beyond their borders; see `sfumato.outpaint`."""
        return self._task("outpaint", source, **settings)

    def transfer(self, source: Any, label: str, **settings: Any) -> Any:
        """Transfer items to another class; see `sfumato.transfer`."""
        return self._task("transfer", source, label=label, **settings)

    def augment(self, source: Any, **settings: Any) -> Any:
        """Enlarge and balance a labelled data set; see `sfumato.augment`."""
        return self._task("augment", source, **settings)

    def evaluate(self, source: Any, **settings: Any) -> Any:
        """Evaluate the model; see `sfumato.evaluate`."""
        return self._task("evaluate", source, **settings)

    def _task(self, name: str, *args: Any, **settings: Any) -> Any:
        import sfumato

        return getattr(sfumato, name)(self, *args, **settings)


def find_class(names: Sequence[str], label: str) -> int | None:
    """The number of the class named `label`, or numbered `label` if no class name is a number; None if unknown."""
    if label in names:
        return list(names).index(label)
    by_number = label.isdecimal() and int(label) < len(names) and not any(name.isdecimal() for name in names)
    return int(label) if by_number else None


def load(folder: str | Path, device: str | None = None) -> Model:
    """Load the model in a folder.

    Args:
        folder: A run folder of `fit` or `distill`.
        device: Where to compute (default: the best available device).

    Raises:
        UserError: There is no model, its files are damaged, or another version of sfumato wrote it.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file():
        unfinished = (folder / "run.json").is_file()
        hint = "its training has not finished: continue it with --resume" if unfinished else "there is no model.json"
        raise UserError(f"no model in '{folder}': {hint}")
    metadata = read_json(folder / "model.json")
    check_format(metadata.get("format"), folder)
    keys = ("modality", "shape", "spec", "label_names", "sample")
    configs = {name: read_json(folder / name / "config.json") for name in PARTS}
    try:
        fields: dict[str, Any] = {key: metadata[key] for key in keys} | configs | {"shape": tuple(metadata["shape"])}
        fields |= {"distilled": metadata.get("distilled"), "guide": metadata.get("guide")}
        model = Model(ModelConfig(**fields))
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{folder}: its JSON files do not describe a model ({error!r})", code=1) from None
    for name, module in model.parts.items():
        load_part(folder / name, module)
    model.folder = folder
    return model.eval().to(device or default_device())


def check_format(number: object, folder: Path) -> None:
    """Refuse a `model.json` of another format than `FORMAT`."""
    if number == 1:
        raise UserError(f"{folder}: this model was written by an older sfumato and must be trained again")
    if number != FORMAT_VERSION:
        raise UserError(f"{folder}/model.json: format {number} is unknown; update sfumato")
