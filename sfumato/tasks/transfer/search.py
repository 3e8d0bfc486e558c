"""Search for the map from one class to another, on generated items of both; results are cached."""

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

from sfumato.conditioners import constant_conditions
from sfumato.core import Denoise, NoiseLevel, integrate_to_data, inversion_grid, step_generator, strength_time
from sfumato.data import TensorCache, cache_root
from sfumato.data.cache import expire, key_of
from sfumato.errors import UserError
from sfumato.metrics.features import weights_hash
from sfumato.model import Model
from sfumato.sampling import Sampling, complete_conditions
from sfumato.tasks.inputs import report_progress, sample_latents
from sfumato.tasks.transfer.gaussian_map import (
    ROTATION_BATCH,
    Gaussian,
    GaussianMap,
    fit_gaussian,
    optimal_transport,
    search_rotation,
)
from sfumato.tasks.transfer.residual import ResidualMap, fit_residual
from sfumato.types import Progress, Raw

LATENT_BATCH = 500  # latents that are generated or refined at a time
REFINE_STRENGTH = 0.4  # strength at which mapped items are noised and denoised
REFINE_STEPS, REFINE_GUIDANCE = 6, 1.5  # solver steps and guidance weight of that
DENOISER_SHARE = 0.7  # share of a budget for evaluations of the denoiser; the rest trains the residual
MIN_SEARCH_SHARE = 0.05  # minimum share of the full search that a budget must allow
TIMED_EVALUATIONS = 3  # evaluations of the denoiser that measure its speed
CACHE_VERSION = 1  # version of the search and of its file format


@dataclass(frozen=True)
class SearchBudget:
    """The size of the search.

    Args:
        align: Optimizer steps of the rotation; 0 uses optimal transport.
        rounds: Fits of the residual from source to target; 0 disables it.
        samples: Generated items per class.
        seconds: Time limit per source class; steps and samples are reduced to fit the measured speed.
        share: Share of the optimizer steps in each fit of the residual.
    """

    align: int
    rounds: int
    samples: int
    seconds: float | None = None
    share: float = 1.0

    @property
    def residual_fits(self) -> int:
        """Number of fits of the residual, in both directions."""
        return max(0, 2 * self.rounds - 1)

    def limited_to_time(self, model: Model, raw: Raw) -> "SearchBudget":
        """The budget reduced to its time limit.

        Args:
            model: The model.
            raw: The conditions of `ROTATION_BATCH` items, for which the denoiser's speed is measured.

        Raises:
            UserError: The time limit is too short.
        """
        if self.seconds is None:
            return self
        level = model.denoiser.schedule(torch.full((ROTATION_BATCH,), 0.5))
        denoise = model.denoise(raw, ROTATION_BATCH, model.sampling.unguided)
        forward, both = _denoiser_seconds(denoise, _blank(model), level)
        calls = 2 * 2 * model.sampling.steps  # two classes, at most two evaluations per step
        calls += self.residual_fits * REFINE_STEPS * 2 * 2  # two evaluations per step, each with and without the class
        share = DENOISER_SHARE * self.seconds / (forward * calls * self.samples / ROTATION_BATCH + both * self.align)
        if share < MIN_SEARCH_SHARE:
            minimum = self.seconds / share * MIN_SEARCH_SHARE
            raise UserError(f"a search of {self.seconds:.0f} s is too short for this model; it needs {minimum:.0f} s")
        share = min(1.0, share)
        align, samples = round(share * self.align), max(2, round(share * self.samples))
        return replace(self, align=align, samples=samples, share=share)


def _denoiser_seconds(denoise: Denoise, z: Tensor, level: NoiseLevel) -> tuple[float, float]:
    """Median seconds of the denoiser for latents z: the forward pass alone, and with the backward pass."""
    forward, both = list[float](), list[float]()
    for _ in range(TIMED_EVALUATIONS + 1):
        x = z.clone().requires_grad_()
        start = time.perf_counter()
        error = denoise(x, level).square().sum()
        forward.append(time.perf_counter() - start)
        error.backward()
        error.item()
        both.append(time.perf_counter() - start)
    return median(forward[1:]), median(both[1:])  # the first evaluation is a warm-up


def _blank(model: Model) -> Tensor:
    """Latents of zeros (ROTATION_BATCH, ...)."""
    return torch.zeros(ROTATION_BATCH, *model.codec.latent_shape, device=model.device)


