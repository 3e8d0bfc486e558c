"""From settings to the things that are trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.codecs.losses import Perceptual, load_vgg
from sfumato.config import Settings
from sfumato.core import Objective, make_times, make_weight, step_generator
from sfumato.data import Data
from sfumato.errors import UserError
from sfumato.modality import Modality
from sfumato.model import Card, Model
from sfumato.nn.classifier import SMALLEST, Classifier, fresh
from sfumato.nn.semi import fit_semi, partly_labelled
from sfumato.training.feeds import DataFeed, LatentFeed
from sfumato.training.horizon import Horizon
from sfumato.training.job import Job
from sfumato.training.loop import Feed
from sfumato.training.plan import ADVERSARIAL_START, PERCEPTUAL_START
from sfumato.training.steps import CodecStep, DiffusionStep
from sfumato.types import UNKNOWN, at_once

USUAL_GUIDANCE = 1.25  # until it is chosen by measurement
FEATURE_WIDTH = 16  # channels of the feature network's stem
SURE = 0.5  # how sure the network must be of a label that it guesses
LOOKED_AT = 1_000  # images at once


def build_card(settings: Settings, data: Data, modality: Modality[Any], classes: int) -> Card:
    """The model that a complete plan describes."""
    denoiser, sample = settings.denoiser, settings.sample
    net: dict[str, Any] = {"name": denoiser.net, "width": denoiser.width, "depth": denoiser.depth}
    if denoiser.net == "mlp":
        net |= {"embed": denoiser.embed, "gated": denoiser.gated}
    else:
        net["heads"] = denoiser.heads
    if denoiser.net == "dit":
        net["patch"] = denoiser.patch
    dropout = denoiser.class_dropout
    return Card(
        modality=modality.name,
        shape=data.shape,
        mode=data.mode,
        label_names=list(data.label_names) if classes else [],
        codec=modality.codec_options(settings.codec, data.shape, data.mode),
        conditioner={"name": "label", "classes": classes, "dropout": dropout} if classes else {"name": "none"},
        denoiser={
            "net": net,
            "schedule": {"name": denoiser.schedule, **(denoiser.schedule_settings or {})},
            "predict": denoiser.predict,
        },
        sample={
            "sampler": sample.sampler,
            "steps": sample.steps,
            "grid": sample.grid,
            "guidance": (USUAL_GUIDANCE if classes else 1.0) if sample.guidance is None else sample.guidance,
            "autoguidance": sample.autoguidance,
            "interval": None if sample.interval is None else list(sample.interval),
            "precision": sample.precision,
        },
    )


def new_model(job: Job) -> Model:
    """The model of a job, untrained; its codec knows what can be known of the data before training."""
    model = Model(build_card(job.settings, job.train, job.modality, job.classes))
    if model.codec.prepares:
        count = min(len(job.train), model.codec.prepares)
        some = torch.randperm(len(job.train), generator=step_generator(job.settings.seed, "prepare", 0))[:count]
        model.codec.prepare(job.train.batch(some).data)
    return model.to(job.device)


def uses_features(settings: Settings) -> bool:
    """Whether the perceptual term compares features of a network trained on the data at hand."""
    kind, weight = settings.codec.perceptual, settings.codec.perceptual_weight
    return bool(weight) and (kind == "features" or (kind == "auto" and load_vgg() is None))


def needs_network(job: Job) -> bool:
    """Whether a small network of the training data is needed: for its features, or to guess labels left open."""
    return uses_features(job.settings) or guesses_labels(job)


def guesses_labels(job: Job) -> bool:
    """Whether some training items have a label and others, that a network can look at, have none."""
    return bool(job.classes) and partly_labelled(job.train.labels) and min(job.train.shape[1:]) >= SMALLEST


def feature_network(job: Job, steps: int, most: int | None = None) -> Classifier:
    """A small classifier of the training data (of its orientation where there are no labels); `most` as in `fit_semi`.

    Raises:
        UserError: The images are too small for one.
    """
    check_sides(job)
    kit: dict[str, Any] = {"width": FEATURE_WIDTH, "seed": job.settings.seed, "device": job.device, "most": most}
    return fit_semi(job.train, job.classes, steps=steps, bf16=job.precision == "bf16", **kit)


def check_sides(job: Job) -> None:
    """Refuse images that are too small for the network."""
    if min(job.train.shape[1:]) < SMALLEST:
        kind = job.settings.codec.perceptual
        raise UserError(f"codec.perceptual={kind} needs images of {SMALLEST} pixels; set it to none")


def untrained_features(job: Job) -> Classifier:
    """A network as `feature_network` makes, to see what it costs, or whether it can be; raises as that does."""
    check_sides(job)
    seed, device = job.settings.seed, torch.device(job.device)
    return fresh(job.train.shape, max(2, job.classes), FEATURE_WIDTH, seed, device).eval().requires_grad_(False)


@torch.no_grad()
def training_labels(job: Job, network: Classifier | None, data: Data) -> Tensor | None:
    """Class numbers (N,) of training items under which the denoiser learns: those left open are what the network sees.

    Where it is less than `SURE`, they stay `UNKNOWN`: such items teach the model what all classes share.
    """
    if not job.classes or data.labels is None:
        return None
    label = torch.from_numpy(data.labels).clone()
    if network is None or not guesses_labels(job):
        return label
    for index in (label == UNKNOWN).nonzero().flatten().split(at_once(data.shape, LOOKED_AT)):
        chance = network(data.batch(index).data.to(job.device)).softmax(1).cpu()
        sure, seen = chance.max(1)
        label[index] = torch.where(sure >= SURE, seen, UNKNOWN)
    return label


def perceptual_term(settings: Settings, network: Classifier | None) -> nn.Module | None:
    """The perceptual distance: LPIPS or VGG where its weights are at hand, the feature network, or none."""
    if network is not None and uses_features(settings):
        return Perceptual(network.folded().pyramid)
    if not settings.codec.perceptual_weight or settings.codec.perceptual == "none":
        return None
    weights = load_vgg()
    if weights is None and settings.codec.perceptual == "lpips":
        raise UserError("codec.perceptual=lpips needs the weights of VGG: name their file in $SFUMATO_VGG")
    return weights


def codec_step(model: Model, settings: Settings, network: Classifier | None, horizon: Horizon) -> CodecStep:
    """The first stage of a model, as long as `horizon` says."""
    codec, steps = settings.codec, horizon.steps
    start = round(ADVERSARIAL_START * steps)
    return CodecStep(
        model.codec,
        perceptual_term(settings, network),
        kind=codec.reconstruction or "l1",
        perceptual_weight=codec.perceptual_weight or 0.0,
        perceptual_start=round(PERCEPTUAL_START * steps),
        bottleneck_weight=(codec.kl_weight or 0.0) if codec.bottleneck == "kl" else 1.0,
        adversarial_weight=codec.adversarial_weight or 0.0,
        start=start,
        lead=max(1, start // 10),
        channels=model.card.shape[0],
        horizon=horizon,
    )


def denoiser_step(model: Model, settings: Settings) -> DiffusionStep:
    """The second stage of a model."""
    denoiser = settings.denoiser
    weight = make_weight(denoiser.weight or "uniform", **(denoiser.weight_settings or {}))
    times = make_times(denoiser.times or "uniform", **(denoiser.times_settings or {}))
    draw = model.codec.draw if model.codec.draws else None
    return DiffusionStep(model.denoiser, model.conditioner, Objective(weight, times), draw)


def latent_feed(job: Job, model: Model, z: Tensor, label: Tensor | None) -> Feed:
    """What the denoiser is trained on: latents z (N, *latent_shape) at hand, or data to draw them from."""
    settings = job.settings.train.denoiser
    if model.codec.draws:
        return DataFeed(job.train, settings, job.settings.seed, "denoiser", job.device)
    return LatentFeed(z, label, settings, job.settings.seed, job.device)


def keep_network(path: Path, network: Classifier) -> None:
    """Keep the feature network beside the checkpoint."""
    from sfumato.model import write_tensors

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, network.state_dict())


def kept_network(path: Path, job: Job) -> Classifier | None:
    """The feature network kept by an earlier session; None if there is none."""
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    state = load_file(path)
    with torch.random.fork_rng(devices=[]):  # whether it was trained or loaded, what is drawn next is the same
        network = Classifier(job.train.shape, state["head.weight"].shape[0], FEATURE_WIDTH)
    network.load_state_dict(state)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(job.device).eval().requires_grad_(False)
