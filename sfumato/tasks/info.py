"""Describe a model from the JSON files in its folder and the headers of its weights; nothing is built or loaded."""

import json
import math
from pathlib import Path
from typing import Any, cast

from sfumato.errors import UserError

PART_NAMES = ("codec", "conditioner", "denoiser", "guide")


def info(model: Path | str) -> dict[str, Any]:
    """Describe a model: data, sizes, plan and metrics.

    Args:
        model: Folder of the model.

    Returns:
        A JSON object: `path`, `modality`, `latent_shape`, `labels`, `conditions` if there are others than one label,
        `parameters` and `bytes` per part, and what the run recorded of its data, plan, metrics and versions.

    Raises:
        UserError: There is no model in the folder, or its files cannot be read.
    """
    folder = Path(model)
    if not (folder / "model.json").is_file():
        raise UserError(f"no model in '{model}': there is no model.json (train one with: sfumato fit SOURCE --out RUN)")
    config, run = _read_json(folder / "model.json"), _read_json(folder / "run.json")
    weights = {part: folder / part / "model.safetensors" for part in PART_NAMES}
    present = {part: path for part, path in weights.items() if path.is_file()}
    conditions = _conditions(config, folder)
    described = {
        "path": str(folder),
        "modality": config.get("modality"),
        "latent_shape": _latent_shape(config, folder),
        "labels": _label_names(conditions),
        "conditions": [] if [condition["kind"] for condition in conditions] == ["label"] else conditions,
        "parameters": {part: count_parameters(path) for part, path in present.items()},
        "bytes": {part: path.stat().st_size for part, path in present.items()},
    }
    recorded = {key: run[key] for key in ("distilled", "data", "plan", "metrics", "seed", "versions") if key in run}
    return {key: value for key, value in described.items() if value} | recorded


def count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header alone.

    The file starts with the header's length (8 bytes, little endian) and the header, a JSON object of name to
    `{"dtype", "shape", "data_offsets"}`.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        raise UserError(f"'{path}' is damaged: its header cannot be read", code=1) from None


def _latent_shape(config: dict[str, Any], folder: Path) -> list[int] | None:
    """The latent shape in model.json, else in the codec's configuration."""
    return config.get("latent_shape") or _read_json(folder / "codec" / "config.json").get("latent_shape")


def _conditions(config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Name, kind and classes, or mean and standard deviation, of each condition."""
    if "label_names" in config:  # format 2
        return [{"name": "label", "kind": "label", "classes": config["label_names"]}] if config["label_names"] else []
    settings = _read_json(folder / "conditioner" / "config.json")
    kept = {"kind": "kind", "names": "classes", "mean": "mean", "std": "std"}
    return [
        {"name": name} | {kept[key]: value for key, value in values.items() if key in kept}
        for name, values in settings.items()
    ]


def _label_names(conditions: list[dict[str, Any]]) -> list[str]:
    """Class names of the primary label: of the condition "label", else of the first one with classes."""
    labels: dict[str, list[str]] = {c["name"]: c["classes"] for c in conditions if c["kind"] == "label"}
    return labels.get("label") or [name for names in list(labels.values())[:1] for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"'{path}' is damaged: it is not JSON", code=1) from None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
