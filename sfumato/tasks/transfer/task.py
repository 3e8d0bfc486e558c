"""Transfer real items from one class to another, such as from one style to another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sfumato.tasks.outputs import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core import NoiseLevel
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.tasks.transfer.residual import ResidualMap
    from sfumato.types import Items, Progress, Raw

GUIDANCE_WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # weights of the target class, tried in this order
EVIDENCE_QUANTILE = 0.2  # quantile of generated items' evidence that transferred items must reach
MAX_EVIDENCE = math.log(1e6)  # nats that always suffice: the target is a million times as likely as the others
EVIDENCE_SAMPLES = 500  # generated items for that quantile
MAX_ALTERNATIVES = 8  # other classes that the target is compared with


def transfer(
    model: "Path | str | Model",
    source: str | Path,
    *,
    label: str,
    source_label: "str | Sequence[str] | None" = None,
    out: Path | None = None,
    sheet: Path | None = None,
    strength: float = 0.35,
    align: int = 800,
    rounds: int = 3,
    samples: int = 4000,
    budget: str | None = None,
    steps: int = 20,
    guidance: float | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    seed: int = 0,
    batch: int = 250,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Transfer items to another class, keeping what both share: the motif of a photograph, the shape of a digit.

    One model of both classes is needed (such as styles, a folder each), but no paired items. The correspondence is
    learned from items that the model generates of each class: a linear map matches mean and covariance, its rotation
    makes the results most likely in the target class, and a residual network adds what no linear map can. The result is
    cached. Items that do not show the target class yet are inverted part of the way to noise under their own class,
    mapped, and regenerated under the target class.

    Args:
        model: Folder of the model.
        source: Built-in data set, folder, file or hf://owner/name.
        label: Target class, or name=class for another label than the first.
        source_label: Class of all items before, or name=value of a condition; may be given several times (default: the
            conditions of the source).
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of originals and results (default: OUT-sheet.png).
        strength: Share of noise at which items are mapped, from 0 (the map alone) to 1. More brings out finer traits of
            the target, and keeps less.
        align: Optimizer steps for the map's rotation; 0 uses optimal transport.
        rounds: Rounds of back-translation that train the residual network; 0 disables it.
        samples: Generated items per class to learn the map from.
        budget: Time limit of the search per source class, such as 5m; steps and samples are reduced to fit (default:
            unlimited).
        steps: Solver steps in each direction.
        guidance: Guidance weight of the target class; 1 disables it (default: per item, the smallest weight at which it
            shows the class more clearly than a fifth of the items that generate makes of it, or beyond doubt).
        skip_bad: Skip unreadable files instead of stopping.
        overrides: Override how the source is read, such as data.resolution=64 (default: as in training).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The items and a row for each: its `source`, `label` (the new one), `source_label`, `guidance` (None if it had
        the class already, or the map alone sufficed), settings.

    Raises:
        UserError: The model, source or class does not exist; the model has no classes, or its items have several
            lengths; the items have no labels or do not fit the model; the strength is outside 0..1; the budget is too
            small; or the output folder is not empty or cannot be written.

    References:
        Su et al., Dual Diffusion Implicit Bridges, https://arxiv.org/abs/2203.08382 (algorithm 1), which is the special
        case of strength 1 without a map; the map: `sfumato.tasks.transfer.gaussian_map`; the residual network:
        `sfumato.tasks.transfer.residual`.
    """
    import time

    from sfumato.conditioners import constant_conditions
    from sfumato.config import parse_budget
    from sfumato.core import strength_time
    from sfumato.tasks.inputs import check_counts, item_conditions, map_items, open_model, output_metadata, read_items
    from sfumato.tasks.outputs import check_outputs, write_result
    from sfumato.tasks.transfer.search import Search, SearchBudget

    start = time.perf_counter()
    check_counts(steps=steps, batch=batch)
    check_counts(minimum=0, align=align, rounds=rounds)
    check_counts(minimum=2, samples=samples)
    loaded = open_model(model, device)
    (name, target), sampling = _target_class(loaded, label), loaded.choose_sampling(steps, guidance, "heun")
    t_start = strength_time(loaded.denoiser.schedule, strength)
    sheet = check_outputs(loaded, out, sheet, overwrite, sources=[source])
    originals = read_items(model, loaded, source, overrides, skip_bad)
    raw = item_conditions(loaded, source_label, originals)
    classes = sorted({int(k) for k in _check_labels(source, raw, name)} - {target})
    search_budget = SearchBudget(align, rounds, samples, None if budget is None else parse_budget(budget, 1.0))
    search = Search(loaded, name, target, search_budget, seed, progress)
    translator = _Translator(loaded, raw, name, target, {k: search(k) for k in classes}, t_start, sampling)
    if guidance is None and classes and translator.levels is not None:
        new = search.new_items(target, EVIDENCE_SAMPLES)
        translator.calibrate(search.sample(new, EVIDENCE_SAMPLES, loaded.sampling), new)
    items = map_items(loaded, originals, translator, batch, "transfer", progress)
    settings = {"strength": strength, "align": align, "rounds": rounds, "steps": steps, "seed": seed}
    changed = constant_conditions(loaded.conditioner, {name: target}, len(originals))
    metadata = output_metadata(loaded, originals, changed, settings)
    _record_guidance(metadata, translator.weights)
    statistics = settings | {"guidance": guidance, **originals.notes()}
    write_result(loaded, originals, items, metadata, out, sheet, overwrite)
    return Result(items, metadata, time.perf_counter() - start, statistics)


