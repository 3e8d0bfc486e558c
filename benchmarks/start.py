"""Seconds from the `fit` command to its first training steps. Prints a Markdown table with a row per source.

    python benchmarks/start.py --data mnist,fashion-mnist --repeat 3

Each `fit` is its own process, as a user would type it, and is stopped when its first stage begins. The marks are its
progress lines: the plan begins once everything is imported and read; the first step of any network (feature network,
codec or denoiser) follows the plan at once; the codec waits for the feature network, whose training takes a share of
the budget. Medians of wall-clock seconds. Keep the machine otherwise idle.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

MARKS = ("imported and read", "first step of any network", "first step of codec or denoiser")
BEGUN, PLANNED, TRAINING, TRAINED = ("plan", 0), ("plan", 100), ("features", 0), ("features", 100)


def marks(lines: Iterable[str], clock: Iterable[float]) -> list[float]:
    """Seconds at which each mark is reached.

    Args:
        lines: Progress lines: stage, percentage, and more.
        clock: Seconds since the start at each line.
    """
    seen: dict[tuple[str, int], float] = {}
    for line, now in zip(lines, clock, strict=False):
        stage, share, *_ = [*line.split(), "", ""]
        if share.isdigit():
            seen[stage, int(share)] = now
        if PLANNED in seen and not seen.keys() <= {BEGUN, PLANNED, TRAINING}:
            break  # the feature network is trained, or there is none
    if PLANNED not in seen:
        raise SystemExit("fit ended before its plan was complete")
    return [seen[BEGUN], seen[PLANNED], seen.get(TRAINED, seen[PLANNED])]


def start(source: str, budget: str) -> list[float]:
    """The marks of one `fit`, which is then stopped."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "sfumato", "fit", source, "--budget", budget, "--out", f"{folder}/run"]
        began = time.perf_counter()
        with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            try:
                return marks(process.stderr, iter(lambda: time.perf_counter() - began, None))
            finally:
                process.kill()


def row(source: str, budget: str, runs: list[list[float]]) -> str:
    """A row of the table."""
    medians = [statistics.median(run[i] for run in runs) for i in range(len(MARKS))]
    return "| " + " | ".join([source, budget, *(f"{seconds:.1f}" for seconds in medians)]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Seconds from the command to the first training step.")
    parser.add_argument("--data", default="mnist", help="sources, separated by commas")
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print("| " + " | ".join(["source", "budget", *MARKS]) + " |")
    print("|" + "---|" * (2 + len(MARKS)))
    for source in options.data.split(","):
        print(row(source, options.budget, [start(source, options.budget) for _ in range(options.repeat)]), flush=True)


if __name__ == "__main__":
    main()
