"""How cost grows with image size, number of images, model size, batch and cores: seconds an item, and peak memory.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py

Every point is a process of its own on synthetic images. Training steps are those that `fit` would take: a plan for
such data, of which one number is varied. Work is floating-point operations as torch counts them, or images. The
exponent is the slope of the last three points on doubly logarithmic axes: 1 is in proportion. What grows faster than
the work by more than `SLACK` is marked; small points are mostly overhead, so that slopes under 1 are usual. Memory is
the largest resident one, less that of a process that has only imported the package; pages of mapped files are part of
it while there is room. `--quick` takes about a minute of a quiet core, all of it about ten. Keep the machine quiet.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from profile_step import table
from quality import call

Spec = dict[str, Any]
SLACK = 0.15
BASE: Spec = {"probe": "step", "stage": "codec", "side": 32, "batch": 32, "threads": 1, "settings": ["codec.width=32"]}
DENOISER: Spec = BASE | {"stage": "denoiser", "batch": 256}
SIDES, COUNTS = (16, 32, 64, 128, 256), (10**3, 10**4, 10**5, 10**6)
CODECS, BATCHES = (32, 64, 128), {"codec": (8, 32, 128), "denoiser": (64, 256, 1024)}
DENOISERS = ((256, 4), (512, 4), (1024, 6), (1536, 6))
BATCHED = 100  # batches timed in each feed
SIDE = 16  # of the images that are counted


class Point(NamedTuple):
    """One measurement: what was varied, the work, seconds, peak memory in MiB above that of the bare package."""

    value: str
    work: float
    seconds: float
    memory: float


# -- in the child


def synthetic(count: int, side: int, channels: int) -> Any:
    """Images of noise in ten classes."""
    from sfumato.data import Data

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    names = [str(k) for k in range(10)]
    return Data(pixels, {1: "L", 3: "RGB"}[channels], None, np.arange(count) % 10, names)


def planned_job(train: Any, held: Any, folder: Path, spec: Spec) -> Any:
    """A run as planned for these images on a machine of nominal speed, with the settings that are varied."""
    from sfumato.config import apply_overrides, read_settings
    from sfumato.modality import Facts, find_modality
    from sfumato.training.job import Job
    from sfumato.training.log import Log
    from sfumato.training.plan import make_plan
    from sfumato.training.planning import WITHOUT_BUDGET
    from sfumato.training.run import make_accelerator

    given = apply_overrides(read_settings({}), spec["settings"])
    row, precision = find_modality("image"), spec["precision"]
    facts = Facts(train.shape, train.mode, len(train), train.classes, precision)
    settings = make_plan(row, given, facts, WITHOUT_BUDGET)
    accelerator = make_accelerator("cpu", precision)
    log = Log(folder, None, main=False)
    return Job("noise", folder, settings, row, train, held, accelerator, log, time.monotonic())


def probe_step(spec: Spec) -> dict[str, float]:
    """Seconds and operations of a training step, averaged over a stage whose terms begin one after the other."""
    from sfumato.training.build import untrained_features, uses_features
    from sfumato.training.planning import mean_speed, stage_copies

    data = synthetic(max(64, 2 * spec["batch"]), spec["side"], 3)
    spec = spec | {"settings": [*spec["settings"], f"train.{spec['stage']}.batch={spec['batch']}"]}
    job = planned_job(data, data, Path(), spec)
    network = untrained_features(job) if uses_features(job.settings) and spec["stage"] == "codec" else None
    copy = stage_copies(job, network)[spec["stage"]]
    kit = {"stage": spec["stage"], "seed": 0, "accelerator": job.accelerator}
    return mean_speed(*copy, seconds=spec["seconds"], least=3, **kit)._asdict()


def probe_images(spec: Spec) -> dict[str, float]:
    """Seconds of what is done once with all images, and of what each step does with some of them."""
    import torch

    from sfumato.data import read_source
    from sfumato.metrics import NamedExtractor, image_report
    from sfumato.training.build import new_model
    from sfumato.training.feeds import DataFeed, LatentFeed
    from sfumato.training.stages import encode_all, encoded_part

    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], times: int = 1) -> Any:
        start = time.perf_counter()
        for _ in range(times):
            result = work()
        found[name] = (time.perf_counter() - start) / times
        return result

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "images.npy"
        write_noise(file, spec["count"])
        train, held = timed("read and split", lambda: read_source(file))
        job = planned_job(train, held, Path(place), spec)
        model, settings = new_model(job), job.settings.train
        model.codec.eval().requires_grad_(False)
        feed = DataFeed(train, settings.codec, 0, "codec", "cpu")
        steps = iter(range(10**9))
        timed("first batch of images", lambda: feed.batch(next(steps)))
        timed("a batch of images", lambda: feed.batch(next(steps)), BATCHED)
        z = timed("encode", lambda: encode_all(job, model, encoded_part(job)))
        latents = LatentFeed(z, None, settings.denoiser, 0, "cpu")
        latents.batch(0)
        timed("a batch of latents", lambda: latents.batch(next(steps)), BATCHED)
        few = held.subset(torch.arange(min(len(held), 500)))
        pooled = NamedExtractor("pooled", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 4))
        timed("measure 500 samples", lambda: image_report(few, train, held, pooled))
    return found


def write_noise(path: Path, count: int) -> None:
    """An .npy of gray images, written piece by piece."""
    store = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE))
    rng = np.random.default_rng(0)
    for start in range(0, count, 2**14):
        part = store[start : start + 2**14]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    store.flush()


def probe_nothing(spec: Spec) -> dict[str, float]:
    """What only importing the package takes."""
    import sfumato.training.run  # noqa: F401

    return {"seconds": 0.0}


PROBES = {"step": probe_step, "images": probe_images, "nothing": probe_nothing}


def answer(spec: Spec) -> str:
    """What a child prints."""
    import torch

    torch.set_num_threads(spec["threads"])
    return json.dumps(PROBES[spec["probe"]](spec))


# -- in the parent


@cache
def asked(text: str) -> tuple[dict[str, float], float]:
    """What a child found out, and its largest memory in MiB."""
    done = call([__file__, "--child", text])
    return json.loads(done.output.splitlines()[-1]), 1024 * done.gib


def measured(spec: Spec) -> tuple[dict[str, float], float]:
    """The same of a spec, memory above that of a process that only imports."""
    _, bare = asked(json.dumps(BASE | {"probe": "nothing"}))
    found, peak = asked(json.dumps(spec))
    return found, max(peak - bare, 1.0)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, over the last three points."""
    slope = float(np.polyfit(np.log(x[-3:]), np.log(np.maximum(y[-3:], 1e-9)), 1)[0])
    return round(slope, 2) + 0.0  # no -0.00


