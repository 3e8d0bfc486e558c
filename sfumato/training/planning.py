"""From a job to its plan: measures the machine and a few real steps, and decides what is still open."""

import math
import platform
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from sfumato import __version__
from sfumato.config import Settings, StageSettings
from sfumato.errors import UserError
from sfumato.machine import measure_peak
from sfumato.modality import Facts
from sfumato.nn.classifier import Classifier
from sfumato.nn.semi import MOST, ROUNDS, seen_once
from sfumato.nn.spread import comparing
from sfumato.training.build import (
    codec_step,
    denoiser_step,
    feature_network,
    guesses_labels,
    latent_feed,
    needs_network,
    new_model,
    untrained_features,
    uses_features,
)
from sfumato.training.feeds import DataFeed
from sfumato.training.horizon import Horizon
from sfumato.training.job import Job
from sfumato.training.loop import Feed, Trainer
from sfumato.training.measure import Speed, count_operations, measure_step
from sfumato.training.plan import (
    FEATURE_SHARE,
    FEATURE_STEPS,
    GUESS_SHARE,
    GUESS_STEPS,
    WARMUP,
    blank_codec,
    filled,
    make_plan,
    most_steps,
)
from sfumato.training.steps import TrainStep

LATE = 999_999  # a step of a million at which every term of the loss plays
ENCODING_SHARE = 0.15  # of the budget; of more items than can be encoded in it, so many are drawn
FEWEST_ENCODED = 5_000
BRIEF = 0.1  # seconds that the steps of a plan that is only tried take, at least
LOOKED_AT, GUESSED = 2_000, 12  # images and steps that guessing labels is measured on
WITHOUT_BUDGET = 600.0  # seconds that sizes are planned for where steps are given


class Features(NamedTuple):
    """What the small network costs: its steps, and where labels are guessed what is beside them.

    Args:
        step: Seconds of a step.
        look: Seconds in which an image is looked at.
        compare: Seconds in which all images are compared with one another.
        known: Images with a label, where labels are guessed.
        open: Images without one that are learned from at most.
    """

    step: float
    look: float = 0.0
    compare: float = 0.0
    known: int = 0
    open: int = 0

    def seconds(self, steps: int) -> float:
        """Of so many steps; the fewer they are, the fewer open images are worth a look."""
        images = self.known + min(self.open, seen_once(steps))
        share = images / max(1, self.known + self.open)
        return steps * self.step + images * self.look + share**2 * self.compare


