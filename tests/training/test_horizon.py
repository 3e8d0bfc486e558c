"""The horizon under a simulated clock: the seconds are kept, and the rate comes down to the end smoothly."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from sfumato.training.horizon import Horizon

DECAY = 0.3
Machine = Callable[[float], float]  # (seconds since the start) -> how much slower than as measured


def simulate(horizon: Horizon, machine: Machine) -> tuple[float, list[float]]:
    """Run to the horizon on a machine: seconds taken, and the level of the rate at each step."""
    clock, levels, pace = 0.0, list[float](), horizon.seconds / horizon.steps
    while len(levels) < horizon.at(len(levels)):
        levels.append(horizon.level(len(levels), DECAY))
        clock += pace * machine(clock)
        horizon.amend(len(levels), clock)
    return clock, levels


def changing(at: float, factor: float) -> Machine:
    """Slower by a factor from some second on."""
    return lambda clock: factor if clock >= at else 1.0


POINTS = (0, 1, 5, 10, 20, 24, 26, 30, 40, 44, 50, 58, 60, 70, 76, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99, 99.5)


@pytest.mark.parametrize("steps", [300, 2_000])
@pytest.mark.parametrize("at", POINTS)
def test_a_machine_slowed_three_times_ends_on_time(at: float, steps: int):
    seconds, levels = simulate(Horizon(steps, seconds=100.0), changing(at, 3.0))
    assert 97 <= seconds <= 103
    assert levels[-1] < 0.1  # the rate came down, though the end came near at once


@pytest.mark.parametrize("steps", [300, 2_000])
@pytest.mark.parametrize("at", POINTS)
def test_a_machine_twice_as_fast_uses_its_time(at: float, steps: int):
    seconds, levels = simulate(Horizon(steps, seconds=100.0), changing(at, 0.5))
    assert 95 <= seconds <= 101
    assert levels[-1] < 0.02


MACHINES: dict[str, Machine] = {
    "as measured": lambda clock: 1.0,
    "twice as slow": lambda clock: 2.0,
    "three times as fast": lambda clock: 1 / 3,
    "ten times as fast": lambda clock: 0.1,
    "a slow start": lambda clock: 10.0 if clock < 10 else 1.0,
    "a slow moment": lambda clock: 5.0 if 70 < clock < 90 else 1.0,
    "slow and fast in turn": lambda clock: 2.0 if clock % 20 < 10 else 0.7,
    "a sheet at each quarter": lambda clock: 20.0 if clock % 25 < 0.1 else 1.0,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_seconds_are_kept_by_few_amendments(machine: str):
    horizon = Horizon(1_000, seconds=100.0)
    seconds, levels = simulate(horizon, MACHINES[machine])
    assert 97 <= seconds <= 103
    assert len(levels) == horizon.at(len(levels))
    assert len(horizon.amendments) <= 12


def test_what_was_planned_well_is_not_amended():
    horizon = Horizon(1_000, seconds=100.0)
    assert simulate(horizon, lambda clock: 1.002)[0] == pytest.approx(100.2) and horizon.amendments == []


def test_a_machine_that_stands_still_ends_the_stage():
    """The process is stopped for longer than was left: it does not go on for as long again."""
    horizon = Horizon(1_000, seconds=100.0)
    stopped = lambda clock: 1_000.0 if 60 <= clock < 60.1 else 1.0
    seconds, levels = simulate(horizon, stopped)
    assert seconds < 165 and len(levels) < 610


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_horizon_of_few_steps_ends(steps: int):
    assert len(simulate(Horizon(steps, seconds=0.5), lambda clock: 5.0)[1]) <= steps


def test_a_horizon_without_a_clock_stands():
    horizon = Horizon(100)
    assert not any(horizon.amend(step, 5.0 * step) for step in range(1, 101))
    assert horizon.amendments == [] and horizon.at(99) == 100


@pytest.mark.parametrize("machine", [changing(50, 3.0), changing(50, 0.5), MACHINES["slow and fast in turn"]])
def test_amendments_are_replayed(machine: Machine):
    """From the list alone, as it comes from JSON, follow the same number of steps and the same rates."""
    first = Horizon(1_000, seconds=100.0, amendments=[(0, 900)])
    _, levels = simulate(first, machine)
    again = Horizon(1_000, math.inf, [(int(a), int(b)) for a, b in first.amendments])
    assert len(first.amendments) > 2
    replayed: list[float] = []
    while len(replayed) < again.at(len(replayed)):
        replayed.append(again.level(len(replayed), DECAY))
        assert not again.amend(len(replayed), 1e9)
    assert replayed == levels


# the rate


def test_the_rate_falls_over_the_last_share():
    levels = [Horizon(100).level(step, 0.4) for step in range(101)]
    assert set(levels[:61]) == {1.0}
    assert levels[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 101)])
    assert {Horizon(100).level(step, 0.0) for step in range(100)} == {1.0}


@pytest.mark.parametrize(
    ("amendments", "level"),
    [
        ([(50, 80)], {50: 1, 56: 1, 68: 0.5, 80: 0}),  # shrunk before the fall: the last three tenths, as ever
        ([(60, 70)], {60: 1, 65: 0.5, 70: 0}),  # so far that the fall should have begun: it begins now
        ([(85, 90)], {85: 0.5, 88: 0.2, 90: 0}),  # in the fall: steeper, from where it is
        ([(85, 200)], {85: 0.5, 140: 0.5, 170: 0.25, 200: 0}),  # grown in the fall: it waits, and does not rise
        ([(0, 50)], {0: 1, 35: 1, 50: 0}),
        ([(50, 80), (68, 74)], {56: 1, 68: 0.5, 71: 0.25, 74: 0}),
    ],
)
def test_the_rate_where_the_horizon_is_amended(amendments: list[tuple[int, int]], level: dict[int, float]):
    horizon = Horizon(100, amendments=amendments)
    assert [horizon.level(step, DECAY) for step in level] == pytest.approx(list(level.values()))


@pytest.mark.parametrize("factor", [3.0, 0.5])
@pytest.mark.parametrize("at", [10, 45, 75, 90, 96])
def test_the_rate_neither_jumps_nor_rises(at: float, factor: float):
    _, levels = simulate(Horizon(2_000, seconds=100.0), changing(at, factor))
    steps = [b - a for a, b in pairwise(levels)]
    assert max(steps) <= 1e-12 and min(steps) > -0.05


def test_closing_lets_the_rate_fall_at_once():
    horizon = Horizon(1_000)
    horizon.close(300, 0.4)
    assert horizon.at(300) == 500 and horizon.level(400, 0.4) == pytest.approx(0.5)
    falling = Horizon(1_000)
    falling.close(300, 1.0)  # it falls from the first step on
    assert falling.at(300) == 1_000


def test_no_amendment_goes_beyond_the_most():
    """A machine that turns out three times as fast ends early, and does not go through the items more often."""
    seconds, levels = simulate(Horizon(100, seconds=100.0, most=150), lambda clock: 1 / 3)
    assert len(levels) == 150 and seconds == pytest.approx(50)
    assert levels[-1] < 0.05
    assert simulate(Horizon(100, seconds=100.0, most=150), lambda clock: 2.0)[0] == pytest.approx(100, abs=3)
