"""Step budget of a stage: its planned number of steps, amended by the clock."""

import math
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise

CHECK_RATIO = 0.75  # share of the stage left at one check of the clock, relative to that at the previous check
TOLERANCE = 0.01  # deviation of the projected end, as a share of the budget, up to which the steps are kept
STALE_SECONDS = 30.0  # seconds after the start of the process from which its start no longer counts for a run
PROCESS_START = time.monotonic()  # seconds; the budget starts here, so it includes the imports that follow

_started_runs: list[bool] = []


@dataclass
class StepBudget:
    r"""The number of steps of a stage, amended so that the stage ends when its seconds do.

    The clock is checked when a quarter of the stage is over, then whenever a quarter of the remainder is over (of
    seconds or of steps, whichever is less), and when the seconds are over. With T seconds, of which t are over at step
    n, the projection takes the mean step duration τ over the last 2 (T - t) seconds: the nearer the end, the more
    recent the estimate, but one slow moment never counts for everything that follows. If the projected end misses T by
    more than `TOLERANCE` T, the number of steps becomes n + (T - t) / τ. The checks form a geometric series, so there
    are few of them.

    Args:
        steps: Planned number of steps.
        seconds: Wall-clock seconds of the stage; infinite if the user fixed the steps, and in a resumed session. Only
            a finite budget is amended.
        amendments: (step of the decision, new number of steps), replayed on resume.
        max_steps: Upper bound of amended numbers of steps.
    """

    steps: int
    seconds: float = math.inf
    amendments: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    max_steps: float = math.inf
    _clock: list[float] = field(default_factory=lambda: [0.0], init=False, repr=False)  # seconds after each step
    _next: float = field(default=CHECK_RATIO, init=False, repr=False)  # share left at the next check

    def steps_at(self, step: int) -> int:
        """The number of steps in force when `step` begins."""
        return next((total for start, total in reversed(self.amendments) if step >= start), self.steps)

    def min_steps(self, step: int) -> int:
        """The smallest number of steps in force up to `step`; a loss term that starts at a share of it never stops."""
        return min([self.steps, *(total for start, total in self.amendments if step >= start)])

    def update(self, step: int, elapsed: float) -> bool:
        """Check the clock after each step and amend the number of steps if needed.

        Args:
            step: Steps done.
            elapsed: Seconds that they took.

        Returns:
            Whether the number of steps was amended.
        """
        if math.isinf(self.seconds):
            return False
        self._clock.append(elapsed)
        left = self._share_left(step, elapsed)
        if left > self._next:
            return False
        projected, step_seconds = self._project(step, elapsed)
        end = elapsed + (self.steps_at(step) - step) * step_seconds
        amend = projected != self.steps_at(step) and abs(end - self.seconds) > TOLERANCE * self.seconds
        if amend:
            self.amendments.append((step, projected))
            left = self._share_left(step, elapsed)
        self._next = CHECK_RATIO * left if left > TOLERANCE / 2 else 0.0
        return amend

    def start_decay(self, step: int, decay: float) -> None:
        """Start the learning-rate decay now and end after it; the clock adds no more steps.

        Args:
            step: Steps done.
            decay: Share of all steps over which the rate decays; with 1, it decays already and nothing changes.
        """
        if decay >= 1:
            return
        total = math.ceil(step / (1 - decay))
        if total < self.steps_at(step):
            self.amendments.append((step, total))
            self.max_steps = total

    def _share_left(self, step: int, elapsed: float) -> float:
        """Share of the stage that is left, in seconds or in steps, whichever is less."""
        return max(0.0, min(1 - elapsed / self.seconds, 1 - step / self.steps_at(step)))

    def _project(self, step: int, elapsed: float) -> tuple[int, float]:
        """The number of steps that fit into the seconds, and the seconds per step."""
        left = max(0.0, self.seconds - elapsed)
        since = min(bisect_left(self._clock, elapsed - 2 * left), len(self._clock) - 2)
        step_seconds = max((elapsed - self._clock[since]) / (len(self._clock) - 1 - since), 1e-9)
        return int(min(step + round(left / step_seconds), max(self.max_steps, step))), step_seconds

    def lr_factor(self, step: int, decay: float) -> float:
        """Learning rate at `step` relative to its peak: 1, then linear decay to 0 over the last `decay` of the steps.

        An amendment makes the rate neither jump nor rise: from its current value it decays to 0 at the new end,
        starting where the last `decay` of the new number of steps starts, or at once if that is past.
        """
        factor = 1.0
        starts = [(0, self.steps), *((start, total) for start, total in self.amendments if start < step)]
        for (start, total), (end, _) in pairwise([*starts, (step, 0)]):
            knee = max(start, (1 - decay) * total)
            if end > knee:
                factor *= (total - end) / (total - knee)
        return factor


def start_clock() -> float:
    """Start of a run's budget (`time.monotonic`): now, or the start of the process for its first run.

    The first run is charged with the imports, unless the process has been running for a while.
    """
    fresh = time.monotonic() - PROCESS_START < STALE_SECONDS and not _started_runs
    _started_runs.append(True)
    return PROCESS_START if fresh else time.monotonic()
