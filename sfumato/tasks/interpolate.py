"""Interpolate between two items."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.edit import INVERSION_STEPS, masked_denoiser
from sfumato.tasks.outputs import ITEMS_PER_SHEET, Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core import Denoise
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.types import Items, Latent, Progress, Raw

    Curve = Callable[[Tensor], Latent]  # weights of the last item (B,) -> latents (B, ...)


def interpolate(
    model: "Path | str | Model",
    a: str | Path = "0",
    b: str | Path = "1",
    *,
    n: int = 9,
    out: Path | None = None,
    sheet: Path | None = None,
    animation: Path | None = None,
    label_a: str | Sequence[str] | None = None,
    label_b: str | Sequence[str] | None = None,
    path: Literal["flow", "latent"] = "flow",
    steps: int | None = None,
    guidance: float | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 250,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Interpolate between two items, with realistic items in between.

    A and B are each a file, or the number of an item that generate makes with this seed. Files are inverted to their
    noise along the deterministic flow. The noise is interpolated on a great circle, the condition linearly from A's to
    B's. A generated item is reproduced only approximately if the other end is a file or if the model's sampler is
    stochastic or jumps: the flow then takes its own steps, without autoguidance.

    Args:
        model: Folder of the model.
        a: First item: a file, or the number of a generated item.
        b: Last item, likewise.
        n: Number of items, both ends included.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of the first 100 items (default: OUT-sheet.png).
        animation: Animation of the items, a .gif or .webp file.
        label_a: Class of A, or name=value of a condition; may be given several times (default: as generated; none for a
            file).
        label_b: Class of B, likewise.
        path: Interpolate noise along the flow, or latents directly, where only the codec keeps items realistic.
        steps: Sampler steps (default: chosen by fit; 50 steps of heun if a file is inverted).
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        overrides: Override how a file is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The items and a row for each: the share of B, `label` and other conditions that both ends share, settings.

    Raises:
        UserError: The model, file or label does not exist; a file does not fit the model; there are fewer than two
            items, or the ends have several lengths; or the output folder is not empty or cannot be written.

    References:
        Song et al., DDIM, https://arxiv.org/abs/2010.02502 (section 5.3).
    """
    import time

    import torch

    from sfumato.distributed import is_main
    from sfumato.modalities.base import Animatable
    from sfumato.registry import choose
    from sfumato.tasks.inputs import check_counts, open_model, require
    from sfumato.tasks.outputs import check_outputs, write_items

    start = time.perf_counter()
    check_counts(minimum=2, n=n)
    check_counts(steps=steps, batch=batch)
    make_curve = choose(PATHS, "path", path)
    loaded = open_model(model, device)
    animate = None if animation is None else require(loaded, Animatable, "--animation").animation(Path(animation))
    files = [end for end in (a, b) if not _is_number(end)]
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=files, animation=animation)
    first, last = (_end(model, loaded, *end, overrides, seed) for end in ((a, label_a), (b, label_b)))
    sampling = _sampling(loaded, path == "flow" and (first.x is not None or last.x is not None), steps, guidance)
    weights = torch.linspace(0, 1, n)
    items = _items(loaded, make_curve(loaded, first, last, sampling, seed), weights, batch, progress)
    settings = {"path": path, "steps": sampling.steps, "guidance": sampling.guidance}
    settings |= {"autoguidance": sampling.autoguidance, "seed": seed}
    metadata = _metadata(loaded, first, last, [float(weight) for weight in weights], settings)
    write_items(loaded, items, metadata, out, sheet, overwrite, items[:ITEMS_PER_SHEET])
    if animate is not None and is_main():
        animate(items)
    return Result(items, metadata, time.perf_counter() - start, settings)


def _sampling(model: "Model", inverted: bool, steps: int | None, guidance: float | None) -> "Sampling":
    """The sampling of the flow; if no file is inverted, the ends are what `generate` makes."""
    from sfumato.core.sampler import SAMPLERS

    default = SAMPLERS.get(model.sampling.sampler)  # none for few-step models: a jump is bound to one condition
    sampler = "heun" if inverted or default is None or default.stochastic else None
    steps = steps or (INVERSION_STEPS if inverted else None)
    return model.choose_sampling(steps, guidance, sampler, 1.0 if inverted else None)


@dataclass
class _End:
    """An end of the curve.

    Args:
        name: The file, or the number of a generated item.
        x: The one item of the file; None for a generated item.
        raw: Its conditions, one row.
    """

    name: str
    x: "Items | None"
    raw: "Raw"

    @property
    def conditions(self) -> dict[str, float | str | None]:
        """Its conditions as Python values, class numbers as floats."""
        rows = self.raw.values.items()
        return {name: row[0] if isinstance(row, Sequence) else float(row[0]) for name, row in rows}

    def denoise(self, model: "Model", count: int, sampling: "Sampling", mask: "Tensor | None") -> "Denoise":
        """The denoiser of `count` items under this end's conditions, and with the mask of their tokens."""
        return masked_denoiser(model.denoise(self.raw.select([0] * count), count, sampling, mask), mask)


