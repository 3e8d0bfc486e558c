"""How cost scales with image size, number of images, model size, batch and cores: seconds per item, peak memory.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py

Every point is its own process on synthetic images. Training steps are those of `fit`: one number of the plan for such
data is varied. Work is floating-point operations as counted by torch, or images. The exponent is the slope of the last
three points in a log-log plot; 1 is linear scaling. Costs that grow faster than the work by more than `TOLERANCE` are
marked; small points are mostly overhead, so slopes below 1 are usual. Memory is the peak resident set minus that of a
process that only imports the package; it can include pages of mapped files. `--quick` takes about a minute of an idle
core, the full run about ten. Keep the machine otherwise idle.
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
TOLERANCE = 0.15  # of an exponent
BASE: Spec = {"probe": "step", "stage": "codec", "side": 32, "batch": 32, "threads": 1, "settings": ["codec.width=32"]}
DENOISER: Spec = BASE | {"stage": "denoiser", "batch": 256}
SIDES, IMAGE_COUNTS = (16, 32, 64, 128, 256), (10**3, 10**4, 10**5, 10**6)
CODECS, BATCHES = (32, 64, 128), {"codec": (8, 32, 128), "denoiser": (64, 256, 1024)}
DENOISERS = ((256, 4), (512, 4), (1024, 6), (1536, 6))
TIMED_BATCHES = 100  # batches that are averaged
COUNT_SIDE = 16  # pixels, of the images of the count axis


class Point(NamedTuple):
    """One measurement: varied value, work, seconds, peak memory in MiB above that of the imported package."""

    value: str
    work: float
    seconds: float
    memory: float


# -- child process


def synthetic(count: int, side: int, channels: int) -> Any:
    """Noise images in ten classes."""
    from sfumato.data.conditions import LABEL, Labels
    from sfumato.modalities.image.dataset import ImageDataset

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    labels = Labels(np.arange(count) % 10, [str(k) for k in range(10)])
    return ImageDataset(pixels, {1: "L", 3: "RGB"}[channels], conditions={LABEL: labels})


def planned_run(train: Any, held: Any, folder: Path, spec: Spec) -> Any:
    """A run planned for these images on a machine of nominal speed, with the varied settings."""
    from sfumato.config import apply_overrides, read_settings
    from sfumato.modalities import find_modality
    from sfumato.modalities.base import PlanContext
    from sfumato.training.launch import make_accelerator
    from sfumato.training.log import Log
    from sfumato.training.plan import make_plan
    from sfumato.training.profile import NOMINAL_SECONDS
    from sfumato.training.run import Run

    given = apply_overrides(read_settings({}), spec["settings"])
    modality, precision = find_modality("image"), spec["precision"]
    context = PlanContext(train.shape, train.spec, len(train), train.classes, precision)
    settings = make_plan(modality, given, context, NOMINAL_SECONDS)
    accelerator = make_accelerator("cpu", precision)
    log = Log(folder, None, main=False)
    return Run("noise", folder, settings, modality, train, held, accelerator, log, time.monotonic())


def probe_step(spec: Spec) -> dict[str, float]:
    """Seconds and operations of a training step, averaged over a stage whose loss terms start one after the other."""
    from sfumato.training.build import untrained_features, uses_features
    from sfumato.training.profile import mean_cost, stage_copies

    data = synthetic(max(64, 2 * spec["batch"]), spec["side"], 3)
    spec = spec | {"settings": [*spec["settings"], f"train.{spec['stage']}.batch={spec['batch']}"]}
    run = planned_run(data, data, Path(), spec)
    network = untrained_features(run) if uses_features(run) and spec["stage"] == "codec" else None
    copy = stage_copies(run, network)[spec["stage"]]
    trainer_options = {"stage": spec["stage"], "seed": 0, "accelerator": run.accelerator}
    return mean_cost(*copy, seconds=spec["seconds"], min_steps=3, **trainer_options)._asdict()


def probe_images(spec: Spec) -> dict[str, float]:
    """Seconds of the work on all images, and of one batch."""
    import torch

    from sfumato.metrics import NamedExtractor
    from sfumato.modalities.image.metrics import image_report
    from sfumato.modalities.image.read import read_source
    from sfumato.training.batches import DataBatches, LatentBatches
    from sfumato.training.build import new_model
    from sfumato.training.stages import encode_all, encoded_subset
    from sfumato.types import Raw

    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], times: int = 1) -> Any:
        start = time.perf_counter()
        for _ in range(times):
            result = work()
        seconds[name] = (time.perf_counter() - start) / times
        return result

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        write_noise(file, spec["count"])
        train, held = timed("read and split", lambda: read_source(file))
        run = planned_run(train, held, Path(folder), spec)
        model, settings = new_model(run), run.settings.train
        model.codec.eval().requires_grad_(False)
        batches = DataBatches(train, settings.codec, 0, "codec", "cpu")
        steps = iter(range(10**9))
        timed("first batch of images", lambda: batches.batch(next(steps)))
        timed("a batch of images", lambda: batches.batch(next(steps)), TIMED_BATCHES)
        latents = timed("encode", lambda: encode_all(run, model, encoded_subset(run)))
        batches = LatentBatches(latents, Raw(), settings.denoiser, 0, "cpu")
        batches.batch(0)
        timed("a batch of latents", lambda: batches.batch(next(steps)), TIMED_BATCHES)
        samples = held.subset(torch.arange(min(len(held), 500)))
        pooled = NamedExtractor("pooled", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 4))
        timed("measure 500 samples", lambda: image_report(samples, train, held, pooled))
    return seconds


def write_noise(path: Path, count: int) -> None:
    """Write an .npy of gray noise images, chunk by chunk."""
    store = np.lib.format.open_memmap(path, "w+", np.uint8, (count, COUNT_SIDE, COUNT_SIDE))
    rng = np.random.default_rng(0)
    for start in range(0, count, 2**14):
        part = store[start : start + 2**14]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    store.flush()


def probe_import(spec: Spec) -> dict[str, float]:
    """Nothing but the import of the package."""
    import sfumato.training.run  # noqa: F401

    return {"seconds": 0.0}


PROBES = {"step": probe_step, "images": probe_images, "import": probe_import}


def run_probe(spec: Spec) -> str:
    """Run a probe; its result as JSON."""
    import torch

    torch.set_num_threads(spec["threads"])
    return json.dumps(PROBES[spec["probe"]](spec))


# -- parent process


@cache
def probe(text: str) -> tuple[dict[str, float], float]:
    """Result of a child process, and its peak memory in MiB."""
    done = call([__file__, "--child", text])
    return json.loads(done.output.splitlines()[-1]), 1024 * done.gib


def measure(spec: Spec) -> tuple[dict[str, float], float]:
    """Result of a spec, and its memory in MiB above that of the import."""
    _, baseline = probe(json.dumps(BASE | {"probe": "import"}))
    result, peak = probe(json.dumps(spec))
    return result, max(peak - baseline, 1.0)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x for the last three points."""
    slope = float(np.polyfit(np.log(x[-3:]), np.log(np.maximum(y[-3:], 1e-9)), 1)[0])
    return round(slope, 2) + 0.0  # no -0.00


