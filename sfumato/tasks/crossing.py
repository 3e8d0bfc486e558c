"""The way from one class of a model's items to another: searched for in new items of both, and kept."""

# pyright: reportUnknownMemberType=false

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

import torch
from safetensors import SafetensorError
from torch import Tensor

from sfumato.core import (
    Bent,
    Crossing,
    Spread,
    align,
    bend,
    flow_grid,
    measure_spread,
    regenerate,
    shortest,
    step_generator,
    strength_time,
)
from sfumato.core.align import BATCH
from sfumato.core.sampler import Denoise
from sfumato.data import LatentCache, cache_root
from sfumato.data.cache import forget, key_of
from sfumato.errors import UserError
from sfumato.metrics.features import weights_hash
from sfumato.model import Model, Sampling
from sfumato.tasks.common import Progress, drawn, tell

CHUNK = 500  # new items drawn at once
NEAR = 0.4  # strength by which items that are nearly of a class are drawn towards it
DRAWS, GUIDED = 6, 1.5  # steps and guidance of that
CALLS = 0.7  # share of a budget that calls of the denoiser may take; the rest is for what is learned from them
LEAST = 0.05  # share of the full search that a budget must pay for
PASSES = 3  # of the denoiser, by which its speed is measured
VERSION = 1  # of what is searched for, and of how it is kept


@dataclass(frozen=True)
class Effort:
    """How much is searched.

    Args:
        align: Steps of the search for the map's turn; 0 takes the map that moves items least.
        rounds: How often a network learns what the map misses; 0 is never.
        samples: New items of each class that both are found from.
        seconds: What one search may take, by the measured speed of the denoiser: fewer steps and items then.
        share: Of the steps in which that network learns.
    """

    align: int
    rounds: int
    samples: int
    seconds: float | None = None
    share: float = 1.0

    @property
    def fits(self) -> int:
        """How often a network learns, there and back."""
        return max(0, 2 * self.rounds - 1)

    def within(self, model: Model, label: int) -> "Effort":
        """As much of it as there is time for.

        Raises:
            UserError: There is time for next to nothing.
        """
        if self.seconds is None:
            return self
        forward, both = _pace(model.denoise(same(label, BATCH), BATCH, model.sampling.unguided), _blank(model))
        calls = 2 * 2 * model.sampling.steps  # of both classes, each step two calls at most
        calls += self.fits * DRAWS * 2 * 2  # each of these once more without the class
        share = CALLS * self.seconds / (forward * calls * self.samples / BATCH + both * self.align)
        if share < LEAST:
            least = self.seconds / share * LEAST
            raise UserError(f"a search of {self.seconds:.0f} s is too short for this model: it needs {least:.0f} s")
        share = min(1.0, share)
        align, samples = round(share * self.align), max(2, round(share * self.samples))
        return replace(self, align=align, samples=samples, share=share)


def _pace(denoise: Denoise, z: Tensor) -> tuple[float, float]:
    """Seconds that a call of the denoiser takes for items z, and with the way back."""
    t = torch.full((len(z),), 0.5, dtype=torch.float64)
    there, both = list[float](), list[float]()
    for _ in range(PASSES + 1):
        x = z.clone().requires_grad_()
        begun = time.perf_counter()
        error = denoise(x, t).square().sum()
        there.append(time.perf_counter() - begun)
        error.backward()
        error.item()
        both.append(time.perf_counter() - begun)
    return median(there[1:]), median(both[1:])  # the first one sets things up


def _blank(model: Model) -> Tensor:
    return torch.zeros(BATCH, *model.codec.latent_shape, device=model.device)


def same(label: int, count: int) -> Tensor:
    """The class number of `count` items (count,)."""
    return torch.full((count,), label)


