"""The model card, `README.md` of a run folder."""

from sfumato import __version__
from sfumato.model import Model
from sfumato.training.job import Job


def write_card(job: Job, model: Model) -> None:
    """Say what the model is, what it was trained on and how, and how to use it."""
    if not job.accelerator.is_main_process:
        return
    record, codec = job.record, job.record.get("metrics", {}).get("codec", {})
    total = sum(record["metrics"]["parameters"].values())
    lines = [
        "---",
        "library_name: sfumato",
        "tags: [latent-diffusion, sfumato]",
        "---",
        f"# {job.folder.name}",
        "",
        f"A latent diffusion model of {record['data']['items']:,} items ({job.modality.name}, shape "
        f"{tuple(record['data']['shape'])}, {job.classes or 'no'} classes), trained by sfumato {__version__} in "
        f"{record['seconds_taken']:.0f} s on {record['device']}; {total:,} parameters, latent "
        f"{tuple(model.codec.latent_shape)}.",
        "",
        *([f"Held-out reconstructions: {', '.join(f'{k} {v}' for k, v in codec.items())}.", ""] if codec else []),
        "```",
        f"sfumato generate {job.folder} -n 64 --out samples/",
        f"sfumato evaluate {job.folder} {job.source}",
        "```",
        "",
        "It repeats what its training data hold, biases included; look at `evaluate`'s novelty before sharing it.",
        "",
    ]
    (job.folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
