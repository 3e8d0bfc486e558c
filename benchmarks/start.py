"""How long `fit` takes from the command to its first training steps; a Markdown table, a row for each source.

    python benchmarks/start.py --data mnist,fashion-mnist --repeat 3

Each `fit` is a process of its own, as a user would type it, and is stopped when its first stage begins. The marks are
its lines of progress: the plan begins once everything is imported and read; the first step of any network follows the
plan at once, be it of the feature network, of the codec or of the denoiser; the codec waits for the feature network,
whose training takes a share of the budget. Medians of wall-clock seconds; keep the machine quiet meanwhile.
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
    """Seconds at which each mark is passed.

    Args:
        lines: Progress, as it comes: a stage, how much of it is done in per cent, and more.
        clock: Seconds since the start as each line comes.
    """
    seen: dict[tuple[str, int], float] = {}
    for line, now in zip(lines, clock, strict=False):
        stage, share, *_ = [*line.split(), "", ""]
        if share.isdigit():
            seen[stage, int(share)] = now
        if PLANNED in seen and not seen.keys() <= {BEGUN, PLANNED, TRAINING}:
            break  # the feature network is trained, or there is none
    if PLANNED not in seen:
        raise SystemExit("fit ended before its plan stood")
    return [seen[BEGUN], seen[PLANNED], seen.get(TRAINED, seen[PLANNED])]


def start(source: str, budget: str) -> list[float]:
    """The marks of one `fit`, which is then stopped."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "sfumato", "fit", source, "--budget", budget, "--out", f"{folder}/run"]
        began = time.perf_counter()
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
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
    given = parser.parse_args()
    print("| " + " | ".join(["source", "budget", *MARKS]) + " |")
    print("|" + "---|" * (2 + len(MARKS)))
    for source in given.data.split(","):
        print(row(source, given.budget, [start(source, given.budget) for _ in range(given.repeat)]), flush=True)


if __name__ == "__main__":
    main()
