"""sfumato beside its peers: the same data, machine, wall clock and judge; a table, speeds, samples, and a plot.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install torch==2.13.0 diffusers accelerate einops ema-pytorch scipy tqdm pillow safetensors matplotlib
    PEERS/bin/pip install --no-deps denoising-diffusion-pytorch
    python benchmarks/peers.py --peer-python PEERS/bin/python --data mnist,fashion-mnist --minutes 5,10,30 --judge JUDGE

The peers have an environment of their own, without torchvision (`peers_nets.py` says what each peer is and what was
chosen, `peers_train.py` how all are trained and timed). A peer is trained once, for the longest of the minutes, and its
averaged weights are kept at each of them; of one with two stages, the second starts anew for each. sfumato is fitted
anew for each, by its command line, and everything it does is within its minutes, starting up and reading too, while a
peer's clock counts training steps alone. Everyone draws the same number of samples in its own way: sfumato by its
defaults, the peers by DDIM with --steps steps. The distance depends on that number, and so does its floor, what real
held-out images score (in brackets); samples of entrants that know classes have as many of each, which few held-out
images have not, so a line below the tables says what real images score that do. Peers that know no classes have no
accuracy.

The judge is an outside script, called as: JUDGE images SAMPLES --reference DATA [--cas]; without it, and for data that
it does not know, `sfumato evaluate` judges. What is done is kept in OUT/NAME.json and not done again; a training that
was cut short starts over. Everything runs on the CPU. Keep the machine quiet meanwhile.
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
from quality import Failed, beside_floor, call, keep, print_all, recorded

Facts = dict[str, Any]
OURS = "sfumato"
TRAINER = str(Path(__file__).with_name("peers_train.py"))
SHOWN, SCALE, NAMES = 16, 2, 140  # samples in a row of pictures, their enlargement, pixels for what a row is called
MEASURES = ("fd", "accuracy", "cas", "coverage", "novelty")
HEAD = ("data", "entrant", "minutes", "steps", "images/s", "parameters", "samples", "sampling s", *MEASURES, "judge")
SPEEDS = ("data", "entrant", "stage", "images/s", "of sfumato's codec", "of sfumato's denoiser")


class Entry(NamedTuple):
    """One entrant on one data set."""

    data: str
    entrant: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and record."""
        return f"{self.data}-{self.entrant}-{self.seed}"


def seconds(minutes: float) -> str:
    """As peers_train.py names a time."""
    return f"{60 * minutes:g}"


def export(data: str, options: argparse.Namespace) -> Path:
    """The training part as plain arrays, from the same reader that sfumato trains from."""
    folder = options.out / "data" / data
    if not folder.is_dir():
        from sfumato.data import read_images

        train, _ = read_images(data)
        if train.mode not in ("L", "RGB") or train.labels is None:
            raise Failed(f"{data}: only grey or RGB images with classes can be compared")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial_folder = Path(tempfile.mkdtemp(prefix=f".{data}-", dir=folder.parent))
        np.save(partial_folder / "images.npy", train.pixels)
        np.save(partial_folder / "labels.npy", train.labels)
        try:
            partial_folder.rename(folder)
        except OSError:  # a run beside this one was first
            shutil.rmtree(partial_folder)
    return folder


def train_peer(entry: Entry, run: Path, options: argparse.Namespace) -> Facts:
    """Train a peer once: its size and, for each of the minutes, what its stages did."""
    marks = ",".join(map(seconds, options.minutes))
    where = ["--data", str(export(entry.data, options)), "--run", str(run), "--seed", str(entry.seed)]
    done = call([TRAINER, "train", entry.entrant, *where, "--seconds", marks], options.peer_python)
    return {"gib": round(done.gib, 2), **json.loads(done.output)}


