"""What generated rows of a rare class add to a classifier: average precision. Prints a Markdown table.

    python benchmarks/oversample.py --data TABLES --names default,shoppers --seeds 0,1,2 --budget 5m

TABLES holds a folder per table with train.csv, test.csv and schema.json, which names the binary `target` and the
`categorical` columns. `sfumato fit` trains on train.csv (it holds out only what early stopping needs, because the other
methods see all rows), `sfumato augment` balances the classes, and boosted trees are trained on

* real: the rows unchanged;
* weights: the same with balanced class weights;
* copies: random oversampling of the rare class;
* SMOTE: rows interpolated between neighbours of the rare class (SMOTE-NC: categories by the neighbours' majority);
* augment: the real and the generated rows.

The metric is the average precision of the rare class on test.csv. Results are stored in OUT, and later calls skip what
is there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality import Failed, call
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from tables import cached

from sfumato.modalities.table.columns import Column, modelled
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.metrics import tree_features
from sfumato.modalities.table.read import read_rows, read_table
from sfumato.modalities.table.trees import find_trees

Record = dict[str, Any]
Rows = NDArray[np.float64]
HELD_OUT = 0.02  # share of the training rows
METHODS = ("real", "weights", "copies", "SMOTE", "augment")


def smote(rare: Rows, count: int, categorical: NDArray[np.bool_], rng: np.random.Generator, k: int = 5) -> Rows:
    """New rows (count, D) between rows of one class (N, D) and their neighbours, without missing cells.

    References:
        Chawla et al. 2002, SMOTE: Synthetic Minority Over-sampling Technique, section 6.1 (SMOTE-NC).
    """
    std = rare[:, ~categorical].std(0)
    numbers = rare[:, ~categorical] / np.where(std > 0, std, 1)
    # another category is as far away as one standard deviation of a number
    one_hot = [(rare[:, j, None] == np.unique(rare[:, j])) * 0.5**0.5 for j in np.flatnonzero(categorical)]
    points = np.hstack([numbers, *one_hot])
    neighbours = NearestNeighbors(n_neighbors=min(k + 1, len(rare))).fit(points).kneighbors(points)[1][:, 1:]
    base = rng.integers(0, len(rare), count)
    neighbour = neighbours[base, rng.integers(0, neighbours.shape[1], count)]
    new = rare[base] + rng.random((count, 1)) * (rare[neighbour] - rare[base])
    for j in np.flatnonzero(categorical):
        votes = rare[neighbours[base], j]  # (count, k)
        agreeing = (votes[:, :, None] == votes[:, None, :]).sum(1)
        new[:, j] = votes[np.arange(count), agreeing.argmax(1)]
    return new


def scores(train: Rows, columns: Sequence[Column], target: int, augmented: Rows, test: Rows, seed: int) -> Record:
    """Average precision of each method."""
    y = train[:, target]
    classes, counts = np.unique(y, return_counts=True)
    rare, missing_count = classes[counts.argmin()], int(counts.max() - counts.min())
    rows, rng = train[y == rare], np.random.default_rng(seed)
    categorical = np.array([bool(column.levels) for column in columns])
    training_sets: dict[str, Callable[[], Rows]] = {
        "real": lambda: train,
        "weights": lambda: train,
        "copies": lambda: np.concatenate([train, rows[rng.integers(0, len(rows), missing_count)]]),
        "SMOTE": lambda: np.concatenate([train, smote(np.nan_to_num(rows), missing_count, categorical, rng)]),
        "augment": lambda: augmented,
    }
    rest = [j for j in range(len(columns)) if j != target]
    trees, truth = find_trees(), test[:, target] == rare

    def average_precision(method: str) -> float:
        fit_rows = training_sets[method]()
        x, y = tree_features(fit_rows, columns, trees)[:, rest], fit_rows[:, target] == rare
        weight = np.where(y, (~y).sum() / y.sum(), 1.0) if method == "weights" else None
        model = trees.classifier([bool(columns[j].levels) for j in rest], seed).fit(x, y, sample_weight=weight)
        probability = model.predict_proba(tree_features(test, columns, trees)[:, rest])[:, 1]
        return float(average_precision_score(truth, probability))

    return {method: average_precision(method) for method in training_sets}


def measure(name: str, seed: int, options: argparse.Namespace) -> Record:
    """Fit, augment, and compute the average precision of each method."""
    folder, run = options.data / name, options.out / f"{name}-{options.budget}-{seed}"
    schema = json.loads((folder / "schema.json").read_text())
    source, out, flags = str(folder / "train.csv"), str(run) + ".csv", ["--seed", str(seed), "--overwrite", "--quiet"]
    argv = ["--out", str(run), "--budget", options.budget, "--categorical", ",".join(schema["categorical"])]
    fit = call(["-m", "sfumato", "fit", source, *argv, "--set", f"data.held_out={HELD_OUT}", *flags])
    argv = ["--target", schema["target"], "--out", out, "--json"]
    data, _ = read_table(folder, categorical=schema["categorical"])
    done = call(["-m", "sfumato", "augment", str(run), source, *argv, *flags])
    columns = data.columns
    target = [column.name for column in modelled(columns)].index(schema["target"])
    parts: list[TableDataset] = [read_rows(path, columns) for path in (folder / "train.csv", out, folder / "test.csv")]
    train, augmented, test = (part.values for part in parts)
    record = scores(train, modelled(columns), target, augmented, test, seed)
    return {"fit": fit.seconds, "made": done.seconds, "report": json.loads(done.output), **record}


def table_row(name: str, records: Sequence[Record]) -> str:
    """The row of one table: mean and standard deviation over the seeds."""
    cells = [name, len(records)]
    for method in METHODS:
        values = [f[method] for f in records]
        cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
    cells += [f"{mean(f[part] for f in records):.0f}" for part in ("fit", "made")]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--names", type=by_commas, default=["default", "shoppers"])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in by_commas(text)], default=[0, 1, 2])
    parser.add_argument("--budget", default="5m", help="training budget of each fit")
    parser.add_argument("--out", type=Path, default=Path("runs/oversample"), help="folder of runs and records")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options, failed = read_options(argv), 0
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"| {' | '.join(['table', 'seeds', *METHODS, 'fit s', 'augment s'])} |\n|{'---|' * (len(METHODS) + 4)}",
        flush=True,
    )
    for name in options.names:
        records: list[Record] = []
        for seed in options.seeds:
            try:
                make = lambda name=name, seed=seed: measure(name, seed, options)
                records.append(
                    cached(options.out / f"{name}-{options.budget}-{seed}.json", make, data=str(options.data))
                )
            except Failed as error:
                print(f"{name}, seed {seed}: {error}", file=sys.stderr, flush=True)
                failed = 1
        if records:
            print(table_row(name, records), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
