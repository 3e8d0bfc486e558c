"""What made rows of rare classes are worth to a classifier: average precision; one row of a Markdown table a run.

    python benchmarks/oversample.py --data TABLES --names default,shoppers --seeds 0,1,2 --budget 5m

TABLES holds a folder for each table with train.csv, test.csv and schema.json, which names the `target` (of two
classes) and the columns that are `categorical`. `sfumato fit` trains on train.csv (holding out no more of it than it
needs to know when to end, as the other ways see all of it), `sfumato augment` fills up the rare class, and boosted
trees are trained on

* real: the rows as they are;
* weights: the same, a row of the rare class counting as much more as it is rarer;
* copies: rows of the rare class repeated at random;
* SMOTE: new rows between neighbours of the rare class (SMOTE-NC: categories by the neighbours' majority);
* augment: the made rows.

Average precision of the rare class on test.csv is the measure. What is done is kept in OUT and skipped the next time.
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
from tables import kept

from sfumato.data import Column, TableData, modelled, read_rows, read_table
from sfumato.metrics import find_trees
from sfumato.metrics.table import tree_features

Facts = dict[str, Any]
Rows = NDArray[np.float64]
HELD_OUT = 0.02  # of the training rows
WAYS = ("real", "weights", "copies", "SMOTE", "augment")


def smote(rare: Rows, count: int, categorical: NDArray[np.bool_], rng: np.random.Generator, k: int = 5) -> Rows:
    """New rows (count, D) between rows of one class (N, D) and their neighbours; no missing cells.

    References:
        Chawla et al. 2002, SMOTE: Synthetic Minority Over-sampling Technique, section 6.1 (SMOTE-NC).
    """
    spread = rare[:, ~categorical].std(0)
    numbers = rare[:, ~categorical] / np.where(spread > 0, spread, 1)
    # another category is as far away as one standard deviation of a number
    hot = [(rare[:, j, None] == np.unique(rare[:, j])) * 0.5**0.5 for j in np.flatnonzero(categorical)]
    points = np.hstack([numbers, *hot])
    near = NearestNeighbors(n_neighbors=min(k + 1, len(rare))).fit(points).kneighbors(points)[1][:, 1:]
    base = rng.integers(0, len(rare), count)
    other = near[base, rng.integers(0, near.shape[1], count)]
    made = rare[base] + rng.random((count, 1)) * (rare[other] - rare[base])
    for j in np.flatnonzero(categorical):
        votes = rare[near[base], j]  # (count, k)
        alike = (votes[:, :, None] == votes[:, None, :]).sum(1)
        made[:, j] = votes[np.arange(count), alike.argmax(1)]
    return made


def scores(train: Rows, columns: Sequence[Column], target: int, augmented: Rows, test: Rows, seed: int) -> Facts:
    """Average precision of each way."""
    y = train[:, target]
    levels, counts = np.unique(y, return_counts=True)
    rare, lacking = levels[counts.argmin()], int(counts.max() - counts.min())
    rows, rng = train[y == rare], np.random.default_rng(seed)
    categorical = np.array([bool(column.levels) for column in columns])
    ways: dict[str, Callable[[], Rows]] = {
        "real": lambda: train,
        "weights": lambda: train,
        "copies": lambda: np.concatenate([train, rows[rng.integers(0, len(rows), lacking)]]),
        "SMOTE": lambda: np.concatenate([train, smote(np.nan_to_num(rows), lacking, categorical, rng)]),
        "augment": lambda: augmented,
    }
    rest = [j for j in range(len(columns)) if j != target]
    trees, truth = find_trees(), test[:, target] == rare

    def learned(way: str) -> float:
        learn = ways[way]()
        x, y = tree_features(learn, columns, trees)[:, rest], learn[:, target] == rare
        weight = np.where(y, (~y).sum() / y.sum(), 1.0) if way == "weights" else None
        model = trees.classes([bool(columns[j].levels) for j in rest], seed).fit(x, y, sample_weight=weight)
        chance = model.predict_proba(tree_features(test, columns, trees)[:, rest])[:, 1]
        return float(average_precision_score(truth, chance))

    return {way: learned(way) for way in ways}


def measured(name: str, seed: int, options: argparse.Namespace) -> Facts:
    """Fit, augment, and the average precision of each way."""
    folder, run = options.data / name, options.out / f"{name}-{options.budget}-{seed}"
    schema = json.loads((folder / "schema.json").read_text())
    source, out, often = str(folder / "train.csv"), str(run) + ".csv", ["--seed", str(seed), "--overwrite", "--quiet"]
    words = ["--out", str(run), "--budget", options.budget, "--categorical", ",".join(schema["categorical"])]
    fit = call(["-m", "sfumato", "fit", source, *words, "--set", f"data.held_out={HELD_OUT}", *often])
    words = ["--target", schema["target"], "--out", out, "--json"]
    data, _ = read_table(folder, categorical=schema["categorical"])
    done = call(["-m", "sfumato", "augment", str(run), source, *words, *often])
    columns = data.columns
    target = [column.name for column in modelled(columns)].index(schema["target"])
    parts: list[TableData] = [read_rows(path, columns) for path in (folder / "train.csv", out, folder / "test.csv")]
    train, augmented, test = (part.values for part in parts)
    facts = scores(train, modelled(columns), target, augmented, test, seed)
    return {"fit": fit.seconds, "made": done.seconds, "report": json.loads(done.output), **facts}


def table_row(name: str, facts: Sequence[Facts]) -> str:
    """The line of one table: mean and deviation over the seeds."""
    cells = [name, len(facts)]
    for way in WAYS:
        values = [f[way] for f in facts]
        cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
    cells += [f"{mean(f[part] for f in facts):.0f}" for part in ("fit", "made")]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--names", type=listed, default=["default", "shoppers"])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in listed(text)], default=[0, 1, 2])
    parser.add_argument("--budget", default="5m", help="of each fit")
    parser.add_argument("--out", type=Path, default=Path("runs/oversample"), help="where runs and records go")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options, failed = read_options(words), 0
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(['table', 'seeds', *WAYS, 'fit s', 'augment s'])} |\n|{'---|' * (len(WAYS) + 4)}", flush=True)
    for name in options.names:
        found: list[Facts] = []
        for seed in options.seeds:
            try:
                make = lambda name=name, seed=seed: measured(name, seed, options)
                found.append(kept(options.out / f"{name}-{options.budget}-{seed}.json", make, data=str(options.data)))
            except Failed as error:
                print(f"{name}, seed {seed}: {error}", file=sys.stderr, flush=True)
                failed = 1
        if found:
            print(table_row(name, found), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
