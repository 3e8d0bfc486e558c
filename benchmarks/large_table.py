"""What a table of a million rows takes: seconds and peak memory of each command, one row of a Markdown table each.

    python benchmarks/large_table.py --rows 1000000 --budget 4m

Rows are made up: 10 numbers that hang together (one with holes), 4 heavy-tailed integers, 5 categories and a date, 20
columns. `sfumato fit`, `generate` (100,000 rows, 20 steps, without autoguidance) and `evaluate` of these against the
table run as a user would type them. Memory is the largest resident one of the process, pages of mapped files included.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from quality import call, print_all

PIECE = 100_000  # rows made at once
SHOWN = ("c2st", "shape_error", "trend_error", "copy_auc")


def made_up(rows: int, rng: np.random.Generator, weights: np.ndarray) -> pd.DataFrame:
    """Some rows; `weights` (10, 4) say how the numbers hang together."""
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
    """The table as a CSV file, piece by piece."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(10, 4))
    partial = path.with_name(path.name + ".partial")
    for start in range(0, rows, PIECE):
        piece = made_up(min(PIECE, rows - start), rng, weights)
        piece.to_csv(partial, index=False, header=not start, mode="a" if start else "w")
    partial.rename(path)


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines."""
    options.out.mkdir(parents=True, exist_ok=True)
    source, run, made = options.out / f"{options.rows}.csv", options.out / "run", options.out / "made.csv"
    if not source.is_file():
        write(source, options.rows)
    yield f"{options.rows:,} rows, {source.stat().st_size / 2**20:.0f} MiB"
    yield "| command | seconds | GiB | |\n|---|---|---|---|"
    words = {
        "fit": ["fit", source, "--out", run, "--budget", options.budget, "--overwrite"],
        "generate": ["generate", run, "-n", options.made, "--out", made, "--overwrite"],
        "evaluate": ["evaluate", made, source, "--json"],
    }
    words["generate"] += ["--steps", 20, "--autoguidance", 1]
    for name, line in words.items():
        done = call(["-m", "sfumato", *map(str, line)])
        report = json.loads(done.output) if name == "evaluate" else {}
        figures = ", ".join(f"{key} {report[key]:.3f}" for key in SHOWN if key in report)
        yield f"| {name} | {done.seconds:.0f} | {done.gib:.2f} | {figures} |"


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--made", type=int, default=100_000)
    parser.add_argument("--budget", default="4m")
    parser.add_argument("--out", type=Path, default=Path("runs/large_table"))
    options = parser.parse_args(words)
    return print_all([("large table", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
