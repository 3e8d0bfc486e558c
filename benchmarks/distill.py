"""Quality and speed of a few-step model beside its teacher. Prints a Markdown table with a row per sampling.

    python benchmarks/distill.py runs/mnist mnist
    python benchmarks/distill.py runs/mnist mnist --student runs/mnist-fast --judge ../judge.py

The teacher is sampled with its own defaults and, as a baseline, with 1, 2, 4 and 8 DDIM steps; the few-step model with
1, 2 and 4 jumps. Without --student it is distilled here, with the default budget. `NFE` counts network evaluations per
item, `seconds` is the time of `generate`, decoding and writing included. Every command runs in its own process.
Results are stored in OUT/ROW.json, and later calls skip what is there. Keep the machine otherwise idle.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quality import Failed, call, load_record, save_record

from sfumato.core import denoiser_evaluations

Record = dict[str, Any]
ITEMS = 10_000  # generated per row
METRICS = ("fd", "accuracy", "coverage", "cas")


class Row(NamedTuple):
    """One way of sampling: name, model folder, flags of `generate`."""

    name: str
    model: Path
    flags: list[str]


def rows(teacher: Path, student: Path) -> list[Row]:
    """The rows of the table."""
    few = [Row(f"teacher ddim {n}", teacher, ["--sampler", "ddim", "--steps", str(n)]) for n in (1, 2, 4, 8)]
    jumps = [Row(f"few-step {n}", student, ["--steps", str(n)]) for n in (1, 2, 4)]
    return [Row("teacher", teacher, []), *few, *jumps]


def student_folder(options: argparse.Namespace) -> Path:
    """The few-step model: the given one, or one distilled here."""
    if options.student is not None:
        return options.student
    student, path, request = options.out / "student", options.out / "student.json", {"model": str(options.model)}
    load_record(path, request)
    if not (student / "model.json").is_file():
        call(["-m", "sfumato", "distill", str(options.model), "--out", str(student)])
        save_record(path, request)
    return student


def evaluations_per_item(report: Record) -> int:
    """Network evaluations per item, from the output of `generate`: each kind of guidance doubles them."""
    sampler, steps = report["sampler"], report["steps"]
    each = steps if sampler == "jump" else denoiser_evaluations(sampler, steps)
    return each * 2 ** sum(report.get(kind) not in (None, 1) for kind in ("guidance", "autoguidance"))


def run_parts(row: Row, options: argparse.Namespace) -> Record:
    """The complete record of a row; parts that are missing are run now."""
    path = options.out / f"{row.name.replace(' ', '-')}.json"
    request = {"model": str(row.model), **{key: getattr(options, key) for key in ("source", "seed", "items")}}
    record = load_record(path, request)
    samples = options.out / f"{row.name.replace(' ', '-')}{options.suffix}"
    parts: dict[str, Callable[[], list[str]]] = {
        "generate": lambda: [
            *("-m", "sfumato", "generate", str(row.model), "-n", str(options.items), "--out", str(samples)),
            *("--seed", str(options.seed), "--overwrite", "--json", *row.flags),
        ],
        "evaluate": lambda: ["-m", "sfumato", "evaluate", str(samples), options.source, "--json"],
    }
    if options.judge is not None:
        extra = ["--cas"] if options.cas else []
        parts["judge"] = lambda: [str(options.judge), "images", str(samples), "--reference", options.source, *extra]
    for part, argv in parts.items():
        if not record.get(part) or (part == "judge" and options.cas and "cas" not in record[part]):
            print(f"{row.name}: {part}", file=sys.stderr, flush=True)
            record[part] = json.loads(call(argv()).output)
            save_record(path, record)
    return record


def with_ratio(report: Record, teacher: Record, name: str) -> str:
    """A metric; for distances also its ratio to the teacher's."""
    if name not in report:
        return "–"
    return f"{report[name]:.3f}" + (f" ({report[name] / teacher[name]:.2f}×)" if name == "fd" and teacher[name] else "")


def table_row(row: Row, record: Record, teacher: Record) -> str:
    """The row of one way of sampling; `teacher` is the teacher's record with its own defaults."""
    report = record["generate"]
    cells = [row.name, evaluations_per_item(report), f"{report['seconds']:.1f}"]
    for part in ("evaluate", "judge"):
        if part in teacher:
            cells += [
                with_ratio(record.get(part, {}), teacher[part], name) for name in METRICS if name in teacher[part]
            ]
    return f"| {' | '.join(map(str, cells))} |"


def header(teacher: Record) -> list[str]:
    """The first two lines of the table."""
    names = ["sampled", "NFE", "seconds"]
    names += [name for name in METRICS if name in teacher["evaluate"]]
    names += [f"judge: {name}" for name in METRICS if name in teacher.get("judge", {})]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the teacher")
    parser.add_argument("source", help="source that it was trained on")
    parser.add_argument("--student", type=Path, help="folder of the few-step model (default: distilled into OUT)")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), help="folder of samples and records")
    parser.add_argument(
        "--judge", type=Path, help="external evaluator, called as: JUDGE images SAMPLES --reference SOURCE"
    )
    parser.add_argument("--cas", action="store_true", help="also the classification accuracy score of the judge")
    parser.add_argument("--items", type=int, default=ITEMS, help="number of generated items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="", help="suffix of the sample path: .csv for tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    options = read_options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        student = student_folder(options)
        teacher: Record = {}
        for row in rows(options.model, student):
            record = run_parts(row, options)
            if not teacher:
                teacher = record
                print("\n".join(header(teacher)), flush=True)
            print(table_row(row, record, teacher), flush=True)
    except Failed as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
