"""The one training loop: phases, clipping, weight average, checkpoints, reports. It knows nothing of what it trains."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sfumato.config import StageSettings
from sfumato.core import step_generator
from sfumato.errors import UserError
from sfumato.training.early import Early
from sfumato.training.ema import EMA
from sfumato.training.horizon import Horizon
from sfumato.training.steps import Phase, TrainStep, matrices
from sfumato.training.watch import Watch
from sfumato.types import Batch


class Feed(Protocol):
    """Where batches come from: the batch of a step depends on the step's number alone."""

    def batch(self, step: int) -> Batch: ...


@dataclass
class Report:
    """What the loop says every so often: means since the last report."""

    stage: str
    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    items_per_second: float
    share_of_peak: float
    eta: float


@dataclass
class Summary:
    """What a whole stage came to, by wall clock: sheets, checkpoints and reports are in its seconds.

    Args:
        stage: Its name.
        steps: Optimizer steps.
        items: Items seen, each as often as it was.
        seconds: From the first step on, in all sessions; steps that a killed session lost count only once.
        items_per_second: Items by seconds.
        share_of_peak: Operations of the steps by what the machine's measured peak could do in those seconds; 0 where
            operations were not counted.
    """

    stage: str
    steps: int
    items: int
    seconds: float
    items_per_second: float
    share_of_peak: float


def rate(step: int, horizon: Horizon, warmup: int, decay: float) -> float:
    """Learning rate at a step, relative to its peak: linear warm-up, constant, linear decay over the last share."""
    return min((step + 1) / max(1, warmup + 1), horizon.level(step, decay))


