"""The two stages of a run, one after the other, from wherever its checkpoint left them."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.config import StageSettings
from sfumato.core import step_generator
from sfumato.data import Data, LatentCache, latent_key
from sfumato.data.cache import allocate_tensor
from sfumato.metrics.features import NamedExtractor, weights_hash
from sfumato.model import Model, load_part, save_part
from sfumato.nn import count_parameters
from sfumato.nn.classifier import Classifier
from sfumato.training.build import (
    codec_step,
    denoiser_step,
    feature_network,
    keep_network,
    kept_network,
    latent_feed,
    needs_network,
    new_model,
    training_labels,
)
from sfumato.training.card import write_card
from sfumato.training.choose import choose_guidance
from sfumato.training.early import Early
from sfumato.training.feeds import DataFeed
from sfumato.training.horizon import Horizon
from sfumato.training.job import Job
from sfumato.training.loop import Feed, Trainer, held_interrupts
from sfumato.training.plan import most_steps
from sfumato.training.state import State, save_state
from sfumato.training.steps import TrainStep
from sfumato.training.watch import FIRST, Watch
from sfumato.types import Batch, at_once

PAIRS = 32  # items on a reconstruction sheet
CHECKED, CHECKED_NUMBERS = 2_000, 2**26  # held-out items the codec is measured on, and numbers in them
ENCODED = 500  # items encoded at once
WATCHED_BATCHES, FEWEST_WATCHED, MOST_WATCHED = 8, 512, 2_048  # held-out items in a look
GUIDE_STEPS = 50  # of the denoiser that autoguidance leads away from: before, it knows nothing
GUIDE_SHARE = 0.125  # of the steps, after which the average is kept that autoguidance leads away from

Sheet = Callable[[], tuple[str, Any]]


def train_stages(job: Job, state: State | None) -> Model:
    """Train what is left to train, and leave the model in the folder.

    Args:
        job: The run.
        state: Its checkpoint, or None.
    """
    torch.manual_seed(job.settings.seed)
    model = new_model(job)
    network = features(job) if needs_network(job) else None
    if job.done("codec"):
        load_part(job.folder / "codec", model.codec)
    elif model.codec.learns:
        train_codec(job, model, network, state)
        job.accelerator.free_memory()
    model.codec.eval().requires_grad_(False)
    data = encoded_part(job)
    z = encode_all(job, model, data)
    if not job.done("codec"):
        save_part(job.folder / "codec", model.codec, model.card.codec)
        job.finish("codec", **measure_codec(job, model, network))
    label = training_labels(job, network, data)
    train_denoiser(job, model, network, z, label, state)
    model.eval()
    if job.settings.sample.guidance is None:
        job.log.show("choose", 0, 1)
        model.card.sample["guidance"], tried = choose_guidance(job, model, network, data, label)
        job.record["guidance"] = tried
    model.save(job.folder)
    model.folder = job.folder
    trained = sum(stage["seconds"] for stage in job.record["stages"].values())  # in all sessions
    job.record["seconds_taken"] = round(max(time.monotonic() - job.started, trained), 1)
    job.record["metrics"]["parameters"] = {k: count_parameters(v) for k, v in model.parts.items()}
    write_card(job, model)
    job.finish("denoiser")
    forget_latents(job.folder)
    return model


def forget_latents(folder: Path) -> None:
    """Remove the latents of a run that is done: only a resumed one asks for them."""
    shutil.rmtree(folder / "cache", ignore_errors=True)


def features(job: Job) -> Classifier:
    """The small network of the training data: trained now, or kept by an earlier session."""
    path = job.folder / "checkpoint-features" / "model.safetensors"
    network = kept_network(path, job)
    if network is None:
        job.log.show("features", 0, 1)
        network = feature_network(job, job.settings.codec.perceptual_steps or 1)
        keep_network(path, network)
        job.log.show("features", 1, 1)
    return network


def make_horizon(job: Job, settings: StageSettings, stage: str) -> Horizon:
    """How many steps a stage has: as planned, and as the clock has amended it."""
    planned = job.record.get("seconds", {}).get(stage, math.inf)
    left = job.seconds_left()
    fixed = math.isinf(left) or math.isinf(planned)  # the latter where the user gave the number of steps
    clock = math.inf if fixed else planned if stage == "codec" else max(left, 1.0)
    horizon = Horizon(settings.steps or 1, clock, most=most_steps(settings, len(job.train)))
    if not job.fresh:  # until there is a checkpoint of this stage, which has its own
        horizon.amendments = [(a, b) for a, b in job.record.get("amendments", {}).get(stage, [])]
    if stage == "denoiser" and not fixed:  # what the first stage left over or took too much of
        horizon.amendments.append((0, int(min(horizon.most, max(1, round(horizon.steps * clock / planned))))))
        job.record.setdefault("amendments", {})[stage] = horizon.amendments
        job.write()
    return horizon


def make_trainer(
    job: Job,
    step: TrainStep,
    settings: StageSettings,
    horizon: Horizon,
    stage: str,
    state: State | None,
    early: Early | None = None,
    watch: Watch | None = None,
) -> Trainer:
    """A stage's trainer, where its checkpoint left it."""
    trainer = Trainer(
        step,
        settings,
        horizon,
        stage=stage,
        seed=job.settings.seed,
        accelerator=job.accelerator,
        flops=job.record.get("measured", {}).get(stage, {}).get("flops", 0.0),
        peak=job.record["peak"],
        early=early,
        watch=watch,
    )
    if state is not None and state[1]["stage"] == stage:
        trainer.load(*state)
    if not job.fresh:  # also without a checkpoint: there may be records of steps that were lost
        job.log.rewind(stage, trainer.done)
    return trainer


