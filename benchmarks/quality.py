"""How good `fit` is at each budget: train, generate 10,000, measure; one row of a Markdown table a run.

    python benchmarks/quality.py --data mnist,fashion-mnist --budgets 5m,10m,30m --seeds 0
    python benchmarks/quality.py --data mnist --budgets 5m --judge ../judge.py

Every command runs in a process of its own, as a user would type it, so seconds and memory hold everything. What is
done is kept in RUN.json beside the run and skipped the next time; a training that was cut short starts over, for its
seconds would not be those of one go. Keep the machine quiet meanwhile: the budget is wall clock.
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

Facts = dict[str, Any]
ITEMS = 10_000
MEASURES = ("accuracy", "fd", "cas", "coverage", "novelty")
HEAD = ("data", "budget", "seed", "fit s", "GiB", "parameters", "PSNR", "steps", "w", "generate s")


class Spec(NamedTuple):
    """One run: what is read, for how long it is trained, with which seed."""

    data: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.-]+", "-", f"{self.data}-{self.budget}-{self.seed}").strip("-")


class Done(NamedTuple):
    """A finished command: what it printed, wall clock in seconds, largest memory in GiB."""

    output: str
    seconds: float
    gib: float


class Failed(Exception):
    """A command that did not end well."""


def keep(record: Path, facts: Facts) -> None:
    """Write what is known so far, whole or not at all."""
    partial = record.with_name(record.name + ".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(record)


def call(words: Sequence[str], python: str = sys.executable) -> Done:
    """Run a Python command line in its own process; its progress goes to the error stream."""
    start = time.perf_counter()
    with subprocess.Popen([python, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike getrusage
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {' '.join(words)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Done(output, round(time.perf_counter() - start, 1), usage.ru_maxrss * unit / 2**30)


def recorded(record: Path, asked: Facts) -> Facts:
    """What is known of a run that was asked this; of a new one nothing else."""
    facts: Facts = json.loads(record.read_text()) if record.is_file() else asked
    if {key: facts.get(key) for key in asked} != asked:
        raise Failed(f"{record} is of other {' or '.join(f'--{key}' for key in asked)}; name another --out")
    return facts


def fit(source: str, run: Path, budget: str, seed: int, settings: Sequence[str]) -> Done:
    """Train, with what the plan decides but for some settings."""
    where = ["--out", str(run), "--budget", budget, "--seed", str(seed), "--overwrite"]
    return call(
        ["-m", "sfumato", "fit", source, *where, *(word for setting in settings for word in ("--set", setting))]
    )


def fit_once(make_source: Callable[[], Path], run: Path, asked: Facts, options: argparse.Namespace) -> None:
    """Train, if there is no model of which the same was asked; what is asked is kept beside it."""
    record = run.with_name(f"{run.name}.json")
    if record.is_file() and (run / "model.json").is_file():
        recorded(record, asked)
        return
    fit(str(make_source()), run, options.budget, options.seed, options.set)
    keep(record, asked)


def print_all(jobs: Iterable[tuple[str, Callable[[], Iterable[str]]]]) -> int:
    """Print the lines of named jobs as they come, and say which failed; 1 if one did, else 0."""
    failed = 0
    for name, job in jobs:
        try:
            for line in job():
                print(line, flush=True)
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


def train(spec: Spec, run: Path, options: argparse.Namespace) -> Facts:
    """Fit, with the settings given to all runs."""
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


def draw(spec: Spec, run: Path, options: argparse.Namespace) -> Facts:
    """Generate, evenly over the classes and with the model's own defaults."""
    where = ["--out", f"{run}-samples", "--overwrite", "--sheet", f"{run}.png"]
    done = call(["-m", "sfumato", "generate", str(run), "-n", str(options.items), "--seed", str(spec.seed), *where])
    return {"seconds": done.seconds, "items": options.items}


def measure(spec: Spec, run: Path, options: argparse.Namespace) -> Facts:
    """What the project says of the samples."""
    extra = ["--cas"] if options.cas else []
    done = call(["-m", "sfumato", "evaluate", f"{run}-samples", spec.data, "--json", *extra])
    return json.loads(done.output)


def ask_judge(spec: Spec, run: Path, options: argparse.Namespace) -> Facts:
    """What an outside judge says of them; nothing where it does not know the data set."""
    try:
        done = call([str(options.judge), "images", f"{run}-samples", "--reference", spec.data, "--cas"])
    except Failed as error:
        print(f"{spec.name}: no judgement ({error})", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.output)


PARTS: dict[str, Callable[[Spec, Path, argparse.Namespace], Facts]] = {
    "fit": train,
    "generate": draw,
    "evaluate": measure,
    "judge": ask_judge,
}


def complete(spec: Spec, options: argparse.Namespace) -> Facts:
    """Everything about a run: what is known already, and what is done now."""
    run = options.out / spec.name
    record = options.out / f"{spec.name}.json"
    facts = recorded(record, {"set": options.set, "items": options.items})
    for part, work in PARTS.items():
        missing = not facts.get(part) or (part == "evaluate" and options.cas and "cas" not in facts[part])
        if not missing or (part == "judge" and options.judge is None):
            continue
        print(f"{spec.name}: {part}", file=sys.stderr, flush=True)
        facts[part] = work(spec, run, options)
        keep(record, facts)
    return facts


def beside_floor(report: Facts, name: str) -> str:
    """A figure and, in brackets, what real held-out items score; a distance is of as many items as its floor."""
    if name not in report:
        return "–"
    floor, value = report.get(f"{name}_floor"), report.get(f"{name}_equal", report[name])
    return f"{value:.3f}" + ("" if floor is None else f" ({floor:.3f})")


def header(judged: bool) -> list[str]:
    """The first two lines of the table."""
    names = [*HEAD, *MEASURES, *(f"judge: {name}" for name in MEASURES if judged)]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def table_row(spec: Spec, facts: Facts, judged: bool) -> str:
    """The line of one run."""
    fit, sample = facts["fit"], facts["fit"]["sample"]
    cells = [*spec, fit["seconds"], fit["gib"], f"{fit['parameters']:,}", f"{fit['psnr']:.1f}"]
    cells += [f"{sample['sampler']} {sample['steps']}", sample["guidance"], facts["generate"]["seconds"]]
    cells += [beside_floor(facts["evaluate"], name) for name in MEASURES]
    cells += [beside_floor(facts.get("judge", {}), name) for name in MEASURES if judged]
    return f"| {' | '.join(map(str, cells))} |"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=listed, default=["mnist"], help="sources, separated by commas")
    parser.add_argument("--budgets", type=listed, default=["5m"], help="such as 5m,10m,30m")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in listed(text)], default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="where runs and records go")
    parser.add_argument("--judge", type=Path, help="script called as: JUDGE images SAMPLES --reference DATA --cas")
    parser.add_argument("--cas", action="store_true", help="also our own classification accuracy score (slow)")
    parser.add_argument("--items", type=int, default=ITEMS, help="how many are generated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    options = read_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    judged = options.judge is not None
    print("\n".join(header(judged)), flush=True)
    specs = [Spec(*one) for one in product(options.data, options.budgets, options.seeds)]
    return print_all((spec.name, lambda s=spec: [table_row(s, complete(s, options), judged)]) for spec in specs)


if __name__ == "__main__":
    sys.exit(main())
