"""Where the time of a training step goes, for both stages of a plan: by part of the step, and by operator.

    python benchmarks/profile_step.py --data mnist --budget 5m
    python benchmarks/profile_step.py --data mnist --budget 5m --set codec.width=96 --trace step.json

The steps are those of `fit` with the same data, budget and settings, on copies that `training/planning.py` makes and
throws away; nothing is written but the trace. Parts are timed by the clock, each without those inside it, and the
median of the steps counts. Operators are timed by torch's profiler, which slows small ones down; their floating-point
operations are counted by torch, backward passes included, and their bytes are those of all tensors they read and write.

`at best` is what a step could take on this machine without other operators: each at the peak of matrix products, or as
fast as a copy of as many bytes, whichever is slower. Copies are measured at all sizes, so that caches count, and so
does what it costs to call anything at all. Keep the machine quiet meanwhile.
"""

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sfumato.config import apply_overrides, parse_budget, read_settings
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device, measure_bandwidth
from sfumato.modality import find_modality, recognise
from sfumato.training.build import feature_network, uses_features
from sfumato.training.horizon import Horizon
from sfumato.training.job import Job
from sfumato.training.log import Log
from sfumato.training.loop import Feed, Trainer
from sfumato.training.measure import Speed, measure_step
from sfumato.training.planning import LATE, decide, stage_copies
from sfumato.training.run import make_accelerator
from sfumato.training.steps import CodecStep, DiffusionStep, TrainStep

SEEN = 3  # steps that the profiler looks at
REST = "bookkeeping"


class Clock:
    """Seconds of parts that lie within one another, each without those inside it.

    Args:
        wait: Called before the clock is read: waits for the device.
        now: The clock.
    """

    def __init__(self, wait: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> None:
        self.wait, self.now = wait, now
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.since = 0.0

    def _turn(self) -> None:
        """Charge what has passed to the innermost open part."""
        self.wait()
        now = self.now()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def enter(self, name: str) -> None:
        """A part begins."""
        self._turn()
        self.open.append(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self._turn()
        self.open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part."""

        def call(*args: Any, **options: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return call

    def watch(self, name: str, module: nn.Module) -> None:
        """The module's forward as a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())


class Operator(NamedTuple):
    """What one kind of operator takes in a step, and what it could take."""

    name: str
    calls: float
    seconds: float
    flops: float
    bytes: float
    best: float


@cache
def copied(log_size: int, device: str) -> float:
    """Bytes a second that a copy moves which reads and writes 2^log_size bytes."""
    return measure_bandwidth(device, 0.02, size=2**log_size // 2)


class Work(TorchDispatchMode):
    """Operations, bytes and least seconds of every operator within the block.

    Args:
        peak: Operations a second of the best matrix product.
        bandwidth: Logarithm to base 2 of bytes read and written -> bytes a second.
    """

    def __init__(self, peak: float, bandwidth: Callable[[int], float]) -> None:
        super().__init__()
        self.peak, self.bandwidth = peak, bandwidth
        self.flops, self.bytes, self.best = (defaultdict[str, float](float) for _ in range(3))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, packet = str(func._schema.name), func.overloadpacket
        tensors = [] if func.is_view else tree_leaves((args, kwargs, out))
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors if isinstance(x, torch.Tensor))
        flops = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out)) if packet in flop_registry else 0.0
        self.flops[name] += flops
        self.bytes[name] += moved
        least = moved / self.bandwidth(min(28, max(10, round(math.log2(moved))))) if moved else 0.0
        self.best[name] += max(flops / self.peak, least)
        return out


def make_job(options: argparse.Namespace) -> Job:
    """A run as `fit` would plan it; its folder is never written."""
    started = time.monotonic()
    given = read_settings({"seed": options.seed, "budget_seconds": parse_budget(options.budget)})
    settings = apply_overrides(given, options.set)
    modality = find_modality(settings.modality) if settings.modality else recognise(options.data)
    train, held = modality.read(options.data, settings.data, None)
    device, precision = options.device or default_device(), settings.train.precision
    accelerator = make_accelerator(device, best_precision(device) if precision == "auto" else precision)
    log = Log(Path(), None, main=False)
    job = Job(options.data, Path(), settings, modality, train, held, accelerator, log, started)
    decide(job, None, None)
    return job


def inner_parts(step: TrainStep) -> dict[str, nn.Module]:
    """The modules of a step's forward that are told apart."""
    found: dict[str, nn.Module | None] = {"loss": step}  # what is left of it when the others are taken off
    if isinstance(step, CodecStep):
        found |= {"encoder": step.codec.encoder, "bottleneck": step.codec.bottleneck, "decoder": step.codec.decoder}
        found |= {"perceptual network": step.perceptual, "discriminator": step.discriminator}
    if isinstance(step, DiffusionStep):
        found |= {"denoiser": step.denoiser.net, "conditioner": step.conditioner}
    return {name: module for name, module in found.items() if module is not None}