def _record_guidance(metadata: "list[dict[str, Any]]", weights: "Tensor") -> None:
    """Add each item's guidance weight (N,) from all processes to its metadata, None for 0."""
    from sfumato.distributed import gather, shard

    for row, weight in zip(metadata, gather(weights[shard(len(metadata))], len(metadata)), strict=True):
        row["guidance"] = float(weight) or None


def _target_class(model: "Model", label: str) -> tuple[str, int]:
    """The label condition that is changed and the number of the target class."""
    from sfumato.conditioners import parse_conditions
    from sfumato.errors import UserError

    if model.codec.tokens:
        raise UserError(
            f"transfer: not supported for models of modality {model.modality.name}, whose items have several lengths"
        )
    ((name, value),) = parse_conditions(model.conditioner, label).items()
    if not isinstance(value, int):
        raise UserError(f"label '{label}': transfer changes a class; {name} has no classes")
    return name, value


def _check_labels(source: "str | Path", raw: "Raw", name: str) -> "Tensor":
    """The class numbers (N,) of all items; refuse unlabelled items."""
    from torch import Tensor

    from sfumato.errors import UserError
    from sfumato.types import UNKNOWN

    labels = raw.values.get(name)
    remedy = "give the class of its items with --source-label"
    if not isinstance(labels, Tensor):
        raise UserError(f"{source}: has no labels; {remedy}")
    if (labels == UNKNOWN).any():
        raise UserError(f"{source}: {int((labels == UNKNOWN).sum())} items have no label; {remedy}")
    return labels


