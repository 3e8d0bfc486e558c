"""Generate new items."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.outputs import ITEMS_PER_SHEET, Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.conditioners import ConditionValue
    from sfumato.modalities.base import Strata
    from sfumato.model import Model
    from sfumato.sampling import Sampling
    from sfumato.types import Items, Progress, Raw


def generate(
    model: "Path | str | Model",
    *,
    n: int = 64,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | Sequence[str] | None = None,
    where: Sequence[str] = (),
    balance: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    autoguidance: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch: int = 500,
    overwrite: bool = False,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> Result:
    """Generate new items.

    Without --label, the classes are balanced and shuffled; other conditions that are not given are those of similar
    training items. Item i does not depend on -n or --batch.

    Args:
        model: Folder of the model.
        n: Number of items.
        out: Output folder for the items and metadata.jsonl; for tables, the output file.
        sheet: Contact sheet of the first 100 items; for tables, distributions of 2,000 rows.
        label: Class of all items, or name=value of a condition; may be given several times (default: all classes in
            equal shares).
        where: Keep only rows that match, such as income=>50K or age>=30. Rare conditions: the = cells are fixed and the
            rest is inpainted.
        balance: Table column whose categories get equal numbers of rows.
        steps: Sampler steps (default: chosen by fit).
        guidance: Guidance weight; 1 disables it (default: chosen by fit).
        autoguidance: Autoguidance weight; 1 disables it and halves the network evaluations (default: chosen by fit).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde; jump for few-step models (default: chosen by
            fit).
        seed: Random seed.
        batch: Items per batch.
        overwrite: Replace existing output.
        device: Where to compute, such as cpu or cuda (default: the best available device).
        progress: Called with the stage, the amount done, and the total.

    Returns:
        The items and their metadata.

    Raises:
        UserError: The model, label, condition, sampler or column does not exist; hardly any row matches; or the output
            folder is not empty or cannot be written.
    """
    import time

    from sfumato.conditioners import parse_conditions
    from sfumato.tasks.inputs import check_counts, open_model
    from sfumato.tasks.outputs import check_outputs, write_items
    from sfumato.tasks.rejection import fill_strata

    start = time.perf_counter()
    check_counts(n=n, steps=steps, batch=batch)
    loaded = open_model(model, device)
    sampling = loaded.choose_sampling(steps, guidance, sampler, autoguidance)
    check_outputs(loaded, out, sheet, overwrite, default_sheet=False)
    values = parse_conditions(loaded.conditioner, label)
    strata = _strata(loaded, where, balance)

    generator = _Generator(loaded, values, sampling, seed, batch, progress)
    numbers, items = (range(n), generator(range(n))) if strata is None else fill_strata(n, strata, generator)
    metadata = generator.metadata(numbers)
    shown = items[: max(ITEMS_PER_SHEET, loaded.modality.preview_items)]
    write_items(loaded, items, metadata, out, sheet, overwrite, shown)
    return Result(items, metadata, time.perf_counter() - start, vars(sampling).copy())


def _strata(model: "Model", where: Sequence[str], balance: str | None) -> "Strata | None":
    """The groups of items that the conditions request; None without conditions."""
    from sfumato.errors import UserError
    from sfumato.modalities.base import Conditional

    if not where and balance is None:
        return None
    if not isinstance(model.modality, Conditional):
        flag = f"--where {where[0]}" if where else "--balance"
        raise UserError(f"{flag}: applies only to tables; use --label to request a class")
    return model.modality.strata(where, balance, model.config.spec)


@dataclass
class _Generator:
    """Generates items by number, with the requested values of conditions; without any, classes are balanced."""

    model: "Model"
    values: "Mapping[str, ConditionValue]"
    sampling: "Sampling"
    seed: int
    batch: int
    progress: "Progress | None"

    def __call__(self, numbers: Sequence[int], fixed: "Tensor | None" = None) -> "Items":
        """The items (N, ...), split between processes; `fixed` holds the values of fixed cells, NaN elsewhere."""
        from sfumato.distributed import gather, shard
        from sfumato.tasks.inputs import ItemBuffer, report_progress

        local = [numbers[i] for i in shard(len(numbers))]
        buffer = ItemBuffer(len(local), self.model.config.shape)
        for part in self._batches(local, fixed):
            buffer.append(part)
            report_progress(self.progress, "generate", buffer.done, len(local))
        return gather(buffer.items, len(numbers))

    def _batches(self, numbers: Sequence[int], fixed: "Tensor | None") -> "Iterator[Items]":
        """The items of this process, batch by batch."""
        from sfumato.tasks.inpaint import inpaint_fixed
        from sfumato.tasks.inputs import batches

        model, seed, sampling = self.model, self.seed, self.sampling
        for part in batches(numbers, self.batch):
            if fixed is not None:
                yield inpaint_fixed(model, part, fixed, sampling, seed)
            else:
                yield model.decode(model.sample(part, self._conditions(part), seed=seed, sampling=sampling))

    def _conditions(self, numbers: Sequence[int]) -> "Raw":
        """The conditions of the items (N)."""
        from sfumato.sampling import new_conditions

        return new_conditions(self.model.conditioner, numbers, self.seed, self.values)

    def metadata(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """A row per item: conditions such as `label`, item number, settings."""
        from sfumato.tasks.conditions import condition_metadata

        model, sampling = self.model, self.sampling
        settings = {"seed": self.seed, "sampler": sampling.sampler}
        settings |= {"steps": sampling.steps, "guidance": sampling.guidance}
        if model.guide is not None:
            settings["autoguidance"] = sampling.autoguidance
        rows = condition_metadata(model, self._conditions(numbers), len(numbers))
        return [{**row, "item": i, **settings} for i, row in zip(numbers, rows, strict=True)]
