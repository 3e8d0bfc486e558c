"""Edit real items under another condition."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.tasks.outputs import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core import Denoise
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.tasks.inputs import SourceItems
    from sfumato.types import Items, Latent, Progress, Raw

DEFAULT_STRENGTH = {"noise": 0.6, "invert": 1.0}  # strength by method, from 0 (data) to 1 (noise)
INVERSION_STEPS = 50  # solver steps in each direction


def edit(
    model: "Path | str | Model",
    source: str | Path,
    *,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | Sequence[str] | None = None,
    source_label: str | Sequence[str] | None = None,
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
    classes share. Conditions that are not named keep their value.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of originals and results (default: OUT-sheet.png).
        label: New class of all items, or name=value of a condition; may be given several times (default: unchanged).
        source_label: Current class of all items, or name=value of a condition; may be given several times (default: as
            in the source, if known).
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
    source_raw, raw = _conditions(loaded, originals, source_label, label, method)
    editor = (_InversionEdit if method == "invert" else _NoiseEdit)(loaded, source_raw, raw, t_start, sampling, seed)
    items = map_items(loaded, originals, editor, batch, "edit", progress)
    settings: dict[str, Any] = {"method": method, "strength": strength, "seed": seed}
    settings |= {"sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance}
    metadata = output_metadata(loaded, originals, raw, settings)
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


def _conditions(
    model: "Model",
    originals: "SourceItems",
    source_label: str | Sequence[str] | None,
    label: str | Sequence[str] | None,
    method: str,
) -> "tuple[Raw, Raw]":
    """The conditions of the items (N) before the edit, which only inversion needs, and after it."""
    from sfumato.conditioners import parse_conditions
    from sfumato.tasks.inputs import item_conditions
    from sfumato.types import Raw

    current, new = ([given] if isinstance(given, str) else list(given or ()) for given in (source_label, label))
    replaced = parse_conditions(model.conditioner, new).keys()
    kept = [text for text in current if not replaced & parse_conditions(model.conditioner, text).keys()]
    source_raw = item_conditions(model, current, originals) if method == "invert" else Raw()
    return source_raw, item_conditions(model, [*kept, *new], originals)


@dataclass
class _NoiseEdit:
    """Adds noise, z_t = alpha_t z + sigma_t eps, and samples from time t on.

    Args:
        model: The model.
        source_raw: Conditions of the items (N) as they are.
        raw: Their new conditions.
        t_start: The time t.
        sampling: Sampler, steps and guidance.
        seed: Seed of the noise.
    """

    model: "Model"
    source_raw: "Raw"
    raw: "Raw"
    t_start: float
    sampling: "Sampling"
    seed: int

    def __call__(self, numbers: list[int], items: "Items") -> "Items":
        from sfumato.types import Latent

        latent = self.model.encode(items)
        z = zero_padding(self.edit_latents(numbers, latent), latent.mask)
        return self.model.decode(Latent(z, latent.mask))

    def edit_latents(self, numbers: list[int], latent: "Latent") -> "Tensor":
        """New latents (B, ...) of the items with these numbers, from their latents."""
        from sfumato.core import sample, time_grid

        # not the noise stream of `generate`: a generated item that got its own noise again would only come back
        schedule = self.model.denoiser.schedule
        noise = self.model.noise(numbers, self.seed, "edit", latent.mask)
        levels = schedule.levels(time_grid(schedule, self.sampling.steps, self.sampling.grid, self.t_start))
        z_t = levels[0].add_noise(latent.z.to(self.model.device), noise())
        mask = None if latent.mask is None else latent.mask.to(self.model.device)
        step = self.model.step_rule(self.raw.select(numbers), len(numbers), self.sampling, mask)
        with self.model.autocast():
            return sample(self.denoise(self.raw, numbers, mask), levels, z_t, step, noise)

    def denoise(self, raw: "Raw", numbers: list[int], mask: "Tensor | None") -> "Denoise":
        """The denoiser of the items with these numbers under their conditions, and with the mask of their tokens."""
        return self.model.denoise(raw.select(numbers), len(numbers), self.sampling, mask)

    def record(self, metadata: list[dict[str, Any]]) -> dict[str, Any]:
        """Add measurements to each item's metadata; return statistics of all."""
        return {}


@dataclass
class _InversionEdit(_NoiseEdit):
    """Inverts items to their noise under the source's conditions, and regenerates them under the new ones."""

    errors: "list[Tensor]" = field(default_factory=list["Tensor"])

    def edit_latents(self, numbers: list[int], latent: "Latent") -> "Tensor":
        import torch

        from sfumato.core import integrate_to_data, inversion_grid, invert
        from sfumato.core.inversion import relative_error

        schedule, latent = self.model.denoiser.schedule, latent.to(self.model.device)
        grid = inversion_grid(schedule, self.sampling.steps, self.t_start)
        if self.t_start <= float(grid[-1]):  # the noise is invisible: nothing to invert
            self.errors.append(torch.zeros(len(latent)))
            return latent.z
        denoise, levels = self.denoise(self.source_raw, numbers, latent.mask), schedule.levels(grid)
        noise = invert(denoise, levels, latent.z)
        self.errors.append(relative_error(integrate_to_data(denoise, levels, noise) - latent.z, latent.z).cpu())
        return integrate_to_data(self.denoise(self.raw, numbers, latent.mask), levels, noise)

    def denoise(self, raw: "Raw", numbers: list[int], mask: "Tensor | None") -> "Denoise":
        return masked_denoiser(super().denoise(raw, numbers, mask), mask)

    def record(self, metadata: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        from sfumato.distributed import gather

        errors = gather(torch.cat([torch.empty(0), *self.errors]), len(metadata))
        for row, error in zip(metadata, errors, strict=True):
            row["inversion_error"] = float(f"{float(error):.3g}")
        return {"inversion_error": float(errors.max())}


def zero_padding(z: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Tokens z (B, N, D) with zeros where the mask (B, N) has none; other latents (B, ...) as they are."""
    import torch

    return z if mask is None else torch.where(mask[..., None].to(z.device), z, 0)


def masked_denoiser(denoise: "Denoise", mask: "Tensor | None") -> "Denoise":
    """A denoiser whose output is zero where the mask (B, N) has no token: inversion measures all of it."""
    return lambda z, level: zero_padding(denoise(z, level), mask)
