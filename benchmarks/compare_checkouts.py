"""Two checkouts of sfumato on one machine: do they train and sample the same numbers, and how fast is each?

    git worktree add ../before main~1
    python benchmarks/compare_checkouts.py ../before .
    python benchmarks/compare_checkouts.py ../before . --pairs 7

Each checkout runs the same short commands, with a fixed number of steps and seed 0, through its command line alone: an
image set, a partly labelled image folder and a table are trained, the image model is distilled, and every task is run
once. Compared are the loss curves, the weights and what the tasks write, bit for bit; nothing is stored, so that the
machine and the versions of libraries do not matter. A change of structure must not change any of them.

`--pairs N` trains the image set and the table N times more with each checkout, in turn, and prints the median of the
ratios of steps per second, for both stages.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits, load_wine

STEPS, SPEED_STEPS = 120, 300  # optimizer steps of a run that is compared, and of one that is timed
TIMES = ("items_per_second", "share_of_peak")  # what two runs of the same code differ in
CLOCK = """
import itertools, sys, time, threading, queue, concurrent.futures
ticks = itertools.count()
time.perf_counter = time.monotonic = lambda: 0.1 * next(ticks)
from sfumato.apps.cli import main
main()
"""  # a tenth of a second passes whenever anyone looks at it: what is decided by the clock is decided alike
FIXED = ("--seed", "0", "--device", "cpu", "--set", "train.precision=fp32")


def write_inputs(folder: Path) -> None:
    """A partly labelled image folder and a table with every kind of column."""
    digits = load_digits()
    for i, (pixels, digit) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        place = folder / "partly" / ("unlabelled" if i % 3 else str(digit % 4))
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        image.save(place / f"{i:04}.png")
    wine, draw = load_wine(as_frame=True), np.random.default_rng(0)
    table: pd.DataFrame = wine.frame.iloc[:, [0, 1, 4, 9]].copy()
    table["class"] = np.array(["red", "white", "rosé"])[wine.target]
    table["since"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 900, len(table)), "D")
    table["organic"] = np.where(draw.random(len(table)) < 0.3, "yes", "no")
    table.loc[draw.random(len(table)) < 0.1, "malic_acid"] = np.nan
    table.to_csv(folder / "wine.csv", index=False)
    table.loc[draw.random(len(table)) < 0.3, ["class", "alcohol"]] = np.nan
    table.to_csv(folder / "holes.csv", index=False)


def commands(steps: int) -> Iterator[tuple[str, ...]]:
    """The command lines, in order; what they write is compared."""
    fit = ("--steps", str(steps), *FIXED)
    yield ("fit", "digits", "--out", "image", *fit)
    yield ("fit", "wine.csv", "--out", "table", *fit)
    yield ("fit", "partly", "--out", "semi", *fit)
    yield ("distill", "image", "--out", "fast", "--steps", "60", "--device", "cpu")
    for model in ("image", "semi", "fast"):
        yield ("generate", model, "-n", "40", "--out", f"{model}-new", "--sheet", f"{model}-new.png")
    yield ("generate", "image", "-n", "10", "--out", "sevens", "--label", "7", "--sampler", "dpmpp_2m", "--steps", "6")
    yield ("edit", "image", "image-new", "--label", "3", "--out", "edited")
    yield ("edit", "image", "image-new", "--label", "3", "--method", "invert", "--steps", "6", "--out", "inverted")
    yield ("inpaint", "image", "image-new", "--mask", "mask.png", "--steps", "6", "--out", "inpainted")
    yield ("outpaint", "image", "image-new", "--left", "4", "--steps", "4", "--out", "wider")
    yield ("interpolate", "image", "3", "8", "-n", "6", "--out", "between")
    search = ("--align", "30", "--rounds", "0", "--samples", "60")
    yield ("transfer", "semi", "semi-new", "--label", "2", "--steps", "6", *search, "--out", "carried")
    yield ("reconstruct", "image", "digits", "-n", "30", "--out", "back")
    yield ("augment", "semi", "partly", "-n", "20", "--out", "more")
    yield ("evaluate", "image", "digits", "--json", "-n", "300")
    yield ("info", "image", "--json")
    yield ("generate", "table", "-n", "200", "--out", "rows.csv", "--sheet", "rows.png")
    yield ("generate", "table", "-n", "20", "--out", "some.csv", "--where", "class=red", "--where", "alcohol>12")
    yield ("generate", "table", "-n", "30", "--out", "even.csv", "--balance", "class")
    yield ("inpaint", "table", "holes.csv", "--out", "filled.csv")
    yield ("reconstruct", "table", "wine.csv", "--out", "back.csv")
    yield ("augment", "table", "wine.csv", "--target", "class", "-n", "10", "--out", "more.csv")
    yield ("evaluate", "table", "wine.csv", "--json", "-n", "150")


def run(checkout: Path, folder: Path, words: Sequence[str], code: Sequence[str] = ("-c", CLOCK)) -> str:
    """What a command of a checkout prints, run in a folder; by default by a clock that does not depend on speed."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "SFUMATO_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", *code, *words, "--quiet"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()}"