def verdict(name: str, slope: float, limit: float = 1.0) -> str:
    """A line about one exponent, marked if it exceeds its limit."""
    mark = f" **grows faster than the work (at most {limit:g})**" if slope > limit + TOLERANCE else ""
    return f"- {name}: exponent {slope:.2f}{mark}"


def axis_section(title: str, varied: str, measurements: Sequence[Point], items: Sequence[int]) -> str:
    """A table of training steps with its exponents."""
    rows = list[tuple[str, ...]]()
    for point, n in zip(measurements, items, strict=True):
        cost = f"{1e3 * point.seconds / n:.3f}", f"{point.work / n / 1e9:.4f}"
        rows.append((point.value, *cost, f"{point.work / point.seconds / 1e9:.0f}", f"{point.memory:.0f}"))
    work = [p.work for p in measurements]
    lines = [f"## {title}\n", table((varied, "ms per item", "GFLOP per item", "GFLOP/s", "peak MiB"), rows), ""]
    lines.append(verdict("seconds over work", exponent(work, [p.seconds for p in measurements])))
    lines.append(verdict("memory over work", exponent(work, [p.memory for p in measurements])))
    return "\n".join(lines) + "\n"


def step_section(title: str, varied: str, base: Spec, changes: dict[str, Spec]) -> str:
    """A section that varies one number of a training step."""
    measurements, items = list[Point](), list[int]()
    for value, change in changes.items():
        result, memory = measure(base | change)
        measurements.append(Point(value, result["flops"], result["seconds"], memory))
        items.append((base | change)["batch"])
    return axis_section(title, varied, measurements, items)


