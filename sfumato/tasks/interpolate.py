"""The way from one item to another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.generate import Result, sampling

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core.guidance import Denoise
    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress

    Way = Callable[[Tensor], Tensor]

INVERT_STEPS = 50


def interpolate(
    model: "Path | str | Model",
    a: str | Path = "0",
    b: str | Path = "1",
    *,
    n: int = 9,
    out: Path | None = None,
    sheet: Path | None = None,
    animation: Path | None = None,
    label_a: str | None = None,
    label_b: str | None = None,
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
    """Go from one item to another, in steps that all look like data.

    Each end is a file, or the number of a new item: the one that generate makes with that number and seed. Files are
    inverted to their noise along the deterministic flow; the way leads over a great circle of noise, and meanwhile the
    condition of A gives way to that of B. A new item is only about the one of generate where generate's sampler draws
    noise or jumps, and beside a file: the flow then takes steps of its own, and no autoguidance.

    Args:
        model: Folder of the model.
        a: Where to begin: a file, or the number of a new item.
        b: Where to end.
        n: How many items, both ends included.
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows the first 100 of them side by side (default: OUT-sheet.png).
        animation: File that shows them one after the other, .gif or .webp.
        label_a: Class of A (default: of a new item, the one generate gives it; of a file, none).
        label_b: Class of B.
        path: Through noise along the flow, or through the latent space directly, where only the codec sees to it that
            things between look like data.
        steps: Steps of the sampler (default: what fit chose; 50 of heun where a file is inverted).
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        overrides: Fix how a file is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise of new items.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, the sheet and the animation.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The items and a row for each: the share of B, `label` where both ends have the same, the settings.

    Raises:
        UserError: No such model, file or label; a file has another item than the model's; fewer than two items; the
            folder is not empty or cannot be written.

    References:
        Song et al., DDIM, https://arxiv.org/abs/2010.02502 (section 5.3).
    """
    import time

    import torch

    from sfumato.choice import choose
    from sfumato.core.sampler import SAMPLERS
    from sfumato.data import save_picture
    from sfumato.tasks.common import check_counts, is_main, open_model
    from sfumato.tasks.inputs import offered
    from sfumato.tasks.places import check_places

    begun = time.perf_counter()
    check_counts(least=2, n=n)
    check_counts(steps=steps, batch=batch)
    way = choose(PATHS, "path", path)
    loaded = open_model(model, device)
    animate = None if animation is None else offered(loaded, loaded.modality.animation, "--animation")(Path(animation))
    files = [end for end in (a, b) if not _is_number(end)]
    sheet = check_places(loaded, out, sheet, overwrite, sources=files, animation=animation)
    begin, end = (_end(model, loaded, *given, overrides, seed) for given in ((a, label_a), (b, label_b)))
    inverted = path == "flow" and (begin.x is not None or end.x is not None)
    own = SAMPLERS.get(loaded.sampling.sampler)  # none of a few-step model: a jump is bound to one condition
    sampler = "heun" if inverted or own is None or own.stochastic else None
    # new items at the ends are what generate makes of them
    autoguidance = 1.0 if inverted else None
    how = sampling(loaded, steps or (INVERT_STEPS if inverted else None), guidance, sampler, autoguidance)
    shares = torch.linspace(0, 1, n)
    items = _items(loaded, way(loaded, begin, end, how, seed), shares, batch, progress)
    facts = {"path": path, "steps": how.steps, "guidance": how.guidance, "autoguidance": how.autoguidance, "seed": seed}
    rows = _rows(loaded, begin, end, [float(share) for share in shares], facts)
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.sheet(items[:100], loaded.card.mode, None), sheet)
    if animate is not None and is_main():
        animate(items)
    return Result(items, rows, time.perf_counter() - begun, facts)


@dataclass
class _End:
    """One end of the way: an item (1, ...) of a file, or else the number of a new one; and its class number."""

    name: str
    x: "Tensor | None"
    label: int | None

    def denoise(self, model: "Model", count: int, how: "Sampling") -> "Denoise":
        """The denoiser of `count` items under the condition at this end."""
        import torch

        return model.denoise(None if self.label is None else torch.full((count,), self.label), count, how)


def _is_number(end: str | Path) -> bool:
    """Whether an end is the number of a new item."""
    return str(end).isdecimal() and not Path(end).is_file()


def _end(
    model: "Path | str | Model",
    loaded: "Model",
    given: str | Path,
    label: str | None,
    overrides: Sequence[str],
    seed: int,
) -> _End:
    """An end as the user named it."""
    from sfumato.errors import UserError
    from sfumato.tasks.inputs import check_whole, read_inputs

    name, number = str(given), None if label is None else loaded.class_number(label)
    if _is_number(given):
        labels = loaded.labels_for([int(name)], seed) if number is None else [number]
        return _End(name, None, None if labels is None else int(labels[0]))
    inputs = read_inputs(model, loaded, given, overrides, skip_bad=False)
    if len(inputs) != 1:
        raise UserError(f"{name}: holds {len(inputs)} items; name the file of one, or the number of a new one", code=1)
    check_whole(loaded, inputs)
    return _End(name, inputs.take([0]), number)


def _flow(model: "Model", a: _End, b: _End, how: "Sampling", seed: int) -> "Way":
    """Through noise: slerp between the ends' noises, and the one condition giving way to the other."""
    from sfumato.core import cfg, flow_grid, invert, prior, regenerate, slerp, time_grid

    schedule = model.denoiser.schedule
    new = a.x is None and b.x is None
    grid = time_grid(schedule, how.steps, how.grid) if new else flow_grid(schedule, how.steps)

    def noise(end: _End) -> "Tensor":
        if end.x is None:
            return prior(schedule, model.noise([int(end.name)], seed))[0]
        return invert(end.denoise(model, 1, how), schedule, model.encode(end.x).to(model.device), grid)[0]

    ends = noise(a), noise(b)

    def along(share: "Tensor") -> "Tensor":
        denoise = b.denoise(model, len(share), how)
        if a.label != b.label:
            denoise = cfg(denoise, a.denoise(model, len(share), how), share)
        return regenerate(denoise, schedule, slerp(*ends, share), grid, how.sampler)

    return along


