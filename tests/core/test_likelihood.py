"""Likelihood ratios from the denoising error."""

import torch
from torch import Tensor

from sfumato.core import Denoise, NoiseLevel, make_schedule
from sfumato.core.likelihood import class_log_likelihood_ratio


def test_class_evidence_is_a_log_likelihood_ratio():
    """It is largest near the class, and the minimum over all alternatives."""

    def gaussian(mean: float, variance: float):
        def denoise(z: Tensor, level: NoiseLevel) -> Tensor:
            alpha, sigma = (value.float()[:, None] for value in (level.alpha, level.sigma))
            return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)

        return denoise

    schedule = make_schedule("flow")
    z = torch.linspace(-2, 2, 5)[:, None].expand(5, 3).contiguous()
    conditional, null = gaussian(1.0, 0.1), gaussian(0.0, 1.1)

    def measure(others: list[Denoise], z: Tensor, seed: int = 0) -> Tensor:
        return class_log_likelihood_ratio(conditional, others, schedule, z, torch.Generator().manual_seed(seed))

    evidence = [measure([null], z, seed) for seed in (0, 0, 1)]
    assert torch.equal(evidence[0], evidence[1]) and not torch.equal(evidence[0], evidence[2])
    torch.testing.assert_close(measure([null], z[2:3]), evidence[0][2:3])
    assert evidence[0][3] > 0 > evidence[0][1] > evidence[0][0]  # the class is near 1, not -1 or -2
    assert evidence[0].argmax() == 3
    alternatives = [gaussian(-1.0, 0.1), gaussian(2.0, 0.1), null]
    minimum = measure(alternatives, z)
    separate = [measure([other], z) for other in alternatives]
    torch.testing.assert_close(minimum, torch.stack(separate).amin(0))
    assert minimum[3] > 0 > minimum[4]  # at 2 an alternative is as likely, unlike the null condition
    assert evidence[0][4] > minimum[4]
