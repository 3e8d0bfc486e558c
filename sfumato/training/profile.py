"""Profiling: measure the machine and a few real steps, and complete the plan of a run."""

import math
import platform
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from sfumato import __version__
from sfumato.config import Settings, StageSettings
from sfumato.errors import UserError
from sfumato.hardware import measure_peak
from sfumato.modalities.base import FeatureNetwork, PlanContext
from sfumato.model import Model
from sfumato.training.batches import DataBatches, StoredLatents
from sfumato.training.budget import StepBudget
from sfumato.training.build import (
    codec_step,
    denoiser_batches,
    denoiser_step,
    feature_learner,
    needs_features,
    new_model,
    train_feature_network,
    training_conditions,
    untrained_features,
    uses_features,
    uses_pseudo_labels,
)
from sfumato.training.plan import (
    FEATURE_SHARE,
    MAX_FEATURE_STEPS,
    MAX_PSEUDO_LABEL_STEPS,
    PSEUDO_LABEL_SHARE,
    WARMUP_STEPS,
    make_plan,
    max_steps,
    merge,
    meta_codec,
)
from sfumato.training.run import Run
from sfumato.training.steps import TrainStep
from sfumato.training.trainer import BatchSource, Trainer
from sfumato.types import Batch, Raw

LAST_STEP = 999_999  # last of a nominal million steps, when every loss term has started
ENCODING_SHARE = 0.15  # share of the budget for encoding; more items than fit into it are subsampled
MIN_ENCODED = 5_000  # items that are encoded even if they take longer
TRIAL_SECONDS = 0.1  # minimum duration of the measured steps of one candidate size
MEASURED_LATENTS = 4_096  # latents that training steps are measured on
COST_SAMPLE, COST_STEPS = 2_000, 12  # items and steps that the cost of pseudo-labels is measured on
NOMINAL_SECONDS = 600.0  # training time that sizes are planned for if steps are given


class StepCost(NamedTuple):
    """Seconds and floating-point operations of one step."""

    seconds: float
    flops: float


def step_flops(trainer: Trainer, batch: Batch) -> float:
    """Floating-point operations of a training step, which is taken."""
    with FlopCounterMode(display=False) as counter:
        trainer.advance(batch)
    return float(counter.get_total_flops())