def verdict(what: str, slope: float, most: float = 1.0) -> str:
    """A line about one exponent, marked where it is over what it may be."""
    mark = f" **grows faster than the work (at most {most:g})**" if slope > most + SLACK else ""
    return f"- {what}: exponent {slope:.2f}{mark}"


def axis(title: str, varied: str, points: Sequence[Point], items: Sequence[int]) -> str:
    """A table of training steps and what it says."""
    rows = list[tuple[str, ...]]()
    for point, n in zip(points, items, strict=True):
        cost = f"{1e3 * point.seconds / n:.3f}", f"{point.work / n / 1e9:.4f}"
        rows.append((point.value, *cost, f"{point.work / point.seconds / 1e9:.0f}", f"{point.memory:.0f}"))
    work = [p.work for p in points]
    lines = [f"## {title}\n", table((varied, "ms an item", "GFLOP an item", "GFLOP/s", "peak MiB"), rows), ""]
    lines.append(verdict("seconds over work", exponent(work, [p.seconds for p in points])))
    lines.append(verdict("memory over work", exponent(work, [p.memory for p in points])))
    return "\n".join(lines) + "\n"


def step_axis(title: str, varied: str, base: Spec, changes: dict[str, Spec]) -> str:
    """One number of a training step varied."""
    points, items = list[Point](), list[int]()
    for value, change in changes.items():
        found, memory = measured(base | change)
        points.append(Point(value, found["flops"], found["seconds"], memory))
        items.append((base | change)["batch"])
    return axis(title, varied, points, items)