@contextmanager
def watched(trainer: Trainer, feed: Feed, clock: Clock) -> Iterator[None]:
    """Within the block every part of a step runs under the clock."""
    for name, module in inner_parts(trainer.inner).items():
        clock.watch(name, module)
    outer = [
        ("batch", feed, "batch"),
        ("backward", trainer.accelerator, "backward"),
        ("clipping", trainer.accelerator, "clip_grad_norm_"),
        ("optimizer", trainer, "_advance"),
        ("weight average", trainer.ema, "update"),
    ]
    if isinstance(trainer.inner, DiffusionStep) and trainer.inner.draw is not None:
        outer.append(("encoder", trainer.inner, "draw"))
    patches = [patch.object(owner, name, clock.timed(part, getattr(owner, name))) for part, owner, name in outer]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def parts_of(trainer: Trainer, feed: Feed, steps: int, clock: Clock) -> dict[str, float]:
    """Median seconds of each part of a step, the longest first."""
    taken: dict[str, list[float]] = defaultdict(list)
    with watched(trainer, feed, clock):
        for _ in range(steps):
            clock.seconds.clear()
            clock.timed(REST, lambda: trainer.advance(feed.batch(trainer.done)))()
            for name, seconds in clock.seconds.items():
                taken[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def operators(trainer: Trainer, feed: Feed, trace: Path | None, peak: float) -> list[Operator]:
    """What each kind of operator takes in a step, the longest first.

    An operator whose work is counted has all the time that passes inside it; of the others each has its own.
    """
    device = trainer.accelerator.device.type
    with Work(peak, lambda log_size: copied(log_size, device)) as work:
        trainer.advance(feed.batch(trainer.done))
    on_cpu = device == "cpu"
    activities = [ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as seen:
        for _ in range(SEEN):
            trainer.advance(feed.batch(trainer.done))
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    kind, sums = "cpu" if on_cpu else "device", defaultdict[str, list[float]](lambda: [0.0, 0.0])
    waiting = [event for event in seen.events() or () if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        whole = event.name in work.best
        name = event.name if event.name.startswith("aten::") else "between operators"
        taken = sums[name]
        taken[0] += 1
        taken[1] += getattr(event, f"{kind}_time_total" if whole else f"self_{kind}_time_total") / 1e6
        waiting += [] if whole else event.cpu_children
    facts = (work.flops, work.bytes, work.best)
    found = [Operator(name, n / SEEN, t / SEEN, *(one[name] for one in facts)) for name, (n, t) in sums.items()]
    return sorted(found, key=lambda operator: -operator.seconds)


def headline(speed: Speed, batch: int, peak: float, found: Sequence[Operator]) -> str:
    """Seconds, items, operations and share of the peak of one step, and what it could be at best."""
    rate, best = speed.flops / speed.seconds, sum(one.best for one in found)
    shown = f"{1e3 * speed.seconds:.1f} ms a step of {batch} items, {batch / speed.seconds:,.0f} items/s; "
    shown += f"{speed.flops / 1e9:.2f} GFLOP a step, {rate / 1e9:.0f} GFLOP/s, "
    shown += f"{100 * rate / peak:.1f} % of the measured peak\n\nat best {1e3 * best:.1f} ms: "
    shown += f"{sum(one.bytes for one in found) / 1e6:,.0f} MB read and written, "
    return shown + f"{100 * speed.flops / best / peak:.1f} % of the measured peak"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def parts_table(parts: dict[str, float]) -> str:
    """Milliseconds and share of each part."""
    total = sum(parts.values())
    rows = [(name, f"{1e3 * t:.2f}", f"{100 * t / total:.1f} %") for name, t in parts.items()]
    return table(("part", "ms", "share"), [*rows, ("all", f"{1e3 * total:.2f}", "100 %")])


def operators_table(found: Sequence[Operator], top: int) -> str:
    """The longest operators: calls, milliseconds, share, and where they are counted work, rate and least time."""
    total, rows = sum(one.seconds for one in found), list[list[str]]()
    for one in found[:top]:
        speed = [f"{one.flops / 1e9:.3f}", f"{one.flops / one.seconds / 1e9:.0f}"] if one.flops else ["", ""]
        least = [f"{one.bytes / 1e6:.1f}", f"{1e3 * one.best:.2f}"] if one.best else ["", ""]
        share = f"{100 * one.seconds / total:.1f} %"
        rows.append([f"`{one.name}`", f"{one.calls:.0f}", f"{1e3 * one.seconds:.2f}", share, *speed, *least])
    return table(("operator", "calls", "ms", "share", "GFLOP", "GFLOP/s", "MB", "at best, ms"), rows)


def report(job: Job, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, stage by stage."""
    yield f"# A training step: {options.data}, budget {options.budget}\n"
    yield (
        f"{job.device}, {job.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; measured peak "
        f"{job.record['peak'] / 1e9:.0f} GFLOP/s; parts: median of {options.steps} steps; operators: mean of {SEEN}\n"
    )
    wait = (lambda: None) if job.device == "cpu" else torch.accelerator.synchronize
    network = feature_network(job, steps=0) if uses_features(job.settings) else None
    kit: dict[str, Any] = {"seed": job.settings.seed, "accelerator": job.accelerator}
    for stage, (step, settings, feed) in stage_copies(job, network).items():
        speed = measure_step(step, settings, feed, stage=stage, first=LATE, least=options.steps, **kit)
        trainer = Trainer(step, settings, Horizon(10**9), stage=stage, **kit)
        trainer.done = LATE  # every term of the loss plays
        trainer.inner.train()
        trace = options.trace and options.trace.with_stem(f"{options.trace.stem}-{stage}")
        found = operators(trainer, feed, trace, job.record["peak"])
        yield f"## {stage}\n\n{headline(speed, settings.batch or 1, job.record['peak'], found)}\n"
        yield parts_table(parts_of(trainer, feed, options.steps, Clock(wait))) + "\n"
        yield operators_table(found, options.top) + "\n"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="what `fit` would read")
    parser.add_argument("--budget", default="5m", help="what `fit` would plan for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="where to compute (default: the best at hand)")
    parser.add_argument("--steps", type=int, default=20, help="how many are timed")
    parser.add_argument("--top", type=int, default=12, help="how many operators are shown")
    parser.add_argument("--trace", type=Path, help="also write FILE-codec and FILE-denoiser for chrome://tracing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print the report; the exit code of a mistake."""
    options = read_options(words)
    try:
        for text in report(make_job(options), options):
            print(text, flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
