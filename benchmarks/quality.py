"""Sample quality of `fit` at each budget: train, generate 10,000 items, evaluate. Prints a Markdown table.

    python benchmarks/quality.py --data mnist,fashion-mnist --budgets 5m,10m,30m --seeds 0
    python benchmarks/quality.py --data mnist --budgets 5m --judge ../judge.py

Every command runs in its own process, as a user would type it, so seconds and memory include everything. Results are
stored in RUN.json beside the run, and later calls skip what is there. An interrupted training starts over, because its
seconds would not be those of one run. Keep the machine otherwise idle: the budget is wall clock.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
ITEMS = 10_000  # generated per run
METRICS = ("accuracy", "fd", "cas", "coverage", "novelty")
COLUMNS = ("data", "budget", "seed", "fit s", "GiB", "parameters", "PSNR", "steps", "w", "generate s")


class Spec(NamedTuple):
    """One run: source, training budget and seed."""

    data: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return re.sub(r"[^\w.-]+", "-", f"{self.data}-{self.budget}-{self.seed}").strip("-")


class Completed(NamedTuple):
    """A finished command: its output, wall clock in seconds, peak memory in GiB."""

    output: str
    seconds: float
    gib: float


class Failed(Exception):
    """A command failed, or a record belongs to other options."""


def save_record(path: Path, record: Record) -> None:
    """Write a record atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def call(argv: Sequence[str], python: str = sys.executable) -> Completed:
    """Run a Python command line in its own process; its progress goes to stderr."""
    start = time.perf_counter()
    with subprocess.Popen([python, *argv], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike getrusage
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {' '.join(argv)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Completed(output, round(time.perf_counter() - start, 1), usage.ru_maxrss * unit / 2**30)


def load_record(path: Path, request: Record) -> Record:
    """The stored record of a run, checked against its request; of a new run the request itself."""
    record: Record = json.loads(path.read_text()) if path.is_file() else request
    if {key: record.get(key) for key in request} != request:
        raise Failed(f"{path} was made with other {' or '.join(f'--{key}' for key in request)}; name another --out")
    return record


def fit(source: str, run: Path, budget: str, seed: int, settings: Sequence[str]) -> Completed:
    """Train with the plan's settings and these overrides."""
    flags = ["--out", str(run), "--budget", budget, "--seed", str(seed), "--overwrite"]
    return call(
        ["-m", "sfumato", "fit", source, *flags, *(word for setting in settings for word in ("--set", setting))]
    )


def fit_once(source: Callable[[], Path], run: Path, request: Record, options: argparse.Namespace) -> None:
    """Train unless a model of the same request exists; the request is stored beside it."""
    path = run.with_name(f"{run.name}.json")
    if path.is_file() and (run / "model.json").is_file():
        load_record(path, request)
        return
    fit(str(source()), run, options.budget, options.seed, options.set)
    save_record(path, request)


def print_all(jobs: Iterable[tuple[str, Callable[[], Iterable[str]]]]) -> int:
    """Print the lines of named jobs as they come, and report failures; 1 if one failed, else 0."""
    failed = 0
    for name, job in jobs:
        try:
            for line in job():
                print(line, flush=True)
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


def train(spec: Spec, run: Path, options: argparse.Namespace) -> Record:
    """Fit with the settings common to all runs."""
    done = fit(spec.data, run, spec.budget, spec.seed, options.set)
    record = json.loads((run / "run.json").read_text())
    model = json.loads((run / "model.json").read_text())
    metrics = record["metrics"]
    return {
        "seconds": done.seconds,
        "gib": round(done.gib, 2),
        "parameters": sum(metrics["parameters"].values()),
        "psnr": metrics["codec"]["psnr"],
        "sample": model["sample"],
    }


def generate_samples(spec: Spec, run: Path, options: argparse.Namespace) -> Record:
    """Generate class-balanced samples with the model's own sampling defaults."""
    flags = ["--out", f"{run}-samples", "--overwrite", "--sheet", f"{run}.png"]
    done = call(["-m", "sfumato", "generate", str(run), "-n", str(options.items), "--seed", str(spec.seed), *flags])
    return {"seconds": done.seconds, "items": options.items}


def evaluate_samples(spec: Spec, run: Path, options: argparse.Namespace) -> Record:
    """The metrics of `sfumato evaluate`."""
    extra = ["--cas"] if options.cas else []
    done = call(["-m", "sfumato", "evaluate", f"{run}-samples", spec.data, "--json", *extra])
    return json.loads(done.output)


def judge_samples(spec: Spec, run: Path, options: argparse.Namespace) -> Record:
    """The metrics of the external evaluator; empty if it does not know the data set."""
    try:
        done = call([str(options.judge), "images", f"{run}-samples", "--reference", spec.data, "--cas"])
    except Failed as error:
        print(f"{spec.name}: the external evaluator failed ({error})", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.output)


PARTS: dict[str, Callable[[Spec, Path, argparse.Namespace], Record]] = {
    "fit": train,
    "generate": generate_samples,
    "evaluate": evaluate_samples,
    "judge": judge_samples,
}


def run_parts(spec: Spec, options: argparse.Namespace) -> Record:
    """The complete record of a run; parts that are missing are run now."""
    run = options.out / spec.name
    path = options.out / f"{spec.name}.json"
    record = load_record(path, {"set": options.set, "items": options.items})
    for part, work in PARTS.items():
        missing = not record.get(part) or (part == "evaluate" and options.cas and "cas" not in record[part])
        if not missing or (part == "judge" and options.judge is None):
            continue
        print(f"{spec.name}: {part}", file=sys.stderr, flush=True)
        record[part] = work(spec, run, options)
        save_record(path, record)
    return record


def with_floor(report: Record, name: str) -> str:
    """A metric with its floor (real held-out items) in brackets; a distance uses as many items as its floor."""
    if name not in report:
        return "–"
    floor, value = report.get(f"{name}_floor"), report.get(f"{name}_equal", report[name])
    return f"{value:.3f}" + ("" if floor is None else f" ({floor:.3f})")


def header(external: bool) -> list[str]:
    """The first two lines of the table."""
    names = [*COLUMNS, *METRICS, *(f"judge: {name}" for name in METRICS if external)]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def table_row(spec: Spec, record: Record, external: bool) -> str:
    """The row of one run."""
    fit, sample = record["fit"], record["fit"]["sample"]
    cells = [*spec, fit["seconds"], fit["gib"], f"{fit['parameters']:,}", f"{fit['psnr']:.1f}"]
    cells += [f"{sample['sampler']} {sample['steps']}", sample["guidance"], record["generate"]["seconds"]]
    cells += [with_floor(record["evaluate"], name) for name in METRICS]
    cells += [with_floor(record.get("judge", {}), name) for name in METRICS if external]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=by_commas, default=["mnist"], help="sources, separated by commas")
    parser.add_argument("--budgets", type=by_commas, default=["5m"], help="such as 5m,10m,30m")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in by_commas(text)], default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of runs and records")
    parser.add_argument(
        "--judge", type=Path, help="external evaluator, called as: JUDGE images SAMPLES --reference DATA --cas"
    )
    parser.add_argument(
        "--cas", action="store_true", help="also the classification accuracy score of `evaluate` (slow)"
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="number of generated items")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options = read_options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    external = options.judge is not None
    print("\n".join(header(external)), flush=True)
    specs = [Spec(*values) for values in product(options.data, options.budgets, options.seeds)]
    return print_all((spec.name, lambda s=spec: [table_row(s, run_parts(s, options), external)]) for spec in specs)


if __name__ == "__main__":
    sys.exit(main())