def count_axis(base: Spec, counts: Sequence[int]) -> str:
    """The number of images varied."""
    found = [measured(base | {"probe": "images", "count": count, "settings": ["codec.width=16"]}) for count in counts]
    whole = [name for name in found[0][0] if not name.startswith("a batch")]
    each = [name for name in found[0][0] if name.startswith("a batch")]
    rows = [
        (
            f"{count:,}",
            *(f"{1e6 * seconds[name] / count:.1f}" for name in whole),
            *(f"{1e3 * seconds[name]:.3f}" for name in each),
            f"{memory:.0f}",
            f"{memory * 2**20 / count:,.0f}",
        )
        for count, (seconds, memory) in zip(counts, found, strict=True)
    ]
    head = ("images", *(f"{n}, µs an image" for n in whole), *(f"{n}, ms" for n in each), "peak MiB", "bytes an image")
    lines = [f"## Number of images ({SIDE}x{SIDE}, gray)\n", table(head, rows), ""]
    for name in (*whole, *each):
        slope = exponent(counts, [seconds[name] for seconds, _ in found])
        lines.append(verdict(f"{name}, seconds over images", slope, 1.0 if name in whole else 0.0))
    lines.append(verdict("memory over images", exponent(counts, [memory for _, memory in found])))
    return "\n".join(lines) + "\n"


def core_axis(base: Spec, cores: Sequence[int]) -> str:
    """The number of threads varied, for both stages."""
    rows = []
    for stage in (base, base | DENOISER):
        found = [measured(stage | {"threads": n}) for n in cores]
        times = [seconds["seconds"] for seconds, _ in found]
        speed = times[0] / times[-1]
        mark = " **slower**" if speed < 1 else ""
        rows.append((stage["stage"], *(f"{1e3 * t / stage['batch']:.3f}" for t in times), f"{speed:.2f}{mark}"))
    head = ("stage", *(f"ms an item, {n} thread{'s' * (n > 1)}" for n in cores), "speed-up")
    return f"## Cores\n\n{table(head, rows)}\n"


def report(options: argparse.Namespace) -> Iterator[str]:
    """The report, axis by axis."""
    import torch

    from sfumato.machine import best_precision, cpu_name

    few = 3 if options.quick else None
    common = {"precision": options.precision or best_precision(), "seconds": 0.4 if options.quick else 3.0}
    base, denoiser = BASE | common, DENOISER | common
    how = f"{'quick' if options.quick else 'full'}, {common['precision']}"
    yield f"# Scaling ({how}): {cpu_name()}, torch {torch.__version__}\n"
    yield step_axis("Image size (a codec's step)", "side", base, {str(n): {"side": n} for n in SIDES[:few]})
    widths = {str(w): {"settings": [f"codec.width={w}"]} for w in CODECS}
    yield step_axis("Codec size", "width", base, widths)
    nets = {f"{w} x {d}": {"settings": [f"denoiser.width={w}", f"denoiser.depth={d}"]} for w, d in DENOISERS[:few]}
    yield step_axis("Denoiser size (perceptron)", "width x depth", denoiser, nets)
    for stage in (base, denoiser):
        batches = {str(n): {"batch": n} for n in BATCHES[stage["stage"]]}
        yield step_axis(f"Batch ({stage['stage']})", "items", stage, batches)
    yield core_axis(base | {"settings": []}, options.cores)
    yield count_axis(base, COUNTS[:few])


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = lambda text: [int(part) for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter points")
    parser.add_argument("--cores", type=listed, default=[1, 2], help="numbers of threads")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: the faster one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the report, or what a child found out."""
    options = read_options(words)
    if options.child is not None:
        print(answer(json.loads(options.child)))
        return 0
    for text in report(options):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