def measure_step(
    step: TrainStep,
    settings: StageSettings,
    batches: BatchSource,
    *,
    stage: str,
    first: int = 0,
    seconds: float = 0.4,
    min_steps: int = 4,
    **options: Any,
) -> StepCost:
    """Cost of a training step: the median over a few steps from `first` on, after two warm-up steps.

    A few per cent of error are harmless: the clock amends the number of steps during the stage.

    Args:
        step: Training step; its weights change.
        settings: Settings of the stage.
        batches: Training batches.
        stage: Name of the stage.
        first: Number of the first step, which decides the active loss terms.
        seconds: Minimum duration of the measured steps.
        min_steps: Minimum number of measured steps.
        options: Further arguments of the trainer.
    """
    trainer = Trainer(step, settings, StepBudget(10**9), stage=stage, **options)
    trainer.done = first
    trainer.unwrapped.train()
    flops = step_flops(trainer, batches.batch(first))
    trainer.advance(batches.batch(first + 1))
    times: list[float] = []
    while len(times) < min_steps or sum(times) < seconds:
        start = time.perf_counter()
        trainer.advance(batches.batch(trainer.done))
        times.append(time.perf_counter() - start)
    return StepCost(sorted(times)[len(times) // 2], flops)


class FeatureCost(NamedTuple):
    """Cost of training the feature network, and of pseudo-labels if there are any.

    Args:
        step_seconds: Seconds per training step.
        item_seconds: Seconds per item for computing its features, for pseudo-labels.
        comparison_seconds: Seconds for comparing all items with each other, for pseudo-labels.
        labelled: Number of labelled items.
        unlabelled: Number of unlabelled items that are used, at most.
        unlabelled_seen: Steps -> number of unlabelled items that training sees.
    """

    step_seconds: float
    item_seconds: float = 0.0
    comparison_seconds: float = 0.0
    labelled: int = 0
    unlabelled: int = 0
    unlabelled_seen: Callable[[int], int] = lambda steps: 0

    def seconds(self, steps: int) -> float:
        """Seconds of a training of `steps` steps; the fewer steps, the fewer unlabelled items are used."""
        items = self.labelled + min(self.unlabelled, self.unlabelled_seen(steps))
        share = items / max(1, self.labelled + self.unlabelled)
        return steps * self.step_seconds + items * self.item_seconds + share**2 * self.comparison_seconds


def complete_plan(run: Run, steps: int | None, size: str | None) -> None:
    """Decide every setting, in the run and in its record; from here on the run is deterministic.

    Args:
        run: The run; its settings are completed.
        steps: Optimizer steps of both stages, or None to use the budget.
        size: Size preset of the denoiser, or None.

    Raises:
        UserError: The settings cannot be trained with, or the budget is too small.
    """
    run.log.show("plan", 0, 1)
    peak = measure_peak(run.precision, run.device)
    context = PlanContext(run.train.shape, run.train.spec, len(run.train), run.classes, run.precision)
    budget, train = run.settings.budget_seconds, run.settings.train
    left = NOMINAL_SECONDS if steps is not None or budget is None else budget - (time.monotonic() - run.started)
    if steps is not None or train.denoiser.steps is not None:  # a fixed number of steps is not cut short by default
        train.early_stopping = bool(train.early_stopping)
    costs: dict[str, StepCost] = {}
    throughput = measured_throughput(run, context, left, costs) if steps is None else None
    run.settings = make_plan(run.modality, run.settings, replace(context, throughput=throughput), left, size)
    share = run.modality.codec_share if meta_codec(run.modality, run.settings, context).trainable else 0.0
    run.record.update(
        {
            "source": run.source,
            "sfumato": __version__,
            "asked": {"steps": steps, "size": size},
            "seed": run.settings.seed,
            "device": run.device,
            "peak": peak,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "data": {
                "fingerprint": run.train.fingerprint,
                "items": len(run.train),
                "held_out": len(run.held_out),
                "shape": list(run.train.shape),
                "spec": run.train.spec,
                "classes": run.classes,
                **({"notes": run.train.notes} if run.train.notes else {}),
            },
        }
    )
    if steps is not None:
        split_steps(run, steps, share)
        dry_run(run)
    else:
        assert budget is not None
        split_time(run, budget, share, costs)
    for stage in (run.settings.train.codec, run.settings.train.denoiser):
        stage.warmup = min(WARMUP_STEPS, (stage.steps or 0) // 10) if stage.warmup is None else stage.warmup
    run.accelerator.free_memory()  # it holds the measured copies
    run.record["plan"] = run.settings.model_dump()
    run.log.show("plan", 1, 1)
    encoded = run.settings.train.max_encoded or 0
    if encoded < len(run.train):
        note = (
            f"the denoiser is trained on {encoded:,} of {len(run.train):,} items: the budget does not suffice for more"
        )
        run.log.warn([f"{run.source}: {note}"])


def split_steps(run: Run, steps: int, share: float) -> None:
    """Split a number of steps between the stages: `share` to the codec, the rest to the denoiser."""
    codec, denoiser = run.settings.train.codec, run.settings.train.denoiser
    if share:
        first = min(steps - 1, max(1, round(steps * share)))
        if denoiser.steps is not None:
            first = max(1, steps - denoiser.steps)
        codec.steps = codec.steps or first
    denoiser.steps = denoiser.steps or max(1, steps - (codec.steps or 0))
    if run.settings.codec.feature_steps is None:
        run.settings.codec.feature_steps = min(MAX_FEATURE_STEPS, steps)
    run.settings.train.max_encoded = run.settings.train.max_encoded or len(run.train)


def dry_run(run: Run) -> None:
    """Take one step of a copy of each stage, so that a plan that cannot be trained fails here; counts operations."""
    with torch.random.fork_rng(devices=[]):
        network = untrained_features(run) if needs_features(run) else None
        for stage, (step, settings, batches) in stage_copies(run, network).items():
            options: dict[str, Any] = {"stage": stage, "seed": run.settings.seed, "accelerator": run.accelerator}
            trainer = Trainer(step, settings, StepBudget(LAST_STEP + 1), **options)
            trainer.done = LAST_STEP
            flops = step_flops(trainer, batches.batch(0))
            run.record.setdefault("measured", {})[stage] = {"flops": flops}


def split_time(run: Run, budget: float, share: float, costs: dict[str, StepCost]) -> None:
    """Split the budget between the stages, `share` to the codec, and convert seconds to steps by measured costs.

    Args:
        run: The run; its numbers of steps are set.
        budget: Seconds of the whole run.
        share: Share of the training time for the codec.
        costs: Costs measured so far.

    Raises:
        UserError: The budget leaves too little time for training, or less than the user's settings take.
    """
    settings, codec = run.settings, run.settings.train.codec
    features, speeds = measure_stages(run, costs)
    codec_cost = speeds.get("codec", StepCost(0.0, 0.0))
    if settings.codec.feature_steps is None:
        settings.codec.feature_steps = affordable_feature_steps(run, features, budget)
    fixed = features.seconds(settings.codec.feature_steps)
    encoding = codec_cost.seconds / 5 / (codec.batch or 1)  # seconds per item: no backward pass and no decoder
    if settings.train.max_encoded is None:
        affordable = int(ENCODING_SHARE * budget / max(encoding, 1e-12))
        settings.train.max_encoded = min(len(run.train), max(MIN_ENCODED, affordable))
    fixed += settings.train.max_encoded * encoding
    stages = {"codec": codec, "denoiser": settings.train.denoiser}
    stages = {name: stage for name, stage in stages.items() if name in speeds}
    fixed += sum((stage.steps or 0) * speeds[name].seconds for name, stage in stages.items())
    shares = {"codec": share, "denoiser": 1 - share}
    shares = {name: shares[name] for name, stage in stages.items() if stage.steps is None}
    run.record["seconds"] = {}
    left, total = run.seconds_left() - fixed, sum(shares.values())
    if left < 0.25 * total * budget:
        need = (budget - left) / (1 - 0.3 * total)
        raise UserError(f"--budget {budget:g}s is too small for these data on this machine; give at least {need:.0f}s")
    for name, part in shares.items():  # steps that the user fixed are not amended by the clock
        seconds, limit = part / total * left, max_steps(stages[name], len(run.train))
        stages[name].steps = int(min(max(1, seconds / speeds[name].seconds), limit))
        run.record["seconds"][name] = seconds
    run.record["measured"] = {name: speed._asdict() for name, speed in speeds.items()}


def affordable_feature_steps(run: Run, features: FeatureCost, budget: float) -> int:
    """Training steps of the feature network that fit into its share of the budget."""
    share, limit = FEATURE_SHARE, MAX_FEATURE_STEPS
    if uses_pseudo_labels(run):
        share, limit = PSEUDO_LABEL_SHARE, MAX_PSEUDO_LABEL_STEPS
    return max(20, bisect_right(range(limit + 1), share * budget, key=features.seconds) - 1)


def stage_copies(run: Run, network: FeatureNetwork | None) -> dict[str, tuple[TrainStep, StageSettings, BatchSource]]:
    """Step, settings and batches of each stage, on a copy of the model to measure and discard."""
    settings, train = run.settings, run.settings.train
    model = new_model(run)
    latents, raw = random_latents(run, model)
    copies: dict[str, tuple[TrainStep, StageSettings, BatchSource]] = {}
    if model.codec.trainable:
        step = codec_step(model, settings, network, StepBudget(LAST_STEP + 1)).to(run.device)
        copies["codec"] = (step, train.codec, DataBatches(run.train, train.codec, settings.seed, "codec", run.device))
    batches = denoiser_batches(run, model, latents, raw)
    return copies | {"denoiser": (denoiser_step(model, settings).to(run.device), train.denoiser, batches)}


def random_latents(run: Run, model: Model) -> tuple[StoredLatents, Raw]:
    """Random latents in place of those of training items, with the items' conditions."""
    index = torch.arange(MEASURED_LATENTS) % len(run.train)
    raw = training_conditions(run, model, run.train, None).select(index)
    z = torch.randn(MEASURED_LATENTS, *model.codec.latent_shape)
    if not model.codec.tokens:
        return StoredLatents(z), raw
    mask = torch.ones(MEASURED_LATENTS, model.codec.latent_shape[0], dtype=torch.bool)
    return StoredLatents(z.flatten(0, 1), mask, bool(model.codec.segments)), raw


def measure_feature_cost(run: Run) -> tuple[FeatureNetwork | None, FeatureCost]:
    """The feature network after a few training steps, and its cost.

    With pseudo-labels, the cost per item is measured on a sample, and the cost of comparing all items is estimated.
    """
    learner = feature_learner(run)
    if learner is None or not needs_features(run):
        return None, FeatureCost(0.0)
    max_unlabelled = learner.max_unlabelled

    def timed(run: Run, steps: int) -> tuple[FeatureNetwork, float]:
        start = time.perf_counter()
        return train_feature_network(run, steps, max_unlabelled), time.perf_counter() - start

    if not uses_pseudo_labels(run):
        timed(run, 1)  # the first step of a process is slow
        network, seconds = timed(run, 5)
        return network, FeatureCost(seconds / 5)
    labels = torch.from_numpy(run.train.labels)
    order = labels.argsort(descending=True)  # labelled items first
    index = torch.cat([order[: COST_SAMPLE // 4], order[-3 * COST_SAMPLE // 4 :]]).unique()
    labelled = int((labels >= 0).sum())
    sample, unlabelled = replace(run, train=run.train.subset(index)), min(len(labels) - labelled, max_unlabelled)
    timed(sample, 0)  # the first call of a process is slow
    overhead, (network, seconds) = timed(sample, 0)[1], timed(sample, COST_STEPS)
    step = max(seconds - overhead, seconds / 10) / COST_STEPS  # at least a tenth: the difference is noisy
    part, whole = (learner.comparison_seconds(count) for count in (len(index), labelled + unlabelled))
    item = max(overhead - part, 0.0) / len(index)
    return network, FeatureCost(step, item, whole, labelled, unlabelled, learner.unlabelled_seen)


def measured_throughput(
    run: Run, context: PlanContext, seconds: float, costs: dict[str, StepCost]
) -> Callable[[str, Settings], float]:
    """A function (stage, settings) -> items per second, which measures a few real steps.

    Args:
        run: The run.
        context: Data and machine.
        seconds: Training time of both stages.
        costs: Filled with the measured costs.
    """

    def throughput(stage: str, candidate: Settings) -> float:
        # settings that the candidate leaves open are planned without measuring
        settings = make_plan(run.modality, merge(run.settings, candidate), context, seconds)
        trial = replace(run, settings=settings)
        options: dict[str, Any] = {"stage": stage, "seed": settings.seed, "accelerator": run.accelerator}
        with torch.random.fork_rng(devices=[]):
            network = untrained_features(trial) if stage == "codec" and uses_features(trial) else None
            step, stage_settings, batches = stage_copies(trial, network)[stage]
            cost = mean_cost(step, stage_settings, batches, seconds=TRIAL_SECONDS, **options)
        costs[cost_key(stage, settings)] = cost
        return (stage_settings.batch or 1) / cost.seconds

    return throughput


def cost_key(stage: str, settings: Settings) -> str:
    """The settings that a stage's cost depends on, as a key."""
    parts = {"codec", "denoiser"} if stage == "denoiser" else {"codec"}
    return stage + settings.model_dump_json(include={**dict.fromkeys(parts, True), "train": {stage, "precision"}})


def measure_stages(run: Run, costs: dict[str, StepCost]) -> tuple[FeatureCost, dict[str, StepCost]]:
    """The cost of the feature network, and of a training step of each stage: from `costs`, or measured on a copy."""
    settings, speeds = run.settings, dict[str, StepCost]()
    with torch.random.fork_rng(devices=[]):
        network, features = measure_feature_cost(run)
        options: dict[str, Any] = {"seed": settings.seed, "accelerator": run.accelerator}
        for stage, copy in stage_copies(run, network).items():
            speeds[stage] = costs.get(cost_key(stage, settings)) or mean_cost(*copy, stage=stage, **options)
    return features, speeds


def mean_cost(step: TrainStep, settings: StageSettings, batches: BatchSource, **options: Any) -> StepCost:
    """Cost of a training step, averaged over a stage whose loss terms start one after the other."""
    spans = list(pairwise([*step.cost_breakpoints, LAST_STEP + 1]))
    shares = [(end - start) / (LAST_STEP + 1) for start, end in spans]
    costs = [measure_step(step, settings, batches, first=start, **options) for start, _ in spans]
    seconds, flops = (sum(map(math.prod, zip(shares, values, strict=True))) for values in zip(*costs, strict=True))
    return StepCost(seconds, flops)
