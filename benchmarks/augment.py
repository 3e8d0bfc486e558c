"""What `augment` adds to a classifier with few labels and many unlabelled images. Prints a Markdown table.

    python benchmarks/augment.py --data fashion-mnist --labels 20,100 --seeds 0,1,2,3,4 --budget 10m
    python benchmarks/augment.py --data fashion-mnist --labels all --more 1000

For each number of labels per class and each seed, labels are sampled and removed from all other images. `sfumato fit`
trains on everything (a thousand unlabelled images are held out), `sfumato augment` adds --more images to each class,
and one small network is trained, always in the same way, on

* real: the labelled images unchanged;
* classical: the same, shifted, mirrored and cut out, with the strengths that are best in two-fold validation on a third
  of other labels (sampled with a seed that is not in the table);
* pseudo: classical, and all unlabelled images under the pseudo-labels of the classifier of `augment`;
* made: classical, and generated images only, by `augment --no-pseudo-labels`;
* augment: classical, and what `augment` adds: confidently pseudo-labelled images, then generated ones.

Each step sees the same number of labelled images in all methods; the added images come on top and get less weight the
more labels there are. `teacher` is the classifier of `augment` itself; `guessed` and `made` count the pseudo-labelled
and generated images. All are evaluated on the official test images. Every command runs as a user would type it;
results are stored in OUT, and later calls skip what is there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from quality import Failed, call
from tables import cached
from torch import Tensor

from sfumato.hardware import best_precision
from sfumato.modalities.image.classifier import Classifier, endless_batches, new_classifier, predict
from sfumato.modalities.image.dataset import ConcatDataset, ImageDataset
from sfumato.modalities.image.labeler import ImageLabeler
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.semi_supervised import random_shift

Record = dict[str, Any]
METHODS = ("real", "classical", "pseudo", "made", "augment")
AUGMENT_FLAGS = {"made": ["--no-pseudo-labels"], "augment": []}  # flags of `augment` for the methods that use it
WIDTH, BATCH, LR = 16, 128, 4e-3  # channels; labelled images per step, and as many added ones; peak AdamW rate
SHORT_STEPS, LONG_STEPS, ALL_LABELS_STEPS = 500, 1_500, 4_000  # optimizer steps; the last if all images are labelled
FULL_WEIGHT = 2_000  # labelled images up to which added images have weight 1; beyond, their total weight is constant
HELD_OUT = 1_000  # images that `fit` holds out
TUNING_SEED = 1_000  # seed of the labels that classical augmentation is tuned on


class Augmentation(NamedTuple):
    """Classical augmentation: shift in pixels, mirroring, side of the cut-out square; and the training steps."""

    shift: int = 0
    mirror: bool = False
    cut: int = 0
    steps: int = SHORT_STEPS


GRID = [Augmentation(*values) for values in product((0, 1, 2, 3), (False, True), (0, 8))]


def augment_batch(x: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each augmented independently."""
    if augmentation.shift:
        x = random_shift(x, augmentation.shift, generator)
    if augmentation.mirror:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    if augmentation.cut:
        rows, columns = (
            (
                (torch.arange(side) - torch.randint(0, side, (len(x), 1), generator=generator)).abs() * 2
                <= augmentation.cut
            )
            for side in x.shape[-2:]
        )
        x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
    return x


