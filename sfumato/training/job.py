"""What every part of a run needs to know."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfumato.config import Settings
from sfumato.data import Data
from sfumato.modality import Modality
from sfumato.model import write_json
from sfumato.training.log import Log

FINISH_SHARE, FINISH_SECONDS = 0.03, 6.0


@dataclass
class Job:
    """A run under way.

    Args:
        source: What was read.
        folder: Where the run lives.
        settings: Every setting; decided by the plan.
        modality: Row of the table.
        train: Training part of the data.
        held: Held-out part.
        accelerator: Devices, precision, processes.
        log: Records and progress.
        started: When the budget's clock started (`time.monotonic`).
        record: What `run.json` holds.
        fresh: Whether the plan was made in this session, so that the clock may amend it.
    """

    source: str
    folder: Path
    settings: Settings
    modality: Modality[Any]
    train: Data
    held: Data
    accelerator: Accelerator
    log: Log
    started: float
    record: dict[str, Any] = field(default_factory=dict)
    fresh: bool = True

    @property
    def device(self) -> str:
        """Where to compute."""
        return str(self.accelerator.device)

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels, or with one only."""
        return self.train.classes

    def seconds_left(self) -> float:
        """What the budget still has for training; infinite without one, or where the plan is an earlier session's.

        Kept back for choosing the guidance, the last sheets and saving: a few seconds and a small share.
        """
        budget = self.settings.budget_seconds
        if not self.fresh or "seconds" not in self.record or budget is None:
            return math.inf
        return (1 - FINISH_SHARE) * budget - FINISH_SECONDS - (time.monotonic() - self.started)

    def done(self, stage: str) -> bool:
        """Whether a stage is complete and its result is in the folder."""
        return stage in self.record.get("done", [])

    def finish(self, stage: str, **metrics: Any) -> None:
        """Note that a stage is complete."""
        self.record.setdefault("metrics", {}).update(metrics)
        self.record["done"] = [*self.record.get("done", []), stage]
        self.write()

    def write(self) -> None:
        """Bring `run.json` up to date."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "run.json", self.record)
