"""What made images are worth to a classifier: few labels, many images without; one row of a Markdown table a run.

    python benchmarks/augment.py --data fashion-mnist --labels 20,100 --seeds 0,1,2,3,4 --budget 10m
    python benchmarks/augment.py --data fashion-mnist --labels all --made 1000

For each number of labels a class and each seed: labels are drawn, the others left open; `sfumato fit` trains on all of
it (a thousand of the open images are held out), `sfumato augment` makes a balanced set; and one small network is
trained, always in the same way, on

* real: the labelled images as they are;
* classical: the same moved, mirrored and cut into, as much as is best on a third of other labels, held back twice (a
  draw of as many that is no seed of the table);
* pseudo: classical, and the open images under the labels that the classifier of `augment` sees in them (no generation);
* augment: classical, and the made images.

A step sees as many labelled images each way; the others come on top, and count the less the more labels there are.
`teacher` is the classifier of `augment` itself. All are measured on the official test images. Everything runs from
commands as a user would type them; what is done is kept in OUT and skipped the next time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
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
from sfumato.modality.sorter import ImageSorter
from sfumato.nn.classifier import Classifier, endless, fresh, predict
from sfumato.nn.semi import moved

Facts = dict[str, Any]
WAYS = ("real", "classical", "pseudo", "augment")
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
        losses = F.cross_entropy(net(x), y, label_smoothing=0.05, reduction="none")
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


def made_by(source: Path, run: Path, n: int, seed: int, options: argparse.Namespace) -> tuple[Data, Facts]:
    """The images that `augment` made, and what the commands said and took."""
    often, out = ["--seed", str(seed), "--overwrite", "--quiet"], f"{run}-set"

    def make() -> Facts:
        fit = call(["-m", "sfumato", "fit", str(source), "--out", str(run), "--budget", options.budget, *often])
        words = ["-m", "sfumato", "augment", str(run), str(source), "--out", out, "-n", str(n), *often, "--json"]
        done = call([*words, *(word for part in options.draw for word in part.split("="))])
        facts = {"fit": fit.seconds, "made": done.seconds, "gib": round(max(fit.gib, done.gib), 2)}
        return facts | {"report": json.loads(done.output)}

    facts = kept(run.with_name(f"{run.name}-made.json"), make)
    whole, _ = read_images(out)
    rows = [json.loads(line) for line in Path(out, "metadata.jsonl").read_text().splitlines()]
    return whole.subset([i for i, row in enumerate(rows) if "item" in row]), facts


def run_name(labels: int, seed: int, options: argparse.Namespace) -> str:
    """What a run and its record are called."""
    how = "".join(part.lstrip("-") for part in options.draw)
    return f"{Path(options.data).name}-{labels or 'all'}-{options.budget}-{options.made}{how}-{seed}"


def measured(labels: int, seed: int, options: argparse.Namespace) -> Facts:
    """The accuracy of each way."""
    torch.set_num_threads(options.threads)
    (data, test), name = read_images(options.data), run_name(labels, seed, options)
    assert test is not None
    source = options.out / f"{name}.npz"
    write_source(drawn(data, labels, seed), source, seed)
    part, classes = read_images(source)[0], data.classes
    given = labelled(part)
    most = int(np.bincount(given.labels).max())
    made, facts = made_by(source, options.out / name, most + options.made, seed, options)
    record = options.out / f"{Path(options.data).name}-{labels or 'all'}-moves.json"
    others_drawn = labelled(drawn(data, labels, TUNING))
    how = Moves(**kept(record, lambda: tuned(others_drawn, classes, TUNING)._asdict()))
    how = how if labels else how._replace(steps=LONGEST)
    teacher = ImageSorter(part, [], part.label_names).network  # as `augment` trained and kept it
    assert part.labels is not None
    others = part.subset(np.flatnonzero(part.labels < 0))
    guessed = Joined([replace(others, labels=predict_all(teacher, others))]) if len(others) else None
    longer = how._replace(steps=max(LONG, how.steps))
    jobs: dict[str, Callable[[], Classifier]] = {
        "real": lambda: train(given, None, classes, Moves(steps=how.steps), seed),
        "classical": lambda: train(given, None, classes, how, seed),
        "pseudo": lambda: train(given, guessed, classes, longer, seed),
        "augment": lambda: train(given, Joined([made]), classes, longer, seed),
        "teacher": lambda: teacher,
    }
    return facts | {"moves": how._asdict(), **{way: accuracy(make(), test) for way, make in jobs.items()}}


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
        return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")

    cells = [name, labels or "all", len(facts), *(shown([f[way] for f in facts]) for way in (*WAYS, "teacher"))]
    cells.append(shown([f["augment"] - f["classical"] for f in facts]))
    cells += [f"{mean(f[part] for f in facts):.0f}" for part in ("fit", "made")]
    cells.append(max(sum(f["report"].get("short", {}).values()) for f in facts))
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
    parser.add_argument("--made", type=int, default=2_000, help="images of each class that are made")
    listed_draw = "an option of augment and its value"
    parser.add_argument("--draw", action="append", default=[], metavar="--steps=20", help=listed_draw)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/augment"), help="where runs and records go")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options, failed = read_options(words), 0
    options.out.mkdir(parents=True, exist_ok=True)
    head = ["data", "labels", "seeds", *WAYS, "teacher", "gain", "fit s", "augment s", "short"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for labels in options.labels:
        found: list[Facts] = []
        for seed in options.seeds:
            try:
                make = lambda labels=labels, seed=seed: measured(labels, seed, options)
                found.append(kept(options.out / f"{run_name(labels, seed, options)}.json", make))
                print(table_row(options.data, labels, found), file=sys.stderr, flush=True)
            except Failed as error:
                print(f"{labels} labels, seed {seed}: {error}", file=sys.stderr, flush=True)
                failed = 1
        if found:
            print(table_row(options.data, labels, found), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