def make_optimizers(phase: Phase, settings: StageSettings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest; each group remembers its relative rate."""
    muon = {id(p) for p in matrices(phase.parameters)} if settings.optimizer == "muon" else set[int]()
    hidden = [p for p in phase.parameters if id(p) in muon]
    rest = [p for p in phase.parameters if id(p) not in muon]
    decay = settings.weight_decay or 0.0
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, betas=phase.betas, weight_decay=decay, fused=True))
    if hidden:
        made.append(torch.optim.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return made


class Trainer:
    """One stage's training state and its loop.

    Args:
        step: What is trained.
        settings: Batch, rate, average, …; all of them set.
        horizon: The number of steps.
        stage: Name of the stage; part of the address of its random numbers.
        seed: Seed of the run.
        accelerator: Devices, precision, processes.
        flops: Floating-point operations of a step; 0 where they were not counted.
        peak: The machine's measured peak, in operations per second.
        early: Who keeps an early average; None if nobody does.
        watch: Who looks at held-out items; None if nobody does.
    """

    def __init__(
        self,
        step: TrainStep,
        settings: StageSettings,
        horizon: Horizon,
        *,
        stage: str,
        seed: int,
        accelerator: Accelerator,
        flops: float = 0.0,
        peak: float = 1.0,
        early: Early | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.inner, self.settings, self.horizon = step, settings, horizon
        self.stage, self.seed, self.accelerator = stage, seed, accelerator
        self.flops, self.peak, self.early, self.watch = flops, peak, early, watch
        self.module: nn.Module = accelerator.prepare_model(step)
        self.phases = step.phases()
        self.optimizers = {phase.name: make_optimizers(phase, settings) for phase in self.phases}
        self.ema = EMA(step.averaged, settings.ema or 0.0)
        self.done = 0
        self.seconds = 0.0  # that `done` steps took, in all sessions

    @property
    def steps(self) -> int:
        """The number of steps as known now."""
        return self.horizon.at(self.done)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.steps

    def run(
        self,
        feed: Feed,
        save: Callable[[], None],
        interrupted: Callable[[], bool] = lambda: False,
        every: float = 5.0,
        save_every: float = 30.0,
    ) -> Iterator[Report]:
        """Train to the horizon; yields a report about every `every` seconds, saves about every `save_every`.

        Saves between steps only: within one, weights and buffers are not of the same step.

        Raises:
            KeyboardInterrupt: `interrupted()` was true after a step; that step is saved.
        """
        self.inner.train()
        first, start, before = self.done, time.perf_counter(), self.seconds
        reported = saved = start
        since, sums = self.done, dict[str, Tensor]()
        while not self.finished:
            self._add(sums, self.advance(feed.batch(self.done)))
            if self.watch is not None and self.watch.due(self.done):
                self._look(self.watch)
            now = time.perf_counter()
            self.seconds = before + now - start
            self.horizon.amend(self.done, now - start)
            if now - reported > every or self.finished:
                yield self._report(sums, self.done - since, now - reported, (now - start) / (self.done - first))
                reported, since, sums = time.perf_counter(), self.done, {}
            if now - saved > save_every and not self.finished:
                save()
                saved = time.perf_counter()
            if interrupted():
                save()
                raise KeyboardInterrupt

    def advance(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step of every phase that is due."""
        scale = rate(self.done, self.horizon, self.settings.warmup or 0, self.settings.decay or 0.0)
        generator = step_generator(self.seed, self.stage, self.done)
        terms: dict[str, Tensor] = {}
        for phase in self.phases:
            if self.done < phase.start:
                continue
            losses = self.module(batch, phase.name, self.done, generator)
            self.accelerator.backward(losses["loss"])
            self.accelerator.clip_grad_norm_(phase.parameters, self.settings.clip or math.inf)
            self._advance(phase, (self.settings.lr or 0.0) * phase.lr * scale)
            terms |= {k if phase is self.phases[0] else f"{phase.name}.{k}": v.detach() for k, v in losses.items()}
        self.done += 1
        self.ema.update(self.done)
        if self.early is not None:
            self.early.after(self.done, self.steps, self.ema)
        return terms

    @torch.no_grad()
    def _look(self, watch: Watch) -> None:
        """The loss of held-out items under the average, with the same noise each time; where it rises, end soon."""
        self.inner.eval()
        losses: list[Tensor] = []
        with self.averaged():
            for i, batch in enumerate(watch.batches):
                generator = step_generator(self.seed, f"{self.stage}/held out", i)
                losses.append(self.module(batch, self.phases[0].name, self.done, generator)["loss"])
        self.inner.train()
        watch.losses.append((self.done, float(torch.stack(losses).mean())))
        if watch.risen(self.done):
            self.horizon.close(self.done, self.settings.decay or 0.0)

    def _advance(self, phase: Phase, lr: float) -> None:
        for optimizer in self.optimizers[phase.name]:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    @staticmethod
    def _add(sums: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            sums[name] = sums[name] + value if name in sums else value

    def _report(self, sums: dict[str, Tensor], count: int, seconds: float, per_step: float) -> Report:
        losses = {name: float(value) / count for name, value in sums.items()}
        steps = self.horizon.at(self.done)
        if not math.isfinite(losses["loss"]):
            raise UserError(
                f"{self.stage}: the loss is not finite at step {self.done}; lower the rate "
                f"(--set train.{self.stage}.lr={(self.settings.lr or 0) / 3:.1g}) and start again with --overwrite",
                code=1,
            )
        if self.watch is not None and self.watch.losses:
            losses["held_out"] = self.watch.losses[-1][1]
        speed = count / max(seconds, 1e-9)
        scale = rate(self.done, self.horizon, self.settings.warmup or 0, self.settings.decay or 0.0)
        return Report(
            stage=self.stage,
            step=self.done,
            steps=steps,
            losses=losses,
            lr=(self.settings.lr or 0.0) * scale,
            items_per_second=speed * (self.settings.batch or 0),
            share_of_peak=self.flops * speed / self.peak,
            eta=(steps - self.done) * per_step,
        )

    def summary(self, seconds: float) -> Summary:
        """The stage in numbers, when it took so many seconds."""
        speed = self.done / max(seconds, 1e-9)
        return Summary(
            stage=self.stage,
            steps=self.done,
            items=self.done * (self.settings.batch or 0),
            seconds=seconds,
            items_per_second=speed * (self.settings.batch or 0),
            share_of_peak=self.flops * speed / self.peak,
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the module has the averaged weights; afterwards the raw ones are back, bit for bit."""
        raw = {name: value.detach().clone() for name, value in self.ema.source.items()}
        self.ema.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self.ema.source.items():
                    value.copy_(raw[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training needs to go on: tensors, and facts for JSON."""
        tensors = {f"weights/{k}": v for k, v in trained_state(self.inner).items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.weights.items()}
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                for j, values in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer/{name}/{i}/{j}/{k}": torch.as_tensor(v) for k, v in values.items()}
        facts = {"stage": self.stage, "done": self.done, "seconds": self.seconds}
        kept, told = ({}, {}) if self.early is None else self.early.state()
        told |= {} if self.watch is None else self.watch.state()
        return tensors | kept, facts | {"amendments": self.horizon.amendments} | told

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a saved `state`; the horizon is no longer amended by the clock."""
        own = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        missing = self.inner.load_state_dict(own, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        self.ema.load({k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")})
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in tensors.items():
                    if key.startswith(f"optimizer/{name}/{i}/"):
                        j, k = key.split("/")[3:]
                        state.setdefault(int(j), {})[k] = value
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                lay_out(optimizer)
        self.done, self.seconds = int(facts["done"]), float(facts.get("seconds", 0.0))
        self.horizon.amendments = [(int(a), int(b)) for a, b in facts["amendments"]]
        self.horizon.seconds = math.inf
        if self.early is not None:
            self.early.load(tensors, facts)
        if self.watch is not None:
            self.watch.load(facts)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only makes the function handed out say True; the second one interrupts."""
    before, asked = signal.getsignal(signal.SIGINT), list[bool]()

    def note(number: int, frame: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, before)

    ours = threading.current_thread() is threading.main_thread() and callable(before)
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters: fused kernels walk both in the order of memory."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def trained_state(step: TrainStep) -> dict[str, Tensor]:
    """The step's state without frozen helpers such as a perceptual network, which are made anew."""
    frozen = {name for name, p in step.named_parameters() if not p.requires_grad}
    modules = {name.rsplit(".", 1)[0] for name in frozen}
    return {k: v for k, v in step.state_dict().items() if k not in frozen and k.rsplit(".", 1)[0] not in modules}
