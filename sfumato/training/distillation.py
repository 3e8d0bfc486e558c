"""Distillation of a few-step model: sample the teacher's trajectories, then train a student to jump to their ends."""

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from sfumato import __version__
from sfumato.conditioners import TextCondition
from sfumato.config import StageSettings
from sfumato.core import Trajectories, concat, initial_noise, integrate_trajectories, jitter, step_generator, time_grid
from sfumato.data.output import check_swappable, swapped_folder
from sfumato.errors import UserError
from sfumato.hardware import best_precision, default_device
from sfumato.model import Model, load
from sfumato.nn import count_parameters
from sfumato.nn.layers import pad_clock_weights
from sfumato.sampling import JUMP, Sampling, preview_conditions, random_conditions
from sfumato.storage import ModelConfig, read_json, write_json
from sfumato.training.budget import StepBudget
from sfumato.training.launch import is_run, make_accelerator, require_single_process
from sfumato.training.log import Log, StageProgress
from sfumato.training.model_card import write_few_step_card
from sfumato.training.profile import StepCost, measure_step
from sfumato.training.trainer import Trainer
from sfumato.training.trajectories import DistillationStep, TrajectoryBatches
from sfumato.types import Raw

TRAINING_SHARE = 0.2  # default budget relative to the teacher's training time
MIN_DISTILL_BUDGET = 10.0  # seconds; a shorter budget would be spent on imports and measurements
MIN_DISTILL_STEPS = 20  # optimizer steps; with fewer, nothing is learned
DISTILL_RESERVE_SHARE = 0.03  # share of the budget reserved for evaluation and saving
DISTILL_RESERVE_SECONDS = 1.5  # seconds reserved for the same, in addition
TRAJECTORY_STEPS = 8  # steps of a trajectory; with 6, those of a well-trained teacher end elsewhere
MAX_BATCH = 512  # states per training step, at most; also limited to the teacher's batch size, which suits the network
DISTILL_LR = 2e-3  # peak learning rate of AdamW, decays to zero
REUSE = 6  # training states per trajectory: sampling a trajectory costs as much as training on five states
BATCHES_AT_ONCE = 4  # batches of trajectories sampled together, which is faster
MAX_TRAJECTORY_BYTES = 2**30  # memory for trajectories
DEFAULT_JUMPS = 2  # sampling steps of the few-step model
CHECK_TRAJECTORIES = 1_000  # new trajectories that the student is evaluated on


@dataclass(frozen=True)
class DistillConfig:
    """Options of a distillation.

    Args:
        out: Folder of the few-step model.
        seconds: Budget; None for the default, or if steps are given.
        steps: Optimizer steps, or None.
        guidance: Guidance weight of the teacher; None for the model's own.
        overwrite: Replace an existing model.
        seed: Random seed.
        device: Where to compute; None for the default.
    """

    out: Path
    seconds: float | None
    steps: int | None
    guidance: float | None
    overwrite: bool
    seed: int
    device: str | None


def distill_model(
    model: Path | str | Model, config: DistillConfig, started: float, progress: StageProgress | None
) -> Model:
    """Distill a model into a new folder, which is written completely or not at all.

    Args:
        model: The teacher, or its folder.
        config: The user's options.
        started: Start of the budget (`time.monotonic`).
        progress: Called with progress; None to show nothing.
    """
    folder = model.folder if isinstance(model, Model) else Path(model)
    check_target(config.out, folder, config.overwrite)
    device = config.device or (str(model.device) if isinstance(model, Model) else default_device())
    record = read_json(folder / "run.json") if folder is not None and (folder / "run.json").is_file() else {}
    precision = record.get("plan", {}).get("train", {}).get("precision") or best_precision(device)
    accelerator = make_accelerator(device, precision)
    teacher = load(model, device) if not isinstance(model, Model) else model.to(device)
    check_teacher(teacher, "the model" if folder is None else str(folder))
    seconds = distill_seconds(config, record)
    with swapped_folder(config.out) as partial:
        log = Log(partial, progress)
        try:
            deadline = started + seconds - reserve_seconds(seconds)
            distiller = Distiller(teacher, config, record, accelerator, log, deadline)
            distiller.run()
            distiller.save(partial, folder, started)
        finally:
            log.close()
    distiller.student.folder = config.out
    return distiller.student


