"""Parts of real items made anew, the rest kept as it is."""
# scipy's own annotations are incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.generate import Result, sampling

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core.guidance import Denoise
    from sfumato.core.sampler import Step
    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress

RESAMPLE = 3
Method = Literal["gradient", "repaint"]
STD_MIN = 0.02  # no codec is trusted to be closer to the data than that, in the range [-1, 1]


def inpaint(
    model: "Path | str | Model",
    source: str | Path,
    *,
    mask: Path | str | None = None,
    invert_mask: bool = False,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | None = None,
    method: Method | None = None,
    steps: int = 25,
    resample: int = RESAMPLE,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Repaint the white part of a mask, or fill in the empty cells of a table; all else comes back as it was.

    A mask may reach the border or leave only a middle part: then the surroundings are painted.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        mask: A picture of the images' size, white where to repaint; or a folder of such, called like the images. A
            table has none.
        invert_mask: Repaint the black part instead.
        out: Folder to write them to: the items, and metadata.jsonl; of a table a file.
        sheet: Picture file that shows some originals, each beside what became of it (default: OUT-sheet.png).
        label: Class of all items (default: as the source says; none where it does not).
        method: How the kept part is heeded: by the gradient through the decoder (every kept pixel counts), or by
            putting back the latent positions of which no pixel is repainted (default: gradient, of tables repaint).
        steps: Steps of the sampler.
        resample: How often each step is taken, with noise put back in between: more fits new and old together.
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise.
        batch: Items computed at once (default: 32, of tables 1000).
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The items and a row for each: its `source`, `label` and `text` where known, the settings.

    Raises:
        UserError: No such model, source, label or mask; the source has other items than the model's, or a mask another
            size; the folder is not empty or cannot be written.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865; for the gradient see `sfumato.core.consistent`.
    """
    import time

    from sfumato.errors import UserError
    from sfumato.tasks.common import check_counts, open_model
    from sfumato.tasks.inputs import changed, changed_rows, class_numbers, deliver, offered, read_inputs
    from sfumato.tasks.places import check_places

    begun = time.perf_counter()
    check_counts(steps=steps, resample=resample, batch=batch)
    if mask is None and invert_mask:
        raise UserError("--invert-mask needs --mask")
    loaded = open_model(model, device)
    method, how = repainting(loaded, method, steps, guidance)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source, mask])
    write = None
    if out is not None and loaded.modality.fill is not None:
        write = loaded.modality.fill(Path(out), str(source), loaded.card.mode, overwrite)
    read_masks = offered(loaded, loaded.modality.masks, "inpaint")
    inputs = read_inputs(model, loaded, source, overrides, skip_bad)
    masks = read_masks(None if mask is None else Path(mask), inputs.source, inputs.parts, inputs.settings)
    masks = ~masks if invert_mask else masks
    labels = class_numbers(loaded, label, inputs)
    change = METHODS[method](loaded, masks, labels, how, resample, seed)
    items = changed(loaded, inputs, change, batch or (32 if loaded.codec.graded else 1000), "inpaint", progress)
    facts: dict[str, Any] = {"method": method, "steps": steps, "resample": resample}
    facts |= {"guidance": how.guidance, "seed": seed}
    rows = changed_rows(loaded, inputs, None if label is None else labels, facts)
    deliver(loaded, inputs, items, rows, out, sheet, overwrite, write)
    facts |= {"repainted": float(masks.float().mean())} | inputs.told()
    return Result(items, rows, time.perf_counter() - begun, facts)


def repainting(model: "Model", method: Method | None, steps: int, guidance: float | None) -> "tuple[Method, Sampling]":
    """The method that the model allows, and how it samples, checked."""
    from sfumato.choice import choose
    from sfumato.errors import UserError

    method = method or ("gradient" if model.codec.graded else "repaint")
    choose(METHODS, "method", method)
    if method == "gradient" and not model.codec.graded:
        raise UserError("--method gradient: not for a model whose items are no smooth function; leave it out")
    return method, sampling(model, steps, guidance, "ddpm")


@dataclass
class _Gradient:
    """Items to what they become when the decoded estimate is held to their kept part at every step."""

    model: "Model"
    masks: "Tensor"
    labels: "Tensor | None"
    how: "Sampling"
    resample: int
    seed: int

    def __call__(self, items: list[int], x: "Tensor") -> "Tensor":
        import torch

        from sfumato.core import Again, prior, sample, time_grid

        schedule, draw = self.model.denoiser.schedule, self.model.noise(items, self.seed, "inpaint")
        mask = self.masks[items]  # (B, *axes), without the channels
        free = self.model.denoise(None if self.labels is None else self.labels[items], len(items), self.how)
        denoise, step = self.constrained(free, covered(x, mask), mask)
        grid = time_grid(schedule, self.how.steps)  # the grid fit chose is for another sampler
        z = sample(denoise, schedule, prior(schedule, draw), grid, Again(step, self.resample), draw)
        return torch.where(covering(mask, x), self.model.decode(z), x)

    def constrained(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        """The denoiser and the step that heed x (B, ...), `covered`, where the mask (B, *axes) is false."""
        from sfumato.core import SAMPLERS, consistent

        place, kept = self.model.device, ~covering(mask, x)
        missed = ((self.model.autoencode(x) - x) * kept).flatten(1).square().sum(1)
        std = (missed / kept.expand_as(x).flatten(1).sum(1).clamp_min(1)).sqrt().clamp_min(STD_MIN)
        schedule, draft = self.model.denoiser.schedule, self.model.codec.draft
        held = consistent(denoise, schedule, draft, x.to(place), kept.to(place), std.to(place))
        return held, SAMPLERS[self.how.sampler]


class _Repaint(_Gradient):
    """Items to what they become when latent positions outside the mask are put back, noised, after every step."""

    present = True  # a hole that is filled in is no hole

    def constrained(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        from sfumato.core import SAMPLERS, Known

        known = self.model.codec.untouched(mask, self.present).to(self.model.device)
        return denoise, Known(SAMPLERS[self.how.sampler], self.model.encode(x).to(self.model.device), known)


class _Around(_Repaint):
    """New items, of which a part is known; the rest is as the model makes it, missing at times."""

    present = False


def around(model: "Model", items: "Sequence[int]", known: "Tensor", how: "Sampling", seed: int) -> "Tensor":
    """New items (B, ...) of these numbers that all agree with what is known (NaN where nothing is)."""
    from dataclasses import replace

    from sfumato.model import JUMP
    from sfumato.tasks.generate import sampling

    free = known.isnan()[None].expand(max(items) + 1, *known.shape)
    # a jump leads to new items only; the steps are those that its teacher takes
    how = sampling(model, None, None, "ddpm") if how.sampler == JUMP else replace(how, sampler="ddpm")
    change = _Around(model, free, None, how, RESAMPLE, seed)
    return change(list(items), known[None].expand(len(items), *known.shape))


def covered(x: "Tensor", mask: "Tensor") -> "Tensor":
    """Items x (B, ...) without what a mask (B, *axes) hides, so that nothing of it gets into latents beside it.

    A hidden pixel takes the value of the nearest kept one; a cell, or a pixel where none is kept, becomes 0.
    """
    import torch
    from scipy.ndimage import distance_transform_edt

    filled = x.masked_fill(covering(mask, x), 0.0)
    if mask.ndim < x.ndim:  # cells have no neighbours
        for item, hidden in zip(filled, mask, strict=True):
            if not hidden.all():
                nearest = distance_transform_edt(hidden.numpy(), return_distances=False, return_indices=True)
                item.copy_(item[:, *torch.from_numpy(nearest).long()])
    return filled


def covering(mask: "Tensor", x: "Tensor") -> "Tensor":
    """A mask (B, *axes) as it covers items x (B, C, *axes), or x (B, *axes)."""
    return mask if mask.ndim == x.ndim else mask.unsqueeze(1)


METHODS: dict[str, type[_Gradient]] = {"gradient": _Gradient, "repaint": _Repaint}