def losses(path: Path) -> list[dict[str, object]]:
    """The records of a run without times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def digest(path: Path) -> object:
    """What a file holds, so that equal contents are equal: of weights their values, whatever their names."""
    if path.suffix == ".safetensors":
        return sorted(hashlib.sha256(value.tobytes()).hexdigest() for value in load_file(path).values())
    if path.name == "metrics.jsonl":
        return losses(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(folder: Path) -> dict[str, object]:
    """The files that must be equal, by name."""
    kept = (".png", ".csv", ".safetensors", "metrics.jsonl", "metadata.jsonl")
    skipped = {"cache", "checkpoint", "checkpoint-features"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(kept)]
    names = [path.relative_to(folder) for path in files]
    return {str(name): digest(path) for name, path in zip(names, files, strict=True) if not skipped & set(name.parts)}


def printed(text: str) -> object:
    """What a command printed, without times."""
    try:
        report = json.loads(text)
    except ValueError:
        return text
    return {key: value for key, value in report.items() if "seconds" not in key} if isinstance(report, dict) else report


def compare(checkouts: Sequence[Path], root: Path, steps: int) -> list[str]:
    """Run everything with both checkouts; the names of what differs."""
    found: list[dict[str, object]] = []
    for number, checkout in enumerate(checkouts):
        folder = root / str(number)
        folder.mkdir()
        write_inputs(folder)
        Image.fromarray(np.pad(np.full((8, 4), 255, np.uint8), ((0, 0), (4, 0)))).save(folder / "mask.png")
        said = {" ".join(words): printed(run(checkout, folder, words)) for words in commands(steps)}
        failed = [f"{words}: {text}" for words, text in said.items() if str(text).startswith("exit code")]
        print(f"{checkout}: {len(said)} commands", *failed, sep="\n  ", flush=True)
        found.append(said | results(folder))
    before, after = found
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def speeds(checkout: Path, folder: Path, source: str) -> dict[str, float]:
    """Items a second of each stage of one run."""
    quick = (
        "--set",
        "sample.steps=2",
        "--set",
        "sample.guidance=1",
    )  # no time for previews
    words = ("fit", source, "--out", "timed", "--overwrite", "--steps", str(SPEED_STEPS), *quick, *FIXED)
    run(checkout, folder, words, ("-m", "sfumato"))
    stages = json.loads((folder / "timed" / "run.json").read_text())["stages"]
    return {f"{source} {name}": stage["items_per_second"] for name, stage in stages.items()}


def race(checkouts: Sequence[Path], root: Path, pairs: int) -> None:
    """Print the median ratio of the second checkout's speed to the first's, over interleaved pairs of runs."""
    folder = root / "timed"
    folder.mkdir()
    write_inputs(folder)
    ratios: dict[str, list[float]] = {}
    for _ in range(pairs):
        for source in ("digits", "wine.csv"):
            before, after = (speeds(checkout, folder, source) for checkout in checkouts)
            for stage, speed in before.items():
                ratios.setdefault(stage, []).append(after[stage] / speed)
    for stage, found in ratios.items():
        print(f"{stage:<20} {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of timed runs")
    parser.add_argument("--only-speed", action="store_true", help="compare no results")
    options = parser.parse_args(arguments)
    checkouts = [options.before.resolve(), options.after.resolve()]
    with tempfile.TemporaryDirectory() as name:
        different = [] if options.only_speed else compare(checkouts, Path(name), options.steps)
        for result in different:
            print(f"differs: {result}")
        if not different and not options.only_speed:
            print("all the same")
        if options.pairs:
            race(checkouts, Path(name), options.pairs)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