def count_section(base: Spec, counts: Sequence[int]) -> str:
    """The section that varies the number of images."""
    results = [measure(base | {"probe": "images", "count": count, "settings": ["codec.width=16"]}) for count in counts]
    per_image = [name for name in results[0][0] if not name.startswith("a batch")]
    per_step = [name for name in results[0][0] if name.startswith("a batch")]
    rows = [
        (
            f"{count:,}",
            *(f"{1e6 * seconds[name] / count:.1f}" for name in per_image),
            *(f"{1e3 * seconds[name]:.3f}" for name in per_step),
            f"{memory:.0f}",
            f"{memory * 2**20 / count:,.0f}",
        )
        for count, (seconds, memory) in zip(counts, results, strict=True)
    ]
    head = (
        "images",
        *(f"{n}, µs per image" for n in per_image),
        *(f"{n}, ms" for n in per_step),
        "peak MiB",
        "bytes per image",
    )
    lines = [f"## Number of images ({COUNT_SIDE}x{COUNT_SIDE}, gray)\n", table(head, rows), ""]
    for name in (*per_image, *per_step):
        slope = exponent(counts, [seconds[name] for seconds, _ in results])
        lines.append(verdict(f"{name}, seconds over images", slope, 1.0 if name in per_image else 0.0))
    lines.append(verdict("memory over images", exponent(counts, [memory for _, memory in results])))
    return "\n".join(lines) + "\n"


def core_section(base: Spec, cores: Sequence[int]) -> str:
    """The section that varies the number of threads, for both stages."""
    rows = []
    for stage in (base, base | DENOISER):
        results = [measure(stage | {"threads": n}) for n in cores]
        times = [seconds["seconds"] for seconds, _ in results]
        speed = times[0] / times[-1]
        mark = " **slower**" if speed < 1 else ""
        rows.append((stage["stage"], *(f"{1e3 * t / stage['batch']:.3f}" for t in times), f"{speed:.2f}{mark}"))
    head = ("stage", *(f"ms per item, {n} thread{'s' * (n > 1)}" for n in cores), "speed-up")
    return f"## Cores\n\n{table(head, rows)}\n"


def report(options: argparse.Namespace) -> Iterator[str]:
    """The sections of the report."""
    import torch

    from sfumato.hardware import best_precision, cpu_name

    count = 3 if options.quick else None
    common = {"precision": options.precision or best_precision(), "seconds": 0.4 if options.quick else 3.0}
    base, denoiser = BASE | common, DENOISER | common
    mode = f"{'quick' if options.quick else 'full'}, {common['precision']}"
    yield f"# Scaling ({mode}): {cpu_name()}, torch {torch.__version__}\n"
    yield step_section("Image size (a codec's step)", "side", base, {str(n): {"side": n} for n in SIDES[:count]})
    widths = {str(w): {"settings": [f"codec.width={w}"]} for w in CODECS}
    yield step_section("Codec size", "width", base, widths)
    nets = {f"{w} x {d}": {"settings": [f"denoiser.width={w}", f"denoiser.depth={d}"]} for w, d in DENOISERS[:count]}
    yield step_section("Denoiser size (perceptron)", "width x depth", denoiser, nets)
    for stage in (base, denoiser):
        batches = {str(n): {"batch": n} for n in BATCHES[stage["stage"]]}
        yield step_section(f"Batch ({stage['stage']})", "items", stage, batches)
    yield core_section(base | {"settings": []}, options.cores)
    yield count_section(base, IMAGE_COUNTS[:count])


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    by_commas = lambda text: [int(part) for part in text.split(",") if part]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--cores", type=by_commas, default=[1, 2], help="numbers of threads")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: the faster of the two")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, or the result of a child process."""
    options = read_options(argv)
    if options.child is not None:
        print(run_probe(json.loads(options.child)))
        return 0
    for text in report(options):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
