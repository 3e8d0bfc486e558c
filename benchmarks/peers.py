"""sfumato beside other libraries, with equal data, machine, wall clock and evaluator: tables, samples and a plot.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install torch==2.13.0 diffusers accelerate einops ema-pytorch scipy tqdm pillow safetensors matplotlib
    PEERS/bin/pip install --no-deps denoising-diffusion-pytorch
    python benchmarks/peers.py --peer-python PEERS/bin/python --data mnist,fashion-mnist --minutes 5,10,30 --judge JUDGE

The peers have their own environment, without torchvision. `peers_nets.py` describes each peer and its choices,
`peers_train.py` how all are trained and timed. A peer is trained once, for the longest of the --minutes, and its
averaged weights are saved at each of them; a second stage starts anew for each. sfumato is fitted anew for each time,
by its command line, and its clock includes everything, start-up and reading too; a peer's clock counts training steps
only. Every entrant generates the same number of samples: sfumato with its defaults, the peers by DDIM with --steps
steps. The distance and its floor (real held-out images, in brackets) depend on that number. Samples of
class-conditional entrants are class-balanced, which few held-out images are not; so a line below the tables has the
score of a class-balanced set of real images. Unconditional peers have no accuracy.

The judge is an external evaluator, called as: JUDGE images SAMPLES --reference DATA [--cas]. Without it, and for data
that it does not know, `sfumato evaluate` is used. Results are stored in OUT/NAME.json, and later calls skip what is
there; an interrupted training starts over. Everything runs on the CPU. Keep the machine otherwise idle.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers_nets import PEERS
from PIL import Image, ImageDraw
from quality import Failed, call, load_record, print_all, save_record, with_floor

Record = dict[str, Any]
OURS = "sfumato"
TRAINER = str(Path(__file__).with_name("peers_train.py"))
SHEET_COLUMNS, SCALE, LABEL_WIDTH = 16, 2, 140  # samples per row of a sheet, their enlargement, pixels for row labels
METRICS = ("fd", "accuracy", "cas", "coverage", "novelty")
COLUMNS = ("data", "entrant", "minutes", "steps", "images/s", "parameters", "samples", "sampling s", *METRICS, "judge")
SPEED_COLUMNS = ("data", "entrant", "stage", "images/s", "of sfumato's codec", "of sfumato's denoiser")


class Entry(NamedTuple):
    """One entrant on one data set."""

    data: str
    entrant: str
    seed: int

    @property
    def name(self) -> str:
        """Name of folder and record."""
        return f"{self.data}-{self.entrant}-{self.seed}"


def seconds(minutes: float) -> str:
    """The name of a training time in peers_train.py."""
    return f"{60 * minutes:g}"


def export(data: str, options: argparse.Namespace) -> Path:
    """The training part as plain arrays, read as sfumato reads it."""
    folder = options.out / "data" / data
    if not folder.is_dir():
        from sfumato.modalities.image.read import read_images

        train, _ = read_images(data)
        if train.mode not in ("L", "RGB") or train.labels is None:
            raise Failed(f"{data}: only gray or RGB images with classes can be compared")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial_folder = Path(tempfile.mkdtemp(prefix=f".{data}-", dir=folder.parent))
        np.save(partial_folder / "images.npy", train.pixels)
        np.save(partial_folder / "labels.npy", train.labels)
        try:
            partial_folder.rename(folder)
        except OSError:  # a concurrent run was first
            shutil.rmtree(partial_folder)
    return folder


def train_peer(entry: Entry, run: Path, options: argparse.Namespace) -> Record:
    """Train a peer once; its size and, for each of the minutes, the figures of its stages."""
    marks = ",".join(map(seconds, options.minutes))
    flags = ["--data", str(export(entry.data, options)), "--run", str(run), "--seed", str(entry.seed)]
    done = call([TRAINER, "train", entry.entrant, *flags, "--seconds", marks], options.peer_python)
    return {"gib": round(done.gib, 2), **json.loads(done.output)}


def fit(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Record:
    """Fit sfumato within `minutes`; the same record."""
    fixed = [word for setting in options.set for word in ("--set", setting)]
    flags = ["--out", str(run), "--overwrite", "--seed", str(entry.seed), "--device", "cpu", *fixed]
    done = call(["-m", "sfumato", "fit", entry.data, "--budget", f"{seconds(minutes)}s", *flags])
    parameters = sum(json.loads((run / "run.json").read_text())["metrics"]["parameters"].values())
    stages = {**stage_totals(run), "all": {"seconds": done.seconds}}
    return {"gib": round(done.gib, 2), "parameters": parameters, "marks": {seconds(minutes): stages}}


def stage_totals(run: Path) -> Record:
    """Steps, images and seconds of each stage from the reports of a run: seconds = images / (images per second)."""
    batches = json.loads((run / "run.json").read_text())["plan"]["train"]
    stages: Record = {}
    for markdown_row in (run / "metrics.jsonl").read_text().splitlines():
        report = json.loads(markdown_row)
        if report.get("items_per_second") and report.get("stage") in batches:
            stage = stages.setdefault(report["stage"], {"steps": 0, "images": 0, "seconds": 0.0})
            images = (report["step"] - stage["steps"]) * batches[report["stage"]]["batch"]
            stage["steps"], stage["images"] = report["step"], stage["images"] + images
            stage["seconds"] += images / report["items_per_second"]
    return stages


def generate_samples(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Record:
    """Generate the samples; the seconds are those of the whole command."""
    flags = ["-n", str(options.items), "--seed", str(entry.seed), "--out", str(sample_folder(run, minutes))]
    if entry.entrant == OURS:
        extra = ["--overwrite", "--device", "cpu", "--sheet", f"{run}-{minutes:g}.png"]
        done = call(["-m", "sfumato", "generate", f"{run}-{minutes:g}", *flags, *extra])
    else:
        extra = ["--at", seconds(minutes), "--steps", str(options.steps)]
        done = call([TRAINER, "sample", str(run), *flags, *extra], options.peer_python)
    return {"seconds": done.seconds, "items": options.items}


def sample_folder(run: Path, minutes: float) -> Path:
    """Folder of the samples of one training time."""
    return run.with_name(f"{run.name}-{minutes:g}-samples")


def judge_samples(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Record:
    """Metrics of the samples."""
    labelled = entry.entrant == OURS or PEERS[entry.entrant].labelled
    return judge_report(entry.data, sample_folder(run, minutes), options.cas and labelled, options)


def judge_report(data: str, samples: Path, cas: bool, options: argparse.Namespace) -> Record:
    """Metrics of the external evaluator, or of `sfumato evaluate` if that fails."""
    extra = ["--cas"] if cas else []
    if options.judge is not None:
        try:
            report = json.loads(call([str(options.judge), "images", str(samples), "--reference", data, *extra]).output)
            return {"by": options.judge.name, **report}
        except Failed as error:
            print(f"{samples.name}: using sfumato evaluate ({error})", file=sys.stderr, flush=True)
    report = json.loads(call(["-m", "sfumato", "evaluate", str(samples), data, "--json", *extra]).output)
    return {"by": f"{OURS} evaluate", **report}


def balanced_real_line(data: str, options: argparse.Namespace) -> str:
    """A line with the distance of a class-balanced set of held-out images."""
    path, request = options.out / f"{data}-real.json", {"items": options.items}
    record = load_record(path, request)
    if "fd" not in record:
        from sfumato.modalities.image.read import read_source
        from sfumato.modalities.image.write import write_images

        train, held = read_source(data)
        per_class = options.items // train.classes
        index = np.concatenate([np.flatnonzero(held.labels == k)[:per_class] for k in range(train.classes)])
        rows = [{"label": int(k)} for k in held.labels[index]]
        samples = write_images(options.out / f"{data}-real-samples", held.batch(index).data, rows, overwrite=True)
        record |= {"n": len(index), "fd": judge_report(data, samples, False, options)["fd"]}
        save_record(path, record)
    return f"{data}: {record['n']} class-balanced real images have fd {record['fd']:.3f}"


def parts(entry: Entry, options: argparse.Namespace) -> dict[str, Callable[[], Record]]:
    """The work for an entrant, in order."""
    run, work = options.out / entry.name, dict[str, Callable[[], Record]]()
    for minutes in options.minutes:
        if entry.entrant == OURS:
            work[f"train {minutes:g}"] = partial(fit, entry, Path(f"{run}-{minutes:g}"), minutes, options)
        else:
            work["train"] = partial(train_peer, entry, run, options)
        work[f"samples {minutes:g}"] = partial(generate_samples, entry, run, minutes, options)
        work[f"judge {minutes:g}"] = partial(judge_samples, entry, run, minutes, options)
    return work


def run_parts(entry: Entry, options: argparse.Namespace) -> Record:
    """The complete record of an entrant; parts that are missing are run now."""
    path = options.out / f"{entry.name}.json"
    request: Record = {key: getattr(options, key) for key in ("minutes", "items", "steps", "set", "cas")}
    request["judge"] = None if options.judge is None else options.judge.name
    record: Record = json.loads(path.read_text()) if path.is_file() else request
    if {key: record.get(key) for key in request} != request:
        raise Failed(f"{path} was made with other {', '.join(f'--{key}' for key in request)}; name another --out")
    for part, work in parts(entry, options).items():
        if part not in record:
            print(f"{entry.name}: {part}", file=sys.stderr, flush=True)
            record[part] = work()
            save_record(path, record)
    return record


def checkpoint_at(record: Record, minutes: float) -> tuple[Record, Record]:
    """The model at a training time, and the figures of its stages."""
    model = record.get("train") or record[f"train {minutes:g}"]
    return model, model["marks"][seconds(minutes)]


def table_rows(entry: Entry, record: Record, options: argparse.Namespace) -> list[str]:
    """A row per training time; images/s are over the whole training, images of all stages added up."""
    rows: list[str] = []
    for minutes in options.minutes:
        model, stages = checkpoint_at(record, minutes)
        done = [stage for stage in stages.values() if "steps" in stage]
        elapsed = stages["all"]["seconds"] if "all" in stages else sum(stage["seconds"] for stage in done)
        speed = sum(stage["images"] for stage in done) / elapsed
        cells = [entry.data, entry.entrant, f"{minutes:g}", " + ".join(f"{stage['steps']:,}" for stage in done)]
        cells += [f"{speed:,.0f}", f"{model['parameters']:,}", str(options.items)]
        cells += [f"{record[f'samples {minutes:g}']['seconds']:,.0f}"]
        report = record[f"judge {minutes:g}"]
        cells += [*(with_floor(report, name) for name in METRICS), report["by"]]
        rows.append(markdown_row(cells))
    return rows


def markdown_row(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_header(names: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{markdown_row(names)}\n|{'---|' * len(names)}"


def speed_rows(records: dict[Entry, Record], options: argparse.Namespace) -> list[str]:
    """Images/s of each stage in its longest training, also as multiples of those of sfumato's stages."""
    longest, rows = max(options.minutes), list[str]()
    rates = {
        (entry, name): stage["images"] / stage["seconds"]
        for entry, record in records.items()
        for name, stage in checkpoint_at(record, longest)[1].items()
        if "steps" in stage
    }
    for (entry, name), rate in rates.items():
        own = [rates.get((entry._replace(entrant=OURS), stage)) for stage in ("codec", "denoiser")]
        shares = ["–" if own_rate is None else f"{rate / own_rate:.3g}" for own_rate in own]
        rows.append(markdown_row([entry.data, entry.entrant, name, f"{rate:,.1f}", *shares]))
    return rows