def drive(job: Job, trainer: Trainer, feed: Feed, sheet: Sheet) -> None:
    """Run a trainer to its end: records, a sheet at each quarter, checkpoints; the average becomes the weights."""
    began = time.perf_counter() - trainer.seconds

    def save() -> None:
        if job.accelerator.is_main_process:
            save_state(job.folder / "checkpoint", trainer.state())
        job.accelerator.wait_for_everyone()

    quarter = 4 * trainer.done // trainer.steps
    with held_interrupts() as interrupted:
        for report in trainer.run(feed, save, interrupted):
            job.log.report(report)
            if quarter < 4 * report.step // report.steps < 4:
                quarter = 4 * report.step // report.steps
                with trainer.averaged():
                    job.log.picture(*sheet(), report.step)
    save()
    job.record.setdefault("amendments", {})[trainer.stage] = trainer.horizon.amendments
    trainer.ema.apply()
    job.log.picture(*sheet(), trainer.done)
    summary = trainer.summary(time.perf_counter() - began)
    job.log.finish(summary)
    job.record.setdefault("stages", {})[trainer.stage] = {k: v for k, v in asdict(summary).items() if k != "stage"}


def train_codec(job: Job, model: Model, network: Classifier | None, state: State | None) -> None:
    """First stage."""
    settings = job.settings.train.codec
    horizon = make_horizon(job, settings, "codec")
    step = codec_step(model, job.settings, network, horizon).to(job.device)
    trainer = make_trainer(job, step, settings, horizon, "codec", state)
    feed = DataFeed(job.train, settings, job.settings.seed, "codec", job.device)
    some = job.held.batch(torch.arange(min(len(job.held), PAIRS))).data

    def sheet() -> tuple[str, Any]:
        """Originals beside their reconstructions."""
        model.codec.eval()
        x_hat = model.autoencode(some)
        model.codec.train()
        return "reconstructions", job.modality.pairs(some, x_hat, job.train.mode)

    drive(job, trainer, feed, sheet)


def encoded_part(job: Job) -> Data:
    """The items that the second stage learns from: all, or as many at random as the plan has time to encode."""
    count = job.settings.train.encoded
    if count is None or count >= len(job.train):
        return job.train
    order = torch.randperm(len(job.train), generator=step_generator(job.settings.seed, "encoded", 0))
    return job.train.subset(order[:count].sort().values)


def raw_codes(job: Job, model: Model, data: Data) -> Iterator[Tensor]:
    """The raw codes of all items, piece by piece, on the CPU."""
    for index in torch.arange(len(data)).split(at_once(data.shape, ENCODED)):
        with job.accelerator.autocast():
            yield model.codec.codes(data.batch(index).data.to(job.device)).cpu()
        job.log.show("encode", int(index[-1]) + 1, len(data))


