"""Edit real items under another condition."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.outputs import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core.sampler import Denoise
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.types import Progress

DEFAULT_STRENGTH = {"noise": 0.6, "invert": 1.0}  # strength by method, from 0 (data) to 1 (noise)
INVERSION_STEPS = 50  # solver steps in each direction


def edit(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | None = None,
    source_label: str | None = None,
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
    """Edit items: add noise up to --strength, then denoise under the new label (SDEdit).

    With --method noise, every seed gives another variant. With --method invert, items are inverted to their noise along
    the deterministic flow under their source labels: the same label reproduces an item, another label keeps what both
    classes share.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of originals and results (default: OUT-sheet.png).
        label: New class of all items (default: unchanged).
        source_label: Current class of all items (default: the labels of the source, if any).
        method: Add noise, or invert the deterministic flow.
        strength: Share of noise, from 0 (codec only) to 1 (default: 0.6; 1 for invert).
        steps: Sampler steps (default: chosen by fit; 50 for invert).
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde (default: chosen by fit; invert uses heun).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The items and a row for each: `source`, `label` (the new one), `source_label`, settings; for invert also
        `inversion_error`, the relative distance in latent space between an item and its inverted and regenerated copy.

    Raises:
        UserError: The model, source or label does not exist; the items do not fit the model; the strength is outside
            0..1; or the output folder is not empty or cannot be written.

    References:
        Meng et al., SDEdit, https://arxiv.org/abs/2108.01073 (algorithm 1); Song et al., DDIM,
        https://arxiv.org/abs/2010.02502 (section 4.3).
    """
    import time

    from sfumato.core import strength_time
    from sfumato.tasks.inputs import (
        check_complete,
        check_counts,
        class_numbers,
        map_items,
        open_model,
        output_metadata,
        read_items,
    )
    from sfumato.tasks.outputs import check_outputs, write_result

    start = time.perf_counter()
    check_counts(steps=steps, batch=batch)
    loaded = open_model(model, device)
    sampling = _sampling(loaded, method, steps, guidance, sampler)
    strength = DEFAULT_STRENGTH[method] if strength is None else strength
    t_start = strength_time(loaded.denoiser.schedule, strength)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source])
    originals = read_items(model, loaded, source, overrides, skip_bad)
    if method == "invert":
        check_complete(loaded, originals)
    needed = method == "invert" or label is None  # else the source labels play no part
    source_labels = class_numbers(loaded, source_label, originals) if needed else None
    labels = source_labels if label is None else class_numbers(loaded, label, originals)
    editor = (_InversionEdit if method == "invert" else _NoiseEdit)(
        loaded, source_labels, labels, t_start, sampling, seed
    )
    items = map_items(loaded, originals, editor, batch, "edit", progress)
    settings: dict[str, Any] = {"method": method, "strength": strength, "seed": seed}
    settings |= {"sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance}
    metadata = output_metadata(loaded, originals, labels, settings)
    statistics = settings | editor.record(metadata) | originals.notes()
    write_result(loaded, originals, items, metadata, out, sheet, overwrite)
    return Result(items, metadata, time.perf_counter() - start, statistics)


def _sampling(
    model: "Model", method: str, steps: int | None, guidance: float | None, sampler: str | None
) -> "Sampling":
    """The sampling of the method, checked."""
    from sfumato.errors import UserError
    from sfumato.registry import choose

    choose(DEFAULT_STRENGTH, "method", method)
    if method == "invert" and sampler is not None:
        raise UserError("--sampler applies only to --method noise; inversion uses heun")
    if method == "invert":
        return model.choose_sampling(steps or INVERSION_STEPS, guidance, "heun")
    return model.choose_sampling(steps, guidance, sampler)


@dataclass
class _NoiseEdit:
    """Adds noise, z_t = alpha_t z + sigma_t eps, and samples from time t on."""

    model: "Model"
    source_labels: "Tensor | None"
    labels: "Tensor | None"
    t_start: float
    sampling: "Sampling"
    seed: int

    def __call__(self, items: list[int], x: "Tensor") -> "Tensor":
        z = self.model.encode(x).to(self.model.device)
        return self.model.decode(self.edit_latents(items, z))

    def edit_latents(self, items: list[int], z: "Tensor") -> "Tensor":
        """New latents (B, ...) from the items' latents z (B, ...)."""
        import torch

        from sfumato.core import sample, time_grid
        from sfumato.tasks.inputs import select

        # not the noise stream of `generate`: a generated item that got its own noise again would only come back
        denoiser, noise = self.model.denoiser, self.model.noise(items, self.seed, "edit")
        denoise = self.denoise(self.labels, items)
        z_t = denoiser.add_noise(z, noise(), torch.full((len(z),), self.t_start))
        grid = time_grid(denoiser.schedule, self.sampling.steps, self.sampling.grid, self.t_start)
        step = self.model.step_rule(select(self.labels, items), len(items), self.sampling)
        with self.model.autocast():
            return sample(denoise, denoiser.schedule, z_t, grid, step, noise)

    def denoise(self, labels: "Tensor | None", items: list[int]) -> "Denoise":
        """The denoiser with the labels of these items."""
        from sfumato.tasks.inputs import select

        return self.model.denoise(select(labels, items), len(items), self.sampling)

    def record(self, metadata: list[dict[str, Any]]) -> dict[str, Any]:
        """Add measurements to each item's metadata; return statistics of all."""
        return {}


@dataclass
class _InversionEdit(_NoiseEdit):
    """Inverts items to their noise under the source labels, and regenerates them under the new ones."""

    errors: "list[Tensor]" = field(default_factory=list["Tensor"])

    def edit_latents(self, items: list[int], z: "Tensor") -> "Tensor":
        import torch

        from sfumato.core import integrate_to_data, inversion_grid, invert
        from sfumato.core.inversion import relative_error

        schedule, denoise = self.model.denoiser.schedule, self.denoise(self.source_labels, items)
        grid = inversion_grid(schedule, self.sampling.steps, self.t_start)
        if self.t_start <= float(grid[-1]):  # the noise is invisible: nothing to invert
            self.errors.append(torch.zeros(len(z)))
            return z
        noise = invert(denoise, schedule, z, grid)
        self.errors.append(relative_error(integrate_to_data(denoise, schedule, noise, grid) - z, z).cpu())
        return integrate_to_data(self.denoise(self.labels, items), schedule, noise, grid)

    def record(self, metadata: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        from sfumato.distributed import gather

        errors = gather(torch.cat([torch.empty(0), *self.errors]), len(metadata))
        for row, error in zip(metadata, errors, strict=True):
            row["inversion_error"] = float(f"{float(error):.3g}")
        return {"inversion_error": float(errors.max())}