def check_target(out: Path, teacher: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before any work."""
    require_single_process("distill")
    if teacher is not None and out.resolve() == teacher.resolve():
        raise UserError(f"{out}: is the folder of the teacher; name another folder with --out")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_run(out)):
        raise UserError(f"{out}: exists and is not a run of sfumato; name another folder")
    if is_run(out) and not overwrite:
        raise UserError(f"{out}: there is a model already; replace it with --overwrite")
    check_swappable(out)


def check_teacher(teacher: Model, name: str) -> None:
    """Refuse a model that cannot be distilled."""
    if teacher.config.distilled is not None:
        raise UserError(f"{name}: is a few-step model already; distill its teacher instead")
    if teacher.codec.tokens:
        raise UserError(f"{name}: few-step models of items of several lengths are not supported")
    if teacher.conditioner.of_kind(TextCondition):
        raise UserError(f"{name}: few-step models of text conditions are not supported")
    if teacher.config.denoiser["predict"] == "eps":
        remedy = "train one with --set denoiser.predict=flow"
        raise UserError(
            f"{name}: it predicts eps, which carries no information on the data at t = 1, where jumps start; {remedy}"
        )


def distill_seconds(config: DistillConfig, record: dict[str, Any]) -> float:
    """Budget in seconds; infinite if steps are given."""
    if config.steps is not None:
        return math.inf
    if config.seconds is not None:
        return config.seconds
    if "seconds_taken" not in record:
        raise UserError("the training time of this model is unknown; give --budget or --steps")
    seconds = TRAINING_SHARE * float(record["seconds_taken"])
    if seconds < MIN_DISTILL_BUDGET:
        default = f"a fifth of this model's training time is {seconds:.0f} s"
        raise UserError(f"{default}; give at least --budget {MIN_DISTILL_BUDGET:.0f}s")
    return seconds


def reserve_seconds(seconds: float) -> float:
    """Seconds of a budget reserved for evaluation and saving."""
    return DISTILL_RESERVE_SHARE * seconds + DISTILL_RESERVE_SECONDS if math.isfinite(seconds) else 0.0


def new_student(teacher: Model, sampling: Sampling) -> Model:
    """A model with the teacher's weights and a second time input s, whose weights are zero.

    Args:
        teacher: Any model.
        sampling: The teacher's sampling, to be distilled.
    """
    config = copy.deepcopy(teacher.config)
    config.denoiser["net"]["clocks"] = 2
    config.distilled = {key: getattr(sampling, key) for key in ("sampler", "steps", "grid", "guidance", "autoguidance")}
    config.sample |= {"sampler": JUMP, "steps": DEFAULT_JUMPS, "grid": teacher.modality.jump_grid}
    config.sample |= {"guidance": 1.0, "autoguidance": 1.0, "interval": None}
    config.guide = None  # autoguidance is built in
    student = Model(ModelConfig(**vars(config))).to(teacher.device)
    for name, part in student.parts.items():
        weights = teacher.parts[name].state_dict()
        part.load_state_dict(pad_clock_weights(weights, 2) if name == "denoiser" else weights)
    student.codec.eval().requires_grad_(False)
    return student


class TimedTrajectories(NamedTuple):
    """Trajectories with their conditions, and the seconds that sampling them took."""

    trajectories: tuple[Trajectories, Raw]
    seconds: float


class Distiller:
    """A distillation run.

    Args:
        teacher: The teacher.
        config: The user's options.
        record: The teacher's `run.json`.
        accelerator: Device and precision.
        log: Metrics and progress.
        deadline: End of training (`time.monotonic`); infinite if steps are given.
    """

    def __init__(
        self,
        teacher: Model,
        config: DistillConfig,
        record: dict[str, Any],
        accelerator: Accelerator,
        log: Log,
        deadline: float,
    ) -> None:
        weight = teacher.sampling.guidance if config.guidance is None else config.guidance
        self.sampling = replace(teacher.sampling, guidance=weight if teacher.conditioner.names else 1.0)
        self.teacher, self.student = teacher, new_student(teacher, self.sampling)
        self.out, self.seed, self.record = config.out, config.seed, record
        self.accelerator, self.log, self.deadline = accelerator, log, deadline
        teacher_batch = record.get("plan", {}).get("train", {}).get("denoiser", {}).get("batch")
        self.settings = StageSettings(
            steps=config.steps,
            batch=min(MAX_BATCH, teacher_batch or MAX_BATCH),
            lr=DISTILL_LR,
            optimizer="adamw",
            decay=0.5,
            clip=1.0,
            ema=0.1,
            weight_decay=0.0,
        )
        self.results: dict[str, Any] = {}

    @property
    def batch(self) -> int:
        """Batch size: states per training step."""
        return self.settings.batch or 1

    @property
    def left(self) -> float:
        """Seconds left for training."""
        return self.deadline - time.monotonic()

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Arguments common to all trainers."""
        return {"stage": "distill", "seed": self.seed, "accelerator": self.accelerator}

    def run(self) -> None:
        """Sample trajectories, train the student and evaluate it."""
        self.log.show("trajectories", 0, 1)
        start = time.monotonic()
        first = TimedTrajectories(self.teacher_trajectories(0, self.batch), time.monotonic() - start)
        cost = self.reserve_check_time(first) if self.settings.steps is None else None
        trajectories, raw = self.all_trajectories(first, cost)
        self.train(trajectories, raw, cost)
        self.student.eval()
        self.results |= {"trajectories": len(trajectories), "knots": TRAJECTORY_STEPS, "miss": self.jump_errors()}
        self.log.image("samples", self.preview(), self.results["steps"])

    @torch.no_grad()
    def teacher_trajectories(self, number: int, count: int) -> tuple[Trajectories, Raw]:
        """New trajectories of the teacher and their conditions.

        As in training, some are dropped, so that the student also learns unconditional sampling.

        Args:
            number: Number of this set of trajectories, the address of its random numbers.
            count: Number of trajectories.
        """
        generator = step_generator(self.seed, "distill/flights", number)
        schedule, device = self.teacher.denoiser.schedule, self.teacher.device
        noise = torch.randn(count, *self.teacher.codec.latent_shape, generator=generator)
        grid = jitter(
            time_grid(schedule, TRAJECTORY_STEPS, self.sampling.grid), torch.rand(count, generator=generator) - 0.5
        )
        raw, levels = random_conditions(self.teacher.conditioner, count, generator), schedule.levels(grid)
        with self.accelerator.autocast():
            denoise = self.teacher.denoise(raw, count, self.sampling)
            trajectories = integrate_trajectories(denoise, levels, initial_noise(levels[0], lambda: noise.to(device)))
        return Trajectories(trajectories.grid, trajectories.z.cpu(), trajectories.z_hat.cpu()), raw

    def reserve_check_time(self, first: TimedTrajectories) -> StepCost:
        """The measured cost of a training step; reserves time for the evaluation.

        Args:
            first: The first batch of trajectories.

        Raises:
            UserError: The budget does not suffice for `MIN_DISTILL_STEPS`.
        """
        cost = self.step_cost(*first.trajectories)
        self.deadline -= first.seconds * CHECK_TRAJECTORIES / self.batch  # reserved for the evaluation
        missing = MIN_DISTILL_STEPS * (cost.seconds + first.seconds / REUSE) - self.left
        if missing > 0:
            raise UserError(f"the budget is too small for this model; give {math.ceil(missing)} s more with --budget")
        return cost

    def all_trajectories(self, first: TimedTrajectories, cost: StepCost | None) -> tuple[Trajectories, Raw]:
        """As many trajectories as training needs and memory holds, and their conditions.

        Args:
            first: The first batch of trajectories.
            cost: Cost of a training step; None if the user fixed the number of steps.
        """
        parts, done, batch_seconds = [first.trajectories], 1, first.seconds
        start = time.monotonic()
        while done < (total := self.batches_needed(done, batch_seconds, cost)):
            count = min(BATCHES_AT_ONCE, total - done)
            parts.append(self.teacher_trajectories(done, count * self.batch))
            done += count
            batch_seconds = (time.monotonic() - start) / (done - 1)
            self.log.show("trajectories", done, max(done, total), {"eta": batch_seconds * max(0, total - done)})
        if cost is not None:
            self.results["measured"] = {"trajectories": self.batch / batch_seconds, **cost._asdict()}
        return concat([trajectories for trajectories, _ in parts]), Raw.concat([raw for _, raw in parts])

    def batches_needed(self, done: int, batch_seconds: float, cost: StepCost | None) -> int:
        """Number of batches of trajectories, so that each trajectory is trained on `REUSE` times.

        With x more batches of f seconds each, (done + x) REUSE steps of τ seconds fill the remaining time:
        (done + x) REUSE τ = left - x f.

        Args:
            done: Number of batches sampled so far.
            batch_seconds: f.
            cost: Cost of a training step, with τ; None if the user fixed the number of steps.
        """
        if cost is None:
            needed = math.ceil((self.settings.steps or 1) / REUSE)
        else:
            training = REUSE * cost.seconds
            needed = done + max(0, int((self.left - done * training) / (batch_seconds + training)))
        trajectory_bytes = 4 * (2 * TRAJECTORY_STEPS + 1) * self.teacher.codec.latent_size
        return min(needed, max(1, MAX_TRAJECTORY_BYTES // (trajectory_bytes * self.batch)))

    def step_cost(self, trajectories: Trajectories, raw: Raw) -> StepCost:
        """Measured cost of a training step, on a copy of the student."""
        step = DistillationStep(copy.deepcopy(self.student.main))
        batches, seconds = self.batches(trajectories, raw), min(1.2, 0.05 * self.left)
        return measure_step(step, self.settings, batches, seconds=seconds, **self.trainer_options)

    def batches(self, trajectories: Trajectories, raw: Raw) -> TrajectoryBatches:
        """Training batches of states of these trajectories."""
        return TrajectoryBatches(trajectories, raw, self.batch, self.seed, str(self.teacher.device))

    def train(self, trajectories: Trajectories, raw: Raw, cost: StepCost | None) -> None:
        """Train the student, and take the average as its weights."""
        steps = self.settings.steps or 1 if cost is None else max(MIN_DISTILL_STEPS, int(self.left / cost.seconds))
        self.settings.steps, self.settings.warmup = steps, min(20, steps // 10)
        step = DistillationStep(self.student.main)
        step_budget = StepBudget(steps, max(1.0, self.left))
        flops, peak = cost.flops if cost else 0.0, float(self.record.get("peak", 1.0))
        trainer = Trainer(step, self.settings, step_budget, flops=flops, peak=peak, **self.trainer_options)
        for report in trainer.run(self.batches(trajectories, raw), lambda: None, save_every=math.inf):
            self.log.report(report)
        trainer.ema.apply()
        self.results |= {"steps": trainer.done, "amendments": step_budget.amendments}

    @torch.no_grad()
    def jump_errors(self) -> dict[str, float]:
        """Root mean square error of one jump to the ends of new trajectories, from noise and from halfway.

        Latents have unit variance.

        Returns:
            Mean start time of the jump -> error.
        """
        trajectories, raw = self.teacher_trajectories(-1, CHECK_TRAJECTORIES)
        jump, errors = self.student.consistency_step(raw, CHECK_TRAJECTORIES), dict[str, float]()
        for i in (0, TRAJECTORY_STEPS // 2):
            z, t = trajectories.z[i].to(self.student.device), trajectories.grid[i]
            difference = jump.consistency(z, self.student.denoiser.schedule(t)).cpu() - trajectories.z[-1]
            errors[f"{t.mean():.2f}"] = round(float(difference.square().mean().sqrt()), 4)
        return errors

    def preview(self) -> Any:
        """A picture of generated items, one class per row."""
        model, modality = self.student, self.student.modality
        items = range(modality.preview_items)
        raw = preview_conditions(model.conditioner, items, self.seed)
        return modality.preview(model.decode(model.sample(items, raw, seed=self.seed)), model.config.spec)

    def save(self, folder: Path, teacher: Path | None, started: float) -> None:
        """Write the student, its model card and its `run.json`; the records of data and codec are the teacher's."""
        self.student.save(folder)
        record = self.record
        inherited = {key: record[key] for key in ("source", "versions", "data", "plan", "done") if key in record}
        settings = self.settings.model_dump() | {"steps": self.results.pop("steps")}
        metrics = {key: value for key, value in record.get("metrics", {}).items() if key == "codec"}
        metrics |= {"parameters": {k: count_parameters(v) for k, v in self.student.parts.items()}}
        distilled = {
            "teacher": None if teacher is None else str(teacher),
            **vars(self.sampling),
            "train": settings,
            **self.results,
        }
        seconds = round(time.monotonic() - started, 1)
        written = {
            "source": None,
            **inherited,
            "sfumato": __version__,
            "seed": self.seed,
            "device": str(self.student.device),
            "metrics": metrics,
            "distilled": distilled,
            "seconds_taken": seconds,
        }
        write_json(folder / "run.json", written)
        write_few_step_card(folder, self.out, distilled, seconds, self.student.modality.example_output)
