"""Early stopping on the held-out loss."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.training.budget import StepBudget
from sfumato.training.callbacks import PATIENCE_RATIO, EarlyStopping
from sfumato.training.trainer import Trainer
from tests.training.common import record, rows, small_fit
from tests.training.test_trainer import Batches, Line, batch, make_trainer


class HeldOutLoss(Line):
    """A line whose held-out loss is a given function of the step."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.held_out_loss = loss

    def forward(self, batch: Any, phase: str, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.training:
            return super().forward(batch, phase, step, generator)
        return {"loss": torch.tensor(float(self.held_out_loss(step)))}


def trained(step: Line, early_stopping: EarlyStopping | None, steps: int = 1_000) -> Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(step, steps=steps, early_stopping=early_stopping)
    for _ in trainer.run(Batches(), lambda: None):
        pass
    return trainer


def line() -> Line:
    """A line, always with the same initial weights."""
    torch.manual_seed(0)
    return Line()


def test_checks_are_few():
    early_stopping = EarlyStopping([batch()], 4)
    assert trained(HeldOutLoss(lambda step: -step), early_stopping).done == 1_000
    checks = [step for step, _ in early_stopping.losses]
    assert checks[:3] == [4, 5, 6] and len(checks) < 45
    assert all(b >= 1.15 * a for a, b in pairwise(checks))


def test_when_the_loss_rises_the_usual_decay_starts():
    early_stopping = EarlyStopping([batch()], 4)
    trainer = trained(HeldOutLoss(lambda step: abs(step - 100)), early_stopping)
    best = min(early_stopping.losses, key=lambda check: check[1])[0]
    (start, total), *more = trainer.step_budget.amendments
    assert abs(best - 100) <= 15 and not more
    assert PATIENCE_RATIO * best <= start < 1.2 * PATIENCE_RATIO * best and trainer.done == total == math.ceil(
        start / 0.7
    )
    rates = [trainer.step_budget.lr_factor(step, 0.3) for step in range(total)]
    assert set(rates[: start + 1]) == {1.0} and rates[start + 1 :] == sorted(rates[start + 1 :], reverse=True)
    assert 0 < rates[-1] < 2 / (total - start)


def test_a_noisy_loss_does_not_end_training():
    """At a constant rate the held-out loss fluctuates by a thousandth (adult) and keeps falling later."""
    trainer = trained(HeldOutLoss(lambda step: 1 + 1e-3 * math.sin(step)), EarlyStopping([batch()], 4))
    assert trainer.done == 1_000 and not trainer.step_budget.amendments


def test_a_rising_loss_during_the_decay_changes_nothing():
    """The learning rate decays anyway."""
    trainer = trained(HeldOutLoss(lambda step: abs(step - 600)), EarlyStopping([batch()], 4))
    assert trainer.done == 1_000 and not trainer.step_budget.amendments


def test_the_clock_adds_no_steps_afterwards():
    step_budget = StepBudget(1_000, seconds=100.0)
    step_budget.start_decay(70, 0.3)
    for step in range(71, 100):
        step_budget.update(step, 0.001 * step)  # very fast steps
    assert step_budget.steps_at(99) == 100


def test_a_check_does_not_change_training():
    plain, early_stopping = trained(line(), None, steps=12), EarlyStopping([batch(7)], 3)
    checked = trained(line(), early_stopping, steps=12)
    assert len(early_stopping.losses) > 3 and checked.unwrapped.training
    for a, b in zip(checked.unwrapped.parameters(), plain.unwrapped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_check_draws_the_same_noise():
    """Losses differ by the weights alone."""
    early_stopping = EarlyStopping([batch(7)], 3)
    trainer = make_trainer(line(), steps=12, early_stopping=early_stopping)
    trainer._check_held_out(early_stopping)
    trainer.done = 5
    trainer._check_held_out(early_stopping)
    assert early_stopping.losses[0][1] == early_stopping.losses[1][1]


def test_it_survives_a_checkpoint():
    whole, first, second = (EarlyStopping([batch(7)], 3) for _ in range(3))
    trained(line(), whole, steps=12)
    cut = make_trainer(line(), steps=12, early_stopping=first)
    for _ in range(8):
        cut.advance(batch(cut.done))
        if first.due(cut.done):
            cut._check_held_out(first)
    resumed = make_trainer(line(), steps=12, early_stopping=second)
    resumed.load(*cut.state())
    for _ in resumed.run(Batches(), lambda: None):
        pass
    assert second.losses == whole.losses


@pytest.mark.parametrize("enabled", [True, False])
def test_the_held_out_loss_of_a_table_is_recorded(tmp_path: Path, enabled: bool):
    """A number of steps that the user gives is not cut short by default."""
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    overrides = ("train.early_stopping=True",) if enabled else ()
    small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16", *overrides, steps=40)
    last = [row for row in rows(tmp_path / "run") if row["stage"] == "denoiser"][-1]
    assert ("held_out" in last) == enabled == record(tmp_path / "run")["plan"]["train"]["early_stopping"]
    assert not enabled or 0 < last["held_out"] < 10


@pytest.mark.parametrize("bottleneck", ["kl", "identity"])
def test_held_out_items_are_encoded_as_training_items(tmp_path: Path, bottleneck: str):
    """Their loss is close to the training loss."""
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(400)))
    options = (
        "train.denoiser.batch=64",
        "train.early_stopping=True",
        f"codec.bottleneck={bottleneck}",
        "codec.width=16",
        "codec.latent_dim=4",
    )
    small_fit(tmp_path / "t.csv", tmp_path / "run", *options, steps=60)
    last = [row for row in rows(tmp_path / "run") if row["stage"] == "denoiser"][-1]
    assert last["held_out"] == pytest.approx(last["loss"], rel=0.5)
