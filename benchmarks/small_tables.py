"""Whether models of small tables copy them: one row of a Markdown table a set of samples.

    python benchmarks/small_tables.py --budget 1m --seeds 0,1,2

Four tables of scikit-learn (150 to 569 rows; numbers and a class) are each split in two halves at random, by the
seed. A model is trained on one half and makes as many rows. `copy_auc` says how well rows of that half are told from
those of the other one by how near a sample comes to them: 0.5 if nothing is copied. `equal_rows` is the share of
samples that are a training row in every cell. `c2st` is 1 if trees cannot tell samples from training rows. Beside them
stand a bootstrap copy, which must be found out, and two that hold no row but were made of few figures of that half:
independent columns, and a Gaussian copula. Of a hundred rows their copy AUC is above 0.5 too, since what was reckoned
from few rows lies nearer to these than to others. Keep the machine quiet meanwhile.
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

from sfumato.data import read_rows, read_table
from sfumato.metrics import table_report

TABLES = {"iris": load_iris, "wine": load_wine, "breast_cancer": load_breast_cancer, "diabetes": load_diabetes}
MEASURES = ("copy_auc", "equal_rows", "c2st")


def halves(name: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two halves of a table; the class is a text."""
    options = {"scaled": False} if name == "diabetes" else {}
    whole = TABLES[name](as_frame=True, **options).frame
    if name != "diabetes":
        whole["target"] = "class " + whole["target"].astype(str)
    mixed = whole.sample(frac=1, random_state=seed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def rows_of(name: str, seed: int, options: argparse.Namespace) -> Iterator[str]:
    """The lines of one table and seed."""
    train, held = halves(name, seed)
    folder = options.out / f"{name}-{seed}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, frame in (("train", train), ("test", held)):
        frame.to_csv(folder / "data" / f"{part}.csv", index=False)
    made = {"sfumato": folder / "samples.csv"}
    for kind, make in BASELINES.items():
        made[kind] = folder / f"{kind.replace(' ', '-')}.csv"
        make(train, np.random.default_rng(seed)).to_csv(made[kind], index=False)
    run = folder / "run"
    words = ["--out", str(run), "--budget", options.budget, "--seed", str(seed), "--overwrite"]
    fixed = [word for setting in options.set for word in ("--set", setting)]
    call(["-m", "sfumato", "fit", str(folder / "data"), *words, *fixed])
    words = ["-n", str(len(train)), "--out", str(made["sfumato"]), "--seed", str(seed), "--overwrite"]
    call(["-m", "sfumato", "generate", str(run), *words])
    real, other = read_table(folder / "data")
    for what, place in made.items():
        rows = read_rows(place, real.columns)
        report = table_report(rows.values, real.values, other.values, real.columns, seed=seed)
        figures = " | ".join(f"{float(report[measure]):.3f}" for measure in MEASURES)
        yield f"| {name} | {len(train)} | {seed} | {what} | {figures} |"


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: [part for part in text.split(",") if part]
    parser.add_argument("--names", type=listed, default=list(TABLES))
    parser.add_argument("--budget", default="1m")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in listed(text)], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/small_tables"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    options = parser.parse_args(words)
    print(f"| table | rows | seed | samples | {' | '.join(MEASURES)} |\n|{'---|' * (4 + len(MEASURES))}", flush=True)
    runs = product(options.names, options.seeds)
    return print_all((f"{name} {seed}", lambda n=name, s=seed: rows_of(n, s, options)) for name, seed in runs)


if __name__ == "__main__":
    sys.exit(main())
