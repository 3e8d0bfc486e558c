"""Build models, training steps and batches from settings."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.config import Settings
from sfumato.core import Objective, make_time_sampling, make_weight, step_generator
from sfumato.data.conditions import Labels, Numbers, Texts
from sfumato.data.dataset import Dataset, partly_labelled
from sfumato.errors import UserError
from sfumato.modalities.base import FeatureLearner, FeatureNetwork, Modality
from sfumato.model import Model
from sfumato.storage import ModelConfig, write_tensors
from sfumato.training.batches import DataBatches, LatentBatches, StoredLatents
from sfumato.training.budget import StepBudget
from sfumato.training.plan import ADVERSARIAL_START, PERCEPTUAL_START
from sfumato.training.run import Run
from sfumato.training.steps import CodecStep, DiffusionStep
from sfumato.training.trainer import BatchSource
from sfumato.types import UNKNOWN, Raw, batch_limit

DEFAULT_GUIDANCE = 1.25  # guidance weight until the search at the end of training sets it
PSEUDO_LABEL_THRESHOLD = 0.5  # predicted probability from which a pseudo-label is used
CLASSIFY_BATCH = 1_000  # items per call of the feature network


def conditions_config(data: Dataset, modality: Modality[Any], dropout: float | None) -> dict[str, dict[str, Any]]:
    """The conditions of a model of these data: labels of several classes, known numbers, and texts if it uses them."""
    conditions = dict[str, dict[str, Any]]()
    for name, known in data.conditions.items():
        if isinstance(known, Labels) and len(known.names) > 1:
            conditions[name] = {"kind": "label", "names": list(known.names)}
        elif isinstance(known, Numbers) and np.isfinite(known.values).any():
            values = known.values[np.isfinite(known.values)].astype(np.float64)
            conditions[name] = {"kind": "number", "mean": float(values.mean()), "std": float(values.std())}
        elif isinstance(known, Texts) and modality.uses_texts:
            conditions[name] = {"kind": "text"}
    return {name: values | {"dropout": dropout} for name, values in conditions.items()}


def build_config(settings: Settings, data: Dataset, modality: Modality[Any]) -> ModelConfig:
    """The model configuration of a complete plan."""
    denoiser, sample = settings.denoiser, settings.sample
    net: dict[str, Any] = {"name": denoiser.net, "width": denoiser.width, "depth": denoiser.depth}
    if denoiser.net == "mlp":
        net |= {"embedding_dim": denoiser.embedding_dim, "swiglu": denoiser.swiglu}
    else:
        net["heads"] = denoiser.heads
    if denoiser.net == "dit":
        net["patch"] = denoiser.patch
    conditioner = conditions_config(data, modality, denoiser.class_dropout)
    guidance = DEFAULT_GUIDANCE if conditioner else 1.0
    return ModelConfig(
        modality=modality.name,
        shape=data.shape,
        spec=data.spec,
        codec=modality.codec_config(settings.codec, data.shape, data.spec),
        conditioner=conditioner,
        denoiser={
            "net": net,
            "schedule": {"name": denoiser.schedule, **(denoiser.schedule_settings or {})},
            "predict": denoiser.predict,
        },
        sample={
            "sampler": sample.sampler,
            "steps": sample.steps,
            "grid": sample.grid,
            "guidance": guidance if sample.guidance is None else sample.guidance,
            "autoguidance": sample.autoguidance,
            "interval": None if sample.interval is None else list(sample.interval),
            "precision": sample.precision,
        },
    )


def new_model(run: Run) -> Model:
    """The untrained model of a run; its codec is prepared on a sample of the data, if it supports that."""
    model = Model(build_config(run.settings, run.train, run.modality))
    if model.codec.prepare_items:
        count = min(len(run.train), model.codec.prepare_items)
        index = torch.randperm(len(run.train), generator=step_generator(run.settings.seed, "prepare", 0))[:count]
        model.codec.prepare(run.train.batch(index).data)
    return model.to(run.device)


def feature_learner(run: Run) -> FeatureLearner[Any] | None:
    """The modality, if it can train a feature network, else None."""
    return run.modality if isinstance(run.modality, FeatureLearner) else None


def uses_features(run: Run) -> bool:
    """Whether the perceptual loss uses features of a network trained on the data."""
    learner = feature_learner(run)
    return learner is not None and learner.uses_features(run.settings.codec)


def needs_features(run: Run) -> bool:
    """Whether a feature network is needed, for the perceptual loss or for pseudo-labels."""
    return uses_features(run) or uses_pseudo_labels(run)


def uses_pseudo_labels(run: Run) -> bool:
    """Whether only some training items are labelled, so that the others get pseudo-labels."""
    learner = feature_learner(run)
    partly = bool(run.classes) and partly_labelled(run.train.labels)
    return partly and learner is not None and learner.supports_features(run.train.shape)


def train_feature_network(run: Run, steps: int, max_unlabelled: int | None = None) -> FeatureNetwork:
    """Train the feature network: a classifier, self-supervised if there are no labels.

    Args:
        run: The run.
        steps: Optimizer steps.
        max_unlabelled: Maximum number of unlabelled items to learn from.

    Raises:
        UserError: The network cannot be trained on these items.
    """
    learner = feature_learner(run)
    assert learner is not None
    learner.check_features(run.settings.codec, run.train.shape)
    options: dict[str, Any] = {"seed": run.settings.seed, "device": run.device, "bf16": run.precision == "bf16"}
    return learner.fit_features(run.train, run.classes, steps=steps, max_unlabelled=max_unlabelled, **options)


def untrained_features(run: Run) -> FeatureNetwork:
    """The feature network with random weights, to measure its cost; raises as `train_feature_network` does."""
    learner = feature_learner(run)
    assert learner is not None
    learner.check_features(run.settings.codec, run.train.shape)
    return learner.build_features(run.train.shape, run.classes, run.settings.seed, torch.device(run.device))


def training_conditions(run: Run, model: Model, data: Dataset, label: Tensor | None) -> Raw:
    """The conditions of N items that the model takes; `label` (N,) replaces the primary one."""
    raw = Raw({name: known.raw(np.arange(len(data))) for name, known in data.conditions.items()})
    raw = raw.only(model.conditioner.names)
    name = model.conditioner.primary_label
    return raw if label is None or name is None else raw.with_value(name, label)


@torch.no_grad()
def training_labels(run: Run, network: FeatureNetwork | None, data: Dataset) -> Tensor | None:
    """Class numbers (N,) of the items for the denoiser, with pseudo-labels for unlabelled items.

    Predictions below `PSEUDO_LABEL_THRESHOLD` stay `UNKNOWN`: such items train the unconditional part of the model.
    """
    if not run.classes or data.labels is None:
        return None
    label = torch.from_numpy(data.labels).clone()
    if network is None or not uses_pseudo_labels(run):
        return label
    for index in (label == UNKNOWN).nonzero().flatten().split(batch_limit(data.shape, CLASSIFY_BATCH)):
        probability, predicted = network(data.batch(index).data.to(run.device)).softmax(1).cpu().max(1)
        label[index] = torch.where(probability >= PSEUDO_LABEL_THRESHOLD, predicted, UNKNOWN)
    return label


def codec_step(model: Model, settings: Settings, network: FeatureNetwork | None, step_budget: StepBudget) -> CodecStep:
    """The training step of the first stage.

    Args:
        model: The model.
        settings: All settings.
        network: The feature network of the perceptual loss, or None.
        step_budget: Number of steps of the stage.

    Raises:
        UserError: The modality has no perceptual or adversarial loss.
    """
    codec, steps = settings.codec, step_budget.steps
    learner = model.modality if isinstance(model.modality, FeatureLearner) else None
    if learner is None and (codec.adversarial_weight or codec.perceptual not in (None, "none")):
        raise UserError(
            f"a {model.modality.name} codec has no perceptual or adversarial loss; leave these settings out"
        )
    adversarial_start = round(ADVERSARIAL_START * steps)
    return CodecStep(
        model.codec,
        None if learner is None else learner.perceptual_loss(codec, network),
        learner.discriminator(model.config.shape) if learner is not None and codec.adversarial_weight else None,
        reconstruction=codec.reconstruction or "l1",
        perceptual_weight=codec.perceptual_weight or 0.0,
        perceptual_start=round(PERCEPTUAL_START * steps),
        bottleneck_weight=(codec.kl_weight or 0.0) if codec.bottleneck == "kl" else 1.0,
        adversarial_weight=codec.adversarial_weight or 0.0,
        adversarial_start=adversarial_start,
        discriminator_lead=max(1, adversarial_start // 10),
        step_budget=step_budget,
    )


def denoiser_step(model: Model, settings: Settings) -> DiffusionStep:
    """The training step of the second stage."""
    denoiser = settings.denoiser
    weight = make_weight(denoiser.weight or "uniform", **(denoiser.weight_settings or {}))
    times = make_time_sampling(denoiser.time_sampling or "uniform", **(denoiser.time_sampling_settings or {}))
    sample_latent = model.codec.sample_latent if model.codec.stochastic else None
    return DiffusionStep(model.main, Objective(weight, times), sample_latent)


def denoiser_batches(run: Run, model: Model, latents: StoredLatents, raw: Raw) -> BatchSource:
    """Training batches of the denoiser: stored latents with their conditions, or data whose latents are sampled."""
    settings = run.settings.train.denoiser
    if model.codec.stochastic:
        names = model.conditioner.names
        return DataBatches(run.train, settings, run.settings.seed, "denoiser", run.device, names)
    return LatentBatches(latents, raw, settings, run.settings.seed, run.device)


def save_features(path: Path, network: FeatureNetwork) -> None:
    """Save the feature network beside the checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, network.state_dict())


def load_features(path: Path, run: Run) -> FeatureNetwork | None:
    """Load the feature network saved by an earlier session; None without one."""
    learner = feature_learner(run)
    if not path.is_file() or learner is None:
        return None
    return learner.restore_features(run.train.shape, load_file(path), run.device)
