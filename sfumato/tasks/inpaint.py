"""Inpaint: regenerate a part of real items and keep the rest."""
# scipy's own annotations are incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.outputs import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core import Denoise, Step
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.types import Items, Progress, Raw

DEFAULT_RESAMPLE = 3  # repetitions of each sampler step (RePaint)
Method = Literal["gradient", "repaint"]
STD_MIN = 0.02  # lower bound of the codec's assumed error, in the range [-1, 1]


def inpaint(
    model: "Path | str | Model",
    source: str | Path,
    *,
    mask: Path | str | None = None,
    invert_mask: bool = False,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | Sequence[str] | None = None,
    method: Method | None = None,
    steps: int = 25,
    resample: int = DEFAULT_RESAMPLE,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Inpaint the white part of a mask, or the empty cells of a table; everything else stays unchanged.

    The white part may touch the border or surround the kept part.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        mask: Mask image, white where to inpaint, in the size of the images; or a folder of masks named like the images.
            Not for tables.
        invert_mask: Inpaint the black part instead.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of originals and results (default: OUT-sheet.png).
        label: Class of all items, or name=value of a condition; may be given several times (default: as in the source,
            if known).
        method: Constrain the kept part by the gradient through the decoder (uses every kept pixel), or replace the
            latent positions that contain no masked pixel (default: gradient; repaint for tables).
        steps: Sampler steps.
        resample: Repetitions of each step with noise added back in between (RePaint); more makes old and new parts fit
            better.
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch (default: 32; 1000 for tables).
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The items and a row for each: its `source`, `label` and `text` where known, settings.

    Raises:
        UserError: The model, source, label or mask does not exist; the items do not fit the model, or the mask has
            another size; or the output folder is not empty or cannot be written.

    References:
        Lugmayr et al., RePaint, https://arxiv.org/abs/2201.09865; for the gradient see
        `sfumato.core.reconstruction_guidance`.
    """
    import time

    from sfumato.conditioners import parse_conditions
    from sfumato.errors import UserError
    from sfumato.modalities.base import Maskable
    from sfumato.tasks.inputs import (
        check_counts,
        item_conditions,
        map_items,
        open_model,
        output_metadata,
        read_items,
        require,
    )
    from sfumato.tasks.outputs import check_outputs, write_result

    start = time.perf_counter()
    check_counts(steps=steps, resample=resample, batch=batch)
    if mask is None and invert_mask:
        raise UserError("--invert-mask needs --mask")
    loaded = open_model(model, device)
    method, sampling = choose_method(loaded, method, steps, guidance)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source, mask])
    maskable = require(loaded, Maskable[Any], "inpaint")
    check_one_length(loaded, "inpaint")
    write = None if out is None else maskable.fill_writer(Path(out), str(source), loaded.config.spec, overwrite)
    originals = read_items(model, loaded, source, overrides, skip_bad)
    mask = None if mask is None else Path(mask)
    masks = maskable.read_masks(mask, originals.source, originals.parts, originals.settings) ^ invert_mask
    raw = item_conditions(loaded, label, originals)
    inpainter = METHODS[method](loaded, masks, raw, sampling, resample, seed)
    batch = batch or (32 if loaded.codec.differentiable else 1000)
    items = map_items(loaded, originals, inpainter, batch, "inpaint", progress)
    settings: dict[str, Any] = {"method": method, "steps": steps, "resample": resample}
    settings |= {"guidance": sampling.guidance, "seed": seed}
    metadata = output_metadata(loaded, originals, raw.only(parse_conditions(loaded.conditioner, label)), settings)
    write_result(loaded, originals, items, metadata, out, sheet, overwrite, write)
    statistics = settings | {"repainted": float(masks.float().mean())} | originals.notes()
    return Result(items, metadata, time.perf_counter() - start, statistics)


def choose_method(
    model: "Model", method: Method | None, steps: int, guidance: float | None
) -> "tuple[Method, Sampling]":
    """The method, by default the best that the model's codec allows, and its sampling."""
    from sfumato.errors import UserError
    from sfumato.registry import choose

    method = method or ("gradient" if model.codec.differentiable else "repaint")
    choose(METHODS, "method", method)
    if method == "gradient" and not model.codec.differentiable:
        raise UserError("--method gradient needs a differentiable decoder; use --method repaint")
    return method, model.choose_sampling(steps, guidance, "ddpm")


def check_one_length(model: "Model", task: str) -> None:
    """Refuse models of items of several lengths, which have no masks of one shape."""
    from sfumato.errors import UserError

    if model.codec.tokens:
        raise UserError(f"{task}: not supported for items of several lengths")


@dataclass
class _Gradient:
    """Constrains the decoded estimate to the kept part at every step, by the posterior mean.

    Args:
        model: The model.
        masks: True where an item is regenerated, (N, *axes).
        raw: Conditions of the items (N).
        sampling: Steps and guidance.
        resample: Repetitions of each step.
        seed: Seed of the noise.
    """

    model: "Model"
    masks: "Tensor"
    raw: "Raw"
    sampling: "Sampling"
    resample: int
    seed: int

    def __call__(self, numbers: list[int], items: "Items") -> "Items":
        import torch

        from sfumato.core import Resample, initial_noise, sample, time_grid
        from sfumato.types import Items, Latent

        x, mask = items.stack(), self.masks[numbers]  # (B, ...), and (B, *axes) without the channels
        noise = self.model.noise(numbers, self.seed, "inpaint")
        unconstrained = self.model.denoise(self.raw.select(numbers), len(numbers), self.sampling)
        denoise, step = self.constrain(unconstrained, fill_masked(x, mask), mask)
        schedule = self.model.denoiser.schedule
        levels = schedule.levels(time_grid(schedule, self.sampling.steps))  # fit chose its grid for another sampler
        z = sample(denoise, levels, initial_noise(levels[0], noise), Resample(step, self.resample), noise)
        return Items(torch.where(expand_mask(mask, x), self.model.decode(Latent(z)).stack(), x))

    def constrain(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        """Denoiser and step that keep x (B, ...) where the mask (B, *axes) is false."""
        from sfumato.core import SAMPLERS, reconstruction_guidance

        device, kept = self.model.device, ~expand_mask(mask, x)
        squared_error = ((self.model.autoencode(x).stack() - x) * kept).flatten(1).square().sum(1)
        std = (squared_error / kept.expand_as(x).flatten(1).sum(1).clamp_min(1)).sqrt().clamp_min(STD_MIN)
        decode = self.model.codec.decode_unquantized
        constrained = reconstruction_guidance(denoise, decode, x.to(device), kept.to(device), std.to(device))
        return constrained, SAMPLERS[self.sampling.sampler]


class _Repaint(_Gradient):
    """Replaces the latent positions outside the mask, with noise, after every step."""

    present = True  # regenerated values are never missing ones

    def constrain(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        from sfumato.core import SAMPLERS, Replace

        kept = self.model.codec.unmasked(mask, self.present).to(self.model.device)
        return denoise, Replace(SAMPLERS[self.sampling.sampler], self.model.encode(x).z.to(self.model.device), kept)


class _FixedValues(_Repaint):
    """Generates items with fixed values; the other values may be missing ones."""

    present = False


def inpaint_fixed(model: "Model", numbers: Sequence[int], fixed: "Tensor", sampling: "Sampling", seed: int) -> "Items":
    """New items (B) that all have the values `fixed` (NaN where free)."""
    from dataclasses import replace

    from sfumato.sampling import JUMP
    from sfumato.types import Items, Raw

    mask = fixed.isnan()[None].expand(max(numbers) + 1, *fixed.shape)
    # jumps cannot be constrained: few-step models take their teacher's steps
    jumps = sampling.sampler == JUMP
    ddpm = model.choose_sampling(None, None, "ddpm") if jumps else replace(sampling, sampler="ddpm")
    inpainter = _FixedValues(model, mask, Raw(), ddpm, DEFAULT_RESAMPLE, seed)
    return inpainter(list(numbers), Items(fixed[None].expand(len(numbers), *fixed.shape)))


def fill_masked(x: "Tensor", mask: "Tensor") -> "Tensor":
    """Replace masked values of x (B, ...), so that they do not leak into the latents of their neighbours.

    A masked pixel takes the value of the nearest kept pixel; table cells, and pixels of fully masked items, become 0.
    """
    import torch
    from scipy.ndimage import distance_transform_edt

    filled = x.masked_fill(expand_mask(mask, x), 0.0)
    if mask.ndim < x.ndim:  # cells have no neighbours
        for item, masked in zip(filled, mask, strict=True):
            if not masked.all():
                nearest = distance_transform_edt(masked.numpy(), return_distances=False, return_indices=True)
                item.copy_(item[:, *torch.from_numpy(nearest).long()])
    return filled


def expand_mask(mask: "Tensor", x: "Tensor") -> "Tensor":
    """A mask (B, *axes) that broadcasts to items x (B, C, *axes) or (B, *axes)."""
    return mask if mask.ndim == x.ndim else mask.unsqueeze(1)


METHODS: dict[str, type[_Gradient]] = {"gradient": _Gradient, "repaint": _Repaint}
