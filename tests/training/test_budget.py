"""The step budget under a simulated clock: it keeps the seconds, and the learning rate decays smoothly."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from sfumato.training.budget import StepBudget

DECAY = 0.3
Machine = Callable[[float], float]  # (seconds since the start) -> slowdown relative to the measurement


def simulate(step_budget: StepBudget, machine: Machine) -> tuple[float, list[float]]:
    """Simulate a stage: returns the seconds it takes and the learning-rate factor of each step."""
    clock, factors, step_seconds = 0.0, list[float](), step_budget.seconds / step_budget.steps
    while len(factors) < step_budget.steps_at(len(factors)):
        factors.append(step_budget.lr_factor(len(factors), DECAY))
        clock += step_seconds * machine(clock)
        step_budget.update(len(factors), clock)
    return clock, factors


def changing(at: float, slowdown: float) -> Machine:
    """A machine that becomes slower at some second."""
    return lambda clock: slowdown if clock >= at else 1.0


POINTS = (0, 1, 5, 10, 20, 24, 26, 30, 40, 44, 50, 58, 60, 70, 76, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99, 99.5)


@pytest.mark.parametrize("steps", [300, 2_000])
@pytest.mark.parametrize("at", POINTS)
def test_a_stage_slowed_threefold_ends_on_time(at: float, steps: int):
    seconds, factors = simulate(StepBudget(steps, seconds=100.0), changing(at, 3.0))
    assert 97 <= seconds <= 103
    assert factors[-1] < 0.1  # it decayed, although the end suddenly came near


@pytest.mark.parametrize("steps", [300, 2_000])
@pytest.mark.parametrize("at", POINTS)
def test_a_stage_that_becomes_twice_as_fast_uses_its_time(at: float, steps: int):
    seconds, factors = simulate(StepBudget(steps, seconds=100.0), changing(at, 0.5))
    assert 95 <= seconds <= 101
    assert factors[-1] < 0.02


MACHINES: dict[str, Machine] = {
    "as measured": lambda clock: 1.0,
    "twice as slow": lambda clock: 2.0,
    "three times as fast": lambda clock: 1 / 3,
    "ten times as fast": lambda clock: 0.1,
    "a slow start": lambda clock: 10.0 if clock < 10 else 1.0,
    "a slow moment": lambda clock: 5.0 if 70 < clock < 90 else 1.0,
    "slow and fast in turn": lambda clock: 2.0 if clock % 20 < 10 else 0.7,
    "a preview at each quarter": lambda clock: 20.0 if clock % 25 < 0.1 else 1.0,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_few_amendments_keep_the_seconds(machine: str):
    step_budget = StepBudget(1_000, seconds=100.0)
    seconds, factors = simulate(step_budget, MACHINES[machine])
    assert 97 <= seconds <= 103
    assert len(factors) == step_budget.steps_at(len(factors))
    assert len(step_budget.amendments) <= 12


def test_an_accurate_plan_is_not_amended():
    step_budget = StepBudget(1_000, seconds=100.0)
    assert simulate(step_budget, lambda clock: 1.002)[0] == pytest.approx(100.2) and step_budget.amendments == []


def test_a_suspended_process_ends_the_stage():
    """The process is suspended for longer than the time left: the stage does not continue for as long again."""
    step_budget = StepBudget(1_000, seconds=100.0)
    stopped = lambda clock: 1_000.0 if 60 <= clock < 60.1 else 1.0
    seconds, factors = simulate(step_budget, stopped)
    assert seconds < 165 and len(factors) < 610


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_budget_of_few_steps_ends(steps: int):
    assert len(simulate(StepBudget(steps, seconds=0.5), lambda clock: 5.0)[1]) <= steps


def test_without_seconds_nothing_is_amended():
    step_budget = StepBudget(100)
    assert not any(step_budget.update(step, 5.0 * step) for step in range(1, 101))
    assert step_budget.amendments == [] and step_budget.steps_at(99) == 100


@pytest.mark.parametrize("machine", [changing(50, 3.0), changing(50, 0.5), MACHINES["slow and fast in turn"]])
def test_amendments_are_replayed(machine: Machine):
    """The list of amendments alone, read from JSON, gives the same number of steps and the same rates."""
    first = StepBudget(1_000, seconds=100.0, amendments=[(0, 900)])
    _, factors = simulate(first, machine)
    again = StepBudget(1_000, math.inf, [(int(a), int(b)) for a, b in first.amendments])
    assert len(first.amendments) > 2
    replayed: list[float] = []
    while len(replayed) < again.steps_at(len(replayed)):
        replayed.append(again.lr_factor(len(replayed), DECAY))
        assert not again.update(len(replayed), 1e9)
    assert replayed == factors


# the learning rate


def test_the_rate_decays_over_the_last_share():
    factors = [StepBudget(100).lr_factor(step, 0.4) for step in range(101)]
    assert set(factors[:61]) == {1.0}
    assert factors[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 101)])
    assert {StepBudget(100).lr_factor(step, 0.0) for step in range(100)} == {1.0}


@pytest.mark.parametrize(
    ("amendments", "expected"),
    [
        ([(50, 80)], {50: 1, 56: 1, 68: 0.5, 80: 0}),  # fewer steps, before the decay: the last three tenths, as usual
        ([(60, 70)], {60: 1, 65: 0.5, 70: 0}),  # so few that the decay should have started: it starts now
        ([(85, 90)], {85: 0.5, 88: 0.2, 90: 0}),  # during the decay: steeper, from the current value
        (
            [(85, 200)],
            {85: 0.5, 140: 0.5, 170: 0.25, 200: 0},
        ),  # more steps, during the decay: it waits, and does not rise
        ([(0, 50)], {0: 1, 35: 1, 50: 0}),
        ([(50, 80), (68, 74)], {56: 1, 68: 0.5, 71: 0.25, 74: 0}),
    ],
)
def test_the_rate_after_amendments(amendments: list[tuple[int, int]], expected: dict[int, float]):
    step_budget = StepBudget(100, amendments=amendments)
    assert [step_budget.lr_factor(step, DECAY) for step in expected] == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("slowdown", [3.0, 0.5])
@pytest.mark.parametrize("at", [10, 45, 75, 90, 96])
def test_the_rate_neither_jumps_nor_rises(at: float, slowdown: float):
    _, factors = simulate(StepBudget(2_000, seconds=100.0), changing(at, slowdown))
    steps = [b - a for a, b in pairwise(factors)]
    assert max(steps) <= 1e-12 and min(steps) > -0.05


def test_stopping_starts_the_decay_at_once():
    step_budget = StepBudget(1_000)
    step_budget.start_decay(300, 0.4)
    assert step_budget.steps_at(300) == 500 and step_budget.lr_factor(400, 0.4) == pytest.approx(0.5)
    decaying = StepBudget(1_000)
    decaying.start_decay(300, 1.0)  # it decays from the first step on
    assert decaying.steps_at(300) == 1_000


def test_no_amendment_exceeds_the_maximum():
    """A machine that turns out three times as fast ends early, without further epochs."""
    seconds, factors = simulate(StepBudget(100, seconds=100.0, max_steps=150), lambda clock: 1 / 3)
    assert len(factors) == 150 and seconds == pytest.approx(50)
    assert factors[-1] < 0.05
    assert simulate(StepBudget(100, seconds=100.0, max_steps=150), lambda clock: 2.0)[0] == pytest.approx(100, abs=3)
