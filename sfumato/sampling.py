"""Sampling settings: sampler, steps, guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    from sfumato.core.sampler import SAMPLERS
    from sfumato.errors import UserError
    from sfumato.registry import choose

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