def fit(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Facts:
    """Fit sfumato within so many minutes: the same facts."""
    fixed = [word for setting in options.set for word in ("--set", setting)]
    where = ["--out", str(run), "--overwrite", "--seed", str(entry.seed), "--device", "cpu", *fixed]
    done = call(["-m", "sfumato", "fit", entry.data, "--budget", f"{seconds(minutes)}s", *where])
    parameters = sum(json.loads((run / "run.json").read_text())["metrics"]["parameters"].values())
    stages = {**stages_of(run), "all": {"seconds": done.seconds}}
    return {"gib": round(done.gib, 2), "parameters": parameters, "marks": {seconds(minutes): stages}}


def stages_of(run: Path) -> Facts:
    """Steps, images and seconds of each stage, from the reports of a run: images between two, by images a second."""
    batches = json.loads((run / "run.json").read_text())["plan"]["train"]
    stages: Facts = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        report = json.loads(line)
        if report.get("items_per_second") and report.get("stage") in batches:
            stage = stages.setdefault(report["stage"], {"steps": 0, "images": 0, "seconds": 0.0})
            images = (report["step"] - stage["steps"]) * batches[report["stage"]]["batch"]
            stage["steps"], stage["images"] = report["step"], stage["images"] + images
            stage["seconds"] += images / report["items_per_second"]
    return stages


def sample(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Facts:
    """Draw the samples; the seconds are those of the whole command."""
    where = ["-n", str(options.items), "--seed", str(entry.seed), "--out", str(samples_of(run, minutes))]
    if entry.entrant == OURS:
        more = ["--overwrite", "--device", "cpu", "--sheet", f"{run}-{minutes:g}.png"]
        done = call(["-m", "sfumato", "generate", f"{run}-{minutes:g}", *where, *more])
    else:
        more = ["--at", seconds(minutes), "--steps", str(options.steps)]
        done = call([TRAINER, "sample", str(run), *where, *more], options.peer_python)
    return {"seconds": done.seconds, "items": options.items}


def samples_of(run: Path, minutes: float) -> Path:
    """Where the samples of one training time lie."""
    return run.with_name(f"{run.name}-{minutes:g}-samples")


def judge(entry: Entry, run: Path, minutes: float, options: argparse.Namespace) -> Facts:
    """What is said of the samples."""
    labelled = entry.entrant == OURS or PEERS[entry.entrant].labelled
    return judged(entry.data, samples_of(run, minutes), options.cas and labelled, options)


def judged(data: str, samples: Path, cas: bool, options: argparse.Namespace) -> Facts:
    """What the outside judge says of samples, or `sfumato evaluate` where it has nothing to say."""
    more = ["--cas"] if cas else []
    if options.judge is not None:
        try:
            report = json.loads(call([str(options.judge), "images", str(samples), "--reference", data, *more]).output)
            return {"by": options.judge.name, **report}
        except Failed as error:
            print(f"{samples.name}: sfumato judges ({error})", file=sys.stderr, flush=True)
    report = json.loads(call(["-m", "sfumato", "evaluate", str(samples), data, "--json", *more]).output)
    return {"by": f"{OURS} evaluate", **report}


def real_even(data: str, options: argparse.Namespace) -> str:
    """A line: the distance of held-out images, as many of each class, as entrants that know classes draw them."""
    record, asked = options.out / f"{data}-real.json", {"items": options.items}
    facts = recorded(record, asked)
    if "fd" not in facts:
        from sfumato.data import read_source, write_images

        train, held = read_source(data)
        each = options.items // train.classes
        some = np.concatenate([np.flatnonzero(held.labels == k)[:each] for k in range(train.classes)])
        rows = [{"label": int(k)} for k in held.labels[some]]
        samples = write_images(options.out / f"{data}-real-samples", held.batch(some).data, rows, overwrite=True)
        facts |= {"n": len(some), "fd": judged(data, samples, False, options)["fd"]}
        keep(record, facts)
    return f"{data}: {facts['n']} real images, as many of each class, have fd {facts['fd']:.3f}"


def parts(entry: Entry, options: argparse.Namespace) -> dict[str, Callable[[], Facts]]:
    """All that has to be found out about an entrant, in order."""
    run, work = options.out / entry.name, dict[str, Callable[[], Facts]]()
    for minutes in options.minutes:
        if entry.entrant == OURS:
            work[f"train {minutes:g}"] = partial(fit, entry, Path(f"{run}-{minutes:g}"), minutes, options)
        else:
            work["train"] = partial(train_peer, entry, run, options)
        work[f"samples {minutes:g}"] = partial(sample, entry, run, minutes, options)
        work[f"judge {minutes:g}"] = partial(judge, entry, run, minutes, options)
    return work


def complete(entry: Entry, options: argparse.Namespace) -> Facts:
    """Everything about an entrant: what is known already, and what is found out now."""
    record = options.out / f"{entry.name}.json"
    asked: Facts = {key: getattr(options, key) for key in ("minutes", "items", "steps", "set", "cas")}
    asked["judge"] = None if options.judge is None else options.judge.name
    facts: Facts = json.loads(record.read_text()) if record.is_file() else asked
    if {key: facts.get(key) for key in asked} != asked:
        raise Failed(f"{record} is of other {', '.join(f'--{key}' for key in asked)}; name another --out")
    for part, work in parts(entry, options).items():
        if part not in facts:
            print(f"{entry.name}: {part}", file=sys.stderr, flush=True)
            facts[part] = work()
            keep(record, facts)
    return facts


def trained(facts: Facts, minutes: float) -> tuple[Facts, Facts]:
    """What was trained until then, and what its stages did."""
    model = facts.get("train") or facts[f"train {minutes:g}"]
    return model, model["marks"][seconds(minutes)]


def table_rows(entry: Entry, facts: Facts, options: argparse.Namespace) -> list[str]:
    """A line for each of the minutes; images a second are over the whole training, all stages' images together."""
    rows: list[str] = []
    for minutes in options.minutes:
        model, stages = trained(facts, minutes)
        done = [stage for stage in stages.values() if "steps" in stage]
        taken = stages["all"]["seconds"] if "all" in stages else sum(stage["seconds"] for stage in done)
        speed = sum(stage["images"] for stage in done) / taken
        cells = [entry.data, entry.entrant, f"{minutes:g}", " + ".join(f"{stage['steps']:,}" for stage in done)]
        cells += [f"{speed:,.0f}", f"{model['parameters']:,}", str(options.items)]
        cells += [f"{facts[f'samples {minutes:g}']['seconds']:,.0f}"]
        report = facts[f"judge {minutes:g}"]
        cells += [*(beside_floor(report, name) for name in MEASURES), report["by"]]
        rows.append(line(cells))
    return rows


def line(cells: Sequence[object]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(names: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{line(names)}\n|{'---|' * len(names)}"


def speed_rows(found: dict[Entry, Facts], options: argparse.Namespace) -> list[str]:
    """Images a second of each stage in its longest training, and as a multiple of those of sfumato's stages."""
    longest, rows = max(options.minutes), list[str]()
    rates = {
        (entry, name): stage["images"] / stage["seconds"]
        for entry, facts in found.items()
        for name, stage in trained(facts, longest)[1].items()
        if "steps" in stage
    }
    for (entry, name), rate in rates.items():
        ours = [rates.get((entry._replace(entrant=OURS), stage)) for stage in ("codec", "denoiser")]
        shares = ["–" if our is None else f"{rate / our:.3g}" for our in ours]
        rows.append(line([entry.data, entry.entrant, name, f"{rate:,.1f}", *shares]))
    return rows


def check_judges(found: dict[Entry, Facts], options: argparse.Namespace) -> None:
    """Refuse to draw one picture of what different judges said of one data set: one of them may have failed."""
    for data in dict.fromkeys(entry.data for entry in found):
        said = {
            (facts[f"judge {minutes:g}"]["by"], entry.name): None
            for entry, facts in found.items()
            if entry.data == data
            for minutes in options.minutes
        }
        if len({by for by, _ in said}) > 1:
            names = ", ".join(f"{by} of {name}" for by, name in said)
            raise Failed(f"{data}: judged by different judges ({names}); remove those records and run again")


def plot(found: dict[Entry, Facts], options: argparse.Namespace) -> None:
    """fd.png: the distance against minutes; drawn by the peers' interpreter, whose environment has matplotlib."""
    sets: dict[str, Facts] = {}
    for entry, facts in found.items():
        judged = [(minutes, facts[f"judge {minutes:g}"]) for minutes in options.minutes]
        drawn = sets.setdefault(entry.data, {"floor": judged[0][1]["fd_floor"], "entrants": {}})
        drawn["entrants"][entry.entrant] = [(minutes, report["fd"]) for minutes, report in judged]
    points = options.out / "fd.json"
    keep(points, sets)
    call([TRAINER, "plot", str(points), str(options.out / "fd.png")], options.peer_python)


def side_by_side(found: dict[Entry, Facts], options: argparse.Namespace) -> None:
    """DATA.png for each data set: a row of real images, then one of the first samples of each entrant and time."""
    for data in dict.fromkeys(entry.data for entry in found):
        known = np.load(export(data, options) / "images.npy", mmap_mode="r")
        real = known[np.linspace(0, len(known) - 1, SHOWN).astype(int)]  # some sets are ordered by class
        rows = [("real", [Image.fromarray(pixels.squeeze()) for pixels in real])]
        drawn = [(entry, minutes) for entry in found if entry.data == data for minutes in options.minutes]
        for entry, minutes in drawn:
            files = sorted(samples_of(options.out / entry.name, minutes).glob("*.png"))[:SHOWN]
            rows.append((f"{entry.entrant}, {minutes:g} min", [Image.open(file) for file in files]))
        width, height = (SCALE * side + 2 for side in rows[0][1][0].size)
        mode = rows[0][1][0].mode
        sheet = Image.new(mode, (NAMES + SHOWN * width, len(rows) * height), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (name, images) in enumerate(rows):
            pen.text((4, (i + 0.5) * height), name, "black", anchor="lm")
            for j, image in enumerate(images):
                enlarged = image.convert(mode).resize((width - 2, height - 2), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (NAMES + j * width, i * height))
        partial_file = options.out / f".{data}.png"
        sheet.save(partial_file)
        partial_file.replace(options.out / f"{data}.png")


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [part for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    entrants = [OURS, *PEERS]
    parser.add_argument("--data", type=listed, default=["mnist"], help="built-in sets with classes, by commas")
    parser.add_argument("--minutes", type=lambda text: sorted(map(float, listed(text))), default=[5.0, 10.0, 30.0])
    parser.add_argument("--only", type=listed, default=entrants, help=f"entrants: {', '.join(entrants)}")
    parser.add_argument("--peer-python", help="interpreter of the peers' environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=1000, help="how many samples everyone draws")
    parser.add_argument("--steps", type=int, default=50, help="of the peers' samplers")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="where runs and records go")
    parser.add_argument("--judge", type=Path, help="script called as: JUDGE images SAMPLES --reference DATA [--cas]")
    parser.add_argument(
        "--cas", action="store_true", help="also classification accuracy scores, where there are labels"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every fit")
    options = parser.parse_args(words)
    unknown = [name for name in options.only if name not in entrants]
    if unknown:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(entrants)}")
    if options.peer_python is None and options.only != [OURS]:
        parser.error(f"--peer-python: name the interpreter of the peers' environment, or pass --only {OURS}")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables, draw the pictures and the plot; 1 if something failed."""
    options, failed, found = read_options(words), 0, dict[Entry, Facts]()
    options.out.mkdir(parents=True, exist_ok=True)
    print(header(HEAD), flush=True)
    for data, entrant in product(options.data, options.only):
        entry = Entry(data, entrant, options.seed)
        try:
            found[entry] = complete(entry, options)
            print("\n".join(table_rows(entry, found[entry], options)), flush=True)
        except Failed as error:
            print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    print(f"\n{header(SPEEDS)}", *speed_rows(found, options), sep="\n", flush=True)
    side_by_side(found, options)
    print(flush=True)
    failed |= print_all((data, lambda data=data: [real_even(data, options)]) for data in options.data)
    try:
        check_judges(found, options)
        if found and options.peer_python is not None:
            plot(found, options)
    except Failed as error:
        print(error, file=sys.stderr, flush=True)
        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
