"""Processes killed by signals, and resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.common import assert_same_run, rows, small_fit

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from sfumato.training.trainer import Trainer
from tests.training.common import reported_every_step, small_fit

def slowly(self, batch, advance=Trainer.advance):
    time.sleep(0.05)
    return advance(self, batch)

Trainer.run, Trainer.advance = reported_every_step(), slowly
source, run, resume, *overrides = sys.argv[1:]
small_fit(Path(source), Path(run), *overrides, steps=60, resume=resume == "resume")
"""
STEPS = ("train.codec.steps=30", "codec.adversarial_weight=0.5")


def start(source: Path, run: Path, *overrides: str, resume: bool) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    words = [str(source), str(run), "resume" if resume else "start", *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], cwd=ROOT, env={**os.environ, **threads}, stderr=subprocess.PIPE
    )


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool], number: int = signal.SIGKILL) -> int:
    """Send the signal as soon as `condition()` holds; returns the exit code."""
    while process.poll() is None and not condition():
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode in (-number, 1), stderr.decode()
    return process.returncode


def reached(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """A condition: the run has recorded this step, or a later one."""

    def condition() -> bool:
        try:
            return any(row["stage"] == stage and row["step"] >= step for row in rows(run))
        except (OSError, ValueError):  # no file yet, or a partial line
            return False

    return condition


def test_killed_in_both_stages(source: Path, tmp_path: Path):
    run, whole = tmp_path / "killed", tmp_path / "whole"
    for resume, stage in ((False, "codec"), (True, "denoiser")):
        process = start(source, run, *STEPS, resume=resume)
        assert kill_when(process, reached(run, stage, 20)) == -signal.SIGKILL
        last = rows(run)[-1] if (run / "metrics.jsonl").read_text().endswith("\n") else None
        assert last is None or last["step"] < 30
    small_fit(source, run, *STEPS, steps=60, resume=True)
    small_fit(source, whole, *STEPS, steps=60)
    assert_same_run(run, whole)


@pytest.mark.slow
def test_killed_at_many_moments(source: Path, tmp_path: Path):
    """At moments from the start of the process to the end of the run."""
    run, whole = tmp_path / "killed", tmp_path / "whole"
    for seconds in (0.5, 2.5, 3.0, 3.2, 3.5, 3.7, 4.1, 4.4, 4.8, 5.3):
        end = time.monotonic() + seconds
        process = start(source, run, *STEPS, resume=(run / "run.json").is_file())
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    small_fit(source, run, *STEPS, steps=60, resume=(run / "run.json").is_file())
    small_fit(source, whole, *STEPS, steps=60)
    assert_same_run(run, whole)


@pytest.mark.slow
def test_fit_keeps_its_budget(tmp_path: Path):
    """Imports included; and it uses most of the budget."""
    code = "import sys; from sfumato import fit; fit('digits', out=sys.argv[1], budget='40s')"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, check=True)
    assert 0.75 * 40 < time.monotonic() - started < 1.05 * 40
