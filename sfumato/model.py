"""A model: codec, conditioner and denoiser, built from one folder's JSON and safetensors."""
# torch's and safetensors' own annotations are incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato import __version__
from sfumato.choice import choose
from sfumato.codecs import Codec
from sfumato.conditioners import Conditioner, make_conditioner
from sfumato.core import (
    SAMPLERS,
    Denoiser,
    Jump,
    Noise,
    Step,
    Weaker,
    cfg,
    interval,
    make_schedule,
    prior,
    sample,
    time_grid,
)
from sfumato.core.noise import item_generator
from sfumato.core.sampler import Denoise, Draw, OnStep
from sfumato.data import json_text
from sfumato.errors import UserError
from sfumato.machine import default_device, has_bf16
from sfumato.methods import Methods
from sfumato.modality import Modality, find_modality
from sfumato.nn import make_net
from sfumato.types import Latent, at_once

FORMAT = 1
PARTS = ("codec", "conditioner", "denoiser")
CODED = 256  # items that the codec works on at a time
JUMP = "jump"  # the sampler that only few-step models have


@dataclass
class Card:
    """What `model.json` holds, and the configuration of each part.

    Args:
        modality: Row of the table of modalities.
        shape: Shape of one item.
        mode: How the item's numbers are meant, as JSON can hold it ("L", "RGB", the columns of a table).
        label_names: Name of each class; empty without classes.
        codec: Arguments of the codec's constructor.
        conditioner: Name and arguments of the conditioner.
        denoiser: `net` (name and arguments), `schedule` (name and arguments) and `predict`.
        sample: What `generate` does unless told otherwise: the fields of `Sampling`.
        distilled: Of a few-step model, what it was taught: sampler, steps and guidance of its teacher.
        guide: Where there is a weaker denoiser for autoguidance, the step of training that it is from.
    """

    modality: str
    shape: tuple[int, ...]
    mode: Any
    label_names: list[str]
    codec: dict[str, Any]
    conditioner: dict[str, Any]
    denoiser: dict[str, Any]
    sample: dict[str, Any] = field(default_factory=dict[str, Any])
    distilled: dict[str, Any] | None = None
    guide: int | None = None


@dataclass
class Sampling:
    """How a sampler is run: its name, steps, guidance weight (1 = off), time grid, times (lo, hi) that are guided.

    The name is one of `SAMPLERS`, or `JUMP` for few-step models. `guidance` leads away from the null condition,
    `autoguidance` (1 = off) from the model's weaker denoiser, if it has one.
    Precision (`fp32` or `bf16`) is that of the networks, the decoder included; the sampler's state is always float32.
    """

    sampler: str = "heun"
    steps: int = 15
    guidance: float = 1.0
    grid: str = "uniform"
    interval: Sequence[float] | None = None
    autoguidance: float = 1.0
    precision: str = "fp32"

    @property
    def unguided(self) -> "Sampling":
        """The same without guidance of any kind: where the model's own E[z | z_t] is wanted."""
        return replace(self, guidance=1.0, autoguidance=1.0)


