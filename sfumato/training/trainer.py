"""The training loop: phases, gradient clipping, weight average, checkpoints, reports. It works with any step."""

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
from sfumato.training.budget import StepBudget
from sfumato.training.callbacks import EarlyStopping, GuideSnapshot
from sfumato.training.ema import EMA
from sfumato.training.optim import lr_scale, make_optimizers, match_memory_format
from sfumato.training.steps import Phase, TrainStep
from sfumato.types import Batch


class BatchSource(Protocol):
    """Source of batches; the batch of a step depends on the step's number alone."""

    def batch(self, step: int) -> Batch: ...


@dataclass
class Report:
    """Training metrics, averaged since the previous report.

    Args:
        stage: Name of the stage.
        step: Steps done.
        steps: Number of steps of the stage.
        losses: Mean loss and loss terms.
        lr: Learning rate of the next step.
        items_per_second: Training speed.
        share_of_peak: Hardware utilisation: operations per second relative to the measured peak; 0 if not counted.
        eta: Estimated seconds left in the stage.
    """

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
    """Metrics of a complete stage by wall clock, previews, checkpoints and reports included.

    Args:
        stage: Name of the stage.
        steps: Optimizer steps.
        items: Training items seen, counted with repetition.
        seconds: Duration over all sessions; steps lost with a killed session count once.
        items_per_second: Training speed.
        share_of_peak: Hardware utilisation: operations per second relative to the measured peak; 0 if not counted.
    """

    stage: str
    steps: int
    items: int
    seconds: float
    items_per_second: float
    share_of_peak: float


