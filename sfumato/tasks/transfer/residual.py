r"""Residual MLP on the Gaussian map, trained by back-translation.

A `GaussianMap` G is linear, and exact only between Gaussians. Small networks are added in both directions:
$f(z) = G(z) + r(z)$ to the target and $g(z') = G^{-1}(z') + q(z')$ back, with r and q zero at first. New items b of the
target are mapped back by g, and the result is refined toward the source by the source's denoiser; f is then trained to
reproduce b, $\min E\|f(\mathrm{refine}(g(b))) - b\|^2$, and likewise g from the output of f. So each map is trained on
true items of its output class, however poor its input may still be.

References:
    Lample et al., Unsupervised Machine Translation Using Monolingual Corpora Only, https://arxiv.org/abs/1711.00043.
"""

# pyright: reportUnknownMemberType=false

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.tasks.transfer.gaussian_map import GaussianMap

RESIDUAL_WIDTH = 512  # hidden units per layer
RESIDUAL_DROPOUT = 0.2  # dropout rate, high because items are few
RESIDUAL_STEPS, RESIDUAL_BATCH = 500, 256  # optimizer steps per fit, items per step
RESIDUAL_LR, RESIDUAL_DECAY = 1e-3, 0.05  # AdamW learning rate, decays to zero; weight decay
RESIDUAL_VALIDATION_SHARE = 0.1  # share of the items for early stopping
VALIDATE_EVERY = 50  # steps between validations

Refine = Callable[[Tensor], Tensor]


class ResidualMap(nn.Module):
    """A Gaussian map between data plus a network: f(z) = G(z) + r(z), (B, ...) to (B, ...).

    Args:
        gaussian_map: G.
        z: Items of the source class (N, ...), whose mean and standard deviation normalise the network's input.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, gaussian_map: GaussianMap, z: Tensor) -> None:
        super().__init__()
        self.gaussian_map, size = gaussian_map, z[0].numel()
        self.register_buffer("mean", z.flatten(1).mean(0))
        self.register_buffer("deviation", z.flatten(1).std(0).clamp_min(1e-3))
        layers = _hidden(size) + _hidden(RESIDUAL_WIDTH)
        last = nn.Linear(RESIDUAL_WIDTH, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last).to(z.device)
        self.eval()

    def residual(self, z: Tensor) -> Tensor:
        """r(z), (B, ...)."""
        return self.net((z.flatten(1) - self.mean) / self.deviation).reshape(z.shape)

    def forward(self, z: Tensor) -> Tensor:
        """f(z), (B, ...)."""
        return self.gaussian_map(z) + self.residual(z)


def _hidden(size: int) -> list[nn.Module]:
    """A hidden layer."""
    return [nn.Linear(size, RESIDUAL_WIDTH), nn.SiLU(), nn.Dropout(RESIDUAL_DROPOUT)]


def fit_residual(
    gaussian_map: GaussianMap,
    a: Tensor,
    b: Tensor,
    refine_a: Refine,
    refine_b: Refine,
    rounds: int,
    seed: int,
    on_fit: Callable[[int], None] | None = None,
    share: float = 1.0,
) -> ResidualMap:
    """Train the residual of a Gaussian map.

    Args:
        gaussian_map: From the source to the target.
        a: Items of the source (N, ...), N >= 2.
        b: Items of the target (M, ...), M >= 2.
        refine_a: Moves items (N, ...) that are nearly of the source class toward it.
        refine_b: The same for the target.
        rounds: Fits of the forward map, with fits of the backward map in between; 0 adds nothing.
        seed: Seed of weights and order.
        on_fit: Called with the number of completed fits, of 2 * rounds - 1.
        share: Share of `RESIDUAL_STEPS` in each fit.
    """
    steps = max(1, round(share * RESIDUAL_STEPS))
    with torch.random.fork_rng(devices=[a.device] if a.device.type == "cuda" else []):
        torch.manual_seed(seed)
        forward, backward = ResidualMap(gaussian_map, a), ResidualMap(gaussian_map.inverse, b)
        for k in range(2 * rounds - 1):
            if k % 2:
                _fit(backward, _translate(forward, a, refine_b), a, steps)
            else:
                _fit(forward, _translate(backward, b, refine_a), b, steps)
            if on_fit is not None:
                on_fit(k + 1)
    return forward.requires_grad_(False)


@torch.no_grad()
def _translate(residual_map: ResidualMap, z: Tensor, refine: Refine) -> Tensor:
    """Map items to the other class and refine them."""
    return refine(residual_map(z))


def _fit(residual_map: ResidualMap, x: Tensor, y: Tensor, steps: int) -> None:
    """Train the map from x to y (N, ...), with early stopping on held-out items."""
    target = (y - residual_map.gaussian_map(x)).detach()
    count = len(x) - max(1, round(RESIDUAL_VALIDATION_SHARE * len(x)))
    optimizer = torch.optim.AdamW(residual_map.net.parameters(), RESIDUAL_LR, weight_decay=RESIDUAL_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def squared_error(index: Tensor) -> Tensor:
        return (residual_map.residual(x[index]) - target[index]).square().mean()

    def validate() -> float:
        residual_map.eval()
        with torch.no_grad():
            return float(squared_error(torch.arange(count, len(x))))

    best, best_state = validate(), copy.deepcopy(residual_map.net.state_dict())
    for step in range(steps):
        residual_map.train()
        loss = squared_error(torch.randint(count, (RESIDUAL_BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if ((step + 1) % VALIDATE_EVERY == 0 or step + 1 == steps) and (error := validate()) < best:
            best, best_state = error, copy.deepcopy(residual_map.net.state_dict())
    residual_map.net.load_state_dict(best_state)
    residual_map.eval()
