"""Memorisation of small tables. Prints a Markdown table with a row per set of samples.

    python benchmarks/small_tables.py --budget 1m --seeds 0,1,2

Four tables of scikit-learn (150 to 569 rows; numbers and a class) are each split at random into two halves, by seed. A
model is trained on one half and generates as many rows. `copy_auc` is the AUC of telling training rows from rows of the
other half by the distance to the nearest sample: 0.5 if nothing is copied. `equal_rows` is the share of samples that
equal a training row in every cell. `c2st` is 1 if trees cannot tell samples from training rows. The baselines are a
bootstrap copy, which must be detected, and two that contain no training row: independent columns and a Gaussian copula.
With a hundred rows their copy AUC is above 0.5 too, because statistics of few rows lie nearer to these rows than to
others. Keep the machine otherwise idle.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from quality import call, print_all
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from tables import BASELINES

from sfumato.modalities.table.metrics import table_report
from sfumato.modalities.table.read import read_rows, read_table

TABLES = {"iris": load_iris, "wine": load_wine, "breast_cancer": load_breast_cancer, "diabetes": load_diabetes}
METRICS = ("copy_auc", "equal_rows", "c2st")


def halves(name: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two random halves of a table; the class is text."""
    options = {"scaled": False} if name == "diabetes" else {}
    whole = TABLES[name](as_frame=True, **options).frame
    if name != "diabetes":
        whole["target"] = "class " + whole["target"].astype(str)
    shuffled = whole.sample(frac=1, random_state=seed)
    return shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]


def rows_of(name: str, seed: int, options: argparse.Namespace) -> Iterator[str]:
    """The rows of one table and seed."""
    train, held = halves(name, seed)
    folder = options.out / f"{name}-{seed}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, frame in (("train", train), ("test", held)):
        frame.to_csv(folder / "data" / f"{part}.csv", index=False)
    samples = {"sfumato": folder / "samples.csv"}
    for kind, make in BASELINES.items():
        samples[kind] = folder / f"{kind.replace(' ', '-')}.csv"
        make(train, np.random.default_rng(seed)).to_csv(samples[kind], index=False)
    run = folder / "run"
    argv = ["--out", str(run), "--budget", options.budget, "--seed", str(seed), "--overwrite"]
    overrides = [word for setting in options.set for word in ("--set", setting)]
    call(["-m", "sfumato", "fit", str(folder / "data"), *argv, *overrides])
    argv = ["-n", str(len(train)), "--out", str(samples["sfumato"]), "--seed", str(seed), "--overwrite"]
    call(["-m", "sfumato", "generate", str(run), *argv])
    real, held = read_table(folder / "data")
    for sample_name, path in samples.items():
        rows = read_rows(path, real.columns)
        report = table_report(rows.values, real.values, held.values, real.columns, seed=seed)
        figures = " | ".join(f"{float(report[metric]):.3f}" for metric in METRICS)
        yield f"| {name} | {len(train)} | {seed} | {sample_name} | {figures} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_commas = lambda text: [part for part in text.split(",") if part]
    parser.add_argument("--names", type=by_commas, default=list(TABLES))
    parser.add_argument("--budget", default="1m")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in by_commas(text)], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/small_tables"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every run")
    options = parser.parse_args(argv)
    print(f"| table | rows | seed | samples | {' | '.join(METRICS)} |\n|{'---|' * (4 + len(METRICS))}", flush=True)
    runs = product(options.names, options.seeds)
    return print_all((f"{name} {seed}", lambda n=name, s=seed: rows_of(n, s, options)) for name, seed in runs)


if __name__ == "__main__":
    sys.exit(main())
