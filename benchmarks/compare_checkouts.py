"""Two checkouts of sfumato on one machine: do they train and sample the same numbers, and how fast is each?

    git worktree add ../before main~1
    python benchmarks/compare_checkouts.py ../before .
    python benchmarks/compare_checkouts.py ../before . --tolerance --keep ../compared
    python benchmarks/compare_checkouts.py ../before . --pairs 7

Each checkout runs the same short commands, with a fixed number of steps and seed 0, through its command line alone: an
image set, a partly labelled image folder and a table are trained, the image model is distilled, and every task is run
once. Compared are the loss curves, the weights and what the tasks write, bit for bit; nothing is stored, so that the
machine and the versions of libraries do not matter. A change of structure must not change any of them.

With `--tolerance`, for a change that reorders arithmetic, both checkouts train the same models, and the losses may
differ by 1 % at each logged step. Then both open the models that the first one trained and run every sampler and the
tasks through the Python API, in float32 and with the same seeds; the items may differ by 1e-5 of the range of the data.
The steps that are logged depend on how often a checkout looks at the clock: those that both logged are compared.
`--keep FOLDER` keeps the models and items; further calls with the same first checkout then only run the second one.

`--pairs N` trains the image set and the table N times more with each checkout, in turn, and prints the median of the
ratios of steps per second, for both stages.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits, load_wine

STEPS, SPEED_STEPS = 120, 300  # optimizer steps of a run that is compared, and of one that is timed
GUIDED_STEPS = 400  # optimizer steps of a model with a guide: the fewest after which there is one
TIMES = ("items_per_second", "share_of_peak")  # what two runs of the same code differ in
CLOCK = """
import itertools, sys, time, threading, queue, concurrent.futures
ticks = itertools.count()
time.perf_counter = time.monotonic = lambda: 0.1 * next(ticks)
from sfumato.apps.cli import main
main()
"""  # a tenth of a second passes whenever anyone looks at it: what is decided by the clock is decided alike
FIXED = ("--seed", "0", "--device", "cpu", "--set", "train.precision=fp32")
LOSS_TOLERANCE = 1e-2  # largest difference of losses, relative
ITEM_TOLERANCE = 1e-5  # largest difference of items, as a share of the range of the data
TRAINED = ("image", "table", "semi", "fast")  # the models whose losses are compared
LOSSES = ("loss", "held_out")
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m", "unipc", "abm2", "sde")
SAMPLE = "import runpy, sys; runpy.run_path(sys.argv[1])['write_samples'](*sys.argv[2:4])"  # script, models, output
Call = tuple[str, str, Mapping[str, Any]]  # model, task, arguments


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
    Image.fromarray(np.pad(np.full((8, 4), 255, np.uint8), ((0, 0), (4, 0)))).save(folder / "mask.png")


def trainings(steps: int) -> Iterator[tuple[str, ...]]:
    """The command lines that train the models `TRAINED`."""
    fit = ("--steps", str(steps), *FIXED)
    yield ("fit", "digits", "--out", "image", *fit)
    yield ("fit", "wine.csv", "--out", "table", *fit)
    yield ("fit", "partly", "--out", "semi", *fit)
    yield ("distill", "image", "--out", "fast", "--steps", "60", "--device", "cpu")


def commands(steps: int) -> Iterator[tuple[str, ...]]:
    """The command lines, in order; what they write is compared."""
    yield from trainings(steps)
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


def preparations() -> Iterator[tuple[str, ...]]:
    """The command lines that, after `trainings`, make what `calls` need: a transformer with a guide, and images."""
    net = ("net=dit", "width=96", "depth=2", "heads=4", "patch=1")
    settings = ["sample.autoguidance=2", "train.codec.steps=40", f"train.denoiser.steps={GUIDED_STEPS}"]
    settings += [f"denoiser.{setting}" for setting in net]
    yield ("fit", "digits", "--out", "guided", *FIXED, *(word for text in settings for word in ("--set", text)))
    yield ("generate", "image", "-n", "12", "--out", "given", "--device", "cpu")


def calls() -> Iterator[Call]:
    """The calls of the Python API whose items are compared; paths are those in the folder of the models."""
    few: dict[str, Any] = {"n": 12, "seed": 1, "steps": 10}
    for sampler, label, guidance in product(SAMPLERS, (None, "7"), (1.0, 1.5)):
        yield "image", "generate", {**few, "sampler": sampler, "label": label, "guidance": guidance}
    for label in (None, "2"):
        yield "semi", "generate", {**few, "label": label}
        yield "fast", "generate", {**few, "label": label, "steps": 2}
        yield "guided", "generate", {**few, "label": label, "autoguidance": 2.0, "guidance": 1.5}
    yield "fast", "generate", {**few, "sampler": "heun"}
    yield "guided", "generate", {**few, "autoguidance": 1.0}
    given: dict[str, Any] = {"source": "given", "seed": 1, "steps": 10}
    for name, method in product(("image", "guided"), ("noise", "invert")):
        yield name, "edit", {**given, "label": "3", "source_label": "1", "method": method}
    for name, method in product(("image", "guided"), ("gradient", "repaint")):
        yield name, "inpaint", {**given, "mask": "mask.png", "label": "4", "method": method}
    yield "image", "outpaint", {**given, "left": 4}
    yield "image", "reconstruct", {"source": "given"}
    for a, b, path in (("3", "8", "flow"), ("3", "8", "latent"), ("given/000003.png", "given/000008.png", "flow")):
        yield "image", "interpolate", {"a": a, "b": b, "path": path, "n": 6, "steps": 10}
    yield "table", "generate", {**few, "n": 200}
    yield "table", "generate", {**few, "n": 20, "where": ["class=red", "alcohol>12"]}
    yield "table", "inpaint", {"source": "holes.csv", "seed": 1, "steps": 10}
    yield "table", "reconstruct", {"source": "wine.csv"}


def title(call: Call) -> str:
    """The name of a call's items."""
    model, task, arguments = call
    return " ".join([model, task, *(f"{key}={value}" for key, value in arguments.items())]).replace("/", "-")


