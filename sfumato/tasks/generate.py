"""New items from a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress


SHOWN = 100  # items on a sheet


@dataclass
class Result:
    """Items (N, ...) in the range of the data, and for each a row of facts: label, seed, item number, settings."""

    items: "Tensor"
    rows: list[dict[str, Any]]
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def summary(self) -> dict[str, Any]:
        """What was made, in a few numbers."""
        return {"items": len(self.items), "seconds": round(self.seconds, 2), **self.facts}


def generate(
    model: "Path | str | Model",
    *,
    n: int = 64,
    out: Path | None = None,
    sheet: Path | None = None,
    label: str | None = None,
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

    Without a label, a model with classes goes evenly through them, shuffled. Item i is the same whatever n and batch.

    Args:
        model: Folder of the model.
        n: How many items.
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows the first 100 of them side by side, of a table how 2,000 rows are distributed.
        label: Class of all items (default: every class in turn).
        where: What each row must fulfil, such as income=>50K or age>=30; rows are drawn until enough do. If hardly any
            does, they are made around the cells that = says.
        balance: Column of a table of whose categories there should be as many rows each.
        steps: Steps of the sampler (default: what fit chose).
        guidance: Weight of the condition; 1 is off (default: what fit chose).
        autoguidance: Weight by which the model's weaker self is left behind; 1 is off, with half the calls of a network
            (default: what fit chose).
        sampler: ddpm, ddim, euler, heun, dpmpp_2m, unipc, abm2 or sde; jump for few-step models (default: what fit
            chose).
        seed: Seed of the noise.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The items and their facts.

    Raises:
        UserError: No such model, label, sampler or column; a condition that hardly any row fulfils; the folder is not
            empty or cannot be written.
    """
    import time

    from sfumato.data import save_picture
    from sfumato.tasks.common import check_counts, is_main, open_model
    from sfumato.tasks.kinds import of_kinds
    from sfumato.tasks.places import check_places

    start = time.perf_counter()
    check_counts(n=n, steps=steps, batch=batch)
    loaded = open_model(model, device)
    how = sampling(loaded, steps, guidance, sampler, autoguidance)
    check_places(loaded, out, sheet, overwrite, beside=False)
    fixed = None if label is None else loaded.class_number(label)
    kinds = loaded.modality.kinds(where, balance, loaded.card.mode) if where or balance is not None else None

    draw = _Maker(loaded, fixed, how, seed, batch, progress)
    numbers, items = (range(n), draw(range(n))) if kinds is None else of_kinds(n, kinds, draw)
    rows = _rows(loaded, numbers, seed, fixed, how)
    if out is not None and is_main():
        loaded.modality.write(out, items, rows, loaded.card.mode, overwrite)
    if sheet is not None and is_main():
        save_picture(loaded.modality.sheet(items[: max(SHOWN, loaded.modality.shown)], loaded.card.mode, None), sheet)
    return Result(items, rows, time.perf_counter() - start, vars(how).copy())


@dataclass
class _Maker:
    """Makes items by their numbers, all of one class (`fixed`) or of each class in turn."""

    model: "Model"
    fixed: int | None
    how: "Sampling"
    seed: int
    batch: int
    progress: "Progress | None"

    def __call__(self, numbers: Sequence[int], known: "Tensor | None" = None) -> "Tensor":
        """The items (N, ...), shared out between processes; with the cells that are known, if any are."""
        import torch

        from sfumato.tasks.common import Collected, batches, drawn, gathered, shard, tell
        from sfumato.tasks.inpaint import around

        model, how, mine = self.model, self.how, [numbers[i] for i in shard(len(numbers))]
        if known is None:
            labels = model.labels_for(mine, self.seed) if self.fixed is None else torch.full((len(mine),), self.fixed)
            made = (model.decode(z) for z in drawn(model, mine, labels, how, self.seed, self.batch))
        else:
            made = (around(model, some, known, how, self.seed) for some in batches(mine, self.batch))
        parts = Collected(len(mine), model.card.shape)
        for part in made:
            parts.append(part)
            tell(self.progress, "generate", parts.done, len(mine))
        return gathered(parts.items, len(numbers))


def sampling(
    model: "Model",
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    autoguidance: float | None = 1.0,
) -> "Sampling":
    """The model's own sampling defaults with what the user fixed, checked.

    Autoguidance is for new items (None: as `fit` chose); what is made of given ones should stay as likely as it was.

    Of a few-step model `steps` means jumps; any other sampler takes the steps that it took of the teacher.
    """
    from dataclasses import replace

    from sfumato.choice import choose
    from sfumato.core.sampler import SAMPLERS
    from sfumato.errors import UserError
    from sfumato.model import JUMP

    taught, grid = model.card.distilled, None
    if sampler == JUMP and taught is None:
        raise UserError(f"--sampler {JUMP} is for few-step models; make one with: sfumato distill MODEL --out RUN")
    if sampler not in (None, JUMP):
        choose(SAMPLERS, "sampler", sampler)
        steps = steps if taught is None else steps or taught["steps"]
        grid = None if taught is None else taught.get("grid")  # folders of before have none
    if taught is not None and guidance not in (None, 1):
        built_in = f"the weight {taught['guidance']} is built into this few-step model"
        raise UserError(f"--guidance {guidance}: {built_in}; take its teacher, or distill it with another --guidance")
    if taught is not None and autoguidance not in (None, 1):
        raise UserError(f"--autoguidance {autoguidance:g}: what the teacher had is built into this few-step model")
    if model.guide is None and autoguidance not in (None, 1):
        remedy = "train one with --set sample.autoguidance=2"
        raise UserError(f"--autoguidance {autoguidance:g}: this model has no weaker self; {remedy}")
    given = {"steps": steps, "guidance": guidance, "sampler": sampler, "autoguidance": autoguidance, "grid": grid}
    return replace(model.sampling, **{key: value for key, value in given.items() if value is not None})


def _rows(
    model: "Model", numbers: Sequence[int], seed: int, fixed: int | None, how: "Sampling"
) -> list[dict[str, Any]]:
    """A row of facts per item."""
    from sfumato.tasks.common import label_values

    labels = model.labels_for(numbers, seed) if fixed is None else [fixed] * len(numbers)
    facts = {"seed": seed, "sampler": how.sampler, "steps": how.steps, "guidance": how.guidance}
    if model.guide is not None:
        facts["autoguidance"] = how.autoguidance
    if labels is None:
        return [{"item": i, **facts} for i in numbers]
    values = label_values(model.card.label_names)
    return [{"label": values[int(k)], "item": i, **facts} for i, k in zip(numbers, labels, strict=True)]
