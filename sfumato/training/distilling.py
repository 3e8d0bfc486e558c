"""From a teacher to a few-step model: its trajectories, then a network that jumps to their ends."""

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sfumato import __version__
from sfumato.config import StageSettings
from sfumato.core import Trajectories, fly, joined, prior, shaken, step_generator, time_grid
from sfumato.data import check_swappable, swapped_folder
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.model import JUMP, Card, Model, Sampling, load, read_json, write_json
from sfumato.nn import count_parameters
from sfumato.nn.blocks import with_clocks
from sfumato.training.card import write_few_step_card
from sfumato.training.feeds import JumpFeed
from sfumato.training.horizon import Horizon
from sfumato.training.log import Log, Progress
from sfumato.training.loop import Trainer
from sfumato.training.measure import Speed, measure_step
from sfumato.training.run import is_run, make_accelerator, one_process
from sfumato.training.steps import JumpStep

SHARE = 0.2  # of the teacher's training time, unless told otherwise
SMALLEST = 10.0  # seconds: below this little but imports and measuring would happen
FEWEST = 20  # optimizer steps: with fewer nothing would be learned
FINISH_SHARE, FINISH_SECONDS = 0.03, 1.5  # of the budget, kept back for checking and saving
KNOTS = 8  # steps of a trajectory: with six, those of a well-trained teacher end elsewhere
BATCH = 512  # states of trajectories in a step, at most: the teacher's batch is known to suit the network
RATE = 2e-3  # peak learning rate
REUSE = 6  # times that each trajectory is trained on: a new one costs as much as five states of an old one
AT_ONCE = 4  # batches of trajectories made at once: larger ones are faster
MEMORY = 2**30  # bytes of trajectories at most
JUMPS = 2  # what the few-step model does unless told otherwise
CHECKED = 1_000  # trajectories that it is compared with at the end


@dataclass(frozen=True)
class Wish:
    """What the user asked for: folder, seconds or steps (or neither), guidance (None: the teacher's) and the rest."""

    out: Path
    seconds: float | None
    steps: int | None
    guidance: float | None
    overwrite: bool
    seed: int
    device: str | None


def run(model: Path | str | Model, wish: Wish, started: float, progress: Progress | None) -> Model:
    """Distill a model into a new folder, whole or not at all.

    Args:
        model: The teacher, or its folder.
        wish: What is asked for.
        started: When the clock of the budget started (`time.monotonic`).
        progress: Who shows how far it is.
    """
    folder = model.folder if isinstance(model, Model) else Path(model)
    check_target(wish.out, folder, wish.overwrite)
    place = wish.device or (str(model.device) if isinstance(model, Model) else default_device())
    record = read_json(folder / "run.json") if folder is not None and (folder / "run.json").is_file() else {}
    precision = record.get("plan", {}).get("train", {}).get("precision") or best_precision(place)
    accelerator = make_accelerator(place, precision)
    teacher = load(model, place) if not isinstance(model, Model) else model.to(place)
    check_teacher(teacher, "the model" if folder is None else str(folder))
    seconds = budget(wish, record)
    with swapped_folder(wish.out) as partial:
        log = Log(partial, progress)
        try:
            lesson = Lesson(teacher, wish, record, accelerator, log, started + seconds - finish(seconds))
            lesson.give()
            lesson.write(partial, folder, started)
        finally:
            log.close()
    lesson.student.folder = wish.out
    return lesson.student


