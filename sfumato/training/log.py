"""The log of a run: `metrics.jsonl`, TensorBoard files, previews, progress."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.training.trainer import Report, Summary

StageProgress = Callable[[str, int, int, Mapping[str, float]], None]


def speeds(report: Report | Summary) -> dict[str, float]:
    """Training speed and, if operations are counted, hardware utilisation, for display."""
    share = {"of peak": report.share_of_peak} if report.share_of_peak else {}
    return {"items/s": report.items_per_second, **share}


class Log:
    """Writes the metrics of a run to `metrics.jsonl` and TensorBoard, and shows its progress.

    Args:
        folder: Run folder.
        progress: Called with progress; None to show nothing.
        main: Whether this process writes.
    """

    def __init__(self, folder: Path, progress: StageProgress | None, main: bool = True) -> None:
        self.folder, self.progress, self.main = folder, progress, main
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """The TensorBoard writer, opened on first use."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def rewind(self, stage: str, step: int) -> None:
        """Remove the metrics after `step` of `stage`, because the run continues from an older checkpoint."""
        path = self.folder / "metrics.jsonl"
        if not self.main or not path.is_file():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip().endswith("}")]
        order = {"codec": 0, "reconstruction": 1, "denoiser": 2}
        last = (order[stage], step)
        kept = [row for row in rows if (order.get(row.get("stage", ""), 3), row.get("step", 0)) <= last]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)

    def report(self, report: Report) -> None:
        """Record and show a report."""
        held = {"held out": report.losses["held_out"]} if "held_out" in report.losses else {}
        shown = {"loss": report.losses["loss"], **held, **speeds(report), "eta": report.eta}
        self.show(report.stage, report.step, report.steps, shown)
        self.record({k: v for k, v in asdict(report).items() if k not in ("losses", "eta")} | report.losses)

    def finish(self, summary: Summary) -> None:
        """Show the summary of a complete stage."""
        shown = {"steps": summary.steps, "items": summary.items, "took": summary.seconds, **speeds(summary)}
        self.show(summary.stage, summary.steps, summary.steps, shown)

    def record(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and write its numbers to TensorBoard."""
        if not self.main:
            return
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        prefix, step = row.get("stage", "run"), row.get("step", 0)
        for name, value in row.items():
            if isinstance(value, float) or (isinstance(value, int) and name not in ("step", "steps")):
                self.writer.add_scalar(f"{prefix}/{name}", value, step)

    def image(self, name: str, image: Any, step: int) -> None:
        """Save a preview as `samples/NAME-STEP.png`, and write it to TensorBoard."""
        import numpy as np

        if not self.main:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-{step:06d}.png")
        self.writer.add_image(name, np.atleast_3d(np.asarray(image.convert("RGB"))), step, dataformats="HWC")

    def warn(self, lines: Sequence[str]) -> None:
        """Log messages for the user to the logger `sfumato`, by default on the error stream."""
        for line in lines if self.main else ():
            logging.getLogger("sfumato").warning("%s", line)

    def show(self, stage: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show progress without recording it."""
        if self.progress is not None and self.main:
            self.progress(stage, done, total, metrics or {})

    def close(self) -> None:
        """Flush and close the TensorBoard writer."""
        if self._writer is not None:
            self._writer.close()
