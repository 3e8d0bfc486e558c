"""Profile of a training step, for both stages of a plan: by part of the step, and by operator.

    python benchmarks/profile_step.py --data mnist --budget 5m
    python benchmarks/profile_step.py --data mnist --budget 5m --set codec.width=96 --trace step.json

The steps are those of `fit` with the same data, budget and settings, on copies that `training/profile.py` makes and
discards; only the trace is written. Times of parts are exclusive, and medians over the steps. Operators are timed by
torch's profiler, which slows small ones down; torch counts their floating-point operations, backward passes included,
and their bytes are those of all tensors that they read and write.

`at best` is a lower bound of the step on this machine (a roofline): each operator at the peak of matrix products, or at
the bandwidth of a copy of as many bytes, whichever is slower. Copies are measured at all sizes, so the bound includes
caches and call overhead. Keep the machine otherwise idle.
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
from sfumato.hardware import best_precision, default_device, measure_bandwidth
from sfumato.modalities import find_modality, recognise
from sfumato.training.budget import StepBudget
from sfumato.training.build import train_feature_network, uses_features
from sfumato.training.launch import make_accelerator
from sfumato.training.log import Log
from sfumato.training.profile import LAST_STEP, StepCost, complete_plan, measure_step, stage_copies
from sfumato.training.run import Run
from sfumato.training.steps import CodecStep, DiffusionStep, TrainStep
from sfumato.training.trainer import BatchSource, Trainer

PROFILED_STEPS = 3  # steps under the profiler
BOOKKEEPING = "bookkeeping"  # name of the part outside all others


class PartTimer:
    """Exclusive seconds of nested parts.

    Args:
        synchronize: Waits for the device; called before the clock is read.
        now: The clock.
    """

    def __init__(self, synchronize: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> None:
        self.synchronize, self.now = synchronize, now
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.last = 0.0

    def _charge(self) -> None:
        """Add the elapsed time to the innermost part."""
        self.synchronize()
        now = self.now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, name: str) -> None:
        """A part begins."""
        self._charge()
        self.stack.append(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self._charge()
        self.stack.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a part."""

        def call(*args: Any, **options: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return call

    def watch_module(self, name: str, module: nn.Module) -> None:
        """Time the module's forward as a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())


class OperatorCost(NamedTuple):
    """Cost of one kind of operator per step, and its lower bound `best`, in seconds."""

    name: str
    calls: float
    seconds: float
    flops: float
    bytes: float
    best: float


@cache
def copy_bandwidth(log_size: int, device: str) -> float:
    """Bandwidth in bytes/s of a copy that reads and writes 2^log_size bytes in all."""
    return measure_bandwidth(device, 0.02, size=2**log_size // 2)


class CostCounter(TorchDispatchMode):
    """Operations, bytes and lower bound in seconds of every operator within the block.

    Args:
        peak: Peak of matrix products in operations/s.
        bandwidth: log2 of bytes read and written -> bytes/s.
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
        transfer = moved / self.bandwidth(min(28, max(10, round(math.log2(moved))))) if moved else 0.0
        self.best[name] += max(flops / self.peak, transfer)
        return out


def planned_run(options: argparse.Namespace) -> Run:
    """A run as `fit` would plan it; its folder is never written."""
    started = time.monotonic()
    given = read_settings({"seed": options.seed, "budget_seconds": parse_budget(options.budget)})
    settings = apply_overrides(given, options.set)
    modality = find_modality(settings.modality) if settings.modality else recognise(options.data)
    train, held = modality.read_split(options.data, settings.data)
    device, precision = options.device or default_device(), settings.train.precision
    accelerator = make_accelerator(device, best_precision(device) if precision == "auto" else precision)
    log = Log(Path(), None, main=False)
    run = Run(options.data, Path(), settings, modality, train, held, accelerator, log, started)
    complete_plan(run, None, None)
    return run


def inner_parts(step: TrainStep) -> dict[str, nn.Module]:
    """The modules of a step's forward that are timed separately."""
    modules: dict[str, nn.Module | None] = {"loss": step}  # exclusive of the others
    if isinstance(step, CodecStep):
        modules |= {"encoder": step.codec.encoder, "bottleneck": step.codec.bottleneck, "decoder": step.codec.decoder}
        modules |= {"perceptual network": step.perceptual, "discriminator": step.discriminator}
    if isinstance(step, DiffusionStep):
        modules |= {"denoiser": step.model.denoiser.net, "conditioner": step.model.conditioner}
    return {name: module for name, module in modules.items() if module is not None}


@contextmanager
def timed_parts(trainer: Trainer, batches: BatchSource, clock: PartTimer) -> Iterator[None]:
    """Time every part of a step within the block."""
    for name, module in inner_parts(trainer.unwrapped).items():
        clock.watch_module(name, module)
    outer = [
        ("batch", batches, "batch"),
        ("backward", trainer.accelerator, "backward"),
        ("clipping", trainer.accelerator, "clip_grad_norm_"),
        ("optimizer", trainer, "_optimizer_step"),
        ("weight average", trainer.ema, "update"),
    ]
    if isinstance(trainer.unwrapped, DiffusionStep) and trainer.unwrapped.sample_latent is not None:
        outer.append(("encoder", trainer.unwrapped, "sample_latent"))
    patches = [patch.object(owner, name, clock.timed(part, getattr(owner, name))) for part, owner, name in outer]
    for part in patches:
        part.start()
    try:
        yield
    finally:
        for part in patches:
            part.stop()


def time_parts(trainer: Trainer, batches: BatchSource, steps: int, clock: PartTimer) -> dict[str, float]:
    """Median seconds of each part of a step, longest first."""
    seconds_by_part: dict[str, list[float]] = defaultdict(list)
    with timed_parts(trainer, batches, clock):
        for _ in range(steps):
            clock.seconds.clear()
            clock.timed(BOOKKEEPING, lambda: trainer.advance(batches.batch(trainer.done)))()
            for name, seconds in clock.seconds.items():
                seconds_by_part[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in seconds_by_part.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def profile_operators(trainer: Trainer, batches: BatchSource, trace: Path | None, peak: float) -> list[OperatorCost]:
    """Cost of each kind of operator per step, longest first.

    Times are inclusive for operators with counted work, and exclusive for all others.
    """
    device = trainer.accelerator.device.type
    with CostCounter(peak, lambda log_size: copy_bandwidth(log_size, device)) as cost:
        trainer.advance(batches.batch(trainer.done))
    on_cpu = device == "cpu"
    activities = [ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            trainer.advance(batches.batch(trainer.done))
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kind, sums = "cpu" if on_cpu else "device", defaultdict[str, list[float]](lambda: [0.0, 0.0])
    pending = [event for event in profiler.events() or () if event.cpu_parent is None]
    while pending:
        event = pending.pop()
        counted = event.name in cost.best
        name = event.name if event.name.startswith("aten::") else "between operators"
        total = sums[name]
        total[0] += 1
        total[1] += getattr(event, f"{kind}_time_total" if counted else f"self_{kind}_time_total") / 1e6
        pending += [] if counted else event.cpu_children
    counters = (cost.flops, cost.bytes, cost.best)
    costs = [
        OperatorCost(name, n / PROFILED_STEPS, t / PROFILED_STEPS, *(counter[name] for counter in counters))
        for name, (n, t) in sums.items()
    ]
    return sorted(costs, key=lambda operator: -operator.seconds)


def headline(step_cost: StepCost, batch: int, peak: float, costs: Sequence[OperatorCost]) -> str:
    """Seconds, items, operations and share of the peak of one step, and its lower bound."""
    seconds, flops = step_cost.seconds, step_cost.flops
    best, moved = sum(cost.best for cost in costs), sum(cost.bytes for cost in costs)
    text = f"{1e3 * seconds:.1f} ms per step of {batch} items, {batch / seconds:,.0f} items/s; "
    text += f"{flops / 1e9:.2f} GFLOP per step, {flops / seconds / 1e9:.0f} GFLOP/s, "
    text += f"{100 * flops / seconds / peak:.1f} % of the measured peak\n\nat best {1e3 * best:.1f} ms: "
    return text + f"{moved / 1e6:,.0f} MB read and written, {100 * flops / best / peak:.1f} % of the measured peak"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def parts_table(parts: dict[str, float]) -> str:
    """Milliseconds and share of each part."""
    total = sum(parts.values())
    rows = [(name, f"{1e3 * t:.2f}", f"{100 * t / total:.1f} %") for name, t in parts.items()]
    return table(("part", "ms", "share"), [*rows, ("all", f"{1e3 * total:.2f}", "100 %")])


def operators_table(costs: Sequence[OperatorCost], top: int) -> str:
    """The longest operators: calls, milliseconds, share; if counted also work, rate and lower bound."""
    total, rows = sum(cost.seconds for cost in costs), list[list[str]]()
    for cost in costs[:top]:
        speed = [f"{cost.flops / 1e9:.3f}", f"{cost.flops / cost.seconds / 1e9:.0f}"] if cost.flops else ["", ""]
        bound = [f"{cost.bytes / 1e6:.1f}", f"{1e3 * cost.best:.2f}"] if cost.best else ["", ""]
        share = f"{100 * cost.seconds / total:.1f} %"
        rows.append([f"`{cost.name}`", f"{cost.calls:.0f}", f"{1e3 * cost.seconds:.2f}", share, *speed, *bound])
    return table(("operator", "calls", "ms", "share", "GFLOP", "GFLOP/s", "MB", "at best, ms"), rows)


def report(run: Run, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, stage by stage."""
    yield f"# A training step: {options.data}, budget {options.budget}\n"
    yield (
        f"{run.device}, {run.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; measured peak "
        f"{run.record['peak'] / 1e9:.0f} GFLOP/s; parts: median of {options.steps} steps; "
        f"operators: mean of {PROFILED_STEPS}\n"
    )
    synchronize = (lambda: None) if run.device == "cpu" else torch.accelerator.synchronize
    network = train_feature_network(run, steps=0) if uses_features(run) else None
    trainer_options: dict[str, Any] = {"seed": run.settings.seed, "accelerator": run.accelerator}
    for stage, (step, settings, batches) in stage_copies(run, network).items():
        step_cost = measure_step(
            step, settings, batches, stage=stage, first=LAST_STEP, min_steps=options.steps, **trainer_options
        )
        trainer = Trainer(step, settings, StepBudget(10**9), stage=stage, **trainer_options)
        trainer.done = LAST_STEP  # all terms of the loss are active
        trainer.unwrapped.train()
        trace = options.trace and options.trace.with_stem(f"{options.trace.stem}-{stage}")
        costs = profile_operators(trainer, batches, trace, run.record["peak"])
        yield f"## {stage}\n\n{headline(step_cost, settings.batch or 1, run.record['peak'], costs)}\n"
        yield parts_table(time_parts(trainer, batches, options.steps, PartTimer(synchronize))) + "\n"
        yield operators_table(costs, options.top) + "\n"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="source, as for `fit`")
    parser.add_argument("--budget", default="5m", help="budget, as for `fit`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="device (default: the best available)")
    parser.add_argument("--steps", type=int, default=20, help="number of timed steps")
    parser.add_argument("--top", type=int, default=12, help="number of operators shown")
    parser.add_argument("--trace", type=Path, help="also write FILE-codec and FILE-denoiser for chrome://tracing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code of a mistake."""
    options = read_options(argv)
    try:
        for text in report(planned_run(options), options):
            print(text, flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