def check_target(out: Path, teacher: Path | None, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, or must not be, before any work."""
    one_process("distill")
    if teacher is not None and out.resolve() == teacher.resolve():
        raise UserError(f"{out}: is the model that is to be distilled; name another folder with --out")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_run(out)):
        raise UserError(f"{out}: exists and is not a run of sfumato; name another folder")
    if is_run(out) and not overwrite:
        raise UserError(f"{out}: there is a model already; replace it with --overwrite")
    check_swappable(out)


def check_teacher(teacher: Model, name: str) -> None:
    """Refuse a model that cannot be distilled."""
    if teacher.card.distilled is not None:
        raise UserError(f"{name}: is a few-step model already; distill the model it was made from")
    if teacher.denoiser.predict == "eps":
        remedy = "train one with --set denoiser.predict=flow"
        raise UserError(f"{name}: it predicts eps, which tells nothing of the data where a jump begins; {remedy}")


def budget(wish: Wish, record: dict[str, Any]) -> float:
    """Seconds that everything may take; infinite where steps are given."""
    if wish.steps is not None:
        return math.inf
    if wish.seconds is not None:
        return wish.seconds
    if "seconds_taken" not in record:
        raise UserError("it is not known how long this model's training took; give --budget or --steps")
    seconds = SHARE * float(record["seconds_taken"])
    if seconds < SMALLEST:
        raise UserError(f"a fifth of this model's training is {seconds:.0f} s; give at least --budget {SMALLEST:.0f}s")
    return seconds


def finish(seconds: float) -> float:
    """What of a budget is kept for the end."""
    return FINISH_SHARE * seconds + FINISH_SECONDS if math.isfinite(seconds) else 0.0


def few_step(teacher: Model, how: Sampling) -> Model:
    """A model with the teacher's weights and a second clock, to which it gives no heed yet.

    Args:
        teacher: Any model.
        how: What it is to be taught: the teacher's way of sampling.
    """
    card = copy.deepcopy(teacher.card)
    card.denoiser["net"]["clocks"] = 2
    card.distilled = {key: getattr(how, key) for key in ("sampler", "steps", "grid", "guidance", "autoguidance")}
    card.sample |= {"sampler": JUMP, "steps": JUMPS, "grid": teacher.modality.jump_grid}
    card.sample |= {"guidance": 1.0, "autoguidance": 1.0, "interval": None}
    card.guide = None  # built in
    student = Model(Card(**vars(card))).to(teacher.device)
    for name, part in student.parts.items():
        weights = teacher.parts[name].state_dict()
        part.load_state_dict(with_clocks(weights, 2) if name == "denoiser" else weights)
    student.codec.eval().requires_grad_(False)
    return student


class Flown(NamedTuple):
    """Trajectories with the class numbers (N,) they were made under, and the seconds they took."""

    made: tuple[Trajectories, Tensor | None]
    seconds: float


class Lesson:
    """A distillation under way.

    Args:
        teacher: What is followed.
        wish: What the user asked for.
        record: What is recorded of the teacher's training.
        accelerator: Device and precision.
        log: Records and progress.
        deadline: When training has to end (`time.monotonic`); infinite where steps are given.
    """

    def __init__(
        self,
        teacher: Model,
        wish: Wish,
        record: dict[str, Any],
        accelerator: Accelerator,
        log: Log,
        deadline: float,
    ) -> None:
        weight = teacher.sampling.guidance if wish.guidance is None else wish.guidance
        self.how = replace(teacher.sampling, guidance=weight if teacher.conditioner.classes else 1.0)
        self.teacher, self.student = teacher, few_step(teacher, self.how)
        self.out, self.seed, self.record = wish.out, wish.seed, record
        self.accelerator, self.log, self.deadline = accelerator, log, deadline
        theirs = record.get("plan", {}).get("train", {}).get("denoiser", {}).get("batch")
        self.settings = StageSettings(
            steps=wish.steps,
            batch=min(BATCH, theirs or BATCH),
            lr=RATE,
            optimizer="adamw",
            decay=0.5,
            clip=1.0,
            ema=0.1,
            weight_decay=0.0,
        )
        self.facts: dict[str, Any] = {}

    @property
    def batch(self) -> int:
        """States of trajectories in a step."""
        return self.settings.batch or 1

    @property
    def left(self) -> float:
        """Seconds until training has to end."""
        return self.deadline - time.monotonic()

    @property
    def kit(self) -> dict[str, Any]:
        """What every trainer is given."""
        return {"stage": "distill", "seed": self.seed, "accelerator": self.accelerator}

    def give(self) -> None:
        """Plan, make the trajectories, train, and measure what came of it."""
        self.log.show("trajectories", 0, 1)
        began = time.monotonic()
        first = Flown(self.flown(0, self.batch), time.monotonic() - began)
        speed = self.plan(first) if self.settings.steps is None else None
        flights, label = self.trajectories(first, speed)
        self.train(flights, label, speed)
        self.student.eval()
        self.facts |= {"trajectories": len(flights), "knots": KNOTS, "miss": self.misses()}
        self.log.picture("samples", self.sheet(), self.facts["steps"])

    @torch.no_grad()
    def flown(self, number: int, count: int) -> tuple[Trajectories, Tensor | None]:
        """New trajectories of the teacher, and the class numbers (N,) they were made under.

        As in training some go without a label, so that the few-step model still knows how to.
        """
        generator = step_generator(self.seed, "distill/flights", number)
        schedule, place = self.teacher.denoiser.schedule, self.teacher.device
        noise = torch.randn(count, *self.teacher.codec.latent_shape, generator=generator)
        grid = shaken(time_grid(schedule, KNOTS, self.how.grid), torch.rand(count, generator=generator) - 0.5)
        label, classes = None, self.teacher.conditioner.classes
        if classes:
            label = torch.randint(classes, (count,), generator=generator)
            label = self.teacher.conditioner.drop(label, generator)
        with self.accelerator.autocast():
            denoise = self.teacher.denoise(label, count, self.how)
            flights = fly(denoise, schedule, prior(schedule, lambda: noise.to(place)), grid)
        return Trajectories(flights.grid, flights.z.cpu(), flights.z_hat.cpu()), label

    def plan(self, first: Flown) -> Speed:
        """The time of a real step; refuses a budget in which nothing would be learned."""
        speed = self.measured(*first.made)
        self.deadline -= first.seconds * CHECKED / self.batch  # what the check at the end takes
        need = FEWEST * (speed.seconds + first.seconds / REUSE) - self.left
        if need > 0:
            raise UserError(f"the budget is too small for this model; give {math.ceil(need)} s more with --budget")
        return speed

    def trajectories(self, first: Flown, speed: Speed | None) -> tuple[Trajectories, Tensor | None]:
        """As many as training wants and memory holds, and their class numbers.

        Args:
            first: The first batch of them.
            speed: Of a training step; None where the user told the number of steps.
        """
        parts, made, flight = [first.made], 1, first.seconds
        began = time.monotonic()
        while made < (sets := self.sets(made, flight, speed)):
            count = min(AT_ONCE, sets - made)
            parts.append(self.flown(made, count * self.batch))
            made += count
            flight = (time.monotonic() - began) / (made - 1)
            self.log.show("trajectories", made, max(made, sets), {"eta": flight * max(0, sets - made)})
        if speed is not None:
            self.facts["measured"] = {"trajectories": self.batch / flight, **speed._asdict()}
        labels = [label for _, label in parts if label is not None]
        return joined([flights for flights, _ in parts]), torch.cat(labels) if labels else None

    def sets(self, made: int, flight: float, speed: Speed | None) -> int:
        """Batches of trajectories that there have to be for each to be trained on `REUSE` times.

        With x more, which take f seconds each, (made + x) REUSE steps of τ seconds are to fill what is left then:
        (made + x) REUSE τ = left - x f.

        Args:
            made: How many there are.
            flight: f.
            speed: τ; None where the user told the number of steps.
        """
        if speed is None:
            wanted = math.ceil((self.settings.steps or 1) / REUSE)
        else:
            used = REUSE * speed.seconds
            wanted = made + max(0, int((self.left - made * used) / (flight + used)))
        bytes_each = 4 * (2 * KNOTS + 1) * self.teacher.codec.latent_size
        return min(wanted, max(1, MEMORY // (bytes_each * self.batch)))

    def measured(self, flights: Trajectories, label: Tensor | None) -> Speed:
        """Seconds and operations of a real step, on a copy that is thrown away."""
        parts = copy.deepcopy((self.student.denoiser, self.student.conditioner))
        seconds = min(1.2, 0.05 * self.left)
        return measure_step(JumpStep(*parts), self.settings, self.feed(flights, label), seconds=seconds, **self.kit)

    def feed(self, flights: Trajectories, label: Tensor | None) -> JumpFeed:
        """States of these trajectories."""
        return JumpFeed(flights, label, self.batch, self.seed, str(self.teacher.device))

    def train(self, flights: Trajectories, label: Tensor | None, speed: Speed | None) -> None:
        """Teach the student; its average becomes its weights."""
        steps = self.settings.steps or 1 if speed is None else max(FEWEST, int(self.left / speed.seconds))
        self.settings.steps, self.settings.warmup = steps, min(20, steps // 10)
        step = JumpStep(self.student.denoiser, self.student.conditioner)
        horizon = Horizon(steps, max(1.0, self.left))
        flops, peak = speed.flops if speed else 0.0, float(self.record.get("peak", 1.0))
        trainer = Trainer(step, self.settings, horizon, flops=flops, peak=peak, **self.kit)
        for report in trainer.run(self.feed(flights, label), lambda: None, save_every=math.inf):
            self.log.report(report)
        trainer.ema.apply()
        self.facts |= {"steps": trainer.done, "amendments": horizon.amendments}

    @torch.no_grad()
    def misses(self) -> dict[str, float]:
        """How far from the ends of new trajectories jumps land, from noise and from halfway, by the time of these.

        Root mean square, of latents of unit variance.
        """
        flights, label = self.flown(-1, CHECKED)
        jump, found = self.student.jump(label, CHECKED), dict[str, float]()
        for knot in (0, KNOTS // 2):
            z, t = flights.z[knot].to(self.student.device), flights.grid[knot]
            miss = jump.end(z, t).cpu() - flights.z[-1]
            found[f"{t.mean():.2f}"] = round(float(miss.square().mean().sqrt()), 4)
        return found

    def sheet(self) -> Any:
        """Items of the few-step model, that a class each row would show."""
        model, row = self.student, self.student.modality
        items, classes = range(row.shown), model.conditioner.classes
        labels = torch.arange(len(items)) % classes if classes else None
        return row.sheet(model.decode(model.sample(items, labels, seed=self.seed)), model.card.mode, None)

    def write(self, folder: Path, teacher: Path | None, started: float) -> None:
        """The model, its card and its record, in which what is said of data and codec is the teacher's."""
        self.student.save(folder)
        record = self.record
        kept = {key: record[key] for key in ("source", "versions", "data", "plan", "done") if key in record}
        plan = self.settings.model_dump() | {"steps": self.facts.pop("steps")}
        metrics = {key: value for key, value in record.get("metrics", {}).items() if key == "codec"}
        metrics |= {"parameters": {k: count_parameters(v) for k, v in self.student.parts.items()}}
        told = {"teacher": None if teacher is None else str(teacher), **vars(self.how), "train": plan, **self.facts}
        seconds = round(time.monotonic() - started, 1)
        written = {
            "source": None,
            **kept,
            "sfumato": __version__,
            "seed": self.seed,
            "device": str(self.student.device),
        }
        write_json(folder / "run.json", written | {"metrics": metrics, "distilled": told, "seconds_taken": seconds})
        write_few_step_card(folder, self.out, told, seconds, self.student.modality.example)
