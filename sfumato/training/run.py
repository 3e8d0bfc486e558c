"""The run: its data, settings, devices and record."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfumato.config import Settings
from sfumato.data.dataset import Dataset
from sfumato.modalities.base import Modality
from sfumato.storage import write_json
from sfumato.training.log import Log

RESERVE_SHARE = 0.03  # share of the budget reserved for guidance search, previews and saving
RESERVE_SECONDS = 6.0  # seconds reserved for the same, in addition


@dataclass
class Run:
    """A training run.

    Args:
        source: Source of the data.
        folder: Run folder.
        settings: All settings; complete once planned.
        modality: Modality of the data.
        train: Training items.
        held_out: Held-out items.
        accelerator: Devices, precision, processes.
        log: Metrics and progress.
        started: Start of the budget (`time.monotonic`).
        record: Contents of `run.json`.
        fresh: Whether the plan was made in this session, so that the clock may amend it.
    """

    source: str
    folder: Path
    settings: Settings
    modality: Modality[Any]
    train: Dataset
    held_out: Dataset
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
        """Number of classes; 0 without labels, or with a single class."""
        return self.train.classes

    def seconds_left(self) -> float:
        """Seconds of the budget left for training; infinite without a budget and in a resumed session.

        A reserve is kept for the guidance search, the last previews and saving.
        """
        budget = self.settings.budget_seconds
        if not self.fresh or "seconds" not in self.record or budget is None:
            return math.inf
        return (1 - RESERVE_SHARE) * budget - RESERVE_SECONDS - (time.monotonic() - self.started)

    def done(self, stage: str) -> bool:
        """Whether a stage is complete and its result saved."""
        return stage in self.record.get("done", [])

    def finish(self, stage: str, **metrics: Any) -> None:
        """Record that a stage is complete, with its metrics."""
        self.record.setdefault("metrics", {}).update(metrics)
        self.record["done"] = [*self.record.get("done", []), stage]
        self.write()

    def write(self) -> None:
        """Write `run.json`."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "run.json", self.record)
