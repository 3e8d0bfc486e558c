"""What a run tells: `metrics.jsonl`, TensorBoard files, sample sheets, progress."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.training.loop import Report, Summary

Progress = Callable[[str, int, int, Mapping[str, float]], None]


def speeds(said: Report | Summary) -> dict[str, float]:
    """Items per second and, where operations are counted, the share of the machine's peak, as they are shown."""
    share = {"of peak": said.share_of_peak} if said.share_of_peak else {}
    return {"items/s": said.items_per_second, **share}


class Log:
    """One run's records; a line of `metrics.jsonl` and TensorBoard scalars per report.

    Args:
        folder: The run.
        progress: Who shows it; None for nobody.
        main: Whether this process writes.
    """

    def __init__(self, folder: Path, progress: Progress | None, main: bool = True) -> None:
        self.folder, self.progress, self.main = folder, progress, main
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """TensorBoard's writer, opened when first needed."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def rewind(self, stage: str, step: int) -> None:
        """Forget what was recorded of `stage` after `step` (a run goes on from an older checkpoint)."""
        path = self.folder / "metrics.jsonl"
        if not self.main or not path.is_file():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip().endswith("}")]
        order = {"codec": 0, "reconstruction": 1, "denoiser": 2}
        now = (order[stage], step)
        kept = [row for row in rows if (order.get(row.get("stage", ""), 3), row.get("step", 0)) <= now]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)

    def report(self, report: Report) -> None:
        """Record and show a report."""
        held = {"held out": report.losses["held_out"]} if "held_out" in report.losses else {}
        facts = {"loss": report.losses["loss"], **held, **speeds(report), "eta": report.eta}
        self.show(report.stage, report.step, report.steps, facts)
        self.record({k: v for k, v in asdict(report).items() if k not in ("losses", "eta")} | report.losses)

    def finish(self, summary: Summary) -> None:
        """Show what a stage that is over came to."""
        facts = {"steps": summary.steps, "items": summary.items, "took": summary.seconds, **speeds(summary)}
        self.show(summary.stage, summary.steps, summary.steps, facts)

    def record(self, row: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`, and its numbers to TensorBoard."""
        if not self.main:
            return
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        prefix, step = row.get("stage", "run"), row.get("step", 0)
        for name, value in row.items():
            if isinstance(value, float) or (isinstance(value, int) and name not in ("step", "steps")):
                self.writer.add_scalar(f"{prefix}/{name}", value, step)

    def picture(self, name: str, image: Any, step: int) -> None:
        """A sheet: `samples/NAME-STEP.png`, and the same to TensorBoard."""
        import numpy as np

        if not self.main:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-{step:06d}.png")
        self.writer.add_image(name, np.atleast_3d(np.asarray(image.convert("RGB"))), step, dataformats="HWC")

    def tell(self, lines: Sequence[str]) -> None:
        """Say what the user should know before it starts: to the logger `sfumato`, by default on the error stream."""
        for line in lines if self.main else ():
            logging.getLogger("sfumato").warning("%s", line)

    def show(self, stage: str, done: int, total: int, facts: Mapping[str, float] | None = None) -> None:
        """Progress without a record."""
        if self.progress is not None and self.main:
            self.progress(stage, done, total, facts or {})

    def close(self) -> None:
        """Write what is held back."""
        if self._writer is not None:
            self._writer.close()
