"""How new items are sampled: sampler, steps and guidance, and their conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from sfumato.conditioners import Conditioner, ConditionValue, constant_conditions
from sfumato.core import SAMPLERS, item_generator
from sfumato.errors import UserError
from sfumato.registry import choose
from sfumato.types import Raw

JUMP = "jump"  # multistep consistency sampling; few-step models only


@dataclass
class Sampling:
    """Settings of a sampling run.

    Args:
        sampler: A name of `SAMPLERS`, or `JUMP` for few-step models.
        steps: Sampling steps.
        guidance: Classifier-free guidance weight; 1 disables it.
        grid: Spacing of the time grid.
        interval: Times (lo, hi) between which guidance is applied; None for all times.
        autoguidance: Weight of autoguidance by the model's guide; 1 disables it.
        precision: `fp32` or `bf16`, of the networks including the decoder; the sampler's state is always float32.
    """

    sampler: str = "heun"
    steps: int = 15
    guidance: float = 1.0
    grid: str = "uniform"
    interval: Sequence[float] | None = None
    autoguidance: float = 1.0
    precision: str = "fp32"

    @property
    def unguided(self) -> "Sampling":
        """The same settings without any guidance, so that the denoiser gives the model's E[z | z_t]."""
        return replace(self, guidance=1.0, autoguidance=1.0)


def choose_sampling(
    defaults: Sampling,
    distilled: Mapping[str, Any] | None,
    has_guide: bool,
    *,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    autoguidance: float | None,
) -> Sampling:
    """A model's sampling defaults, overridden by the arguments that are not None, validated.

    For a few-step model, `steps` counts jumps; other samplers default to the steps and grid of the teacher.

    Args:
        defaults: The model's sampling defaults.
        distilled: The teacher's sampling of a few-step model; None for other models.
        has_guide: Whether the model has a guide for autoguidance.
        steps: Sampling steps.
        guidance: Classifier-free guidance weight.
        sampler: A name of `SAMPLERS`, or `JUMP`.
        autoguidance: Autoguidance weight.

    Raises:
        UserError: The model does not support one of these settings.
    """
    grid = None
    if sampler == JUMP and distilled is None:
        raise UserError(f"--sampler {JUMP} needs a few-step model; make one with: sfumato distill MODEL --out RUN")
    if sampler not in (None, JUMP):
        choose(SAMPLERS, "sampler", sampler)
        steps = steps if distilled is None else steps or distilled["steps"]
        grid = None if distilled is None else distilled["grid"]
    if distilled is not None and guidance not in (None, 1):
        built_in = f"the weight {distilled['guidance']} is built into this few-step model"
        raise UserError(f"--guidance {guidance}: {built_in}; use its teacher, or distill with another --guidance")
    if distilled is not None and autoguidance not in (None, 1):
        raise UserError(f"--autoguidance {autoguidance:g}: the teacher's weight is built into this few-step model")
    if not has_guide and autoguidance not in (None, 1):
        remedy = "train one with --set sample.autoguidance=2"
        raise UserError(f"--autoguidance {autoguidance:g}: this model was trained without a guide; {remedy}")
    overrides = {"steps": steps, "guidance": guidance, "sampler": sampler, "autoguidance": autoguidance, "grid": grid}
    return replace(defaults, **{key: value for key, value in overrides.items() if value is not None})


def balanced_labels(classes: int, items: Sequence[int], seed: int) -> Tensor:
    """Class numbers (B,): every class once per round, in random order.

    An item's class depends on the seed and its number alone.
    """
    rounds = {
        k: torch.randperm(classes, generator=item_generator(seed, k, "label"))
        for k in {item // classes for item in items}
    }
    return torch.tensor([int(rounds[item // classes][item % classes]) for item in items])


def new_conditions(
    conditioner: Conditioner, items: Sequence[int], seed: int, values: Mapping[str, ConditionValue] | None = None
) -> Raw:
    """The conditions of new items: the requested ones, and for the others those of similar training items.

    If none is requested, the classes of the primary label are balanced. Texts that are not requested are unknown.

    Args:
        conditioner: The model's conditioner.
        items: Item numbers (B,), on which the random choices depend.
        seed: Seed of these choices.
        values: The requested values, the same for all items.
    """
    raw = constant_conditions(conditioner, values or {}, len(items))
    if not values and conditioner.primary_label is not None:
        raw = raw.with_value(conditioner.primary_label, balanced_labels(conditioner.classes, items, seed))
    return complete_conditions(conditioner, raw, items, seed)


def preview_conditions(conditioner: Conditioner, items: Sequence[int], seed: int) -> Raw:
    """The conditions of items in a picture: classes of the primary label in their order, others as in training."""
    name = conditioner.primary_label
    raw = Raw() if name is None else Raw({name: torch.arange(len(items)) % conditioner.classes})
    return complete_conditions(conditioner, raw, items, seed)


def complete_conditions(conditioner: Conditioner, known: Raw, items: Sequence[int], seed: int) -> Raw:
    """The known conditions of items (B,) and, for the others, those of training items with the same labels."""
    if conditioner.observed is None:
        return known
    draws = [float(torch.rand((), generator=item_generator(seed, item, "conditions"))) for item in items]
    return conditioner.observed.complete(known, torch.tensor(draws))


def random_conditions(conditioner: Conditioner, count: int, generator: Generator) -> Raw:
    """Random conditions of `count` items; as in training, some are dropped."""
    raw = Raw()
    if conditioner.primary_label is not None:
        raw = Raw({conditioner.primary_label: torch.randint(conditioner.classes, (count,), generator=generator)})
    if conditioner.observed is not None:
        raw = conditioner.observed.complete(raw, torch.rand(count, generator=generator))
    return raw.drop(conditioner.draw_dropout(count, generator))
