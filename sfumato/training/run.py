"""Opening a run's folder: a new one, one to replace, or one to go on with."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfumato.config import Settings
from sfumato.errors import UserError
from sfumato.machine import best_precision, default_device
from sfumato.modality import find_modality, recognise
from sfumato.model import Model, load, read_json, write_json
from sfumato.training.job import Job
from sfumato.training.log import Log
from sfumato.training.planning import decide
from sfumato.training.stages import train_stages
from sfumato.training.state import load_state

Progress = Callable[[str, int, int, Mapping[str, float]], None]


def check_folder(folder: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the folder before any work.

    Returns:
        With `resume`, the record of the run to go on with, if it got as far as a plan; else None.
    """
    present = folder.is_dir() and any(folder.iterdir())
    if folder.is_file() or (present and not (folder / "run.json").is_file()):
        raise UserError(f"{folder}: exists and is not a run of sfumato; name another folder")
    if present and not (resume or overwrite):
        raise UserError(f"{folder}: there is a run already; go on with --resume, or replace it with --overwrite")
    if resume and not present:
        raise UserError(f"{folder}: there is no run to resume; leave out --resume to start one")
    record = read_json(folder / "run.json") if resume else {}
    return record if "plan" in record else None


def make_folder(folder: Path, source: str, overwrite: bool) -> None:
    """Make the folder of a new run; an old run in it goes only now that the new one's data have been read."""
    try:
        if overwrite and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"source": source})
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})", code=1) from error


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
    record = check_folder(folder, resume, overwrite)
    if record is not None:
        settings = Settings.model_validate(record["plan"])
    modality = find_modality(settings.modality) if settings.modality else recognise(source)
    train, held = modality.read(source, settings.data)
    if record is not None and record["data"]["fingerprint"] != train.fingerprint:
        raise UserError(f"{source}: the data differ from those {folder} was trained on; start another run")
    device = device or default_device()
    asked = settings.train.precision
    bf16 = (best_precision(device) if asked == "auto" else asked) == "bf16"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=device == "cpu")
    if record is None and accelerator.is_main_process:
        make_folder(folder, source, overwrite)
    accelerator.wait_for_everyone()
    log = Log(folder, progress, accelerator.is_main_process)
    job = Job(source, folder, settings, modality, train, held, accelerator, log, started, record or {}, record is None)
    try:
        if record is None:
            decide(job, steps, size)
        elif job.done("denoiser"):
            return load(folder, device)
        return train_stages(job, load_state(folder / "checkpoint") if record is not None else None)
    finally:
        log.close()
