"""What a few-step model loses and saves: a Markdown table with a row a way of sampling.

    python benchmarks/distill.py runs/mnist mnist
    python benchmarks/distill.py runs/mnist mnist --student runs/mnist-fast --judge ../judge.py

The teacher is sampled with its own defaults and, as what costs nothing to try, with 1, 2, 4 and 8 steps of ddim; the
few-step model, which is made with the usual budget if none is named, with 1, 2 and 4 jumps. `calls` is how often a
network is called for an item, `seconds` the time of `generate`, decoding and writing included. Every command runs in a
process of its own; what is done is kept in OUT/ROW.json and skipped the next time. Keep the machine quiet meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quality import Failed, call, keep, recorded

from sfumato.core import denoiser_calls

Facts = dict[str, Any]
ITEMS = 10_000
MEASURES = ("fd", "accuracy", "coverage", "cas")


class Row(NamedTuple):
    """A way of sampling: whose, and what is asked of `generate`."""

    name: str
    model: Path
    words: list[str]


def rows(teacher: Path, student: Path) -> list[Row]:
    """The lines of the table."""
    few = [Row(f"teacher ddim {n}", teacher, ["--sampler", "ddim", "--steps", str(n)]) for n in (1, 2, 4, 8)]
    jumps = [Row(f"few-step {n}", student, ["--steps", str(n)]) for n in (1, 2, 4)]
    return [Row("teacher", teacher, []), *few, *jumps]


def make_student(options: argparse.Namespace) -> Path:
    """The few-step model: the one that is named, or one distilled here."""
    if options.student is not None:
        return options.student
    student, record, asked = options.out / "student", options.out / "student.json", {"model": str(options.model)}
    recorded(record, asked)
    if not (student / "model.json").is_file():
        call(["-m", "sfumato", "distill", str(options.model), "--out", str(student)])
        keep(record, asked)
    return student


def calls_of(made: Facts) -> int:
    """Calls of networks for an item, from what `generate` printed: both kinds of guidance double them."""
    sampler, steps = made["sampler"], made["steps"]
    each = steps if sampler == "jump" else denoiser_calls(sampler, steps)
    return each * 2 ** sum(made.get(kind) not in (None, 1) for kind in ("guidance", "autoguidance"))


def complete(row: Row, options: argparse.Namespace) -> Facts:
    """Everything about a row: what is known already, and what is done now."""
    record = options.out / f"{row.name.replace(' ', '-')}.json"
    asked = {"model": str(row.model), **{key: getattr(options, key) for key in ("source", "seed", "items")}}
    facts = recorded(record, asked)
    samples = options.out / f"{row.name.replace(' ', '-')}{options.suffix}"
    parts: dict[str, Callable[[], list[str]]] = {
        "generate": lambda: [
            *("-m", "sfumato", "generate", str(row.model), "-n", str(options.items), "--out", str(samples)),
            *("--seed", str(options.seed), "--overwrite", "--json", *row.words),
        ],
        "evaluate": lambda: ["-m", "sfumato", "evaluate", str(samples), options.source, "--json"],
    }
    if options.judge is not None:
        extra = ["--cas"] if options.cas else []
        parts["judge"] = lambda: [str(options.judge), "images", str(samples), "--reference", options.source, *extra]
    for part, words in parts.items():
        if not facts.get(part) or (part == "judge" and options.cas and "cas" not in facts[part]):
            print(f"{row.name}: {part}", file=sys.stderr, flush=True)
            facts[part] = json.loads(call(words()).output)
            keep(record, facts)
    return facts


def beside(report: Facts, best: Facts, name: str) -> str:
    """A figure and, of distances, how many times the teacher's it is."""
    if name not in report:
        return "–"
    return f"{report[name]:.3f}" + (f" ({report[name] / best[name]:.2f}×)" if name == "fd" and best[name] else "")


def table_row(row: Row, facts: Facts, best: Facts) -> str:
    """The line of one way of sampling; `best` is what the teacher scores with its own defaults."""
    made = facts["generate"]
    cells = [row.name, calls_of(made), f"{made['seconds']:.1f}"]
    for part in ("evaluate", "judge"):
        if part in best:
            cells += [beside(facts.get(part, {}), best[part], name) for name in MEASURES if name in best[part]]
    return f"| {' | '.join(map(str, cells))} |"


def header(best: Facts) -> list[str]:
    """The first two lines of the table."""
    names = ["sampled", "calls", "seconds"]
    names += [name for name in MEASURES if name in best["evaluate"]]
    names += [f"judge: {name}" for name in MEASURES if name in best.get("judge", {})]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the teacher")
    parser.add_argument("source", help="what it was trained on")
    parser.add_argument("--student", type=Path, help="folder of the few-step model (default: distilled into OUT)")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), help="where samples and records go")
    parser.add_argument("--judge", type=Path, help="script called as: JUDGE images SAMPLES --reference SOURCE")
    parser.add_argument("--cas", action="store_true", help="ask the judge for the classification accuracy score too")
    parser.add_argument("--items", type=int, default=ITEMS, help="how many are generated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="", help="of the samples' names: .csv for tables")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    options = read_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        student = make_student(options)
        best: Facts = {}
        for row in rows(options.model, student):
            facts = complete(row, options)
            if not best:
                best = facts
                print("\n".join(header(best)), flush=True)
            print(table_row(row, facts, best), flush=True)
    except Failed as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
