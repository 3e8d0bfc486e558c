"""Seconds and peak memory of each command on a table of a million rows. Prints a Markdown table.

    python benchmarks/large_table.py --rows 1000000 --budget 4m

The table is synthetic, with 20 columns: 10 correlated numbers (one with missing cells), 4 heavy-tailed integers, 5
categories and a date. `sfumato fit`, `generate` (100,000 rows, 20 steps, without autoguidance) and `evaluate` run as a
user would type them. Memory is the peak resident set of the process, pages of mapped files included.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from quality import call, print_all

CHUNK = 100_000  # rows generated at once
METRICS = ("c2st", "shape_error", "trend_error", "copy_auc")


def synthetic_rows(rows: int, rng: np.random.Generator, weights: np.ndarray) -> pd.DataFrame:
    """Random rows; `weights` (10, 4) are the factor loadings of the correlated numbers."""
    z = rng.normal(size=(rows, 4))
    columns = {f"number {i}": np.round(z @ w + 0.3 * rng.normal(size=rows), 3) for i, w in enumerate(weights)}
    columns["number 3"] = np.where(rng.random(rows) < 0.05, np.nan, columns["number 3"])
    columns |= {f"count {i}": np.floor(10 * np.exp(z[:, i])).astype(int) for i in range(4)}
    for i in range(5):
        levels = np.minimum((3 * np.abs(z[:, i % 4])).astype(int), 3 + 3 * i)
        columns[f"kind {i}"] = np.char.add("level ", levels.astype(str))
    days = rng.integers(0, 1_500, rows).astype("timedelta64[D]")
    columns["day"] = (np.datetime64("2020-01-01") + days).astype(str)
    return pd.DataFrame(columns)


def write(path: Path, rows: int) -> None:
    """Write the table as a CSV file, chunk by chunk."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(10, 4))
    partial = path.with_name(path.name + ".partial")
    for start in range(0, rows, CHUNK):
        chunk = synthetic_rows(min(CHUNK, rows - start), rng, weights)
        chunk.to_csv(partial, index=False, header=not start, mode="a" if start else "w")
    partial.rename(path)


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the Markdown table."""
    options.out.mkdir(parents=True, exist_ok=True)
    source, run, samples = options.out / f"{options.rows}.csv", options.out / "run", options.out / "made.csv"
    if not source.is_file():
        write(source, options.rows)
    yield f"{options.rows:,} rows, {source.stat().st_size / 2**20:.0f} MiB"
    yield "| command | seconds | GiB | |\n|---|---|---|---|"
    argv = {
        "fit": ["fit", source, "--out", run, "--budget", options.budget, "--overwrite"],
        "generate": ["generate", run, "-n", options.samples, "--out", samples, "--overwrite"],
        "evaluate": ["evaluate", samples, source, "--json"],
    }
    argv["generate"] += ["--steps", 20, "--autoguidance", 1]
    for name, line in argv.items():
        done = call(["-m", "sfumato", *map(str, line)])
        report = json.loads(done.output) if name == "evaluate" else {}
        figures = ", ".join(f"{key} {report[key]:.3f}" for key in METRICS if key in report)
        yield f"| {name} | {done.seconds:.0f} | {done.gib:.2f} | {figures} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--budget", default="4m")
    parser.add_argument("--out", type=Path, default=Path("runs/large_table"))
    options = parser.parse_args(argv)
    return print_all([("large table", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
