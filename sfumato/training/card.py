"""The model card, `README.md` of a run folder."""

from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.model import Model
from sfumato.training.job import Job


def write_card(job: Job, model: Model) -> None:
    """Say what the model is, what it was trained on and how, and how to use it."""
    if not job.accelerator.is_main_process:
        return
    record, codec = job.record, job.record.get("metrics", {}).get("codec", {})
    total = sum(record["metrics"]["parameters"].values())
    encoded = job.settings.train.encoded or len(job.train)
    some = f"; its denoiser learned from {encoded:,} of them" if encoded < len(job.train) else ""
    lines = [
        *head(job.folder),
        "",
        f"A latent diffusion model of {record['data']['items']:,} items ({job.modality.name}, shape "
        f"{tuple(record['data']['shape'])}, {job.classes or 'no'} classes), trained by sfumato {__version__} in "
        f"{record['seconds_taken']:.0f} s on {record['device']}; {total:,} parameters, latent "
        f"{tuple(model.codec.latent_shape)}{some}.",
        "",
        *([f"Held-out reconstructions: {', '.join(f'{k} {v}' for k, v in codec.items())}.", ""] if codec else []),
        "```",
        f"sfumato generate {job.folder} -n 64 --out {job.modality.example}",
        f"sfumato evaluate {job.folder} {job.source}",
        "```",
        "",
        "It repeats what its training data hold, biases included; look at what `evaluate` says of copying before "
        "sharing it.",
        "",
    ]
    (job.folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def head(folder: Path) -> list[str]:
    """The first lines: what sites that show cards look for, and the model's name."""
    return ["---", "library_name: sfumato", "tags: [latent-diffusion, sfumato]", "---", f"# {folder.name}"]


def write_few_step_card(folder: Path, out: Path, told: dict[str, Any], seconds: float, example: str) -> None:
    """Say of a few-step model what it was made from, and how to use it.

    Args:
        folder: Where to write.
        out: What the folder will be called.
        told: What the run recorded of its distillation.
        seconds: How long it took.
        example: What new items could be written to.
    """
    misses = ", ".join(f"{miss} from time {t}" for t, miss in told["miss"].items())
    lines = [
        *head(out),
        "",
        f"A few-step model made from {told['teacher'] or 'another one'} (guidance {told['guidance']}, autoguidance "
        f"{told['autoguidance']} built in) by sfumato {__version__} in {seconds:.0f} s. Its jumps miss the teacher's "
        f"ends (root mean square, of latents of unit variance) by {misses}.",
        "",
        "```",
        f"sfumato generate {out} -n 64 --out {example}",
        f"sfumato generate {out} -n 64 --steps 1 --overwrite --out {example}",
        "```",
        "",
        "It repeats what its teacher's training data hold, biases included.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
