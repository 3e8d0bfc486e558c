"""The model card: `README.md` of a run folder."""

from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.model import Model
from sfumato.training.run import Run


def write_card(run: Run, model: Model) -> None:
    """Write the model card: the model, its training data and how to use it."""
    if not run.accelerator.is_main_process:
        return
    record, codec = run.record, run.record.get("metrics", {}).get("codec", {})
    parameters = sum(record["metrics"]["parameters"].values())
    encoded = run.settings.train.max_encoded or len(run.train)
    subset = f" (the denoiser on {encoded:,} of them)" if encoded < len(run.train) else ""
    lines = [
        *front_matter(run.folder),
        "",
        f"A latent diffusion model trained on {record['data']['items']:,} items{subset} ({run.modality.name}, shape "
        f"{tuple(record['data']['shape'])}, {_conditions(model)}) by sfumato {__version__} in "
        f"{record['seconds_taken']:.0f} s on {record['device']}; {parameters:,} parameters, latent shape "
        f"{tuple(model.codec.latent_shape)}.",
        "",
        *([f"Held-out reconstruction: {', '.join(f'{k} {v}' for k, v in codec.items())}.", ""] if codec else []),
        "```",
        f"sfumato generate {run.folder} -n 64 --out {run.modality.example_output}",
        f"sfumato evaluate {run.folder} {run.source}",
        "```",
        "",
        "The model can reproduce biases and training items; check `copies` and `novelty` in `evaluate` before sharing.",
        "",
    ]
    (run.folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _conditions(model: Model) -> str:
    """The model's classes or, if it has other conditions than one label, their names."""
    conditioner = model.conditioner
    if set(conditioner.names) <= {conditioner.primary_label}:
        return f"{conditioner.classes or 'no'} classes"
    return f"condition{'s' * (len(conditioner.names) > 1)} {', '.join(conditioner.names)}"


def front_matter(folder: Path) -> list[str]:
    """YAML metadata, as model hubs read it, and the title."""
    return ["---", "library_name: sfumato", "tags: [latent-diffusion, sfumato]", "---", f"# {folder.name}"]


def write_few_step_card(folder: Path, out: Path, distilled: dict[str, Any], seconds: float, example: str) -> None:
    """Write the model card of a few-step model.

    Args:
        folder: Folder to write to.
        out: Final name of the folder.
        distilled: The record of the distillation in `run.json`.
        seconds: Duration of the distillation.
        example: Example of an output path.
    """
    errors = ", ".join(f"{error} from time {t}" for t, error in distilled["miss"].items())
    lines = [
        *front_matter(out),
        "",
        f"A few-step model distilled from {distilled['teacher'] or 'another model'} (guidance {distilled['guidance']}, "
        f"autoguidance {distilled['autoguidance']} built in) by sfumato {__version__} in {seconds:.0f} s. Root mean "
        f"square error of one jump against the endpoints of the teacher's trajectories (latents have unit variance): "
        f"{errors}.",
        "",
        "```",
        f"sfumato generate {out} -n 64 --out {example}",
        f"sfumato generate {out} -n 64 --steps 1 --overwrite --out {example}",
        "```",
        "",
        "The model can reproduce biases and training items of its teacher.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