def train(
    data: ImageDataset, more: ConcatDataset | None, classes: int, augmentation: Augmentation, seed: int
) -> Classifier:
    """The network that all methods share, trained on labelled images and, if given, on added ones."""
    generator = torch.Generator().manual_seed(seed)
    order = endless_batches(len(data), min(BATCH, len(data)), generator)
    other_order = None if more is None else endless_batches(len(more), min(BATCH, len(more)), generator)
    weight = min(1.0, FULL_WEIGHT / len(data))
    net = new_classifier(data.shape, classes, WIDTH, seed, torch.device("cpu"))
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=augmentation.steps, pct_start=0.2)
    net.train()
    for _ in range(augmentation.steps):
        x, y = labelled_batch(data, next(order))
        weights = torch.ones(len(y))
        if more is not None and other_order is not None:
            other_x, other_y = labelled_batch(more, next(other_order))
            x, y = torch.cat([x, other_x]), torch.cat([y, other_y])
            weights = torch.cat([weights, torch.full((len(other_x),), weight)])
        x = augment_batch(x, augmentation, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=best_precision("cpu") == "bf16"):
            logits = net(x)
        losses = F.cross_entropy(logits.float(), y, label_smoothing=0.05, reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def labelled_batch(data: ImageDataset | ConcatDataset, index: Tensor) -> tuple[Tensor, Tensor]:
    """The images (B, C, H, W) and class numbers (B,) of the items `index` (B,)."""
    assert data.labels is not None
    return data.batch(index).data, torch.from_numpy(data.labels[index.numpy()])


@torch.no_grad()
def accuracy(net: Classifier, data: ImageDataset) -> float:
    """Share of images that the network classifies correctly."""
    parts = [predict(net, data.batch(index).data) for index in torch.arange(len(data)).split(1_000)]
    assert data.labels is not None
    return float((torch.cat(parts).numpy() == data.labels).mean())


def tune(data: ImageDataset, classes: int, seed: int) -> Augmentation:
    """The augmentation with the best accuracy on a held-out third of the labels, twice; then the number of steps."""

    def best(grid: Sequence[Augmentation]) -> Augmentation:
        scores = dict.fromkeys(grid, 0.0)
        for fold in range(2):
            order = np.random.default_rng([seed, fold]).permutation(len(data))
            third = min(len(data) // 3, 5_000)
            held, rest = data.subset(order[:third]), data.subset(order[third:])
            for augmentation in grid:
                scores[augmentation] += accuracy(train(rest, None, classes, augmentation, seed), held)
        return max(scores, key=lambda augmentation: scores[augmentation])

    chosen = best(GRID)
    return best([chosen, chosen._replace(steps=LONG_STEPS)])


def draw_labels(data: ImageDataset, labels: int, seed: int) -> ImageDataset:
    """The data with this many labels per class; the other images become unlabelled (-1)."""
    assert data.labels is not None
    rng, kept = np.random.default_rng(seed), np.full(len(data), -1)
    for k in range(data.classes):
        index = rng.permutation(np.flatnonzero(data.labels == k))[: labels or None]
        kept[index] = k
    return data.relabel(kept, list(data.label_names), data.notes)


def write_source(data: ImageDataset, path: Path, seed: int) -> None:
    """An .npz for `fit` and `augment`; missing labels are NaN, and unlabelled images are held out if there are any."""
    assert data.labels is not None
    candidates = np.flatnonzero(data.labels < 0)
    candidates = np.random.default_rng([seed, 1]).permutation(candidates if len(candidates) else len(data))
    held = np.isin(np.arange(len(data)), candidates[: min(HELD_OUT, len(candidates) // 2)])
    labels = np.where(data.labels < 0, np.nan, data.labels)
    parts = {"x_train": data.pixels[~held], "y_train": labels[~held]}
    np.savez(path, **parts, x_test=data.pixels[held], y_test=labels[held])


def added_images(
    source: Path, run: Path, method: str, n: int, seed: int, options: argparse.Namespace
) -> tuple[ImageDataset, Record]:
    """The images that `augment` adds to the labelled ones, and the report and seconds of the commands."""
    flags, out = ["--seed", str(seed), "--overwrite", "--quiet"], f"{run}-{method}"

    def fit() -> Record:
        done = call(["-m", "sfumato", "fit", str(source), "--out", str(run), "--budget", options.budget, *flags])
        return {"seconds": done.seconds}

    def make() -> Record:
        argv = ["-m", "sfumato", "augment", str(run), str(source), "--out", out, "-n", str(n), *flags, "--json"]
        done = call([*argv, *AUGMENT_FLAGS[method], *(word for part in options.flag for word in part.split("="))])
        return {"seconds": done.seconds, "report": json.loads(done.output)}

    fitted = cached(run.with_name(f"{run.name}-fit.json"), fit)
    record = {"fit": fitted["seconds"]} | cached(run.with_name(f"{run.name}-{method}.json"), make)
    whole, _ = read_images(out)
    rows = [json.loads(line) for line in Path(out, "metadata.jsonl").read_text().splitlines()]
    return whole.subset([i for i, row in enumerate(rows) if "item" in row or "guessed" in row]), record


def run_name(labels: int, seed: int, options: argparse.Namespace) -> str:
    """Name of a run and its record."""
    flags = "".join(part.lstrip("-") for part in options.flag)
    return f"{Path(options.data).name}-{labels or 'all'}-{options.budget}-{options.more}{flags}-{seed}"


def measure_accuracy(labels: int, seed: int, method: str, options: argparse.Namespace) -> Record:
    """Test accuracy of one method."""
    torch.set_num_threads(options.threads)
    (data, test), name = read_images(options.data), run_name(labels, seed, options)
    assert test is not None
    source = options.out / f"{name}.npz"
    write_source(draw_labels(data, labels, seed), source, seed)
    part = read_images(source)[0]
    if method == "teacher":
        return {"accuracy": accuracy(teacher(part), test)}
    given = labelled_part(part)
    augmentation, record, more = tuned_augmentation(data, labels, options), Record(), None
    if method == "real":
        augmentation = Augmentation(steps=augmentation.steps)
    elif method == "pseudo":
        more = pseudo_labelled(part)
    elif method in AUGMENT_FLAGS:
        n = largest_class(given) + options.more
        more, record = added_images(source, options.out / name, method, n, seed, options)
    if more is not None:
        augmentation = augmentation._replace(steps=max(LONG_STEPS, augmentation.steps))
    net = train(given, None if more is None else ConcatDataset([more]), data.classes, augmentation, seed)
    return record | {"moves": augmentation._asdict(), "accuracy": accuracy(net, test)}


def tuned_augmentation(data: ImageDataset, labels: int, options: argparse.Namespace) -> Augmentation:
    """The classical augmentation for this many labels per class, tuned once and stored."""
    path = options.out / f"{Path(options.data).name}-{labels or 'all'}-moves.json"
    other = labelled_part(draw_labels(data, labels, TUNING_SEED))
    augmentation = Augmentation(**cached(path, lambda: tune(other, data.classes, TUNING_SEED)._asdict()))
    return augmentation if labels else augmentation._replace(steps=ALL_LABELS_STEPS)


def largest_class(data: ImageDataset) -> int:
    """Number of images in the largest class."""
    assert data.labels is not None
    return int(np.bincount(data.labels).max())


def teacher(part: ImageDataset) -> Classifier:
    """The classifier of `augment`, from its cache."""
    return ImageLabeler(part, [], part.label_names).classifier


def pseudo_labelled(part: ImageDataset) -> ImageDataset | None:
    """All unlabelled images with the teacher's pseudo-labels; None if there are none."""
    assert part.labels is not None
    unlabelled = part.subset(np.flatnonzero(part.labels < 0))
    if not len(unlabelled):
        return None
    return unlabelled.relabel(predict_all(teacher(part), unlabelled), list(part.label_names), part.notes)


def labelled_part(data: ImageDataset) -> ImageDataset:
    """The images that have a label."""
    assert data.labels is not None
    return data.subset(np.flatnonzero(data.labels >= 0))


def predict_all(net: Classifier, data: ImageDataset) -> np.ndarray:
    """Predicted class of each image (N,)."""
    return torch.cat([predict(net, data.batch(i).data) for i in torch.arange(len(data)).split(1_000)]).numpy()


def table_row(name: str, labels: int, records: Sequence[Record]) -> str:
    """The row of one number of labels: mean and standard deviation over the seeds, in percent; and the gains."""

    def percent(values: Sequence[float]) -> str:
        if not values:
            return "-"
        return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")

    def accuracies(method: str) -> list[float]:
        return [f[method]["accuracy"] for f in records if method in f]

    cells = [name, labels or "all", len(records), *(percent(accuracies(method)) for method in (*METHODS, "teacher"))]
    for method in AUGMENT_FLAGS:
        both = [f for f in records if {method, "classical"} <= set(f)]
        cells.append(percent([f[method]["accuracy"] - f["classical"]["accuracy"] for f in both]))
    done = [f["augment"] for f in records if "augment" in f]
    cells += [f"{mean(f[part] for f in done):.0f}" if done else "-" for part in ("fit", "seconds")]
    cells += [f"{mean(f['report'][part] for f in done):.0f}" if done else "-" for part in ("guessed", "made")]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [part for part in text.split(",") if part]
    counts = lambda text: [0 if part == "all" else int(part) for part in by_commas(text)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="built-in data set with test images")
    parser.add_argument("--labels", type=counts, default=[20, 100], help="labels per class, or all")
    parser.add_argument("--seeds", type=counts, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="10m", help="training budget of each fit")
    parser.add_argument("--more", type=int, default=2_000, help="images added to each class")
    parser.add_argument("--methods", type=by_commas, default=[*METHODS, "teacher"], help="methods, in this order")
    parser.add_argument("--flag", action="append", default=[], metavar="--steps=20", help="flag of augment, with value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/augment"), help="folder of runs and records")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options, failed = read_options(argv), 0
    options.out.mkdir(parents=True, exist_ok=True)
    gains = [f"gain of {method}" for method in AUGMENT_FLAGS]
    head = ["data", "labels", "seeds", *METHODS, "teacher", *gains, "fit s", "augment s", "guessed", "made"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for labels in options.labels:
        records: list[Record] = []
        for seed in options.seeds:
            record: Record = {}
            try:
                for method in options.methods:
                    path = options.out / f"{run_name(labels, seed, options)}-{method}-accuracy.json"
                    record[method] = cached(path, partial(measure_accuracy, labels, seed, method, options))
                records.append(record)
                print(table_row(options.data, labels, records), file=sys.stderr, flush=True)
            except Failed as error:
                print(f"{labels} labels, seed {seed}: {error}", file=sys.stderr, flush=True)
                failed = 1
        if records:
            print(table_row(options.data, labels, records), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
