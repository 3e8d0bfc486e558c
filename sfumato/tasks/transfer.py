"""Given items carried over from one class to another, such as from one style to another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.tasks.generate import Result

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.core import Bent
    from sfumato.model import Model, Sampling
    from sfumato.tasks.common import Progress

WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the target class, tried until it shows
UNCLEAR = 0.2  # share of new items that show their class less clearly than is asked of those carried over
CLEAR = math.log(1e6)  # nats, from which on no more is asked: a class that is a million times as likely as the others
COMPARED = 500  # new items
RIVALS = 8  # other classes that an item might show instead, at most


def transfer(
    model: "Path | str | Model",
    source: str | Path,
    *,
    label: str,
    own_label: str | None = None,
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
    """Carry items over into another class, keeping what both classes share: a photograph's motif, a digit's shape.

    The model is one of both classes (such as styles, a folder each), and no item need be there in both. What
    corresponds to what is found out from new items that it makes of each: the map that carries one class's mean and
    covariance into the other's, turned so that what it makes is most likely in the target class, and a small network
    that adds what no such map can do. What was found is kept in the cache: it is searched for once. An item that does
    not show the class yet is inverted a part of the way to its noise under its own class, carried over, and generated
    from there under the other.

    Args:
        model: Folder of the model.
        source: A built-in set, a folder, a file or hf://owner/name.
        label: Class to carry all items into.
        own_label: Class that all items are of (default: as the source says).
        out: Folder to write them to: the items, and metadata.jsonl.
        sheet: Picture file that shows some originals, each beside what became of it (default: OUT-sheet.png).
        strength: Share of noise at which the classes are crossed, from 0 (the map alone) to 1 (all the way). More
            gives the target's finer traits, and keeps less.
        align: Steps of the search for what corresponds; 0 takes the map that moves items least.
        rounds: How often a small network learns, from new items carried there and back, what the map misses; 0 is off.
        samples: New items of each class that it is found from.
        budget: What the search may take for each class that items are of, such as 5m; if need be with fewer of these
            items, and fewer steps (default: as long as it takes).
        steps: Steps of the flow, each way.
        guidance: Weight of the target class; 1 is off (default: for each item the smallest at which it shows the class,
            against the others, as clearly as four in five that `generate` makes of it, or beyond doubt).
        skip_bad: Leave out files that cannot be read.
        overrides: Fix how the source is read, such as data.resolution=64 (default: as for the training).
        seed: Seed of the new items and of the search.
        batch: Items computed at once.
        overwrite: Replace what is in the output folder, and the sheet.
        device: Where to compute, such as cpu or cuda.
        progress: Called with the stage, how much of it is done, and how much there is.

    Returns:
        The items and a row for each: its `source`, `label` (the new one), `source_label`, `guidance` (none where it
        was of the class already, or the map alone is enough), the settings.

    Raises:
        UserError: No such model, source or class; a model without classes; nothing says of which class the items are;
            the source has other items than the model's; a strength outside 0..1; too small a budget; the folder is not
            empty or cannot be written.

    References:
        Su et al., Dual Diffusion Implicit Bridges, https://arxiv.org/abs/2203.08382 (algorithm 1), which this is at
        strength 1 with no map; the map: `sfumato.core.align`; what it misses: `sfumato.core.bend`.
    """
    import time

    import torch

    from sfumato.config import parse_budget
    from sfumato.core import strength_time
    from sfumato.tasks.common import check_counts, open_model
    from sfumato.tasks.crossing import Effort, Search
    from sfumato.tasks.generate import sampling
    from sfumato.tasks.inputs import changed, changed_rows, class_numbers, deliver, read_inputs
    from sfumato.tasks.places import check_places

    begun = time.perf_counter()
    check_counts(steps=steps, batch=batch)
    check_counts(least=0, align=align, rounds=rounds)
    check_counts(least=2, samples=samples)
    loaded = open_model(model, device)
    goal, how = loaded.class_number(label), sampling(loaded, steps, guidance, "heun")
    start = strength_time(loaded.denoiser.schedule, strength)
    sheet = check_places(loaded, out, sheet, overwrite, sources=[source])
    inputs = read_inputs(model, loaded, source, overrides, skip_bad)
    own = _own_classes(source, class_numbers(loaded, own_label, inputs))
    classes = sorted({int(k) for k in own} - {goal})
    effort = Effort(align, rounds, samples, None if budget is None else parse_budget(budget, 1.0))
    search = Search(loaded, goal, effort, seed, progress)
    change = _Carried(loaded, own, goal, {k: search(k) for k in classes}, start, how)
    if guidance is None and classes and change.grid is not None:
        change.ask_as_clear_as(search.draw(goal, COMPARED, loaded.sampling))
    items = changed(loaded, inputs, change, batch, "transfer", progress)
    facts = {"strength": strength, "align": align, "rounds": rounds, "steps": steps, "seed": seed}
    rows = changed_rows(loaded, inputs, torch.full((len(inputs),), goal), facts)
    _record(rows, change.weights)
    facts |= {"guidance": guidance, **inputs.told()}
    deliver(loaded, inputs, items, rows, out, sheet, overwrite)
    return Result(items, rows, time.perf_counter() - begun, facts)


def _record(rows: "list[dict[str, Any]]", weights: "Tensor") -> None:
    """Put the guidance (N,) that each item got, in whichever process, into its row; None for none."""
    from sfumato.tasks.common import gathered, shard

    for row, weight in zip(rows, gathered(weights[shard(len(rows))], len(rows)), strict=True):
        row["guidance"] = float(weight) or None


def _own_classes(source: "str | Path", own: "Tensor | None") -> "Tensor":
    """The class numbers (N,) of all items, which must be known."""
    from sfumato.errors import UserError
    from sfumato.types import UNKNOWN

    remedy = "say which class its items are of with --own-label"
    if own is None:
        raise UserError(f"{source}: has no labels; {remedy}")
    if (own == UNKNOWN).any():
        raise UserError(f"{source}: {int((own == UNKNOWN).sum())} items have no label; {remedy}")
    return own


@dataclass
class _Carried:
    """Items to what they become in the class `goal`: inverted, carried over, generated."""

    model: "Model"
    own: "Tensor"
    goal: int
    crossings: "dict[int, Bent]"
    start: float
    how: "Sampling"
    wanted: float | None = None  # evidence of the goal that every item should show; None: the weight stands

    @cached_property
    def weights(self) -> "Tensor":
        """The guidance that each item got (N,); 0 of those that got none."""
        import torch

        return torch.zeros(len(self.own), dtype=torch.float64)

    def __call__(self, items: list[int], x: "Tensor") -> "Tensor":
        import torch

        z, own = self.model.encode(x).to(self.model.device), self.own[items]
        moved = own != self.goal  # the others are there
        if moved.any():
            there, index = moved.to(z.device), torch.tensor(items)[moved]
            z = z.clone()
            z[there], self.weights[index] = self.new(z[there], own[moved])
        return self.model.decode(z)

    @cached_property
    def grid(self) -> "Tensor | None":
        """Times of the flow; None if no noise is seen at the start, so that the data themselves are carried over."""
        from sfumato.core import flow_grid

        grid = flow_grid(self.model.denoiser.schedule, self.how.steps, self.start)
        return None if self.start <= float(grid[-1]) else grid

    def state(self, z: "Tensor", own: "Tensor") -> "Tensor":
        """Latents (B, ...) of the classes `own` (B,), inverted up to the start and carried over."""
        from sfumato.core import invert

        assert self.grid is not None
        under = self.model.denoise(own, len(z), self.how.unguided)
        return self.carried(invert(under, self.model.denoiser.schedule, z, self.grid), z, own, self.start)

    def new(self, z: "Tensor", own: "Tensor") -> "tuple[Tensor, Tensor]":
        """What becomes of latents (B, ...) of the classes `own` (B,), and by what guidance (B,): 0 is the map alone."""
        import torch

        new, weights = self.carried(z, z, own, 0.0), torch.zeros(len(z), dtype=torch.float64)
        if self.grid is None:
            return new, weights
        if self.wanted is None:
            return self.guided(self.state(z, own), self.how), weights + self.how.guidance
        left = self.unclear(new, torch.arange(len(z)))
        if not len(left):
            return new, weights
        z_t = self.state(z[left], own[left])
        for weight in WEIGHTS:
            weights[left] = weight
            new[left] = self.guided(z_t, replace(self.how, guidance=weight))
            some = self.unclear(new[left], torch.arange(len(left)))
            left, z_t = left[some], z_t[some]
            if not len(left):
                break
        return new, weights

    def ask_as_clear_as(self, new: "Tensor") -> None:
        """Want items to show the class as clearly as most of these new ones (B, ...) do, or beyond doubt."""
        self.wanted = min(CLEAR, float(self.evidence(new).quantile(UNCLEAR)))

    def unclear(self, z: "Tensor", items: "Tensor") -> "Tensor":
        """Those of some items, of latents z (B, ...), that do not show the goal's class as clearly as is wanted."""
        assert self.wanted is not None
        return items[(self.evidence(z) < self.wanted).cpu()]

    def guided(self, z_t: "Tensor", how: "Sampling") -> "Tensor":
        """The flow from such states (B, ...) to latents of the goal."""
        from sfumato.core import regenerate
        from sfumato.tasks.crossing import same

        assert self.grid is not None
        under = self.model.denoise(same(self.goal, len(z_t)), len(z_t), how)
        return regenerate(under, self.model.denoiser.schedule, z_t, self.grid)

    def evidence(self, z: "Tensor") -> "Tensor":
        """How clearly latents (B, ...) show the goal's class (B,)."""
        from sfumato.core import class_evidence, step_generator
        from sfumato.tasks.crossing import same

        rivals = [*self.crossings, *(k for k in range(len(self.model.card.label_names)) if k not in self.crossings)]
        labels = [self.goal, *[k for k in rivals if k != self.goal][:RIVALS]]
        under, *others = (self.model.denoise(same(k, len(z)), len(z), self.how.unguided) for k in labels)
        return class_evidence(under, others, self.model.denoiser.schedule, z, step_generator(0, "evidence", 0))

    def carried(self, z_t: "Tensor", z: "Tensor", own: "Tensor", t: float) -> "Tensor":
        """States (B, ...) at time t of latents z (B, ...) of the classes `own` (B,), as such of the goal."""
        alpha, sigma = (float(value) for value in self.model.denoiser.schedule(t))
        z_t = z_t.clone()
        for label, way in self.crossings.items():
            here = (own == label).to(z.device)
            z_t[here] = way.crossing(z_t[here], alpha, sigma) + alpha * way.added(z[here])
        return z_t
