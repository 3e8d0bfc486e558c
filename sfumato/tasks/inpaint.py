"""Parts of real items made anew, the rest kept as it is."""

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

STD_MIN = 0.02  # no codec is trusted to be closer to the data than that, in the range [-1, 1]


def inpaint(
    model: "Path | str | Model",
    source: str | Path,
    *,
    mask: Path | str,
    invert_mask: bool = False,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | None = None,
    method: Literal["gradient", "repaint"] = "gradient",
    steps: int = 25,
    resample: int = 3,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Repaint the white part of a mask; the black part comes back as it was, to the bit.

    A mask may reach the border or leave only a middle part: then the surroundings are painted.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        mask: A picture of the images' size, white where to repaint; or a folder of such, called like the images.
        invert_mask: Repaint the black part instead.
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows some originals, each beside what became of it (default: OUT-sheet.png).
        label: Class of all items (default: as the source says; none where it does not).
        method: How the kept part is heeded: by the gradient through the decoder (every kept pixel counts), or by
            putting back the latent positions of which no pixel is repainted.
        steps: Steps of the sampler.
        resample: How often each step is taken, with noise put back in between: more fits new and old together.
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder.
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

    from sfumato.choice import choose
    from sfumato.tasks.common import check_counts, open_model
    from sfumato.tasks.inputs import changed, check_places, class_numbers, deliver, offered, read_inputs

    begun = time.perf_counter()
    check_counts(steps=steps, resample=resample, batch=batch)
    fill = choose(METHODS, "method", method)
    loaded = open_model(model, device)
    how = sampling(loaded, steps, guidance, "ddpm")
    sheet = check_places(loaded, out, sheet, overwrite)
    read_masks = offered(loaded, loaded.modality.masks, "inpaint")
    inputs = read_inputs(model, loaded, source, overrides, skip_bad)
    masks = read_masks(Path(mask), inputs.source, inputs.parts, inputs.settings)
    masks = ~masks if invert_mask else masks
    change = fill(loaded, masks, class_numbers(loaded, label, inputs), how, resample, seed)
    items = changed(loaded, inputs, change, batch, "inpaint", progress)
    facts: dict[str, Any] = {"method": method, "steps": steps, "resample": resample}
    facts |= {"guidance": how.guidance, "seed": seed}
    rows = [row | facts for row in inputs.rows()]
    deliver(loaded, inputs, items, rows, out, sheet, overwrite)
    facts["repainted"] = float(masks.float().mean())
    return Result(items, rows, time.perf_counter() - begun, facts)


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

        schedule, draw = self.model.denoiser.schedule, self.model.noise(items, self.seed)
        mask = self.masks[items].unsqueeze(1)  # (B, 1, *axes)
        free = self.model.denoise(None if self.labels is None else self.labels[items], len(items), self.how)
        denoise, step = self.constrained(free, x, mask)
        grid = time_grid(schedule, self.how.steps)  # the grid fit chose is for another sampler
        z = sample(denoise, schedule, prior(schedule, draw), grid, Again(step, self.resample), draw)
        return torch.where(mask, self.model.decode(z), x)

    def constrained(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        """The denoiser and the step that heed x (B, ...) where the mask (B, 1, ...) is false."""
        from sfumato.core import SAMPLERS, consistent

        place, kept = self.model.device, ~mask
        missed = ((self.model.reconstruct(x) - x) * kept).flatten(1).square().sum(1)
        std = (missed / kept.expand_as(x).flatten(1).sum(1).clamp_min(1)).sqrt().clamp_min(STD_MIN)
        schedule, draft = self.model.denoiser.schedule, self.model.codec.draft
        held = consistent(denoise, schedule, draft, x.to(place), kept.to(place), std.to(place))
        return held, SAMPLERS[self.how.sampler]


class _Repaint(_Gradient):
    """Items to what they become when latent positions outside the mask are put back, noised, after every step."""

    def constrained(self, denoise: "Denoise", x: "Tensor", mask: "Tensor") -> "tuple[Denoise, Step]":
        from sfumato.core import SAMPLERS, Known

        known = self.model.codec.untouched(mask.squeeze(1)).to(self.model.device)
        return denoise, Known(SAMPLERS[self.how.sampler], self.model.encode(x).to(self.model.device), known)


METHODS = {"gradient": _Gradient, "repaint": _Repaint}
