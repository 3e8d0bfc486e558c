"""Held-out items, looked at as training goes on; where their loss rises, training comes to an end."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.training.horizon import Horizon
from sfumato.training.loop import Trainer
from sfumato.training.watch import PATIENCE, Watch
from tests.training.common import record, rows, small_fit
from tests.training.test_loop import Feed, Line, batch, make_trainer


class Bent(Line):
    """A line whose loss of held-out items is what a function of the step says."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.held = loss

    def forward(self, batch: Any, phase: str, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.training:
            return super().forward(batch, phase, step, generator)
        return {"loss": torch.tensor(float(self.held(step)))}


def trained(step: Line, watch: Watch | None, steps: int = 1_000) -> Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(step, steps=steps, watch=watch)
    for _ in trainer.run(Feed(), lambda: None):
        pass
    return trainer


def line() -> Line:
    """The same line each time."""
    torch.manual_seed(0)
    return Line()


def test_looks_are_few():
    watch = Watch([batch()], 4)
    assert trained(Bent(lambda step: -step), watch).done == 1_000
    looks = [step for step, _ in watch.losses]
    assert looks[:3] == [4, 5, 6] and len(looks) < 45
    assert all(b >= 1.15 * a for a, b in pairwise(looks))


def test_where_the_loss_rises_the_rate_decays_as_it_would_have_at_the_end():
    watch = Watch([batch()], 4)
    trainer = trained(Bent(lambda step: abs(step - 100)), watch)
    best = min(watch.losses, key=lambda look: look[1])[0]
    (start, total), *more = trainer.horizon.amendments
    assert abs(best - 100) <= 15 and not more
    assert PATIENCE * best <= start < 1.2 * PATIENCE * best and trainer.done == total == math.ceil(start / 0.7)
    rates = [trainer.horizon.level(step, 0.3) for step in range(total)]
    assert set(rates[: start + 1]) == {1.0} and rates[start + 1 :] == sorted(rates[start + 1 :], reverse=True)
    assert 0 < rates[-1] < 2 / (total - start)


def test_a_loss_that_only_wavers_ends_nothing():
    """At a rate that does not fall looks go up and down by a thousandth (adult), and on down later."""
    trainer = trained(Bent(lambda step: 1 + 1e-3 * math.sin(step)), Watch([batch()], 4))
    assert trainer.done == 1_000 and not trainer.horizon.amendments


def test_in_the_decay_nothing_changes():
    """A loss that rises where the rate falls anyway does not end training."""
    trainer = trained(Bent(lambda step: abs(step - 600)), Watch([batch()], 4))
    assert trainer.done == 1_000 and not trainer.horizon.amendments


def test_the_clock_does_not_make_it_longer_again():
    horizon = Horizon(1_000, seconds=100.0)
    horizon.close(70, 0.3)
    for step in range(71, 100):
        horizon.amend(step, 0.001 * step)  # ever so fast
    assert horizon.at(99) == 100


def test_a_look_leaves_training_as_it_was():
    plain, watch = trained(line(), None, steps=12), Watch([batch(7)], 3)
    watched = trained(line(), watch, steps=12)
    assert len(watch.losses) > 3 and watched.inner.training
    for ours, theirs in zip(watched.inner.parameters(), plain.inner.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_look_draws_the_same():
    """Losses differ by the weights alone."""
    watch = Watch([batch(7)], 3)
    trainer = make_trainer(line(), steps=12, watch=watch)
    trainer._look(watch)
    trainer.done = 5
    trainer._look(watch)
    assert watch.losses[0][1] == watch.losses[1][1]


def test_it_goes_through_a_checkpoint():
    whole, first, second = (Watch([batch(7)], 3) for _ in range(3))
    trained(line(), whole, steps=12)
    cut = make_trainer(line(), steps=12, watch=first)
    for _ in range(8):
        cut.advance(batch(cut.done))
        if first.due(cut.done):
            cut._look(first)
    resumed = make_trainer(line(), steps=12, watch=second)
    resumed.load(*cut.state())
    for _ in resumed.run(Feed(), lambda: None):
        pass
    assert second.losses == whole.losses


@pytest.mark.parametrize("watch", [True, False])
def test_in_a_run_of_a_table_it_is_recorded(tmp_path: Path, watch: bool):
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    given = ("train.watch=True",) if watch else ()  # the number of steps is the user's: it is not cut short unasked
    small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16", *given, steps=40)
    last = [row for row in rows(tmp_path / "run") if row["stage"] == "denoiser"][-1]
    assert ("held_out" in last) == watch == record(tmp_path / "run")["plan"]["train"]["watch"]
    assert not watch or 0 < last["held_out"] < 10


@pytest.mark.parametrize("bottleneck", ["kl", "identity"])
def test_held_out_rows_are_what_batches_hold(tmp_path: Path, bottleneck: str):
    """Their loss is about that of rows that were trained on."""
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(400)))
    options = (
        "train.denoiser.batch=64",
        "train.watch=True",
        f"codec.bottleneck={bottleneck}",
        "codec.width=16",
        "codec.latent_dim=4",
    )
    small_fit(tmp_path / "t.csv", tmp_path / "run", *options, steps=60)
    last = [row for row in rows(tmp_path / "run") if row["stage"] == "denoiser"][-1]
    assert last["held_out"] == pytest.approx(last["loss"], rel=0.5)
