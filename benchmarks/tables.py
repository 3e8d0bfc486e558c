"""Sample quality of tabular models beside simple baselines. Prints a Markdown table with a row per run.

    python benchmarks/tables.py --data TABLES --names adult,magic --budgets 10m --seeds 0,1,2 --judge ../judge.py
    python benchmarks/tables.py --data TABLES --codecs identity,kl,vq,fsq --budgets 4m --judge ../judge.py

TABLES holds a folder per table with train.csv, test.csv and schema.json, which names the `categorical` columns. The
judge is an external evaluator, called as: JUDGE table SAMPLES.csv --benchmark NAME. Every set of samples has as many
rows as the training part. The baselines are independent columns, a Gaussian copula and a bootstrap copy: the first must
lose at `c2st` (telling samples from real rows), the last at `copy_auc` (telling training rows from held-out ones by the
samples). In brackets is the score of held-out rows (`c2st_small` uses as many rows as there are of them); for
`downstream`, that of trees trained on real rows. Results are stored beside the run, and later calls skip what is there.
Keep the machine otherwise idle.
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
from quality import Failed, call, load_record, print_all, save_record
from scipy.stats import norm

Record = dict[str, Any]
NAMES = ("adult", "default", "shoppers", "magic", "beijing")
METRICS = {  # metric -> its floor
    "c2st": None,
    "c2st_small": "c2st_small_floor",
    "trend_error": "trend_error_floor",
    "copy_auc": None,
    "downstream": "downstream_real",
}


def independent(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Each column sampled independently."""
    return pd.DataFrame({name: train[name].to_numpy()[rng.integers(0, len(train), len(train))] for name in train})


def bootstrap(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Rows sampled with replacement."""
    return train.iloc[rng.integers(0, len(train), len(train))]


def copula(train: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """A Gaussian copula of the columns' ranks; categories are ordered by frequency."""
    codes = {}
    for name in train:
        column = train[name]
        order = None if pd.api.types.is_numeric_dtype(column) else column.value_counts(dropna=False).index
        codes[name] = column.to_numpy(float) if order is None else order.get_indexer(column).astype(float)
    ranks = pd.DataFrame(codes).rank(method="average").to_numpy() / (len(train) + 1)
    scores = norm.ppf(np.nan_to_num(ranks, nan=0.5))
    normal = rng.multivariate_normal(np.zeros(scores.shape[1]), np.corrcoef(scores.T), len(train))
    index = (norm.cdf(normal) * len(train)).astype(int).clip(0, len(train) - 1)
    sorted_rows = {name: np.argsort(codes[name], kind="stable") for name in train}
    return pd.DataFrame({n: train[n].to_numpy()[sorted_rows[n][index[:, i]]] for i, n in enumerate(train)})


BASELINES: dict[str, Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]] = {
    "independent columns": independent,
    "gaussian copula": copula,
    "bootstrap copy": bootstrap,
}


def cached(path: Path, new: Callable[[], Record], **request: object) -> Record:
    """The stored result of the same request, or a new one."""
    record = load_record(path, request)
    if not path.is_file():
        record = {**request, **new()}
        save_record(path, record)
    return record


def run_judge(options: argparse.Namespace, samples: Path, name: str) -> Record:
    """Metrics of the external evaluator."""
    argv = [options.judge_python, str(options.judge), "table", str(samples), "--benchmark", name]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {' '.join(argv)}")
    return json.loads(done.stdout)


def evaluate_baseline(name: str, kind: str, options: argparse.Namespace) -> Record:
    """Samples of a baseline, evaluated."""
    samples = options.out / f"{name}-{kind.replace(' ', '-')}.csv"
    train = pd.read_csv(options.data / name / "train.csv", keep_default_na=False, na_values=[])
    BASELINES[kind](train, np.random.default_rng(0)).to_csv(samples, index=False)
    return {"scores": run_judge(options, samples, name)}


def evaluate_model(name: str, codec: str, budget: str, seed: int, options: argparse.Namespace) -> Record:
    """Fit, generate as many rows as there are training rows, evaluate."""
    folder = options.data / name
    categorical = json.loads((folder / "schema.json").read_text())["categorical"]
    run = options.out / f"{name}-{codec}-{budget}-{seed}"
    argv = ["-m", "sfumato", "fit", str(folder / "train.csv"), "--out", str(run), "--budget", budget, "--overwrite"]
    argv += ["--seed", str(seed), "--set", f"codec.bottleneck={codec}", "--categorical", ",".join(categorical)]
    fit = call([*argv, *(word for setting in options.set for word in ("--set", setting))])
    rows, samples = len(pd.read_csv(folder / "train.csv")), run.with_suffix(".csv")
    argv = ["-m", "sfumato", "generate", str(run), "-n", str(rows), "--out", str(samples), "--seed", str(seed)]
    generated = call([*argv, "--overwrite", "--sheet", str(run.with_suffix(".png"))])
    report = run_judge(options, samples, name)
    return {"fit": fit.seconds, "gib": round(fit.gib, 2), "generate": generated.seconds, "scores": report}


def table_row(name: str, run: Sequence[object], record: Record) -> str:
    """The row of one set of samples: each metric with its floor in brackets."""
    report, cells = record["scores"], [name, *run, record.get("fit", "–"), record.get("generate", "–")]
    for metric, floor_name in METRICS.items():
        value, floor = report.get(metric), report.get(floor_name)
        shown = "–" if value is None else f"{value:.3f}"
        cells.append(shown if floor is None else f"{shown} ({floor:.3f})")
    return f"| {' | '.join(map(str, cells))} |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--names", type=by_commas, default=list(NAMES))
    parser.add_argument("--codecs", type=by_commas, default=["identity"])
    parser.add_argument("--budgets", type=by_commas, default=["10m"])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in by_commas(text)], default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of runs and records")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument(
        "--judge-python", default=sys.executable, help="Python interpreter of the judge (default: this one)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options = read_options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    head = ["table", "samples", "budget", "seed", "fit s", "generate s", *METRICS]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)

    request: Record = {"set": options.set, "data": str(options.data), "judge": options.judge.name}

    def jobs() -> Iterator[tuple[str, Callable[[], Sequence[str]]]]:
        for name in options.names:
            samples: dict[tuple[object, ...], Callable[[], Record]] = {
                (kind, "–", "–"): partial(evaluate_baseline, name, kind, options) for kind in BASELINES
            }
            for run in product(options.codecs, options.budgets, options.seeds):
                samples[run] = partial(evaluate_model, name, *run, options)
            for run, new in samples.items():
                job = "-".join([name, *map(str, run)])
                path = options.out / f"{job.replace(' ', '-')}.json"
                yield job, lambda n=name, r=run, p=path, new=new: [table_row(n, r, cached(p, new, **request))]

    return print_all(jobs())


if __name__ == "__main__":
    sys.exit(main())