@dataclass
class Search:
    """Finds the way from a class to the goal from new items of both, or finds it where it was kept."""

    model: Model
    goal: int
    effort: Effort
    seed: int
    progress: Progress | None = None
    made: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __call__(self, label: int) -> Bent:
        crossing = self.crossing(label)
        bent = Bent(crossing, _blank(self.model))
        if self.effort.rounds:
            parts = "bend", label, self.effort.rounds
            bent.load_state_dict(self._kept(parts, lambda: self.bent(label, crossing).state_dict()))
        return bent.requires_grad_(False)

    def crossing(self, label: int) -> Crossing:
        """The map, without what it misses."""
        state = self._kept(("align", label), lambda: self.aligned(label).tensors)
        return Crossing.of(state)

    def _kept(self, parts: tuple[object, ...], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was found before with the same model and effort, else what is found now."""
        effort = replace(self.effort, rounds=0)
        key = key_of(VERSION, self._weights, self.model.sampling, self.goal, effort, self.seed, *parts)
        cache = LatentCache(cache_root() / "transfer", key)
        state = cache.get()
        if state is None:
            state = make()
            with suppress(OSError, SafetensorError):  # a cache that cannot be written is no error
                cache.put(state)
                forget(cache.folder)
        return state

    @cached_property
    def _weights(self) -> list[str]:
        parts = self.model.parts
        return [weights_hash(parts[name].state_dict()) for name in ("conditioner", "denoiser")]

    @cached_property
    def affordable(self) -> Effort:
        """What there is time for."""
        return self.effort.within(self.model, self.goal)

    def aligned(self, label: int) -> Crossing:
        """The map, searched for."""
        model, z, steps = self.model, self.new(label), self.affordable.align
        crossing = shortest(measure_spread(z), self.target)
        if not steps:
            return crossing
        return align(
            model.denoise(same(self.goal, BATCH), BATCH, model.sampling.unguided),
            model.denoiser.schedule,
            crossing,
            z,
            steps,
            step_generator(self.seed, "align", label),
            lambda done: tell(self.progress, "align", done, steps),
        )

    def bent(self, label: int, crossing: Crossing) -> Bent:
        """The map with what it misses, learned."""
        return bend(
            crossing,
            self.new(label),
            self.new(self.goal),
            self.toward(label),
            self.toward(self.goal),
            self.effort.rounds,
            self.seed,
            lambda done: tell(self.progress, "bend", done, self.effort.fits),
            self.affordable.share,
        )

    def toward(self, label: int) -> Callable[[Tensor], Tensor]:
        """What draws latents (N, ...) that are nearly of a class towards it: noise is added and taken away again."""
        model, schedule = self.model, self.model.denoiser.schedule
        start = strength_time(schedule, NEAR)
        alpha, sigma = (float(value) for value in schedule(start))
        generator, guided = step_generator(self.seed, "bend", label), replace(model.sampling.unguided, guidance=GUIDED)

        def draw(z: Tensor) -> Tensor:
            parts = list[Tensor]()
            for begin in range(0, len(z), CHUNK):
                part = z[begin : begin + CHUNK]
                noised = alpha * part + sigma * torch.randn(part.shape, generator=generator).to(part)
                under = model.denoise(same(label, len(part)), len(part), guided)
                parts.append(regenerate(under, schedule, noised, flow_grid(schedule, DRAWS, start)))
            return torch.cat(parts)

        return draw

    @cached_property
    def target(self) -> Spread:
        """How new items of the goal lie."""
        return measure_spread(self.new(self.goal))

    def new(self, label: int) -> Tensor:
        """Latents of new items of a class (N, ...), without guidance, which moves their mean and narrows them."""
        if label not in self.made:
            self.made[label] = self.draw(label, self.affordable.samples, self.model.sampling.unguided)
        return self.made[label]

    def draw(self, label: int, count: int, how: Sampling) -> Tensor:
        """Latents of so many new items of a class."""
        parts = list[Tensor]()
        for z in drawn(self.model, range(count), same(label, count), how, self.seed, CHUNK):
            parts.append(z)
            tell(self.progress, "samples", sum(map(len, parts)), count)
        return torch.cat(parts)