@dataclass
class _Translator:
    """Transfers items to the target class: inverted, mapped, regenerated.

    Args:
        model: The model.
        raw: The conditions of the items (N); all have a class.
        name: The label condition that is changed.
        target: Class number of the target.
        maps: The map from each source class.
        t_start: Time at which items are mapped.
        sampling: Sampling of the flow.
        required_evidence: Nats by which every item should show the target; None uses the given guidance weight.
    """

    model: "Model"
    raw: "Raw"
    name: str
    target: int
    maps: "dict[int, ResidualMap]"
    t_start: float
    sampling: "Sampling"
    required_evidence: float | None = None

    @cached_property
    def weights(self) -> "Tensor":
        """The guidance weight of each item (N,), 0 without regeneration."""
        import torch

        return torch.zeros(len(self.classes(self.raw)), dtype=torch.float64)

    def __call__(self, numbers: list[int], items: "Items") -> "Items":
        import torch

        from sfumato.types import Latent

        z, raw = self.model.encode(items).z.to(self.model.device), self.raw.select(numbers)
        changes = (self.classes(raw) != self.target).nonzero().flatten()  # the others have the class already
        if len(changes):
            index, z = torch.tensor(numbers)[changes], z.clone()
            z[changes], self.weights[index] = self.translate(z[changes], raw.select(changes))
        return self.model.decode(Latent(z))

    def classes(self, raw: "Raw") -> "Tensor":
        """The class numbers (B,) of items."""
        return cast("Tensor", raw.values[self.name])

    def of_class(self, label: int, raw: "Raw") -> "Raw":
        """The conditions of items, with this class number for all."""
        import torch

        return raw.with_value(self.name, torch.full_like(self.classes(raw), label))

    @cached_property
    def levels(self) -> "list[NoiseLevel] | None":
        """Noise levels of the flow; None if the first is invisible, so that the data themselves are mapped."""
        from sfumato.core import inversion_grid

        schedule = self.model.denoiser.schedule
        grid = inversion_grid(schedule, self.sampling.steps, self.t_start)
        return None if self.t_start <= float(grid[-1]) else schedule.levels(grid)

    def invert_and_map(self, z: "Tensor", raw: "Raw") -> "Tensor":
        """Latents (B, ...) with these conditions, inverted to the start time and mapped to the target."""
        from sfumato.core import invert

        assert self.levels is not None
        denoise = self.model.denoise(raw, len(z), self.sampling.unguided)
        return self.map(invert(denoise, self.levels, z), z, raw, self.t_start)

    def translate(self, z: "Tensor", raw: "Raw") -> "tuple[Tensor, Tensor]":
        """Target latents for latents (B, ...) with these conditions, and guidance (B,), 0 for the map alone."""
        import torch

        result, weights = self.map(z, z, raw, 0.0), torch.zeros(len(z), dtype=torch.float64)
        if self.levels is None:
            return result, weights
        if self.required_evidence is None:
            return self.regenerate(self.invert_and_map(z, raw), raw, self.sampling), weights + self.sampling.guidance
        index = self.unclear(result, raw)
        if not len(index):
            return result, weights
        z_t = self.invert_and_map(z[index], raw.select(index))
        for weight in GUIDANCE_WEIGHTS:
            weights[index], part = weight, raw.select(index)
            result[index] = self.regenerate(z_t, part, replace(self.sampling, guidance=weight))
            unclear = self.unclear(result[index], part)
            index, z_t = index[unclear], z_t[unclear]
            if not len(index):
                break
        return result, weights

    def calibrate(self, generated: "Tensor", raw: "Raw") -> None:
        """Require as much evidence as most of these generated latents (B, ...) have, at most `MAX_EVIDENCE`."""
        self.required_evidence = min(MAX_EVIDENCE, float(self.evidence(generated, raw).quantile(EVIDENCE_QUANTILE)))

    def unclear(self, z: "Tensor", raw: "Raw") -> "Tensor":
        """The positions of those latents z (B, ...) that lack the required evidence of the target class."""
        assert self.required_evidence is not None
        return (self.evidence(z, raw) < self.required_evidence).nonzero().flatten().cpu()

    def regenerate(self, z_t: "Tensor", raw: "Raw", sampling: "Sampling") -> "Tensor":
        """Latents of the target class by the flow from z_t (B, ...); other conditions stay."""
        from sfumato.core import integrate_to_data

        assert self.levels is not None
        denoise = self.model.denoise(self.of_class(self.target, raw), len(z_t), sampling)
        return integrate_to_data(denoise, self.levels, z_t)

    def evidence(self, z: "Tensor", raw: "Raw") -> "Tensor":
        """Log-likelihood ratio (B,) of latents (B, ...) under the target class against other classes."""
        from sfumato.core import step_generator
        from sfumato.core.likelihood import class_log_likelihood_ratio

        classes = self.model.conditioner.labels[self.name].classes
        others = [*self.maps, *(k for k in range(classes) if k not in self.maps)]
        labels = [self.target, *[k for k in others if k != self.target][:MAX_ALTERNATIVES]]
        target, *alternatives = (
            self.model.denoise(self.of_class(k, raw), len(z), self.sampling.unguided) for k in labels
        )
        generator = step_generator(0, "evidence", 0)
        return class_log_likelihood_ratio(target, alternatives, self.model.denoiser.schedule, z, generator)

    def map(self, z_t: "Tensor", z: "Tensor", raw: "Raw", t: float) -> "Tensor":
        """Noisy latents z_t (B, ...) at time t of latents z with these conditions, mapped to the target class."""
        level = self.model.denoiser.schedule(t)
        alpha, sigma, z_t = float(level.alpha), float(level.sigma), z_t.clone()
        for label, residual_map in self.maps.items():
            of_class = (self.classes(raw) == label).to(z.device)
            mapped = residual_map.gaussian_map(z_t[of_class], alpha, sigma)
            z_t[of_class] = mapped + alpha * residual_map.residual(z[of_class])
        return z_t
