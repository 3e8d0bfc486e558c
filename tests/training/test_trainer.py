"""The trainer: learning rate, Ctrl-C, checkpoint state, reports."""

import signal
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sfumato.config import StageSettings
from sfumato.errors import UserError
from sfumato.training import trainer as trainer_module
from sfumato.training.budget import StepBudget
from sfumato.training.optim import lr_scale
from sfumato.training.steps import Phase, TrainStep
from sfumato.training.trainer import Trainer, deferred_interrupts
from sfumato.types import Batch

# the learning rate


def test_the_rate_warms_up_stays_and_decays():
    rates = [lr_scale(step, StepBudget(100), warmup=9, decay=0.4) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert set(rates[9:61]) == {1.0}
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert 0 < rates[-1] <= 1 / 40


def test_the_rate_without_warmup_and_decay():
    assert {lr_scale(step, StepBudget(10), warmup=0, decay=0.0) for step in range(10)} == {1.0}


def test_the_schedule_counts_training_steps_not_phases():
    """A training step of two phases is one step of the schedule."""
    trainer = make_trainer(Line(phases=2), steps=10, warmup=4)
    trainer.advance(batch())
    assert trainer.done == 1
    assert [o.param_groups[0]["lr"] for os in trainer.optimizers.values() for o in os] == pytest.approx([0.02, 0.01])


# a small trainer


class Line(TrainStep):
    """A linear model with channels-last kernels, one kernel per phase."""

    def __init__(self, phases: int = 1) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(phases))
        self.to(memory_format=torch.channels_last)
        self.register_buffer("seen", torch.zeros(()))

    @property
    def ema_module(self) -> nn.Module:
        return self.kernels

    def phases(self) -> list[Phase]:
        return [Phase(str(i), list(k.parameters()), lr=1 / (i + 1)) for i, k in enumerate(self.kernels)]

    def forward(self, batch: Batch, phase: str, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        self.seen += 1
        x = batch.data + 0.1 * torch.randn(batch.data.shape, generator=generator)
        return {"loss": (self.kernels[int(phase)](x) - 1).square().mean()}


class Batches:
    """Batches that depend on the step alone."""

    def batch(self, step: int) -> Batch:
        return batch(step)


def batch(step: int = 0) -> Batch:
    return Batch(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step)), torch.arange(2))


def make_trainer(step: TrainStep, steps: int = 12, warmup: int = 0, lr: float = 0.1, **options: Any) -> Trainer:
    settings = StageSettings(steps=steps, batch=2, lr=lr, optimizer="adamw", warmup=warmup, decay=0.3, clip=1, ema=0.1)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    return Trainer(step, settings, StepBudget(steps), stage="codec", seed=0, accelerator=accelerator, **options)


def finished(trainer: Trainer) -> dict[str, torch.Tensor]:
    for _ in trainer.run(Batches(), lambda: None):
        pass
    return {k: v.clone() for k, v in trainer.state()[0].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_state_holds_everything(done: int):
    """Saved and loaded as in files, where kernels are contiguous; in memory they are channels-last."""
    torch.manual_seed(0)
    trainer = make_trainer(Line(phases=2))
    for step in range(done):
        trainer.advance(batch(step))
    tensors, metadata = trainer.state()
    saved = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    expected = finished(trainer)
    torch.manual_seed(1)
    other = make_trainer(Line(phases=2))
    other.load(saved, {**metadata, "amendments": [list(a) for a in metadata["amendments"]]})
    assert other.done == done
    assert same(finished(other), expected)


def test_a_resumed_step_budget_is_not_amended():
    trainer = make_trainer(Line())
    metadata = {"done": 3, "seconds": 1.5, "amendments": [[2, 20]]}
    trainer.step_budget.seconds = 10.0
    trainer.load(trainer.state()[0], metadata)
    assert trainer.steps == 20 and not trainer.step_budget.update(5, 100.0)


def test_saving_reporting_and_averaging_do_not_change_training():
    torch.manual_seed(0)
    expected = finished(make_trainer(Line()))
    torch.manual_seed(0)
    trainer = make_trainer(Line())
    reports, states = [], []
    for report in trainer.run(Batches(), lambda: states.append(trainer.state()), report_every=0.0, save_every=0.0):
        reports.append(report)
        with trainer.ema_weights():
            assert torch.equal(trainer.unwrapped.kernels[0].weight, trainer.ema.weights["0.weight"])
    assert same(trainer.state()[0], expected)
    assert [report.step for report in reports] == list(range(1, 13)) and len(states) == 11


def test_reports_are_means_since_the_previous_report():
    trainer = make_trainer(Line())
    losses = []
    advance = trainer.advance
    trainer.advance = lambda b: losses.append(advance(b)) or losses[-1]
    (report,) = trainer.run(Batches(), lambda: None)
    assert report.losses["loss"] == pytest.approx(sum(float(terms["loss"]) for terms in losses) / 12)
    assert report.step == report.steps == 12


class Clock:
    """A simulated clock, moved on by each slow call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: self.now)

    def slow(self, seconds: float, call):
        def slowly(*args):
            self.now += seconds
            return call(*args)

        return slowly


def test_reports_time_the_steps_and_the_summary_the_whole_stage(monkeypatch: pytest.MonkeyPatch):
    """12 steps of 2 items, 0.5 s and 10 operations each, on a machine of 100 operations a second; 3 s for each save."""
    trainer, clock = make_trainer(Line(), flops=10.0, peak=100.0), Clock(monkeypatch)
    trainer.advance = clock.slow(0.5, trainer.advance)
    reports = list(trainer.run(Batches(), clock.slow(3.0, lambda: None), report_every=1.4, save_every=2.9))
    assert [report.step for report in reports] == [3, 6, 7, 10, 12]
    assert [report.items_per_second for report in reports][:2] == pytest.approx([4.0, 4.0])
    assert [report.share_of_peak for report in reports][:2] == pytest.approx([0.2, 0.2])
    assert trainer.seconds == pytest.approx(12 * 0.5 + 3.0)
    summary = trainer.summary(trainer.seconds + 1.0)
    assert (summary.stage, summary.steps, summary.items) == ("codec", 12, 24)
    assert (summary.seconds, summary.items_per_second, summary.share_of_peak) == pytest.approx((10.0, 2.4, 0.12))


def test_the_seconds_of_earlier_sessions_are_added(monkeypatch: pytest.MonkeyPatch):
    trainer, clock = make_trainer(Line()), Clock(monkeypatch)
    trainer.load(trainer.state()[0], {"done": 8, "seconds": 20.0, "amendments": []})
    trainer.advance = clock.slow(0.5, trainer.advance)
    list(trainer.run(Batches(), lambda: None))
    assert trainer.seconds == trainer.state()[1]["seconds"] == pytest.approx(22.0)


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer, saved = make_trainer(Line(), lr=1e30), []
    with pytest.raises(UserError, match=r"not finite.*lower the learning rate.*train\.codec\.lr"):
        for _ in trainer.run(Batches(), lambda: saved.append(trainer.done), report_every=0.0):
            pass
    assert saved == []


def test_an_interrupt_takes_effect_after_the_step():
    trainer, saved = make_trainer(Line(phases=2)), []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as interrupted:
        for report in trainer.run(Batches(), lambda: saved.append(trainer.done), interrupted, report_every=0.0):
            if report.step == 4:
                signal.raise_signal(signal.SIGINT)
    assert saved == [4]


def test_the_second_interrupt_takes_effect_at_once():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
