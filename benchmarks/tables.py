"""How good models of tables are, beside what needs no model: one row of a Markdown table a run.

    python benchmarks/tables.py --data TABLES --names adult,magic --budgets 10m --seeds 0,1,2 --judge ../judge.py
    python benchmarks/tables.py --data TABLES --codecs identity,kl,vq,fsq --budgets 4m --judge ../judge.py

TABLES holds a folder for each table with train.csv, test.csv and schema.json, whose `categorical` names the columns
that are categories. The judge is an outside script, called as: JUDGE table SAMPLES.csv --benchmark NAME. Every set of
samples has as many rows as the training part. The baselines are independent columns, a Gaussian copula and a bootstrap
copy: the first must lose at `c2st`, telling samples from real rows, the last at `copy_auc`, telling training rows from
held-out ones by the samples. In brackets stands what held-out rows get (`c2st_small` on as many rows as there are of
them), and of `downstream` what trees get that learn from real rows. What is done is kept beside the run and skipped the
next time. Keep the machine quiet.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from quality import Failed, call, keep, print_all, recorded
from scipy.stats import norm

Facts = dict[str, Any]
NAMES = ("adult", "default", "shoppers", "magic", "beijing")
MEASURES = {  # and what stands in brackets beside them
    "c2st": None,
    "c2st_small": "c2st_small_floor",
    "trend_error": "trend_error_floor",
    "copy_auc": None,
    "downstream": "downstream_real",
}


def independent(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Each column drawn by itself."""
    return pd.DataFrame({name: train[name].to_numpy()[rng.integers(0, len(train), len(train))] for name in train})


def bootstrap(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Rows drawn with replacement."""
    return train.iloc[rng.integers(0, len(train), len(train))]


def copula(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """A Gaussian copula of the columns' ranks; the levels of categories stand in order of their frequency."""
    codes = {}
    for name in train:
        column = train[name]
        order = None if pd.api.types.is_numeric_dtype(column) else column.value_counts(dropna=False).index
        codes[name] = column.to_numpy(float) if order is None else order.get_indexer(column).astype(float)
    ranks = pd.DataFrame(codes).rank(method="average").to_numpy() / (len(train) + 1)
    scores = norm.ppf(np.nan_to_num(ranks, nan=0.5))
    drawn = rng.multivariate_normal(np.zeros(scores.shape[1]), np.corrcoef(scores.T), len(train))
    places = (norm.cdf(drawn) * len(train)).astype(int).clip(0, len(train) - 1)
    sorted_rows = {name: np.argsort(codes[name], kind="stable") for name in train}
    return pd.DataFrame({n: train[n].to_numpy()[sorted_rows[n][places[:, i]]] for i, n in enumerate(train)})


BASELINES: dict[str, Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]] = {
    "independent columns": independent,
    "gaussian copula": copula,
    "bootstrap copy": bootstrap,
}


def kept(record: Path, make: Callable[[], Facts], **asked: object) -> Facts:
    """What was found out before when the same was asked (beside what the record's name says), else now."""
    facts = recorded(record, asked)
    if not record.is_file():
        facts = {**asked, **make()}
        keep(record, facts)
    return facts


def ask(options: argparse.Namespace, samples: Path, name: str) -> Facts:
    """What the judge says of samples."""
    words = [options.judge_python, str(options.judge), "table", str(samples), "--benchmark", name]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {' '.join(words)}")
    return json.loads(done.stdout)


def baseline(name: str, kind: str, options: argparse.Namespace) -> Facts:
    """Samples that need no model, judged."""
    samples = options.out / f"{name}-{kind.replace(' ', '-')}.csv"
    train = pd.read_csv(options.data / name / "train.csv", keep_default_na=False, na_values=[])
    BASELINES[kind](train, np.random.default_rng(0)).to_csv(samples, index=False)
    return {"scores": ask(options, samples, name)}


def trained(name: str, codec: str, budget: str, seed: int, options: argparse.Namespace) -> Facts:
    """Fit, generate as many rows as there are to train on, judge."""
    folder = options.data / name
    categorical = json.loads((folder / "schema.json").read_text())["categorical"]
    run = options.out / f"{name}-{codec}-{budget}-{seed}"
    words = ["-m", "sfumato", "fit", str(folder / "train.csv"), "--out", str(run), "--budget", budget, "--overwrite"]
    words += ["--seed", str(seed), "--set", f"codec.bottleneck={codec}", "--categorical", ",".join(categorical)]
    fit = call([*words, *(word for setting in options.set for word in ("--set", setting))])
    rows, samples = len(pd.read_csv(folder / "train.csv")), run.with_suffix(".csv")
    words = ["-m", "sfumato", "generate", str(run), "-n", str(rows), "--out", str(samples), "--seed", str(seed)]
    drawn = call([*words, "--overwrite", "--sheet", str(run.with_suffix(".png"))])
    judged = ask(options, samples, name)
    return {"fit": fit.seconds, "gib": round(fit.gib, 2), "generate": drawn.seconds, "scores": judged}


def table_row(name: str, what: Sequence[object], facts: Facts) -> str:
    """The line of one set of samples: each figure with, in brackets, its floor."""
    judged, cells = facts["scores"], [name, *what, facts.get("fit", "–"), facts.get("generate", "–")]
    for measure, beside in MEASURES.items():
        value, floor = judged.get(measure), judged.get(beside)
        shown = "–" if value is None else f"{value:.3f}"
        cells.append(shown if floor is None else f"{shown} ({floor:.3f})")
    return f"| {' | '.join(map(str, cells))} |"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--names", type=listed, default=list(NAMES))
    parser.add_argument("--codecs", type=listed, default=["identity"])
    parser.add_argument("--budgets", type=listed, default=["10m"])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in listed(text)], default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="where runs and records go")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--judge-python", default=sys.executable, help="its interpreter, if it needs another one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options = read_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    head = ["table", "samples", "budget", "seed", "fit s", "generate s", *MEASURES]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)

    asked: Facts = {"set": options.set, "data": str(options.data), "judge": options.judge.name}

    def jobs() -> Iterator[tuple[str, Callable[[], Sequence[str]]]]:
        for name in options.names:
            made: dict[tuple[object, ...], Callable[[], Facts]] = {
                (kind, "–", "–"): partial(baseline, name, kind, options) for kind in BASELINES
            }
            for run in product(options.codecs, options.budgets, options.seeds):
                made[run] = partial(trained, name, *run, options)
            for what, make in made.items():
                words = "-".join([name, *map(str, what)])
                record = options.out / f"{words.replace(' ', '-')}.json"
                yield words, lambda n=name, w=what, r=record, m=make: [table_row(n, w, kept(r, m, **asked))]

    return print_all(jobs())


if __name__ == "__main__":
    sys.exit(main())
