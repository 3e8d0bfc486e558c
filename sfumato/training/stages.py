"""The two training stages of a run, started or resumed from a checkpoint."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sfumato.config import StageSettings
from sfumato.core import step_generator
from sfumato.data import TensorCache, latent_key
from sfumato.data.cache import allocate_tensor
from sfumato.data.dataset import Dataset
from sfumato.metrics.features import NamedExtractor, weights_hash
from sfumato.modalities.base import FeatureNetwork
from sfumato.model import Model
from sfumato.nn import count_parameters
from sfumato.sampling import preview_conditions
from sfumato.storage import load_part, save_part
from sfumato.training.batches import DataBatches, StoredLatents
from sfumato.training.budget import StepBudget
from sfumato.training.build import (
    codec_step,
    denoiser_batches,
    denoiser_step,
    load_features,
    needs_features,
    new_model,
    save_features,
    train_feature_network,
    training_conditions,
    training_labels,
)
from sfumato.training.callbacks import FIRST_CHECK_EPOCH, EarlyStopping, GuideSnapshot
from sfumato.training.checkpoint import State, save_state
from sfumato.training.guidance_search import choose_guidance
from sfumato.training.model_card import write_card
from sfumato.training.plan import max_steps
from sfumato.training.run import Run
from sfumato.training.steps import TrainStep
from sfumato.training.trainer import BatchSource, Trainer, deferred_interrupts
from sfumato.types import Batch, Items, Latent, Raw, batch_limit

PREVIEW_PAIRS = 32  # held-out items in a preview of reconstructions
MEASURED_ITEMS = 2_000  # held-out items that reconstruction is measured on, at most
MEASURED_NUMBERS = 2**26  # values in these items together, at most
ENCODE_BATCH = 500  # items per call of the encoder
HELD_OUT_BATCHES = 8  # held-out items per check of early stopping, as a multiple of the batch size
MIN_HELD_OUT_CHECK, MAX_HELD_OUT_CHECK = 512, 2_048  # limits of the number of these items
MIN_GUIDE_STEP = 50  # first training step of a usable guide: an earlier average has learned nothing
GUIDE_SHARE = 0.125  # share of the denoiser's steps after which its average becomes the guide

Preview = Callable[[], tuple[str, Any]]


def train_stages(run: Run, state: State | None) -> Model:
    """Train the stages that are not complete, and save the model in the run folder.

    Args:
        run: The run.
        state: Its checkpoint, or None.
    """
    torch.manual_seed(run.settings.seed)
    model = new_model(run)
    network = load_or_train_features(run) if needs_features(run) else None
    if run.done("codec"):
        load_part(run.folder / "codec", model.codec)
    elif model.codec.trainable:
        train_codec(run, model, network, state)
        run.accelerator.free_memory()
    model.codec.eval().requires_grad_(False)
    data = encoded_subset(run)
    latents = encode_all(run, model, data)
    if not run.done("codec"):
        save_part(run.folder / "codec", model.codec, model.config.codec)
        run.finish("codec", **measure_codec(run, model, network))
    label = training_labels(run, network, data)
    raw = training_conditions(run, model, data, label)
    if model.conditioner.observed is not None:
        model.conditioner.observed.learn(raw, len(data))
    train_denoiser(run, model, network, latents, raw, state)
    model.eval()
    if run.settings.sample.guidance is None:
        run.log.show("guidance", 0, 1)
        model.config.sample["guidance"], run.record["guidance"] = choose_guidance(run, model, network, data, label)
    model.save(run.folder)
    model.folder = run.folder
    trained = sum(stage["seconds"] for stage in run.record["stages"].values())  # over all sessions
    run.record["seconds_taken"] = round(max(time.monotonic() - run.started, trained), 1)
    run.record["metrics"]["parameters"] = {k: count_parameters(v) for k, v in model.parts.items()}
    write_card(run, model)
    run.finish("denoiser")
    remove_latents(run.folder)
    return model


def remove_latents(folder: Path) -> None:
    """Remove the cached latents, which only a resumed run needs."""
    shutil.rmtree(folder / "cache", ignore_errors=True)


def load_or_train_features(run: Run) -> FeatureNetwork:
    """The feature network: saved by an earlier session, or trained now."""
    path = run.folder / "checkpoint-features" / "model.safetensors"
    network = load_features(path, run)
    if network is None:
        run.log.show("features", 0, 1)
        network = train_feature_network(run, run.settings.codec.feature_steps or 1)
        save_features(path, network)
        run.log.show("features", 1, 1)
    return network


def make_step_budget(run: Run, settings: StageSettings, stage: str) -> StepBudget:
    """The step budget of a stage: its planned steps, with the amendments so far."""
    planned = run.record.get("seconds", {}).get(stage, math.inf)
    left = run.seconds_left()
    fixed = math.isinf(left) or math.isinf(planned)  # without planned seconds, the user fixed the number of steps
    clock = math.inf if fixed else planned if stage == "codec" else max(left, 1.0)
    step_budget = StepBudget(settings.steps or 1, clock, max_steps=max_steps(settings, len(run.train)))
    if not run.fresh:  # a checkpoint of this stage replaces these
        step_budget.amendments = [(a, b) for a, b in run.record.get("amendments", {}).get(stage, [])]
    if stage == "denoiser" and not fixed:  # corrected for the actual duration of the first stage
        step_budget.amendments.append(
            (0, int(min(step_budget.max_steps, max(1, round(step_budget.steps * clock / planned)))))
        )
        run.record.setdefault("amendments", {})[stage] = step_budget.amendments
        run.write()
    return step_budget


def make_trainer(
    run: Run,
    step: TrainStep,
    settings: StageSettings,
    step_budget: StepBudget,
    stage: str,
    state: State | None,
    guide_snapshot: GuideSnapshot | None = None,
    early_stopping: EarlyStopping | None = None,
) -> Trainer:
    """The trainer of a stage, restored from its checkpoint if there is one."""
    trainer = Trainer(
        step,
        settings,
        step_budget,
        stage=stage,
        seed=run.settings.seed,
        accelerator=run.accelerator,
        flops=run.record.get("measured", {}).get(stage, {}).get("flops", 0.0),
        peak=run.record["peak"],
        guide_snapshot=guide_snapshot,
        early_stopping=early_stopping,
    )
    if state is not None and state[1]["stage"] == stage:
        trainer.load(*state)
    if not run.fresh:  # also without a checkpoint: steps that were lost may have been logged
        run.log.rewind(stage, trainer.done)
    return trainer


def run_trainer(run: Run, trainer: Trainer, batches: BatchSource, preview: Preview) -> None:
    """Run a trainer to its end, with metrics, checkpoints and previews, and take the average as the weights."""
    start = time.perf_counter() - trainer.seconds

    def save() -> None:
        if run.accelerator.is_main_process:
            save_state(run.folder / "checkpoint", trainer.state())
        run.accelerator.wait_for_everyone()

    quarter = 4 * trainer.done // trainer.steps
    with deferred_interrupts() as interrupted:
        for report in trainer.run(batches, save, interrupted):
            run.log.report(report)
            if quarter < 4 * report.step // report.steps < 4:
                quarter = 4 * report.step // report.steps
                with trainer.ema_weights():
                    run.log.image(*preview(), report.step)
    save()
    run.record.setdefault("amendments", {})[trainer.stage] = trainer.step_budget.amendments
    trainer.ema.apply()
    run.log.image(*preview(), trainer.done)
    summary = trainer.summary(time.perf_counter() - start)
    run.log.finish(summary)
    run.record.setdefault("stages", {})[trainer.stage] = {k: v for k, v in asdict(summary).items() if k != "stage"}


def train_codec(run: Run, model: Model, network: FeatureNetwork | None, state: State | None) -> None:
    """Train the codec."""
    settings = run.settings.train.codec
    step_budget = make_step_budget(run, settings, "codec")
    step = codec_step(model, run.settings, network, step_budget).to(run.device)
    trainer = make_trainer(run, step, settings, step_budget, "codec", state)
    batches = DataBatches(run.train, settings, run.settings.seed, "codec", run.device)
    x = held_out_items(run, min(len(run.held_out), PREVIEW_PAIRS))

    def preview() -> tuple[str, Any]:
        """Held-out items beside their reconstructions."""
        model.codec.eval()
        x_hat = model.autoencode(x)
        model.codec.train()
        return "reconstructions", run.modality.preview(x, run.train.spec, x_hat)

    run_trainer(run, trainer, batches, preview)


def encoded_subset(run: Run) -> Dataset:
    """The training items of the second stage: all, or a random subset if the plan limits how many are encoded."""
    count = run.settings.train.max_encoded
    if count is None or count >= len(run.train):
        return run.train
    order = torch.randperm(len(run.train), generator=step_generator(run.settings.seed, "encoded", 0))
    return run.train.subset(order[:count].sort().values)


def held_out_items(run: Run, count: int) -> Items:
    """The first held-out items."""
    batch = run.held_out.batch(torch.arange(count))
    return Items.unpad(batch.data, batch.mask)


def encode_batches(run: Run, model: Model, data: Dataset) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The raw codes of all items and, of tokens, their mask (B, capacity), batch by batch, on the CPU.

    Of tokens, the codes (tokens, D) are those that items have.
    """
    for index in torch.arange(len(data)).split(batch_limit(data.shape, ENCODE_BATCH)):
        batch = data.batch(index)
        with run.accelerator.autocast():
            mask = None if batch.mask is None else batch.mask.to(run.device)
            h = model.codec.encode_raw(batch.data.to(run.device), mask).cpu()
        run.log.show("encode", int(index[-1]) + 1, len(data))
        if not model.codec.tokens:
            yield h, None
            continue
        mask = model.codec.latent_mask(mask)
        mask = h.new_ones(h.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
        yield h[mask], pad(mask, (0, model.codec.latent_shape[0] - mask.shape[1]))


@torch.no_grad()
def encode_all(run: Run, model: Model, data: Dataset) -> StoredLatents:
    """Latents of all items; also measures the codec's statistics if that is still to be done.

    With a stochastic codec, training samples latents from the data; none are stored (N = 0), as they may be many times
    larger than the data.
    """
    codec = model.codec
    if codec.stochastic:
        masks = list[Tensor]()
        if not run.done("codec"):
            codec.learn_statistics(_collect_masks(encode_batches(run, model, data), masks))
        if masks:
            codec.learn_lengths(masks)
        return StoredLatents(torch.empty(0, *codec.latent_shape))
    weights = {k: v for k, v in codec.state_dict().items() if not k.startswith(("latent_", "lengths"))}
    key = latent_key(data.fingerprint, weights_hash(weights), {"precision": run.precision})
    stored = TensorCache(run.folder / "cache", key).compute(lambda: encoded_tensors(run, model, data))
    z, mask = stored["h"], stored.get("mask")
    if not run.done("codec"):
        codec.learn_statistics(z)
        if mask is not None:
            codec.learn_lengths([mask])
    for part in z.split(ENCODE_BATCH):  # in place: a second copy may not fit into memory
        part.copy_(codec.whiten(part).z)
    return StoredLatents(z, mask, bool(codec.segments))


def encoded_tensors(run: Run, model: Model, data: Dataset) -> dict[str, Tensor]:
    """The raw codes `h` of all items, (N, *latent_shape) or tokens (tokens, D) with the items' `mask` (N, capacity)."""
    if model.codec.tokens:
        codes, masks = zip(*encode_batches(run, model, data), strict=True)
        return {"h": torch.cat(codes), "mask": torch.cat([mask for mask in masks if mask is not None])}
    h, first = allocate_tensor((len(data), *model.codec.latent_shape), torch.float32), 0
    for part, _ in encode_batches(run, model, data):
        h[first : first + len(part)] = part
        first += len(part)
    return {"h": h}


def _collect_masks(batches: Iterator[tuple[Tensor, Tensor | None]], masks: list[Tensor]) -> Iterator[Tensor]:
    """The codes of batches, whose masks are appended to `masks`."""
    for h, mask in batches:
        masks += [] if mask is None else [mask]
        yield h


def measure_codec(run: Run, model: Model, network: FeatureNetwork | None) -> dict[str, Any]:
    """Reconstruction metrics on held-out items."""
    count = min(len(run.held_out), batch_limit(run.held_out.shape, MEASURED_ITEMS, MEASURED_NUMBERS))
    x = held_out_items(run, count)
    single = len(x) < 2  # the covariance needs two items
    extractor = None if network is None or single else NamedExtractor("features", network.features, run.device)
    report = run.modality.reconstruction_metrics(x, model.autoencode(x), run.train.spec, extractor)
    run.log.record({"stage": "reconstruction", "step": run.settings.train.codec.steps or 0, **report})
    return {"codec": {k: round(v, 4) for k, v in report.items()}}


def make_early_stopping(run: Run, model: Model, network: FeatureNetwork | None) -> EarlyStopping:
    """Early stopping on held-out items, repeated until there are enough and in the form of the denoiser's batches."""
    held_out, batch = run.held_out, run.settings.train.denoiser.batch or 1
    count = min(max(HELD_OUT_BATCHES * batch, MIN_HELD_OUT_CHECK), MAX_HELD_OUT_CHECK)
    items = torch.arange(count) % min(len(held_out), count)
    label = training_labels(run, network, held_out)

    raw = training_conditions(run, model, held_out, label)

    def latent_batch(index: Tensor) -> Batch:
        batch = held_out.batch(index)
        latent = Latent(batch.data, batch.mask)
        if not model.codec.stochastic:
            latent = model.encode(Items.unpad(batch.data, batch.mask))
        latent = latent.to(run.device)
        return Batch(latent.z, index, raw.select(index), latent.mask)

    first_check = math.ceil(FIRST_CHECK_EPOCH * len(run.train) / batch)
    return EarlyStopping([latent_batch(index) for index in items.split(max(batch, MIN_HELD_OUT_CHECK))], first_check)


def train_denoiser(
    run: Run,
    model: Model,
    network: FeatureNetwork | None,
    latents: StoredLatents,
    raw: Raw,
    state: State | None,
) -> None:
    """Train the denoiser on latents with these conditions."""
    settings, autoguidance = run.settings.train.denoiser, run.settings.sample.autoguidance
    step = denoiser_step(model, run.settings).to(run.device)
    snapshot = None if autoguidance in (None, 1) else GuideSnapshot(GUIDE_SHARE)
    early_stopping = make_early_stopping(run, model, network) if run.settings.train.early_stopping else None
    step_budget = make_step_budget(run, settings, "denoiser")
    trainer = make_trainer(run, step, settings, step_budget, "denoiser", state, snapshot, early_stopping)
    batches = denoiser_batches(run, model, latents, raw)
    items = range(run.modality.preview_items)

    def preview() -> tuple[str, Any]:
        """Generated items, one class per row, from the current average."""
        if snapshot is not None and snapshot.step >= MIN_GUIDE_STEP and model.guide is None:
            model.add_guide(snapshot.weights, snapshot.step)
        new = preview_conditions(model.conditioner, items, run.settings.seed)
        x = model.decode(model.sample(items, new, seed=run.settings.seed))
        return "samples", run.modality.preview(x, run.train.spec)

    run_trainer(run, trainer, batches, preview)  # the last preview has added the guide, if there is one
    if model.guide is None:
        model.config.sample["autoguidance"] = 1.0
