"""Launch of a run: prepare its folder (new, replaced or resumed), read the data, plan and train."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sfumato import __version__
from sfumato.config import Settings, read_settings, setting, setting_keys
from sfumato.data.output import check_writable
from sfumato.errors import UserError
from sfumato.hardware import best_precision, default_device
from sfumato.modalities import find_modality, recognise
from sfumato.model import Model, load
from sfumato.storage import read_json, write_json
from sfumato.training.checkpoint import load_state
from sfumato.training.log import Log, StageProgress
from sfumato.training.profile import complete_plan
from sfumato.training.run import Run
from sfumato.training.stages import remove_latents, train_stages

OLD_RUN_KEPT = "the existing run was kept"
DEFAULT_BUDGET = 600.0  # seconds, if neither a budget nor steps are given
RUN_FILES = (  # files of a run besides `run.json`
    *("model.json", "metrics.jsonl", "README.md", "samples", "codec", "conditioner", "denoiser", "guide"),
    *("cache", "checkpoint", "checkpoint.*", "checkpoint-features", "events.out.tfevents.*", "*.partial"),
)


def require_single_process(command: str) -> None:
    """Refuse to run in several processes: each would plan by its own clock."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} runs in one process; start it without accelerate launch or torchrun")


def check_folder(folder: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the run folder before any work.

    Returns:
        With `resume`, the record of the run to continue if it has a plan; else None.

    Raises:
        UserError: The folder does not suit `resume` and `overwrite`, or is not a run folder.
    """
    present = folder.is_dir() and any(folder.iterdir())
    if folder.is_file() or (present and not is_run(folder)):
        raise UserError(f"{folder}: exists and is not a run of sfumato; name another folder")
    if present and not (resume or overwrite):
        raise UserError(f"{folder}: there is a run already; continue it with --resume or replace it with --overwrite")
    if resume and not present:
        raise UserError(f"{folder}: there is no run to resume; leave out --resume to start one")
    record = read_json(folder / "run.json") if resume else {}
    return record if "plan" in record else None


def is_run(folder: Path) -> bool:
    """Whether the folder was written by sfumato and may be replaced: other programs write a `run.json` too."""
    try:
        return {"source", "sfumato"} <= read_json(folder / "run.json").keys()
    except (UserError, OSError, AttributeError):
        return False


def begin_record(folder: Path, source: str) -> None:
    """Write a `run.json` without a plan; `--resume` starts such a run from the beginning."""
    write_json(folder / "run.json", {"source": source, "sfumato": __version__})


def make_folder(folder: Path, source: str) -> None:
    """Create the folder of a new run; an existing run in it is kept for now."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_run(folder):
        begin_record(folder, source)


def check_same_settings(given: Settings, planned: Settings, folder: Path) -> None:
    """Refuse settings that contradict the plan of a resumed run.

    Args:
        given: Settings of this session; those at their defaults were not fixed by the user.
        planned: Settings of the plan.
        folder: Run folder.

    Raises:
        UserError: Names the setting and its planned value.
    """
    defaults = Settings()
    for key in setting_keys():
        value, planned_value = setting(given, key), setting(planned, key)
        if value not in (setting(defaults, key), planned_value):
            message = f"its plan has {key}={planned_value}, not {value}"
            raise UserError(f"{folder}: {message}; leave that out with --resume, or start a new run")


def check_same_arguments(arguments: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> None:
    """Refuse steps or a size that differ from those that the resumed run was started with."""
    for name, value in arguments.items():
        original = record.get("asked", arguments)[name]
        if value is not None and value != original:
            start = f"with --{name} {original}" if original is not None else f"without --{name}"
            raise UserError(f"{folder}: was started {start}; leave --{name} out with --resume, or start a new run")


def read_plan(record: Mapping[str, Any], folder: Path) -> Settings:
    """The settings of a run to resume.

    Raises:
        UserError: The plan is damaged, or was written by another version of sfumato.
    """
    try:
        return read_settings(record["plan"])
    except UserError as error:
        version = record.get("sfumato", "an unknown version")
        raise UserError(
            f"{folder}: its plan cannot be read, it was made by sfumato {version}: {error}", code=1
        ) from None


def make_run_plan(run: Run, steps: int | None, size: str | None) -> None:
    """Make the plan and write it; an existing run is only deleted once the plan is made."""
    folder, main = run.folder, run.accelerator.is_main_process
    try:
        complete_plan(run, steps, size)
    except KeyboardInterrupt:
        if "plan" in read_json(folder / "run.json"):
            raise KeyboardInterrupt(OLD_RUN_KEPT) from None
        raise
    except Exception:
        if main and [path.name for path in folder.iterdir()] == ["run.json"]:  # nothing written yet: leave no folder
            shutil.rmtree(folder)
        raise
    if main:
        begin_record(folder, run.source)
        for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.write()


def make_accelerator(device: str, precision: str) -> Accelerator:
    """The accelerator for a device and a precision.

    Raises:
        UserError: The device is not available.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    index = torch.device(device).index
    if index is not None and device != "cpu":
        torch.accelerator.set_device_index(index)  # the accelerator uses the current device
    if os.environ.get("WORLD_SIZE", "1") == "1":  # its state is global, and the previous run may have set another
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=device == "cpu")


def launch(
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
    progress: StageProgress | None,
) -> Model:
    """Read the data, plan and train, or resume the run in the folder.

    Args:
        source: Source of the data.
        folder: Run folder.
        settings: What the user fixed.
        steps: Optimizer steps of both stages, if no budget is given.
        size: Size preset of the denoiser, or None.
        device: Where to compute.
        started: Start of the budget (`time.monotonic`).
        resume: Continue the run in the folder.
        overwrite: Replace the run in the folder.
        progress: Called with progress; None to show nothing.
    """
    require_single_process("fit")
    record = check_folder(folder, resume, overwrite)
    check_writable(folder)
    if record is not None:
        given, settings = settings, read_plan(record, folder)
        check_same_settings(given, settings, folder)
        check_same_arguments({"steps": steps, "size": size}, record, folder)
    elif steps is None and settings.budget_seconds is None:
        settings.budget_seconds = DEFAULT_BUDGET
    modality = find_modality(settings.modality) if settings.modality else recognise(source)
    train, held_out = modality.read_split(source, settings.data)
    if record is not None and record["data"]["fingerprint"] != train.fingerprint:
        raise UserError(f"{source}: the data differ from the training data of {folder}; start a new run")
    device = device or (str(record["device"]) if record is not None else default_device())
    precision = settings.train.precision
    accelerator = make_accelerator(device, best_precision(device) if precision == "auto" else precision)
    if record is None and accelerator.is_main_process:
        make_folder(folder, source)
    accelerator.wait_for_everyone()
    log = Log(folder, progress, accelerator.is_main_process)
    run = Run(
        source, folder, settings, modality, train, held_out, accelerator, log, started, record or {}, record is None
    )
    try:
        if record is None:
            log.warn([f"{source}: {line}" for line in train.describe()] + train.notes)
            make_run_plan(run, steps, size)
        elif run.done("denoiser"):
            remove_latents(folder)
            return load(folder, device)
        return train_stages(run, load_state(folder / "checkpoint") if record is not None else None)
    finally:
        log.close()
