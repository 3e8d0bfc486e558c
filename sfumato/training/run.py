"""Opening a run's folder: a new one, one to replace, or one to go on with."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sfumato import __version__
from sfumato.config import Settings, read_settings, setting, setting_keys
from sfumato.data import check_writable
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.modality import find_modality, recognise
from sfumato.model import Model, load, read_json, write_json
from sfumato.training.job import Job
from sfumato.training.log import Log
from sfumato.training.planning import decide
from sfumato.training.stages import forget_latents, train_stages
from sfumato.training.state import load_state

SPARED = "the run that was to be replaced is as it was"
USUAL_BUDGET = 600.0  # seconds, where neither a budget nor steps are given
Progress = Callable[[str, int, int, Mapping[str, float]], None]
WRITTEN = (  # what a run leaves in its folder beside `run.json`
    *("model.json", "metrics.jsonl", "README.md", "samples", "codec", "conditioner", "denoiser", "guide"),
    *("cache", "checkpoint", "checkpoint.*", "checkpoint-features", "events.out.tfevents.*", "*.partial"),
)


def one_process(command: str) -> None:
    """Refuse to be one of several processes: each would plan by its own clock."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} runs in one process; start it without accelerate launch or torchrun")


def check_folder(folder: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the folder before any work.

    Returns:
        With `resume`, the record of the run to go on with, if it got as far as a plan; else None.
    """
    present = folder.is_dir() and any(folder.iterdir())
    if folder.is_file() or (present and not is_run(folder)):
        raise UserError(f"{folder}: exists and is not a run of sfumato; name another folder")
    if present and not (resume or overwrite):
        raise UserError(f"{folder}: there is a run already; go on with --resume, or replace it with --overwrite")
    if resume and not present:
        raise UserError(f"{folder}: there is no run to resume; leave out --resume to start one")
    record = read_json(folder / "run.json") if resume else {}
    return record if "plan" in record else None


def is_run(folder: Path) -> bool:
    """Whether the folder is ours, so that it may be replaced: other programs write a `run.json` too."""
    try:
        return {"source", "sfumato"} <= read_json(folder / "run.json").keys()
    except (UserError, OSError, AttributeError):
        return False


def begin(folder: Path, source: str) -> None:
    """Write that a run begins here; without a plan, `--resume` starts it afresh."""
    write_json(folder / "run.json", {"source": source, "sfumato": __version__})


def make_folder(folder: Path, source: str) -> None:
    """Make the folder of a new run; an old run in it stays for now."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_run(folder):
        begin(folder, source)


def check_same(asked: Settings, planned: Settings, folder: Path) -> None:
    """Refuse what is asked of a resumed run beside its plan: it would not be the same run.

    Args:
        asked: What the user fixed this time; what is at its default was not.
        planned: What the run goes on with.
        folder: Where it lives.
    """
    usual = Settings()
    for key in setting_keys():
        ours, theirs = setting(asked, key), setting(planned, key)
        if ours not in (setting(usual, key), theirs):
            raise UserError(
                f"{folder}: its plan has {key}={theirs}, not {ours}; leave that out with --resume, or start a new run"
            )


def check_asked(asked: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> None:
    """Refuse steps or a size that are not those that the run to go on with was started with."""
    for name, value in asked.items():
        before = record.get("asked", asked)[name]
        if value is not None and value != before:
            began = f"with --{name} {before}" if before is not None else f"without --{name}"
            raise UserError(f"{folder}: was begun {began}; leave --{name} out with --resume, or start a new run")


def plan(job: Job, steps: int | None, size: str | None) -> None:
    """Decide on the plan and write it; only now that it stands goes the old run, if there is one to replace."""
    folder, main = job.folder, job.accelerator.is_main_process
    try:
        decide(job, steps, size)
    except KeyboardInterrupt:
        if "plan" in read_json(folder / "run.json"):
            raise KeyboardInterrupt(SPARED) from None
        raise
    except Exception:
        if main and [path.name for path in folder.iterdir()] == ["run.json"]:  # nothing has begun: leave nothing
            shutil.rmtree(folder)
        raise
    if main:
        begin(folder, job.source)
        for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    job.write()


def make_accelerator(device: str, precision: str) -> Accelerator:
    """What knows of devices and processes.

    Raises:
        UserError: The device is not at hand.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    index = torch.device(device).index
    if index is not None and device != "cpu":
        torch.accelerator.set_device_index(index)  # what the accelerator takes
    if os.environ.get("WORLD_SIZE", "1") == "1":  # its state outlives a run, and the next may want another
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=device == "cpu")


def run(
    source: str,
    folder: Path,
    settings: Settings,
    *,
    steps: int | None,
    size: str | None,
    device: str | None,
    started: float,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> Model:
    """Read the data, plan, train; or go on where the run in the folder stands.

    Args:
        source: What to read.
        folder: Where the run lives.
        settings: What the user fixed.
        steps: Optimizer steps in all, where no budget is given.
        size: Size of the denoiser, or None for the plan's.
        device: Where to compute.
        started: When the clock of the budget started (`time.monotonic`).
        resume: Go on with the run in the folder.
        overwrite: Replace it.
        progress: Who shows how far it is.
    """
    one_process("fit")
    record = check_folder(folder, resume, overwrite)
    check_writable(folder)
    if record is not None:
        asked, settings = settings, read_settings(record["plan"])
        check_same(asked, settings, folder)
        check_asked({"steps": steps, "size": size}, record, folder)
    elif steps is None and settings.budget_seconds is None:
        settings.budget_seconds = USUAL_BUDGET
    modality = find_modality(settings.modality) if settings.modality else recognise(source)
    train, held = modality.read(source, settings.data, None)
    if record is not None and record["data"]["fingerprint"] != train.fingerprint:
        raise UserError(f"{source}: the data differ from those {folder} was trained on; start another run")
    device = device or (str(record["device"]) if record is not None else default_device())
    precision = settings.train.precision
    accelerator = make_accelerator(device, best_precision(device) if precision == "auto" else precision)
    if record is None and accelerator.is_main_process:
        make_folder(folder, source)
    accelerator.wait_for_everyone()
    log = Log(folder, progress, accelerator.is_main_process)
    job = Job(source, folder, settings, modality, train, held, accelerator, log, started, record or {}, record is None)
    try:
        if record is None:
            log.tell([f"{source}: {line}" for line in train.described()] + train.notes)
            plan(job, steps, size)
        elif job.done("denoiser"):
            forget_latents(folder)
            return load(folder, device)
        return train_stages(job, load_state(folder / "checkpoint") if record is not None else None)
    finally:
        log.close()