def _latent(model: "Model", a: _End, b: _End, how: "Sampling", seed: int) -> "Way":
    """Through the latent space: slerp between the ends' latents."""
    import torch

    from sfumato.core import slerp

    def latent(end: _End) -> "Tensor":
        if end.x is not None:
            return model.encode(end.x)[0]
        label = None if end.label is None else torch.tensor([end.label])
        return model.sample([int(end.name)], label, seed=seed, how=how)[0]

    ends = latent(a).cpu(), latent(b).cpu()
    return lambda share: slerp(*ends, share)


PATHS = {"flow": _flow, "latent": _latent}


def _items(model: "Model", along: "Way", shares: "Tensor", batch: int, progress: "Progress | None") -> "Tensor":
    """The items (N, ...) on the way, batch by batch."""
    import torch

    from sfumato.tasks.common import tell

    parts: list[Tensor] = []
    for first in range(0, len(shares), batch):
        some = shares[first : first + batch]
        with torch.no_grad():
            parts.append(model.decode(along(some)))
        tell(progress, "interpolate", first + len(some), len(shares))
    return torch.cat(parts)


def _rows(model: "Model", a: _End, b: _End, shares: list[float], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per item: how far along it is; its label, if that is the same all the way."""
    from sfumato.tasks.common import label_values

    same = a.label is not None and a.label == b.label
    label = {"label": label_values(model.card.label_names)[a.label or 0]} if same else {}
    return [{**label, "a": a.name, "b": b.name, "share": round(share, 6), **facts} for share in shares]
