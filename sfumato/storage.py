"""The files of a model folder: JSON and safetensors, written atomically."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato import __version__
from sfumato.data.output import json_text
from sfumato.errors import UserError

FORMAT_VERSION = 3  # version of `model.json`
CONFIGURED_PARTS = ("codec", "conditioner", "denoiser")  # parts with a `config.json` of their own


@dataclass
class ModelConfig:
    """The contents of `model.json` and the configuration of each part.

    Args:
        modality: Name of the modality.
        shape: Shape of an item.
        spec: What an item's numbers mean, JSON-compatible ("L", "RGB", the columns of a table).
        codec: Constructor arguments of the codec.
        conditioner: Constructor arguments of each condition, by its name.
        denoiser: `net` (name and arguments), `schedule` (name and arguments) and `predict`.
        sample: Sampling defaults: the fields of `Sampling`.
        distilled: The teacher's sampler, steps, grid, guidance and autoguidance if this is a few-step model, else None.
        guide: Training step of the guide (a weaker denoiser, for autoguidance); None without one.
    """

    modality: str
    shape: tuple[int, ...]
    spec: Any
    codec: dict[str, Any]
    conditioner: dict[str, dict[str, Any]]
    denoiser: dict[str, Any]
    sample: dict[str, Any] = field(default_factory=dict[str, Any])
    distilled: dict[str, Any] | None = None
    guide: int | None = None

    @property
    def label_names(self) -> list[str]:
        """Class names of the primary label: of the condition "label", else of the first one with classes."""
        labels = {name: values["names"] for name, values in self.conditioner.items() if values["kind"] == "label"}
        return list(labels.get("label") or next(iter(labels.values()), []))


def write_config(folder: Path, config: ModelConfig, latent_shape: tuple[int, ...]) -> None:
    """Write `model.json`; the configuration of each part is in its own folder."""
    metadata = {
        "format": FORMAT_VERSION,
        "sfumato": __version__,
        "modality": config.modality,
        "shape": list(config.shape),
        "spec": config.spec,
        "latent_shape": list(latent_shape),
        "sample": config.sample,
        **({"distilled": config.distilled} if config.distilled else {}),
        **({} if config.guide is None else {"guide": config.guide}),
    }
    write_json(folder / "model.json", metadata)


def read_config(folder: Path) -> tuple[ModelConfig, Callable[[str], str]]:
    """The configuration of the model in a folder, and what its tensors are called now.

    Raises:
        UserError: There is no model, its files are damaged, or another version of sfumato wrote it.
    """
    if not (folder / "model.json").is_file():
        unfinished = (folder / "run.json").is_file()
        hint = "its training has not finished: continue it with --resume" if unfinished else "there is no model.json"
        raise UserError(f"no model in '{folder}': {hint}")
    metadata = read_json(folder / "model.json")
    version = metadata.get("format")
    if version == 1:
        raise UserError(f"{folder}: this model was written by an older sfumato and must be trained again")
    if version not in (2, FORMAT_VERSION):
        raise UserError(f"{folder}/model.json: format {version} is unknown; update sfumato")
    configs = {name: read_json(folder / name / "config.json") for name in CONFIGURED_PARTS}
    try:
        if version == 2:
            configs["conditioner"] = _named_condition(configs["conditioner"], metadata["label_names"])
        fields: dict[str, Any] = {key: metadata[key] for key in ("modality", "spec", "sample")} | configs
        fields |= {key: metadata.get(key) for key in ("distilled", "guide")}
        config = ModelConfig(shape=tuple(metadata["shape"]), **fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its JSON files do not describe a model ({error!r})", code=1) from None
    return config, _new_name if version == 2 else lambda name: name


def _named_condition(conditioner: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    """The conditioner of format 2, which had one condition without a name or none."""
    if conditioner["name"] == "none":
        return {}
    settings = {key: value for key, value in conditioner.items() if key in ("dim", "dropout")}
    return {"label": {"kind": "label", "names": label_names, **settings}}


def _new_name(name: str) -> str:
    """The name of a tensor of format 2: the embeddings of classes, and the network of the guide."""
    name = name.replace("table.weight", "conditions.label.table.weight")
    return f"denoiser.{name}" if name.startswith("net.") else name


def save_part(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` of one part of a model, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", module.state_dict())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, it is not a JSON object", code=1)
    return cast("dict[str, Any]", value)


def load_part(folder: Path, module: nn.Module, rename: Callable[[str], str] = lambda name: name) -> None:
    """Load the weights of one part of a model; their names, renamed, must match exactly.

    Raises:
        UserError: The file is missing, damaged or from another model.
    """
    path = folder / "model.safetensors"
    try:
        module.load_state_dict({rename(name): tensor for name, tensor in load_file(path).items()})
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the model cannot be loaded", code=1) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged or from another model ({reason})", code=1) from None