def _is_number(end: str | Path) -> bool:
    """Whether an end is the number of a generated item."""
    return str(end).isdecimal() and not Path(end).is_file()


def _end(
    model: "Path | str | Model",
    loaded: "Model",
    end: str | Path,
    label: str | Sequence[str] | None,
    overrides: Sequence[str],
    seed: int,
) -> _End:
    """An end from what the user typed."""
    from sfumato.conditioners import constant_conditions, parse_conditions
    from sfumato.errors import UserError
    from sfumato.sampling import new_conditions
    from sfumato.tasks.inputs import check_complete, read_items

    name, given = str(end), parse_conditions(loaded.conditioner, label)
    if _is_number(end):
        return _End(name, None, new_conditions(loaded.conditioner, [int(name)], seed, given))
    originals = read_items(model, loaded, end, overrides, skip_bad=False)
    if len(originals) != 1:
        found = f"holds {len(originals)} items"
        raise UserError(f"{name}: {found}; give a file with one item, or the number of a generated item", code=1)
    check_complete(loaded, originals)
    return _End(name, originals.take([0]), constant_conditions(loaded.conditioner, given, 1))


def _flow(model: "Model", a: _End, b: _End, sampling: "Sampling", seed: int) -> "Curve":
    """Slerp between the noises of both ends, integrated to data under interpolated conditions."""
    from sfumato.core import cfg, initial_noise, integrate_to_data, inversion_grid, invert, slerp, time_grid
    from sfumato.types import Latent

    schedule = model.denoiser.schedule
    generated = a.x is None and b.x is None
    grid = time_grid(schedule, sampling.steps, sampling.grid) if generated else inversion_grid(schedule, sampling.steps)
    levels = schedule.levels(grid)

    def noise(end: _End) -> "Latent":
        if end.x is None:
            mask = model.draw_mask([int(end.name)], seed)
            eps = model.noise([int(end.name)], seed, mask=mask)
            return Latent(initial_noise(levels[0], eps), mask).to(model.device)
        latent = model.encode(end.x).to(model.device)
        return Latent(invert(end.denoise(model, 1, sampling, latent.mask), levels, latent.z), latent.mask)

    first, last, mask = _join(noise(a), noise(b))

    def curve(weight: "Tensor") -> "Latent":
        masks = _repeat(mask, len(weight))
        denoise = b.denoise(model, len(weight), sampling, masks)
        if a.conditions != b.conditions:
            denoise = cfg(denoise, a.denoise(model, len(weight), sampling, masks), weight)
        return Latent(integrate_to_data(denoise, levels, slerp(first, last, weight), sampling.sampler), masks)

    return curve


def _latent(model: "Model", a: _End, b: _End, sampling: "Sampling", seed: int) -> "Curve":
    """Slerp between the latents of both ends."""
    from sfumato.core import slerp
    from sfumato.types import Latent

    def latent(end: _End) -> "Latent":
        if end.x is not None:
            return model.encode(end.x)
        return model.sample([int(end.name)], end.raw, seed=seed, sampling=sampling).to("cpu")

    first, last, mask = _join(latent(a), latent(b))
    return lambda weight: Latent(slerp(first, last, weight), _repeat(mask, len(weight)))


def _join(a: "Latent", b: "Latent") -> "tuple[Tensor, Tensor, Tensor | None]":
    """The latents of both ends, and the mask (1, N) of their tokens, which must be the same."""
    import torch

    from sfumato.errors import UserError
    from sfumato.types import Latent

    ends = Latent.concat([a, b])
    if ends.mask is None:
        return ends.z[0], ends.z[1], None
    if not torch.equal(ends.mask[0], ends.mask[1]):
        raise UserError("interpolate: not supported between items of different lengths")
    return ends.z[0], ends.z[1], ends.mask[:1]


def _repeat(mask: "Tensor | None", count: int) -> "Tensor | None":
    """The mask (count, N) of items that all have the tokens of the mask (1, N)."""
    return None if mask is None else mask.expand(count, -1)


PATHS = {"flow": _flow, "latent": _latent}


def _items(model: "Model", curve: "Curve", weights: "Tensor", batch: int, progress: "Progress | None") -> "Items":
    """The items (N, ...) on the curve, batch by batch."""
    import torch

    from sfumato.tasks.inputs import report_progress
    from sfumato.types import Items

    parts: list[Items] = []
    for first in range(0, len(weights), batch):
        part = weights[first : first + batch]
        with torch.no_grad():
            parts.append(model.decode(curve(part)))
        report_progress(progress, "interpolate", first + len(part), len(weights))
    return Items.concat(parts)


def _metadata(model: "Model", a: _End, b: _End, weights: list[float], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per item: the share of B, and the conditions that both ends share."""
    from sfumato.tasks.conditions import condition_metadata

    shared = [name for name, value in a.conditions.items() if b.conditions.get(name) == value]
    (row,) = condition_metadata(model, a.raw.only(shared), 1)
    return [{**row, "a": a.name, "b": b.name, "share": round(weight, 6), **settings} for weight in weights]