def check_judges(records: dict[Entry, Record], options: argparse.Namespace) -> None:
    """Refuse to plot results of different evaluators for one data set: one of them may have failed."""
    for data in dict.fromkeys(entry.data for entry in records):
        evaluators = {
            (record[f"judge {minutes:g}"]["by"], entry.name): None
            for entry, record in records.items()
            if entry.data == data
            for minutes in options.minutes
        }
        if len({by for by, _ in evaluators}) > 1:
            names = ", ".join(f"{by} of {name}" for by, name in evaluators)
            raise Failed(f"{data}: evaluated by different evaluators ({names}); remove those records and run again")


def plot(records: dict[Entry, Record], options: argparse.Namespace) -> None:
    """fd.png: distance against minutes, drawn by the peers' interpreter, whose environment has matplotlib."""
    sets: dict[str, Record] = {}
    for entry, record in records.items():
        reports = [(minutes, record[f"judge {minutes:g}"]) for minutes in options.minutes]
        panel = sets.setdefault(entry.data, {"floor": reports[0][1]["fd_floor"], "entrants": {}})
        panel["entrants"][entry.entrant] = [(minutes, report["fd"]) for minutes, report in reports]
    points = options.out / "fd.json"
    save_record(points, sets)
    call([TRAINER, "plot", str(points), str(options.out / "fd.png")], options.peer_python)