def decide(job: Job, steps: int | None, size: str | None) -> None:
    """Fix every setting, in the job and in its record: from here on the run is deterministic."""
    job.log.show("plan", 0, 1)
    peak = measure_peak(job.precision, job.device)
    facts = Facts(job.train.shape, job.train.mode, len(job.train), job.classes, job.precision)
    budget = job.settings.budget_seconds
    left = WITHOUT_BUDGET if steps is not None or budget is None else budget - (time.monotonic() - job.started)
    if steps is not None or job.settings.train.denoiser.steps is not None:
        job.settings.train.watch = bool(job.settings.train.watch)  # a number of steps that was given holds
    tried: dict[str, Speed] = {}
    pace = measured_pace(job, facts, left, tried) if steps is None else None
    job.settings = make_plan(job.modality, job.settings, replace(facts, pace=pace), left, size)
    share = job.modality.codec_share if blank_codec(job.modality, job.settings, facts).learns else 0.0
    job.record.update(
        {
            "source": job.source,
            "sfumato": __version__,
            "asked": {"steps": steps, "size": size},
            "seed": job.settings.seed,
            "device": job.device,
            "peak": peak,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "data": {
                "fingerprint": job.train.fingerprint,
                "items": len(job.train),
                "held_out": len(job.held),
                "shape": list(job.train.shape),
                "mode": job.train.mode,
                "classes": job.classes,
                **({"notes": job.train.notes} if job.train.notes else {}),
            },
        }
    )
    if steps is not None:
        divide_steps(job, steps, share)
        rehearse(job)
    else:
        assert budget is not None
        divide_time(job, budget, share, tried)
    for stage in (job.settings.train.codec, job.settings.train.denoiser):
        stage.warmup = min(WARMUP, (stage.steps or 0) // 10) if stage.warmup is None else stage.warmup
    job.accelerator.free_memory()  # it holds what was tried
    job.record["plan"] = job.settings.model_dump()
    job.log.show("plan", 1, 1)
    encoded = job.settings.train.encoded or 0
    if encoded < len(job.train):
        note = f"the second stage learns from {encoded:,} of {len(job.train):,} items: the budget encodes no more"
        job.log.tell([f"{job.source}: {note}"])


def divide_steps(job: Job, steps: int, share: float) -> None:
    """Give the first stage its share of a number of steps, the second one the rest."""
    codec, denoiser = job.settings.train.codec, job.settings.train.denoiser
    if share:
        first = min(steps - 1, max(1, round(steps * share)))
        if denoiser.steps is not None:
            first = max(1, steps - denoiser.steps)
        codec.steps = codec.steps or first
    denoiser.steps = denoiser.steps or max(1, steps - (codec.steps or 0))
    if job.settings.codec.perceptual_steps is None:
        job.settings.codec.perceptual_steps = min(FEATURE_STEPS, steps)
    job.settings.train.encoded = job.settings.train.encoded or len(job.train)


def rehearse(job: Job) -> None:
    """Take one step of each stage, to be thrown away: a plan that cannot be run fails here."""
    with torch.random.fork_rng(devices=[]):
        network = untrained_features(job) if needs_network(job) else None
        for stage, (step, settings, feed) in stage_copies(job, network).items():
            kit: dict[str, Any] = {"stage": stage, "seed": job.settings.seed, "accelerator": job.accelerator}
            trainer = Trainer(step, settings, Horizon(LATE + 1), **kit)
            trainer.done = LATE
            flops = count_operations(trainer, feed.batch(0))
            job.record.setdefault("measured", {})[stage] = {"flops": flops}


def divide_time(job: Job, budget: float, share: float, tried: dict[str, Speed]) -> None:
    """Give the first stage its share of the budget's seconds, the second one the rest, by the time of real steps.

    Raises:
        UserError: So little is left for training that nothing would be learned, or less than what the user fixed takes.
    """
    codec, denoiser = job.settings.train.codec, job.settings.train.denoiser
    features, speeds = measure_stages(job, tried)
    coding = speeds.get("codec", Speed(0.0, 0.0))
    if job.settings.codec.perceptual_steps is None:
        part, most = (GUESS_SHARE, GUESS_STEPS) if guesses_labels(job) else (FEATURE_SHARE, FEATURE_STEPS)
        affordable = bisect_right(range(most + 1), part * budget, key=features.seconds) - 1
        job.settings.codec.perceptual_steps = max(20, affordable)
    fixed = features.seconds(job.settings.codec.perceptual_steps)
    encoding = coding.seconds / 5 / (codec.batch or 1)  # an item, once: without the way back, and no decoder
    if job.settings.train.encoded is None:
        affordable = int(ENCODING_SHARE * budget / max(encoding, 1e-12))
        job.settings.train.encoded = min(len(job.train), max(FEWEST_ENCODED, affordable))
    fixed += job.settings.train.encoded * encoding
    stages = {name: stage for name, stage in (("codec", codec), ("denoiser", denoiser)) if name in speeds}
    fixed += sum((stage.steps or 0) * speeds[name].seconds for name, stage in stages.items())
    shares = {"codec": share, "denoiser": 1 - share}
    wanted = {name: shares[name] for name, stage in stages.items() if stage.steps is None}
    job.record["seconds"] = {}
    left, whole = job.seconds_left() - fixed, sum(wanted.values())
    if left < 0.25 * whole * budget:
        need = (budget - left) / (1 - 0.3 * whole)
        raise UserError(f"--budget {budget:g}s is too small for these data on this machine; give at least {need:.0f}s")
    for name, part in wanted.items():  # what the user fixed, the clock does not amend
        seconds, most = part / whole * left, most_steps(stages[name], len(job.train))
        stages[name].steps = int(min(max(1, seconds / speeds[name].seconds), most))
        job.record["seconds"][name] = seconds
    job.record["measured"] = {name: speed._asdict() for name, speed in speeds.items()}


def stage_copies(job: Job, network: Classifier | None) -> dict[str, tuple[TrainStep, StageSettings, Feed]]:
    """What each stage would train, how and on what, to be thrown away; at step `LATE` every term of the loss plays."""
    settings, train = job.settings, job.settings.train
    model = new_model(job)
    z = torch.randn(4096, *model.codec.latent_shape)
    label = torch.arange(4096) % job.classes if job.classes else None
    copies: dict[str, tuple[TrainStep, StageSettings, Feed]] = {}
    if model.codec.learns:
        step = codec_step(model, settings, network, Horizon(LATE + 1)).to(job.device)
        copies["codec"] = (step, train.codec, DataFeed(job.train, train.codec, settings.seed, "codec", job.device))
    latents = latent_feed(job, model, z, label)
    return copies | {"denoiser": (denoiser_step(model, settings).to(job.device), train.denoiser, latents)}


def measure_network(job: Job) -> tuple[Classifier | None, Features]:
    """The small network, hardly trained, and what it costs.

    Where labels have to be guessed, looking at images is measured on a few, comparing each with every other on a part
    of the comparisons of all.
    """

    def timed(of: Job, steps: int) -> tuple[Classifier, float]:
        began = time.perf_counter()
        return feature_network(of, steps, MOST), time.perf_counter() - began

    if not needs_network(job):
        return None, Features(0.0)
    if not guesses_labels(job):
        timed(job, 1)  # the first step of the process is a slow one
        network, seconds = timed(job, 5)
        return network, Features(seconds / 5)
    labels = torch.from_numpy(job.train.labels)
    order = labels.argsort(descending=True)  # labelled ones first
    some = torch.cat([order[: LOOKED_AT // 4], order[-3 * LOOKED_AT // 4 :]]).unique()
    known = int((labels >= 0).sum())
    few, unknown = replace(job, train=job.train.subset(some)), min(len(labels) - known, MOST)
    timed(few, 0)  # what a process does for the first time is slow
    looks, (network, seconds) = timed(few, 0)[1], timed(few, GUESSED)
    step = max(seconds - looks, seconds / 10) / GUESSED  # the difference of two noisy times, which may be none
    part, whole = (ROUNDS * comparing(count) for count in (len(some), known + unknown))
    return network, Features(step, max(looks - part, 0.0) / len(some), whole, known, unknown)


def measured_pace(job: Job, facts: Facts, seconds: float, tried: dict[str, Speed]) -> Callable[[str, Settings], float]:
    """What says how many items a second a stage gets through, from a few real steps, thrown away; fills in `tried`."""
    given = job.settings

    def pace(stage: str, wanted: Settings) -> float:
        # what is not asked about is planned without measuring
        trial = replace(job, settings=make_plan(job.modality, filled(given, wanted), facts, seconds))
        with torch.random.fork_rng(devices=[]):
            network = untrained_features(trial) if stage == "codec" and uses_features(trial.settings) else None
            step, settings, feed = stage_copies(trial, network)[stage]
            kit: dict[str, Any] = {"stage": stage, "seed": given.seed, "accelerator": job.accelerator}
            speed = tried[decisive(stage, trial.settings)] = mean_speed(step, settings, feed, seconds=BRIEF, **kit)
            return (settings.batch or 1) / speed.seconds

    return pace


def decisive(stage: str, settings: Settings) -> str:
    """The settings that say how long a step of a stage takes."""
    parts = {"codec", "denoiser"} if stage == "denoiser" else {"codec"}
    return stage + settings.model_dump_json(include={**dict.fromkeys(parts, True), "train": {stage, "precision"}})


def measure_stages(job: Job, tried: dict[str, Speed]) -> tuple[Features, dict[str, Speed]]:
    """What the small network costs, and seconds and operations of a real step of each stage.

    The latter are as `tried` has them, or taken on copies that are thrown away.
    """
    settings, speeds = job.settings, dict[str, Speed]()
    with torch.random.fork_rng(devices=[]):
        network, features = measure_network(job)
        kit: dict[str, Any] = {"seed": settings.seed, "accelerator": job.accelerator}
        for stage, copy in stage_copies(job, network).items():
            speeds[stage] = tried.get(decisive(stage, settings)) or mean_speed(*copy, stage=stage, **kit)
    return features, speeds


def mean_speed(step: TrainStep, settings: StageSettings, feed: Feed, **kit: Any) -> Speed:
    """Seconds and operations of a step, averaged over a stage whose terms begin one after the other."""
    spans = list(pairwise([*step.turns, LATE + 1]))
    shares = [(end - begin) / (LATE + 1) for begin, end in spans]
    speeds = [measure_step(step, settings, feed, first=begin, **kit) for begin, _ in spans]
    seconds, flops = (sum(map(math.prod, zip(shares, part, strict=True))) for part in zip(*speeds, strict=True))
    return Speed(seconds, flops)
