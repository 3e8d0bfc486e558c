"""Which guidance weight `generate` uses by default: samples close to the data that show their label."""

from dataclasses import replace

import torch

from sfumato.metrics import frechet
from sfumato.model import Model
from sfumato.nn.classifier import Classifier
from sfumato.training.job import Job

WEIGHTS = (1.0, 1.25, 1.5, 2.0)
ITEMS = 1_000
REAL = 10_000
SLACK = 1.15  # the distance hardly sees whether an item shows its label: within so much of the best, more guidance wins
STEPS = 10


@torch.no_grad()
def choose_guidance(job: Job, model: Model, network: Classifier | None) -> tuple[float, dict[str, float]]:
    """The best weight, and the Fréchet distance (features of the feature network) that each one reached."""
    if not job.classes:
        return 1.0, {}
    if network is None:
        return model.sampling.guidance, {}
    index = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(0))[:REAL]
    parts = [network.features(job.train.batch(part).data.to(job.device)).float().cpu() for part in index.split(1000)]
    real = torch.cat(parts)
    labels = model.labels_for(range(ITEMS), job.settings.seed)
    tried: dict[str, float] = {}
    for weight in WEIGHTS:
        how = replace(model.sampling, steps=STEPS, guidance=weight)
        with job.accelerator.autocast():
            z = model.sample(range(ITEMS), labels, seed=job.settings.seed, how=how)
            fake = network.features(model.decode(z.float()).clamp(-1, 1).to(job.device)).float().cpu()
        tried[str(weight)] = round(frechet(fake, real), 4)
    good = [float(weight) for weight, distance in tried.items() if distance <= SLACK * min(tried.values())]
    return max(good), tried