def side_by_side(records: dict[Entry, Record], options: argparse.Namespace) -> None:
    """DATA.png per data set: a row of real images, then a row of samples per entrant and time."""
    for data in dict.fromkeys(entry.data for entry in records):
        train = np.load(export(data, options) / "images.npy", mmap_mode="r")
        real = train[np.linspace(0, len(train) - 1, SHEET_COLUMNS).astype(int)]  # some sets are ordered by class
        rows = [("real", [Image.fromarray(pixels.squeeze()) for pixels in real])]
        series = [(entry, minutes) for entry in records if entry.data == data for minutes in options.minutes]
        for entry, minutes in series:
            files = sorted(sample_folder(options.out / entry.name, minutes).glob("*.png"))[:SHEET_COLUMNS]
            rows.append((f"{entry.entrant}, {minutes:g} min", [Image.open(file) for file in files]))
        width, height = (SCALE * side + 2 for side in rows[0][1][0].size)
        mode = rows[0][1][0].mode
        sheet = Image.new(mode, (LABEL_WIDTH + SHEET_COLUMNS * width, len(rows) * height), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (name, images) in enumerate(rows):
            pen.text((4, (i + 0.5) * height), name, "black", anchor="lm")
            for j, image in enumerate(images):
                enlarged = image.convert(mode).resize((width - 2, height - 2), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (LABEL_WIDTH + j * width, i * height))
        partial_file = options.out / f".{data}.png"
        sheet.save(partial_file)
        partial_file.replace(options.out / f"{data}.png")


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    entrants = [OURS, *PEERS]
    parser.add_argument(
        "--data", type=by_commas, default=["mnist"], help="built-in data sets with classes, separated by commas"
    )
    parser.add_argument("--minutes", type=lambda text: sorted(map(float, by_commas(text))), default=[5.0, 10.0, 30.0])
    parser.add_argument("--only", type=by_commas, default=entrants, help=f"entrants: {', '.join(entrants)}")
    parser.add_argument("--peer-python", help="interpreter of the peers' environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=1000, help="samples per entrant")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the peers")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of runs and records")
    parser.add_argument(
        "--judge", type=Path, help="external evaluator, called as: JUDGE images SAMPLES --reference DATA [--cas]"
    )
    parser.add_argument("--cas", action="store_true", help="also classification accuracy scores, if there are labels")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every fit")
    options = parser.parse_args(argv)
    unknown = [name for name in options.only if name not in entrants]
    if unknown:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(entrants)}")
    if options.peer_python is None and options.only != [OURS]:
        parser.error(f"--peer-python: name the interpreter of the peers' environment, or pass --only {OURS}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, draw the pictures and the plot; 1 if something failed."""
    options, failed, records = read_options(argv), 0, dict[Entry, Record]()
    options.out.mkdir(parents=True, exist_ok=True)
    print(markdown_header(COLUMNS), flush=True)
    for data, entrant in product(options.data, options.only):
        entry = Entry(data, entrant, options.seed)
        try:
            records[entry] = run_parts(entry, options)
            print("\n".join(table_rows(entry, records[entry], options)), flush=True)
        except Failed as error:
            print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    print(f"\n{markdown_header(SPEED_COLUMNS)}", *speed_rows(records, options), sep="\n", flush=True)
    side_by_side(records, options)
    print(flush=True)
    failed |= print_all((data, lambda data=data: [balanced_real_line(data, options)]) for data in options.data)
    try:
        check_judges(records, options)
        if records and options.peer_python is not None:
            plot(records, options)
    except Failed as error:
        print(error, file=sys.stderr, flush=True)
        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
