"""What `augment` is worth to a classifier: few labels, many images without; one row of a Markdown table a run.

    python benchmarks/augment.py --data fashion-mnist --labels 20,100 --seeds 0,1,2,3,4 --budget 10m
    python benchmarks/augment.py --data fashion-mnist --labels all --more 1000

For each number of labels a class and each seed: labels are drawn, the others left open; `sfumato fit` trains on all of
it (a thousand of the open images are held out), `sfumato augment` brings each class up to --more beyond the labelled
ones; and one small network is trained, always in the same way, on

* real: the labelled images as they are;
* classical: the same moved, mirrored and cut into, as much as is best on a third of other labels, held back twice (a
  draw of as many that is no seed of the table);
* pseudo: classical, and all open images under the labels that the classifier of `augment` sees in them;
* made: classical, and made images alone, of `augment --no-guess`;
* augment: classical, and what `augment` adds: open images that it is sure of, and made ones where these are short.

A step sees as many labelled images each way; the others come on top, and count the less the more labels there are.
`teacher` is the classifier of `augment` itself; `guessed` and `made` say how many of each kind it added. All are
measured on the official test images. Everything runs from commands as a user would type them; what is done is kept in
OUT and skipped the next time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from quality import Failed, call
from tables import kept
from torch import Tensor

from sfumato.data import Data, Joined, read_images
from sfumato.machine import best_precision
from sfumato.modality.sorter import ImageSorter
from sfumato.nn.classifier import Classifier, endless, fresh, predict
from sfumato.nn.semi import moved

Facts = dict[str, Any]
WAYS = ("real", "classical", "pseudo", "made", "augment")
MORE = {"made": ["--no-guess"], "augment": []}  # ways that use a set, and what `augment` is told
WIDTH, BATCH, RATE = 16, 128, 4e-3  # as many labelled images a step, and as many others
SHORT, LONG, LONGEST = 500, 1_500, 4_000  # steps; the last where all images are labelled
ENOUGH = 2_000  # labelled images from which on others count less: as much in all as so many labelled ones
HELD = 1_000  # images that `fit` holds out for its own checks
TUNING = 1_000  # seed of the labels that classical augmentation is tuned on


class Moves(NamedTuple):
    """Classical augmentation: pixels moved, mirrored or not, side of the square cut out; and how long is trained."""

    shift: int = 0
    mirror: bool = False
    cut: int = 0
    steps: int = SHORT


GRID = [Moves(*one) for one in product((0, 1, 2, 3), (False, True), (0, 8))]


def moved_about(x: Tensor, how: Moves, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each by itself changed as is said."""
    if how.shift:
        x = moved(x, how.shift, generator)
    if how.mirror:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    if how.cut:
        rows, columns = (
            ((torch.arange(side) - torch.randint(0, side, (len(x), 1), generator=generator)).abs() * 2 <= how.cut)
            for side in x.shape[-2:]
        )
        x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
    return x


def train(given: Data, more: Joined | None, classes: int, how: Moves, seed: int) -> Classifier:
    """The network that all ways share, trained on labelled images and perhaps on more."""
    generator = torch.Generator().manual_seed(seed)
    order = endless(len(given), min(BATCH, len(given)), generator)
    other_order = None if more is None else endless(len(more), min(BATCH, len(more)), generator)
    weight = min(1.0, ENOUGH / len(given))
    net = fresh(given.shape, classes, WIDTH, seed, torch.device("cpu"))
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=how.steps, pct_start=0.2)
    net.train()
    for _ in range(how.steps):
        batch = given.batch(next(order))
        x, y = batch.data, batch.label
        assert y is not None
        counts = torch.ones(len(y))
        if more is not None and other_order is not None:
            other = more.batch(next(other_order))
            assert other.label is not None
            x, y = torch.cat([x, other.data]), torch.cat([y, other.label])
            counts = torch.cat([counts, torch.full((len(other.data),), weight)])
        x = moved_about(x, how, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=best_precision("cpu") == "bf16"):
            logits = net(x)
        losses = F.cross_entropy(logits.float(), y, label_smoothing=0.05, reduction="none")
        loss = (counts * losses).sum() / counts.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: Classifier, data: Data) -> float:
    """Share of images whose class the network sees."""
    parts = [predict(net, data.batch(index).data) for index in torch.arange(len(data)).split(1_000)]
    assert data.labels is not None
    return float((torch.cat(parts).numpy() == data.labels).mean())