@dataclass
class Search:
    """Finds the map from a class to the target class, or takes it from the cache.

    The classes are those of one label condition. In the search other conditions are null, so that the map is that of
    whole classes; generated items have those of training items.

    Args:
        model: The model.
        name: Name of the label condition.
        target: Class number of the target.
        budget: Size of the search.
        seed: Seed of generated items and of the search.
        progress: Called with the stage, the amount done, and the total.
        latents: Generated latents by class.
    """

    model: Model
    name: str
    target: int
    budget: SearchBudget
    seed: int
    progress: Progress | None = None
    latents: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __call__(self, label: int) -> ResidualMap:
        gaussian_map = self.gaussian_map(label)
        residual_map = ResidualMap(gaussian_map, _blank(self.model))
        if self.budget.rounds:
            key = "bend", label, self.budget.rounds
            residual_map.load_state_dict(
                self._cached(key, lambda: self.fit_residual_map(label, gaussian_map).state_dict())
            )
        return residual_map.requires_grad_(False)

    def gaussian_map(self, label: int) -> GaussianMap:
        """The Gaussian map from a class, without the residual."""
        state = self._cached(("align", label), lambda: self.align(label).tensors)
        return GaussianMap.from_tensors(state)

    def _cached(self, key: tuple[object, ...], search: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The cached result for the same model and budget, else that of `search`."""
        budget = replace(self.budget, rounds=0)
        address = self.name, self.target, budget, self.seed, *key
        cache_key = key_of(CACHE_VERSION, self._weights, self.model.sampling, *address)
        cache = TensorCache(cache_root() / "transfer", cache_key)
        state = cache.get()
        if state is None:
            state = search()
            with suppress(OSError, SafetensorError):  # an unwritable cache is no error
                cache.put(state)
                expire(cache.folder)
        return state

    @cached_property
    def _weights(self) -> list[str]:
        """Hashes of the weights that the result depends on."""
        parts = self.model.parts
        return [weights_hash(parts[name].state_dict()) for name in ("conditioner", "denoiser")]

    @cached_property
    def affordable(self) -> SearchBudget:
        """The budget reduced to its time limit."""
        return self.budget.limited_to_time(self.model, self.of_class(self.target, ROTATION_BATCH))

    def align(self, label: int) -> GaussianMap:
        """Search for the Gaussian map from a class."""
        model, z, steps = self.model, self.class_latents(label), self.affordable.align
        start = optimal_transport(fit_gaussian(z), self.target_moments)
        if not steps:
            return start
        return search_rotation(
            model.denoise(self.of_class(self.target, ROTATION_BATCH), ROTATION_BATCH, model.sampling.unguided),
            model.denoiser.schedule,
            start,
            z,
            steps,
            step_generator(self.seed, "align", label),
            lambda done: report_progress(self.progress, "align", done, steps),
        )

    def fit_residual_map(self, label: int, gaussian_map: GaussianMap) -> ResidualMap:
        """Train the residual of the map from a class."""
        return fit_residual(
            gaussian_map,
            self.class_latents(label),
            self.class_latents(self.target),
            self.refine_toward(label),
            self.refine_toward(self.target),
            self.budget.rounds,
            self.seed,
            lambda done: report_progress(self.progress, "residual", done, self.budget.residual_fits),
            self.affordable.share,
        )

    def refine_toward(self, label: int) -> Callable[[Tensor], Tensor]:
        """A function that moves latents (N, ...) toward a class by adding noise and denoising."""
        model, schedule = self.model, self.model.denoiser.schedule
        levels = schedule.levels(inversion_grid(schedule, REFINE_STEPS, strength_time(schedule, REFINE_STRENGTH)))
        generator = step_generator(self.seed, "bend", label)
        sampling = replace(model.sampling.unguided, guidance=REFINE_GUIDANCE)

        def refine(z: Tensor) -> Tensor:
            parts = list[Tensor]()
            for first in range(0, len(z), LATENT_BATCH):
                part = z[first : first + LATENT_BATCH]
                z_t = levels[0].add_noise(part, torch.randn(part.shape, generator=generator).to(part))
                denoise = model.denoise(self.of_class(label, len(part)), len(part), sampling)
                parts.append(integrate_to_data(denoise, levels, z_t))
            return torch.cat(parts)

        return refine

    @cached_property
    def target_moments(self) -> Gaussian:
        """Moments of the target class."""
        return fit_gaussian(self.class_latents(self.target))

    def class_latents(self, label: int) -> Tensor:
        """Generated latents of a class (N, ...), without guidance, which would shift their mean and narrow them."""
        if label not in self.latents:
            raw = self.new_items(label, self.affordable.samples)
            self.latents[label] = self.sample(raw, self.affordable.samples, self.model.sampling.unguided)
        return self.latents[label]

    def of_class(self, label: int, count: int) -> Raw:
        """The conditions of `count` items of which only the class is known."""
        return constant_conditions(self.model.conditioner, {self.name: label}, count)

    def new_items(self, label: int, count: int) -> Raw:
        """The conditions of `count` new items of a class."""
        return complete_conditions(self.model.conditioner, self.of_class(label, count), range(count), self.seed)

    def sample(self, raw: Raw, count: int, sampling: Sampling) -> Tensor:
        """Generate `count` latents with these conditions."""
        parts = list[Tensor]()
        for latent in sample_latents(self.model, range(count), raw, sampling, self.seed, LATENT_BATCH):
            parts.append(latent.z)
            report_progress(self.progress, "samples", sum(map(len, parts)), count)
        return torch.cat(parts)