class Model(Methods):
    """Encode, decode and sample; every task works on this, and is a method of it.

    Args:
        card: What to build. Weights are random until loaded or trained.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self.modality: Modality[Any] = find_modality(card.modality)
        self.codec: Codec = self.modality.codec(**card.codec)
        self.conditioner: Conditioner = make_conditioner(**card.conditioner)
        schedule, predict = make_schedule(**card.denoiser["schedule"]), card.denoiser["predict"]
        jumps = card.distilled is not None
        self.denoiser = Denoiser(self._net(), schedule, predict, jumps=jumps, corners=self.codec.corners)
        self.guide = None if card.guide is None else self._blank_guide()
        self.device = torch.device("cpu")
        self.folder: Path | None = None  # where it was loaded from, or trained

    def _net(self) -> nn.Module:
        """A network as the card describes."""
        options = {key: value for key, value in self.card.denoiser["net"].items() if key != "name"}
        name, shape = self.card.denoiser["net"]["name"], self.codec.latent_shape
        return make_net(name, latent_shape=shape, cond_dim=self.conditioner.dim, **options)

    def _blank_guide(self) -> nn.ModuleDict:
        return nn.ModuleDict({"net": self._net(), "conditioner": make_conditioner(**self.card.conditioner)})

    def add_guide(self, weights: dict[str, Tensor], step: int) -> None:
        """Take the averages of `net` and `conditioner` after a step of training for a weaker denoiser."""
        self.card.guide, self.guide = step, self._blank_guide().to(self.device)
        self.guide.load_state_dict(weights)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        guide = {} if self.guide is None else {"guide": self.guide}
        return {"codec": self.codec, "conditioner": self.conditioner, "denoiser": self.denoiser.net, **guide}

    @property
    def sampling(self) -> Sampling:
        """The sampling defaults that `fit` chose."""
        return Sampling(**{key: value for key, value in self.card.sample.items() if value is not None})

    def to(self, device: str | torch.device) -> "Model":
        """Move the weights, and compute there from now on."""
        self.device = torch.device(device)
        for part in self.parts.values():
            part.to(self.device)
        return self

    def eval(self) -> "Model":
        """Freeze the model for use."""
        for part in self.parts.values():
            part.eval().requires_grad_(False)
        return self

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of new items: bfloat16 where `fit` chose it and the device computes in it."""
        if self.sampling.precision == "bf16" and has_bf16(str(self.device)):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (N, *latent_shape), on the CPU, of data (N, ...)."""
        parts = x.split(at_once(self.card.shape, CODED))
        return torch.cat([self.codec.encode(part.to(self.device)).z.cpu() for part in parts])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Data (N, ...), on the CPU, of latents z (N, *latent_shape)."""
        parts = z.split(at_once(self.card.shape, CODED))
        with self.autocast():
            return torch.cat([self.codec.decode(Latent(part.to(self.device))).cpu() for part in parts])

    def autoencode(self, x: Tensor) -> Tensor:
        """Encode and decode: what the codec keeps of data (N, ...)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(
        self,
        items: Sequence[int],
        label: Tensor | None = None,
        *,
        seed: int = 0,
        how: Sampling | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents z (B, *latent_shape) of new items.

        Args:
            items: Their numbers; item i gets the same noise whatever the batch, the device or the processes.
            label: Class numbers (B,), None for no condition.
            seed: Seed of the noise.
            how: Sampler, steps, guidance; default what `fit` chose.
            on_step: Called as (i, t, z, ẑ) after each step.
        """
        how = how or self.sampling
        schedule = self.denoiser.schedule
        draw = self.noise(items, seed)
        denoise = self.denoise(label, len(items), how)
        grid = time_grid(schedule, how.steps, how.grid)
        rule = self.rule(label, len(items), how)
        with self.autocast():
            return sample(denoise, schedule, prior(schedule, draw), grid, rule, draw, on_step)

    def noise(self, items: Sequence[int], seed: int = 0, stream: str = "noise") -> Draw:
        """What draws the noise of these items, (B, *latent_shape) on the model's device, each time anew.

        Args:
            items: Their numbers.
            seed: Seed of the noise.
            stream: "noise" is what new items are made of; another one is independent of it.
        """
        draw = Noise(seed, items, self.codec.latent_shape, stream)
        return lambda: draw().to(self.device)

    def denoise(self, label: Tensor | None, count: int, how: Sampling | None = None) -> Denoise:
        """The denoiser (z, t) -> ẑ of `count` items with conditions and guidance bound: what `core` works on.

        Args:
            label: Class numbers (B,), None for no condition.
            count: How many items.
            how: Its guidance and interval count; default what `fit` chose.
        """
        how = how or self.sampling
        if how.guidance == 1 or label is None:
            return self._denoise(label, count, how.autoguidance)
        weight = interval(how.guidance, *how.interval) if how.interval else how.guidance
        null = self._denoise(None, count, how.autoguidance)
        return cfg(self._denoise(label, count, how.autoguidance), null, weight)

    def rule(self, label: Tensor | None, count: int, how: Sampling | None = None) -> Step:
        """The rule of a sampler's steps for `count` items; that of few-step models is bound to their conditions.

        Args:
            label: Class numbers (B,), None for no condition.
            count: How many items.
            how: Its sampler counts; default the model's own.
        """
        name = (how or self.sampling).sampler
        if name != JUMP or not self.denoiser.jumps:
            return choose(SAMPLERS, "sampler", name)
        return self.jump(label, count)

    def jump(self, label: Tensor | None, count: int) -> Jump:
        """The jumps of a few-step model for `count` items under their labels (B,), None for no condition."""
        cond = self.conditioner(label, count)
        return Jump(lambda z, t: self.denoiser(z, t, cond, s=torch.zeros_like(t)))

    def _denoise(self, label: Tensor | None, count: int, autoguidance: float) -> Denoise:
        """The denoiser with its condition bound and no guidance but that away from the weaker one."""
        cond, weaker = self.conditioner(label, count), None
        if self.guide is not None and autoguidance != 1:
            weaker = Weaker(self.guide["net"], self.guide["conditioner"](label, count), autoguidance)
        return lambda z, t: self.denoiser(z, t, cond, weaker=weaker)

    def labels_for(self, items: Sequence[int], seed: int) -> Tensor | None:
        """Class numbers that go evenly through the classes, shuffled within each round; None without classes.

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
        """The number of the class called `label` (or its number)."""
        names = self.card.label_names
        if not names:
            raise UserError(f"label '{label}': this model was trained without labels")
        number = find_class(names, label)
        if number is not None:
            return number
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UserError(f"label '{label}' is unknown to the model: it knows {shown}")

    def save(self, folder: str | Path) -> None:
        """Write `model.json` and, for each part, `config.json` and `model.safetensors`."""
        folder = Path(folder)
        for name in PARTS:
            save_part(folder / name, self.parts[name], getattr(self.card, name))
        if self.guide is not None:
            (folder / "guide").mkdir(exist_ok=True)
            write_tensors(folder / "guide" / "model.safetensors", self.guide.state_dict())
        facts = {
            "format": FORMAT,
            "sfumato": __version__,
            "modality": self.card.modality,
            "shape": list(self.card.shape),
            "mode": self.card.mode,
            "label_names": self.card.label_names,
            "latent_shape": list(self.codec.latent_shape),
            "sample": self.card.sample,
            **({"distilled": self.card.distilled} if self.card.distilled else {}),
            **({} if self.card.guide is None else {"guide": self.card.guide}),
        }
        write_json(folder / "model.json", facts)


def find_class(names: Sequence[str], label: str) -> int | None:
    """The number of the class called `label`; a number counts where no class is called by one. None if unknown."""
    if label in names:
        return list(names).index(label)
    by_number = label.isdecimal() and int(label) < len(names) and not any(name.isdecimal() for name in names)
    return int(label) if by_number else None


def save_part(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write one part's `config.json` and `model.safetensors`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", module.state_dict())


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """A safetensors file under a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, facts)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """A JSON file under a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a model's folder?") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, it is not a JSON object", code=1)
    return cast("dict[str, Any]", value)


def load(folder: str | Path, device: str | None = None) -> Model:
    """The model in a folder, ready for use.

    Args:
        folder: What `fit --out` wrote.
        device: Where to compute; default the best at hand.

    Raises:
        UserError: There is no model, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file():
        unfinished = (folder / "run.json").is_file()
        hint = "its training has not finished: go on with --resume" if unfinished else "there is no model.json"
        raise UserError(f"no model in '{folder}': {hint}")
    facts = read_json(folder / "model.json")
    if facts.get("format") != FORMAT:
        raise UserError(f"{folder}/model.json: format {facts.get('format')} is not known; update sfumato")
    keys = ("modality", "shape", "mode", "label_names", "sample")
    configs = {name: read_json(folder / name / "config.json") for name in PARTS}
    try:
        chosen: dict[str, Any] = {key: facts[key] for key in keys} | configs | {"shape": tuple(facts["shape"])}
        chosen |= {"distilled": facts.get("distilled"), "guide": facts.get("guide")}
        model = Model(Card(**chosen))
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{folder}: its JSON files do not describe a model ({error!r})", code=1) from None
    for name, module in model.parts.items():
        load_part(folder / name, module)
    model.folder = folder
    return model.eval().to(device or default_device())


def load_part(folder: Path, module: nn.Module) -> None:
    """Read one part's weights; every name must be there, and no other."""
    path = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the model cannot be loaded", code=1) from None
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged or of another model ({why})", code=1) from None
