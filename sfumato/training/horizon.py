"""How many steps a stage has: as planned, and as the clock amends it."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise

NEARER = 0.75  # of what was left at one look at the clock is left at the next
DEVIATION = 0.01  # of the seconds by which the end may be missed before the steps are amended


@dataclass
class Horizon:
    r"""The number of steps, so that a stage ends when its seconds do.

    The clock is looked at when a quarter of the stage is over, then whenever a quarter of what was left is over (of
    seconds or of steps, whichever are fewer), and when the seconds are over. With T seconds, of which t are over at
    step n, steps are taken to last as they did over the last 2 (T - t) seconds, τ each: the nearer the end, the
    fresher the estimate, and yet no moment that was slow is taken for all that follows. Where the end would be missed
    by more than `DEVIATION` T, the number becomes n + (T - t) / τ. Looks are geometric, so there are few of them.

    Args:
        steps: As planned.
        seconds: Wall clock the stage may take; infinite where steps were asked for, and in a session that did not
            make the plan. Only with a finite one is the horizon amended.
        amendments: (step at which it was decided, new number of steps), replayed on resume.
        most: Steps that no amendment goes beyond.
    """

    steps: int
    seconds: float = math.inf
    amendments: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    most: float = math.inf
    _clock: list[float] = field(default_factory=lambda: [0.0], init=False, repr=False)  # seconds after each step
    _next: float = field(default=NEARER, init=False, repr=False)  # share of the stage left at which to look again

    def at(self, step: int) -> int:
        """The number of steps as known when `step` begins."""
        return next((total for start, total in reversed(self.amendments) if step >= start), self.steps)

    def fewest(self, step: int) -> int:
        """The smallest number of steps that there was to be until `step`: what begins at a share of it never stops."""
        return min([self.steps, *(total for start, total in self.amendments if step >= start)])

    def amend(self, step: int, elapsed: float) -> bool:
        """After `step` steps, which took `elapsed` seconds: correct the horizon; tells whether it did.

        To be called after each step.
        """
        if math.isinf(self.seconds):
            return False
        self._clock.append(elapsed)
        left = self._left(step, elapsed)
        if left > self._next:
            return False
        amended, pace = self._projected(step, elapsed)
        ends = elapsed + (self.at(step) - step) * pace
        missed = amended != self.at(step) and abs(ends - self.seconds) > DEVIATION * self.seconds
        if missed:
            self.amendments.append((step, amended))
            left = self._left(step, elapsed)
        self._next = NEARER * left if left > DEVIATION / 2 else 0.0
        return missed

    def close(self, step: int, decay: float) -> None:
        """Let the rate begin to decay now, so that `decay` is its share of all steps; the clock adds no more.

        A rate that decays from the first step on (1) is left to.
        """
        if decay >= 1:
            return
        total = math.ceil(step / (1 - decay))
        if total < self.at(step):
            self.amendments.append((step, total))
            self.most = total

    def _left(self, step: int, elapsed: float) -> float:
        """Share of the stage that is left, by the clock or by the steps."""
        return max(0.0, min(1 - elapsed / self.seconds, 1 - step / self.at(step)))

    def _projected(self, step: int, elapsed: float) -> tuple[int, float]:
        """The number of steps by which the seconds are over, and the seconds that a step takes."""
        left = max(0.0, self.seconds - elapsed)
        since = min(bisect_left(self._clock, elapsed - 2 * left), len(self._clock) - 2)
        pace = max((elapsed - self._clock[since]) / (len(self._clock) - 1 - since), 1e-9)
        return int(min(step + round(left / pace), max(self.most, step))), pace

    def level(self, step: int, decay: float) -> float:
        """The learning rate at `step` relative to its peak: 1, and linearly to 0 over the last share of the steps.

        Where the horizon is amended the rate neither jumps nor rises: from what it is, it goes to 0 at the new end,
        from where the last `decay` of the new number of steps begin, or at once if they have begun.
        """
        level = 1.0
        starts = [(0, self.steps), *((start, total) for start, total in self.amendments if start < step)]
        for (start, total), (end, _) in pairwise([*starts, (step, 0)]):
            knee = max(start, (1 - decay) * total)
            if end > knee:
                level *= (total - end) / (total - knee)
        return level