def write_samples(models: str, out: str) -> None:
    """The items of all calls as arrays of an .npz; those that fail are missing, and the error is printed."""
    import torch

    import sfumato

    load = cache(lambda name: sfumato.load(name, device="cpu"))
    items: dict[str, np.ndarray] = {}
    with contextlib.chdir(models):
        for name, task, arguments in calls():
            try:
                result = getattr(load(name), task)(**arguments)
                items[title((name, task, arguments))] = torch.stack(list(result.items)).double().numpy()
            except Exception as error:
                print(f"{title((name, task, arguments))}: {type(error).__name__}: {error}")
    np.savez(out, **items)


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


def run_all(checkout: Path, folder: Path, lines: Iterable[Sequence[str]]) -> dict[str, object]:
    """What each command prints, run in a new folder with the inputs; failures are shown."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    said = {" ".join(words): printed(run(checkout, folder, words)) for words in lines}
    failed = [f"{words}: {text}" for words, text in said.items() if str(text).startswith("exit code")]
    print(f"{checkout}: {len(said)} commands", *failed, sep="\n  ", flush=True)
    return said


def compare(checkouts: Sequence[Path], root: Path, steps: int) -> list[str]:
    """Run everything with both checkouts; the names of what differs."""
    before, after = (
        run_all(checkout, root / str(number), commands(steps)) | results(root / str(number))
        for number, checkout in enumerate(checkouts)
    )
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def loss_curves(folder: Path) -> dict[str, float]:
    """The losses of all models trained in a folder, by model, stage, step and name."""
    curves: dict[str, float] = {}
    for model in TRAINED:
        path = folder / model / "metrics.jsonl"
        for row in losses(path) if path.is_file() else ():
            where = f"{model} {row['stage']} step {row.get('step')}"
            curves |= {f"{where} {name}": float(str(row[name])) for name in LOSSES if name in row}
    return curves


def compare_losses(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Print the largest relative difference; the names of the losses that differ by more than the tolerance."""
    both = before.keys() & after.keys()
    differences = {name: abs(after[name] - before[name]) / abs(before[name]) for name in both}
    largest = max(differences, key=lambda name: differences[name], default="none")
    print(f"losses: {len(before)} and {len(after)}, {len(both)} at the same steps; largest relative difference")
    print(f"  {differences.get(largest, np.inf):.2e} ({largest})", flush=True)
    missing = [f"{model}: no loss in common" for model in TRAINED if not any(n.startswith(f"{model} ") for n in both)]
    return missing + [f"{name}: {share:.2e}" for name, share in differences.items() if not share <= LOSS_TOLERANCE]