class Trainer:
    """The training state of one stage and its loop.

    Args:
        step: The training step.
        settings: Settings of the stage, complete.
        step_budget: Number of steps.
        stage: Name of the stage; part of the address of its random numbers.
        seed: Seed of the run.
        accelerator: Devices, precision, processes.
        flops: Floating-point operations per step; 0 if not counted.
        peak: The machine's measured peak, in floating-point operations per second.
        guide_snapshot: Keeps an early average as the guide; None without a guide.
        early_stopping: Checks the held-out loss; None without early stopping.
    """

    def __init__(
        self,
        step: TrainStep,
        settings: StageSettings,
        step_budget: StepBudget,
        *,
        stage: str,
        seed: int,
        accelerator: Accelerator,
        flops: float = 0.0,
        peak: float = 1.0,
        guide_snapshot: GuideSnapshot | None = None,
        early_stopping: EarlyStopping | None = None,
    ) -> None:
        self.unwrapped, self.settings, self.step_budget = step, settings, step_budget
        self.stage, self.seed, self.accelerator = stage, seed, accelerator
        self.flops, self.peak, self.guide_snapshot, self.early_stopping = flops, peak, guide_snapshot, early_stopping
        self.module: nn.Module = accelerator.prepare_model(step)
        self.phases = step.phases()
        self.optimizers = {phase.name: make_optimizers(phase, settings) for phase in self.phases}
        self.ema = EMA(step.ema_module, settings.ema or 0.0)
        self.done = 0
        self.seconds = 0.0  # duration of the `done` steps, over all sessions

    @property
    def steps(self) -> int:
        """The number of steps in force now."""
        return self.step_budget.steps_at(self.done)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.steps

    def run(
        self,
        batches: BatchSource,
        save: Callable[[], None],
        interrupted: Callable[[], bool] = lambda: False,
        report_every: float = 5.0,
        save_every: float = 30.0,
    ) -> Iterator[Report]:
        """Train until the step budget is used up, yielding reports.

        Args:
            batches: Training batches.
            save: Saves a checkpoint; called between steps only, when weights and buffers belong to the same step.
            interrupted: Whether to stop after the current step.
            report_every: Approximate seconds between reports.
            save_every: Approximate seconds between checkpoints.

        Raises:
            KeyboardInterrupt: `interrupted()` was true after a step; that step is saved.
        """
        self.unwrapped.train()
        first, start, before = self.done, time.perf_counter(), self.seconds
        reported = saved = start
        since, sums = self.done, dict[str, Tensor]()
        while not self.finished:
            self._add_losses(sums, self.advance(batches.batch(self.done)))
            if self.early_stopping is not None and self.early_stopping.due(self.done):
                self._check_held_out(self.early_stopping)
            now = time.perf_counter()
            self.seconds = before + now - start
            self.step_budget.update(self.done, now - start)
            if now - reported > report_every or self.finished:
                yield self._report(sums, self.done - since, now - reported, (now - start) / (self.done - first))
                reported, since, sums = time.perf_counter(), self.done, {}
            if now - saved > save_every and not self.finished:
                save()
                saved = time.perf_counter()
            if interrupted():
                save()
                raise KeyboardInterrupt

    def advance(self, batch: Batch) -> dict[str, Tensor]:
        """One training step: every phase that has started."""
        scale = lr_scale(self.done, self.step_budget, self.settings.warmup or 0, self.settings.decay or 0.0)
        generator = step_generator(self.seed, self.stage, self.done)
        terms: dict[str, Tensor] = {}
        for phase in self.phases:
            if self.done < phase.start:
                continue
            losses = self.module(batch, phase.name, self.done, generator)
            self.accelerator.backward(losses["loss"])
            self.accelerator.clip_grad_norm_(phase.parameters, self.settings.clip or math.inf)
            self._optimizer_step(phase, (self.settings.lr or 0.0) * phase.lr * scale)
            terms |= {k if phase is self.phases[0] else f"{phase.name}.{k}": v.detach() for k, v in losses.items()}
        self.done += 1
        self.ema.update(self.done)
        if self.guide_snapshot is not None:
            self.guide_snapshot.after_step(self.done, self.steps, self.ema)
        return terms

    @torch.no_grad()
    def _check_held_out(self, early_stopping: EarlyStopping) -> None:
        """Measure the held-out loss under the average, with the same noise each time; if it rises, start the decay."""
        self.unwrapped.eval()
        losses: list[Tensor] = []
        with self.ema_weights():
            for i, batch in enumerate(early_stopping.batches):
                generator = step_generator(self.seed, f"{self.stage}/held out", i)
                losses.append(self.module(batch, self.phases[0].name, self.done, generator)["loss"])
        self.unwrapped.train()
        early_stopping.losses.append((self.done, float(torch.stack(losses).mean())))
        if early_stopping.should_stop(self.done):
            self.step_budget.start_decay(self.done, self.settings.decay or 0.0)

    def _optimizer_step(self, phase: Phase, lr: float) -> None:
        for optimizer in self.optimizers[phase.name]:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    @staticmethod
    def _add_losses(sums: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            sums[name] = sums[name] + value if name in sums else value

    def _report(self, sums: dict[str, Tensor], count: int, seconds: float, per_step: float) -> Report:
        losses = {name: float(value) / count for name, value in sums.items()}
        steps = self.step_budget.steps_at(self.done)
        if not math.isfinite(losses["loss"]):
            raise UserError(
                f"{self.stage}: the loss is not finite at step {self.done}; lower the learning rate "
                f"(--set train.{self.stage}.lr={(self.settings.lr or 0) / 3:.1g}) and start again with --overwrite",
                code=1,
            )
        if self.early_stopping is not None and self.early_stopping.losses:
            losses["held_out"] = self.early_stopping.losses[-1][1]
        speed = count / max(seconds, 1e-9)
        scale = lr_scale(self.done, self.step_budget, self.settings.warmup or 0, self.settings.decay or 0.0)
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
        """The summary of a stage that took `seconds`."""
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
    def ema_weights(self) -> Iterator[None]:
        """Context in which the module has the averaged weights; afterwards the raw ones are restored bit for bit."""
        raw = {name: value.detach().clone() for name, value in self.ema.source.items()}
        self.ema.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self.ema.source.items():
                    value.copy_(raw[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON metadata of a checkpoint."""
        tensors = {f"weights/{k}": v for k, v in trained_state(self.unwrapped).items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.weights.items()}
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                for j, values in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer/{name}/{i}/{j}/{k}": torch.as_tensor(v) for k, v in values.items()}
        metadata: dict[str, Any] = {"stage": self.stage, "done": self.done, "seconds": self.seconds}
        metadata["amendments"] = self.step_budget.amendments
        if self.guide_snapshot is not None:
            guide_tensors, guide_metadata = self.guide_snapshot.state()
            tensors, metadata = tensors | guide_tensors, metadata | guide_metadata
        if self.early_stopping is not None:
            metadata |= self.early_stopping.state()
        return tensors, metadata

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Restore a saved `state`; from here on, the clock no longer amends the step budget.

        Raises:
            UserError: The weights have other names than those of this version.
        """
        weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        if weights.keys() != trained_state(self.unwrapped).keys():
            message = "the checkpoint was written by another version of sfumato; start again with --overwrite"
            raise UserError(f"{self.stage}: {message}", code=1)
        self.unwrapped.load_state_dict(weights, strict=False)  # without frozen modules
        self.ema.load({k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")})
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in tensors.items():
                    if key.startswith(f"optimizer/{name}/{i}/"):
                        j, k = key.split("/")[3:]
                        state.setdefault(int(j), {})[k] = value
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                match_memory_format(optimizer)
        self.done, self.seconds = int(metadata["done"]), float(metadata.get("seconds", 0.0))
        self.step_budget.amendments = [(int(a), int(b)) for a, b in metadata["amendments"]]
        self.step_budget.seconds = math.inf
        if self.guide_snapshot is not None:
            self.guide_snapshot.load(tensors, metadata)
        if self.early_stopping is not None:
            self.early_stopping.load(metadata)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C only makes the yielded function return True; the second one interrupts."""
    previous, interrupts = signal.getsignal(signal.SIGINT), list[bool]()

    def handle(number: int, frame: object) -> None:
        interrupts.append(True)
        signal.signal(signal.SIGINT, previous)

    install = threading.current_thread() is threading.main_thread() and callable(previous)
    if install:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(interrupts)
    finally:
        if install:
            signal.signal(signal.SIGINT, previous)


def trained_state(step: TrainStep) -> dict[str, Tensor]:
    """The step's state without frozen modules such as a perceptual network, which are built anew."""
    frozen = {name for name, p in step.named_parameters() if not p.requires_grad}
    modules = {name.rsplit(".", 1)[0] for name in frozen}
    return {k: v for k, v in step.state_dict().items() if k not in frozen and k.rsplit(".", 1)[0] not in modules}
