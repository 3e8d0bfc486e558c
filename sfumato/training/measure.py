"""How long a step takes, and how many operations it is."""

import time
from typing import Any, NamedTuple

from torch.utils.flop_counter import FlopCounterMode

from sfumato.config import StageSettings
from sfumato.training.horizon import Horizon
from sfumato.training.loop import Feed, Trainer
from sfumato.training.steps import TrainStep
from sfumato.types import Batch


class Speed(NamedTuple):
    """Seconds and floating-point operations of one step."""

    seconds: float
    flops: float


def count_operations(trainer: Trainer, batch: Batch) -> float:
    """Take a step, and count its floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        trainer.advance(batch)
    return float(counter.get_total_flops())


def measure_step(
    step: TrainStep,
    settings: StageSettings,
    feed: Feed,
    *,
    stage: str,
    first: int = 0,
    seconds: float = 0.4,
    least: int = 4,
    **kit: Any,
) -> Speed:
    """Run a few steps of a trainer, from step `first` on; the median of those after the first two counts.

    An error of some hundredths does no harm: the clock amends the number of steps while a stage goes on.
    """
    trainer = Trainer(step, settings, Horizon(10**9), stage=stage, **kit)
    trainer.done = first
    trainer.inner.train()
    flops = count_operations(trainer, feed.batch(first))
    trainer.advance(feed.batch(first + 1))
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        began = time.perf_counter()
        trainer.advance(feed.batch(trainer.done))
        times.append(time.perf_counter() - began)
    return Speed(sorted(times)[len(times) // 2], flops)