def difference(before: np.ndarray | None, after: np.ndarray | None) -> float:
    """Largest difference of items (N, ...) as a share of their range; of rows (N, D), of each column's range.

    Categories are numbers too: a different one differs by more than any tolerance, and so does a missing value.
    """
    if before is None or after is None or before.shape != after.shape or (np.isnan(before) != np.isnan(after)).any():
        return np.inf
    columns = before.reshape(-1, before.shape[-1] if before.ndim == 2 else 1)
    span = np.nanmax(columns, 0) - np.nanmin(columns, 0)
    return float(np.nanmax(np.abs(after.reshape(columns.shape) - columns) / np.where(span > 0, span, 1)))


def compare_items(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> list[str]:
    """Print the largest difference of each model; the names of the calls that differ by more than the tolerance."""
    differences = {name: difference(before.get(name), after.get(name)) for name in map(title, calls())}
    print("items: largest difference as a share of the range of the data")
    for model in dict.fromkeys(model for model, *_ in calls()):
        names = [name for name in differences if name.startswith(f"{model} ")]
        largest = max(names, key=lambda name: differences[name])
        print(f"  {differences[largest]:.2e} ({largest})", flush=True)
    return [f"{name}: {share:.2e}" for name, share in differences.items() if not share <= ITEM_TOLERANCE]


def sample(checkout: Path, models: Path, out: Path) -> dict[str, np.ndarray]:
    """What a checkout makes of the models in a folder; `out` is the file of the items."""
    failed = run(checkout, out.parent, (str(models), str(out)), ("-c", SAMPLE, __file__))
    print(f"{checkout}: {len(list(calls()))} calls", *failed.splitlines(), sep="\n  ", flush=True)
    return dict(np.load(out)) if out.is_file() else {}


def compare_within_tolerance(checkouts: Sequence[Path], root: Path, steps: int) -> list[str]:
    """Train with both checkouts, and sample with both from the models of the first; the names of what differs."""
    before, after = checkouts
    kept, new = root / f"before-{steps}", root / f"after-{steps}"
    items = kept / f"items-{hashlib.sha256(str(list(calls())).encode()).hexdigest()[:8]}.npz"  # of these calls
    if not (kept / "complete").is_file():
        shutil.rmtree(kept, ignore_errors=True)
        said = run_all(before, kept, [*trainings(steps), *preparations()])
        if any(str(text).startswith("exit code") for text in said.values()):
            sys.exit("the first checkout has no models to compare")
        (kept / "complete").touch()
    expected = dict(np.load(items)) if items.is_file() else sample(before, kept, items)
    shutil.rmtree(new, ignore_errors=True)
    run_all(after, new, trainings(steps))
    different = compare_losses(loss_curves(kept), loss_curves(new))
    return different + compare_items(expected, sample(after, kept, new / "items.npz"))


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
    parser.add_argument("--tolerance", action="store_true", help="compare losses and items within a tolerance")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where --tolerance keeps models (default: nowhere)")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of timed runs")
    parser.add_argument("--only-speed", action="store_true", help="compare no results")
    options = parser.parse_args(arguments)
    checkouts = [options.before.resolve(), options.after.resolve()]
    with tempfile.TemporaryDirectory() as name:
        root, different = Path(name), list[str]()
        if options.tolerance:
            kept = root if options.keep is None else options.keep.resolve()
            different = compare_within_tolerance(checkouts, kept, options.steps)
        elif not options.only_speed:
            different = compare(checkouts, root, options.steps)
        for result in different:
            print(f"differs: {result}")
        if not different and not options.only_speed:
            print("all within the tolerance" if options.tolerance else "all the same")
        if options.pairs:
            race(checkouts, root, options.pairs)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
