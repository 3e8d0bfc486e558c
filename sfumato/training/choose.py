"""Which guidance weight `generate` uses by default: the one whose samples lie closest to the data."""

from dataclasses import replace

import torch

from sfumato.metrics import frechet
from sfumato.model import Model
from sfumato.nn.classifier import Classifier
from sfumato.training.job import Job

WEIGHTS = (1.0, 1.25, 1.5, 2.0)
ITEMS = 1_000
STEPS = 10


@torch.no_grad()
def choose_guidance(job: Job, model: Model, network: Classifier | None) -> tuple[float, dict[str, float]]:
    """The best weight, and the Fréchet distance (features of the feature network) that each one reached."""
    if not job.classes:
        return 1.0, {}
    if network is None:
        return model.sampling.guidance, {}
    index = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(0))[:4 * ITEMS]
    real = network.features(job.train.batch(index).data.to(job.device)).float().cpu()
    labels = model.labels_for(range(ITEMS), job.settings.seed)
    tried: dict[str, float] = {}
    for weight in WEIGHTS:
        how = replace(model.sampling, steps=STEPS, guidance=weight)
        with job.accelerator.autocast():
            z = model.sample(range(ITEMS), labels, seed=job.settings.seed, how=how)
            fake = network.features(model.decode(z.float()).clamp(-1, 1).to(job.device)).float().cpu()
        tried[str(weight)] = round(frechet(fake, real), 4)
    return float(min(tried, key=lambda weight: tried[weight])), tried