@torch.no_grad()
def encode_all(job: Job, model: Model, data: Data) -> Tensor:
    """Latents (N, *latent_shape) of the items; sets the codec's statistics when they are not known yet.

    None are kept (N = 0) where training draws them from the data, and they may be many times as large as these.
    """
    if model.codec.draws:
        if not job.done("codec"):
            model.codec.learn_statistics(raw_codes(job, model, data))
        return torch.empty(0, *model.codec.latent_shape)

    def codes() -> dict[str, Tensor]:
        h, first = allocate_tensor((len(data), *model.codec.latent_shape), torch.float32), 0
        for part in raw_codes(job, model, data):
            h[first : first + len(part)] = part
            first += len(part)
        return {"h": h}

    weights = {k: v for k, v in model.codec.state_dict().items() if not k.startswith("latent_")}
    key = latent_key(data.fingerprint, weights_hash(weights), {"precision": job.precision})
    z = LatentCache(job.folder / "cache", key).compute(codes)["h"]
    if not job.done("codec"):
        model.codec.learn_statistics(z)
    for part in z.split(ENCODED):  # in place: there may be no room for a second copy
        part.copy_(model.codec.whitened(part))
    return z


def measure_codec(job: Job, model: Model, network: Classifier | None) -> dict[str, Any]:
    """How close reconstructions of held-out items are."""
    count = min(len(job.held), at_once(job.held.shape, CHECKED, CHECKED_NUMBERS))
    x = job.held.batch(torch.arange(count)).data
    few = len(x) < 2  # of one item there is no covariance
    extractor = None if network is None or few else NamedExtractor("features", network.features, job.device)
    report = job.modality.compare(x, model.autoencode(x), job.train.mode, extractor)
    job.log.record({"stage": "reconstruction", "step": job.settings.train.codec.steps or 0, **report})
    return {"codec": {k: round(v, 4) for k, v in report.items()}}


def make_watch(job: Job, model: Model, network: Classifier | None) -> Watch:
    """Held-out items, gone through until there are enough, as the denoiser's batches have them."""
    held, batch = job.held, job.settings.train.denoiser.batch or 1
    count = min(max(WATCHED_BATCHES * batch, FEWEST_WATCHED), MOST_WATCHED)
    some = torch.arange(count) % min(len(held), count)
    label = training_labels(job, network, held)

    def given(index: Tensor) -> Batch:
        x = held.batch(index).data
        z = x if model.codec.draws else model.encode(x)
        return Batch(z.to(job.device), index, None if label is None else label[index])

    first = math.ceil(FIRST * len(job.train) / batch)
    return Watch([given(index) for index in some.split(max(batch, FEWEST_WATCHED))], first)


def train_denoiser(
    job: Job, model: Model, network: Classifier | None, z: Tensor, label: Tensor | None, state: State | None
) -> None:
    """Second stage, on latents z (N, *latent_shape) under their labels (N,)."""
    settings = job.settings.train.denoiser
    step = denoiser_step(model, job.settings).to(job.device)
    early = None if job.settings.sample.autoguidance in (None, 1) else Early(GUIDE_SHARE)  # None: an older plan
    watch = make_watch(job, model, network) if job.settings.train.watch else None
    horizon = make_horizon(job, settings, "denoiser")
    trainer = make_trainer(job, step, settings, horizon, "denoiser", state, early, watch)
    feed = latent_feed(job, model, z, label)
    items = range(job.modality.shown)

    def lend_guide() -> None:
        if early is not None and early.step >= GUIDE_STEPS and model.guide is None:
            model.add_guide({k.removeprefix("denoiser."): v for k, v in early.weights.items()}, early.step)

    def sheet() -> tuple[str, Any]:
        """Items that a class each row would show, from the average so far."""
        lend_guide()
        labels = torch.arange(len(items)) % job.classes if job.classes else None
        x = model.decode(model.sample(items, labels, seed=job.settings.seed))
        return "samples", job.modality.sheet(x, job.train.mode, None)

    drive(job, trainer, feed, sheet)  # its last sheet is of the model as it is then, with the guide
    if model.guide is None:
        model.card.sample["autoguidance"] = 1.0
