"""Real items made anew under another condition."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.generate import Result, sampling

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core.guidance import Denoise
    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress

STRENGTH = {"noise": 0.6, "invert": 1.0}
INVERT_STEPS = 50


def edit(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | None = None,
    own_label: str | None = None,
    method: Literal["noise", "invert"] = "noise",
    strength: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 250,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Change given items: part of the way back to noise, then forward under a label.

    By noise (SDEdit) every seed gives another variant. By inversion the item's own noise is found, along the
    deterministic flow under its own label: under that label it comes back, under another one it keeps what both share.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows some originals, each beside what became of it (default: OUT-sheet.png).
        label: Class to make of all items (default: their own).
        own_label: Class that all items are of (default: as the source says; none where it does not).
        method: How to go back: add noise, or invert the flow.
        strength: How far back: the share of noise, from 0 (only the codec) to 1 (default: 0.6, for invert 1).
        steps: Steps of the sampler (default: what fit chose, for invert 50).
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde (default: what fit chose; invert takes heun).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the noise.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The items and a row for each: its `source`, `label` (the new one), `source_label`, the settings; for invert also
        `inversion_error`, the relative distance in latent space between the item and itself inverted and regenerated.

    Raises:
        UserError: No such model, source or label; the source has other items than the model's; a strength outside 0..1;
            the folder is not empty or cannot be written.

    References:
        Meng et al., SDEdit, https://arxiv.org/abs/2108.01073 (algorithm 1); Song et al., DDIM,
        https://arxiv.org/abs/2010.02502 (section 4.3).
    """
    import time

    from sfumato.core import strength_time
    from sfumato.tasks.common import check_counts, open_model
    from sfumato.tasks.inputs import changed, changed_rows, check_whole, class_numbers, deliver, read_inputs
    from sfumato.tasks.places import check_places

    begun = time.perf_counter()
    check_counts(steps=steps, batch=batch)
    loaded = open_model(model, device)
    how = _sampling(loaded, method, steps, guidance, sampler)
    strength = STRENGTH[method] if strength is None else strength
    start = strength_time(loaded.denoiser.schedule, strength)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source])
    inputs = read_inputs(model, loaded, source, overrides, skip_bad)
    if method == "invert":
        check_whole(loaded, inputs)
    asked = method == "invert" or label is None  # else it does not matter what they are
    own = class_numbers(loaded, own_label, inputs) if asked else None
    new = own if label is None else class_numbers(loaded, label, inputs)
    change = (_Inversion if method == "invert" else _Noise)(loaded, own, new, start, how, seed)
    items = changed(loaded, inputs, change, batch, "edit", progress)
    facts: dict[str, Any] = {"method": method, "strength": strength, "seed": seed}
    facts |= {"sampler": how.sampler, "steps": how.steps, "guidance": how.guidance}
    rows = changed_rows(loaded, inputs, new, facts)
    facts |= change.told(rows) | inputs.told()
    deliver(loaded, inputs, items, rows, out, sheet, overwrite)
    return Result(items, rows, time.perf_counter() - begun, facts)


def _sampling(
    model: "Model", method: str, steps: int | None, guidance: float | None, sampler: str | None
) -> "Sampling":
    """The sampling that the method takes, checked."""
    from sfumato.choice import choose
    from sfumato.errors import UserError

    choose(STRENGTH, "method", method)
    if method == "invert" and sampler is not None:
        raise UserError("--sampler is for --method noise; inversion goes by heun")
    if method == "invert":
        return sampling(model, steps or INVERT_STEPS, guidance, "heun")
    return sampling(model, steps, guidance, sampler)


@dataclass
class _Noise:
    """Items to what they become by adding noise: z_t = alpha_t z + sigma_t eps, then sampled from t on."""

    model: "Model"
    own: "Tensor | None"
    new: "Tensor | None"
    start: float
    how: "Sampling"
    seed: int

    def __call__(self, items: list[int], x: "Tensor") -> "Tensor":
        z = self.model.encode(x).to(self.model.device)
        return self.model.decode(self.latents(items, z))

    def latents(self, items: list[int], z: "Tensor") -> "Tensor":
        """New latents (B, ...) of the items' own."""
        import torch

        from sfumato.core import sample, time_grid
        from sfumato.tasks.inputs import picked

        # not the noise that generate makes items of: given again what it was made of, an item would only come back
        denoiser, draw = self.model.denoiser, self.model.noise(items, self.seed, "edit")
        denoise = self.denoise(self.new, items)
        z_t = denoiser.noised(z, draw(), torch.full((len(z),), self.start))
        grid = time_grid(denoiser.schedule, self.how.steps, self.how.grid, self.start)
        rule = self.model.rule(picked(self.new, items), len(items), self.how)
        with self.model.autocast():
            return sample(denoise, denoiser.schedule, z_t, grid, rule, draw)

    def denoise(self, labels: "Tensor | None", items: list[int]) -> "Denoise":
        """The denoiser of some items under their labels."""
        from sfumato.tasks.inputs import picked

        return self.model.denoise(picked(labels, items), len(items), self.how)

    def told(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What else there is to say of the whole, and into each item's row."""
        return {}


@dataclass
class _Inversion(_Noise):
    """Items to what they become from their own noise, found by inversion under their own labels."""

    errors: "list[Tensor]" = field(default_factory=list["Tensor"])

    def latents(self, items: list[int], z: "Tensor") -> "Tensor":
        import torch

        from sfumato.core import flow_grid, invert, regenerate
        from sfumato.core.inversion import relative

        schedule, own = self.model.denoiser.schedule, self.denoise(self.own, items)
        grid = flow_grid(schedule, self.how.steps, self.start)
        if self.start <= float(grid[-1]):  # no noise that is seen: there is nothing to invert
            self.errors.append(torch.zeros(len(z)))
            return z
        noise = invert(own, schedule, z, grid)
        self.errors.append(relative(regenerate(own, schedule, noise, grid) - z, z).cpu())
        return regenerate(self.denoise(self.new, items), schedule, noise, grid)

    def told(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        from sfumato.tasks.common import gathered

        errors = gathered(torch.cat([torch.empty(0), *self.errors]), len(rows))
        for row, error in zip(rows, errors, strict=True):
            row["inversion_error"] = float(f"{float(error):.3g}")
        return {"inversion_error": float(errors.max())}