def tuned(given: Data, classes: int, seed: int) -> Moves:
    """The classical augmentation that is best on a third of the labels, held back twice; then how long is best."""

    def best(grid: Sequence[Moves]) -> Moves:
        scores = dict.fromkeys(grid, 0.0)
        for fold in range(2):
            order = np.random.default_rng([seed, fold]).permutation(len(given))
            third = min(len(given) // 3, 5_000)
            held, rest = given.subset(order[:third]), given.subset(order[third:])
            for how in grid:
                scores[how] += accuracy(train(rest, None, classes, how, seed), held)
        return max(scores, key=lambda how: scores[how])

    moves = best(GRID)
    return best([moves, moves._replace(steps=LONG)])


def drawn(data: Data, labels: int, seed: int) -> Data:
    """The same with so many labels of each class; the others are left open (-1)."""
    assert data.labels is not None
    rng, kept = np.random.default_rng(seed), np.full(len(data), -1)
    for k in range(data.classes):
        mine = rng.permutation(np.flatnonzero(data.labels == k))[: labels or None]
        kept[mine] = k
    return replace(data, labels=kept)


def write_source(data: Data, path: Path, seed: int) -> None:
    """An .npz that `fit` and `augment` read; open images are held out if there are any; open labels are not numbers."""
    assert data.labels is not None
    free = np.flatnonzero(data.labels < 0)
    free = np.random.default_rng([seed, 1]).permutation(free if len(free) else len(data))
    held = np.isin(np.arange(len(data)), free[: min(HELD, len(free) // 2)])
    labels = np.where(data.labels < 0, np.nan, data.labels)
    parts = {"x_train": data.pixels[~held], "y_train": labels[~held]}
    np.savez(path, **parts, x_test=data.pixels[held], y_test=labels[held])


def added(source: Path, run: Path, way: str, n: int, seed: int, options: argparse.Namespace) -> tuple[Data, Facts]:
    """The images that `augment` adds to the labelled ones, and what the commands said and took."""
    often, out = ["--seed", str(seed), "--overwrite", "--quiet"], f"{run}-{way}"

    def fit() -> Facts:
        done = call(["-m", "sfumato", "fit", str(source), "--out", str(run), "--budget", options.budget, *often])
        return {"seconds": done.seconds}

    def make() -> Facts:
        words = ["-m", "sfumato", "augment", str(run), str(source), "--out", out, "-n", str(n), *often, "--json"]
        done = call([*words, *MORE[way], *(word for part in options.draw for word in part.split("="))])
        return {"seconds": done.seconds, "report": json.loads(done.output)}

    fitted = kept(run.with_name(f"{run.name}-fit.json"), fit)
    facts = {"fit": fitted["seconds"]} | kept(run.with_name(f"{run.name}-{way}.json"), make)
    whole, _ = read_images(out)
    rows = [json.loads(line) for line in Path(out, "metadata.jsonl").read_text().splitlines()]
    return whole.subset([i for i, row in enumerate(rows) if "item" in row or "guessed" in row]), facts


def run_name(labels: int, seed: int, options: argparse.Namespace) -> str:
    """What a run and its record are called."""
    how = "".join(part.lstrip("-") for part in options.draw)
    return f"{Path(options.data).name}-{labels or 'all'}-{options.budget}-{options.more}{how}-{seed}"


def measured(labels: int, seed: int, way: str, options: argparse.Namespace) -> Facts:
    """The accuracy of a way."""
    torch.set_num_threads(options.threads)
    (data, test), name = read_images(options.data), run_name(labels, seed, options)
    assert test is not None
    source = options.out / f"{name}.npz"
    write_source(drawn(data, labels, seed), source, seed)
    part = read_images(source)[0]
    if way == "teacher":
        return {"accuracy": accuracy(teacher(part), test)}
    given = labelled(part)
    how, facts, more = moves(data, labels, options), Facts(), None
    if way == "real":
        how = Moves(steps=how.steps)
    elif way == "pseudo":
        more = pseudo_labelled(part)
    elif way in MORE:
        more, facts = added(source, options.out / name, way, largest(given) + options.more, seed, options)
    if more is not None:
        how = how._replace(steps=max(LONG, how.steps))
    net = train(given, None if more is None else Joined([more]), data.classes, how, seed)
    return facts | {"moves": how._asdict(), "accuracy": accuracy(net, test)}


def moves(data: Data, labels: int, options: argparse.Namespace) -> Moves:
    """The classical augmentation of so many labels a class, found once and kept."""
    record = options.out / f"{Path(options.data).name}-{labels or 'all'}-moves.json"
    others = labelled(drawn(data, labels, TUNING))
    how = Moves(**kept(record, lambda: tuned(others, data.classes, TUNING)._asdict()))
    return how if labels else how._replace(steps=LONGEST)


def largest(data: Data) -> int:
    """How many images the largest class has."""
    assert data.labels is not None
    return int(np.bincount(data.labels).max())


def teacher(part: Data) -> Classifier:
    """The classifier of `augment`, as it trained and kept it."""
    return ImageSorter(part, [], part.label_names).network


def pseudo_labelled(part: Data) -> Data | None:
    """All open images under the labels that the teacher sees in them; None if there are none."""
    assert part.labels is not None
    others = part.subset(np.flatnonzero(part.labels < 0))
    return replace(others, labels=predict_all(teacher(part), others)) if len(others) else None


def labelled(data: Data) -> Data:
    """The images that have a label."""
    assert data.labels is not None
    return data.subset(np.flatnonzero(data.labels >= 0))


def predict_all(net: Classifier, data: Data) -> np.ndarray:
    """The class that the network sees in each image (N,)."""
    return torch.cat([predict(net, data.batch(i).data) for i in torch.arange(len(data)).split(1_000)]).numpy()


def table_row(name: str, labels: int, facts: Sequence[Facts]) -> str:
    """The line of one number of labels: mean and deviation over the seeds, in percent; and what is gained."""

    def shown(values: Sequence[float]) -> str:
        if not values:
            return "-"
        return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")

    def of(way: str) -> list[float]:
        return [f[way]["accuracy"] for f in facts if way in f]

    cells = [name, labels or "all", len(facts), *(shown(of(way)) for way in (*WAYS, "teacher"))]
    for way in MORE:
        both = [f for f in facts if {way, "classical"} <= set(f)]
        cells.append(shown([f[way]["accuracy"] - f["classical"]["accuracy"] for f in both]))
    done = [f["augment"] for f in facts if "augment" in f]
    cells += [f"{mean(f[part] for f in done):.0f}" if done else "-" for part in ("fit", "seconds")]
    cells += [f"{mean(f['report'][part] for f in done):.0f}" if done else "-" for part in ("guessed", "made")]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [part for part in text.split(",") if part]
    counts = lambda text: [0 if part == "all" else int(part) for part in listed(text)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="a built-in set with test images")
    parser.add_argument("--labels", type=counts, default=[20, 100], help="labels a class, or all")
    parser.add_argument("--seeds", type=counts, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="10m", help="of each fit")
    parser.add_argument("--more", type=int, default=2_000, help="images of each class that are added")
    parser.add_argument("--ways", type=listed, default=[*WAYS, "teacher"], help="what is measured, in this order")
    listed_draw = "an option of augment and its value"
    parser.add_argument("--draw", action="append", default=[], metavar="--steps=20", help=listed_draw)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/augment"), help="where runs and records go")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options, failed = read_options(words), 0
    options.out.mkdir(parents=True, exist_ok=True)
    gains = [f"gain of {way}" for way in MORE]
    head = ["data", "labels", "seeds", *WAYS, "teacher", *gains, "fit s", "augment s", "guessed", "made"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for labels in options.labels:
        found: list[Facts] = []
        for seed in options.seeds:
            facts: Facts = {}
            try:
                for way in options.ways:
                    make = lambda labels=labels, seed=seed, way=way: measured(labels, seed, way, options)
                    facts[way] = kept(options.out / f"{run_name(labels, seed, options)}-{way}-accuracy.json", make)
                found.append(facts)
                print(table_row(options.data, labels, found), file=sys.stderr, flush=True)
            except Failed as error:
                print(f"{labels} labels, seed {seed}: {error}", file=sys.stderr, flush=True)
                failed = 1
        if found:
            print(table_row(options.data, labels, found), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
