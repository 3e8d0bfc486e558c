r"""What a crossing misses, learned by carrying new items there and back.

A `Crossing` is linear, and exact between Gaussians alone. Here a small network is put on top of it, both ways:
$f(z) = C(z) + r(z)$ into the target, $g(z') = C^{-1}(z') + q(z')$ back, with r and q zero at first. New items b of the
target are carried back by g, and what comes out is drawn towards the source by its own denoiser; from that f learns to
give b again, $\min E\|f(\mathrm{drawn}(g(b))) - b\|^2$. Then the same the other way round, from what f gives. So
each map is asked for true items of its own end only, however poor what it is given may be yet.

References:
    Lample et al., Unsupervised Machine Translation Using Monolingual Corpora Only, https://arxiv.org/abs/1711.00043.
"""

# pyright: reportUnknownMemberType=false

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .align import Crossing

WIDTH = 512  # of the network
DROPPED = 0.2  # share of its units that a step does without: items are few
STEPS, BATCH = 500, 256  # of each fit
RATE, DECAY = 1e-3, 0.05  # of AdamW; the rate falls to zero
HELD = 0.1  # share of the items that say when to stop
LOOK = 50  # steps between two looks at these

Draw = Callable[[Tensor], Tensor]


class Bent(nn.Module):
    """A crossing between data, and what a network adds to it: f(z) = C(z) + r(z), (B, ...) to (B, ...).

    Args:
        crossing: C.
        z: Items of the class that is left (N, ...): their mean and deviation are the network's measure.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, crossing: Crossing, z: Tensor) -> None:
        super().__init__()
        self.crossing, size = crossing, z[0].numel()
        self.register_buffer("mean", z.flatten(1).mean(0))
        self.register_buffer("deviation", z.flatten(1).std(0).clamp_min(1e-3))
        layers = _hidden(size) + _hidden(WIDTH)
        last = nn.Linear(WIDTH, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last).to(z.device)
        self.eval()

    def added(self, z: Tensor) -> Tensor:
        """r(z), (B, ...)."""
        return self.net((z.flatten(1) - self.mean) / self.deviation).reshape(z.shape)

    def forward(self, z: Tensor) -> Tensor:
        """f(z), (B, ...)."""
        return self.crossing(z) + self.added(z)


def _hidden(size: int) -> list[nn.Module]:
    """A layer of the network."""
    return [nn.Linear(size, WIDTH), nn.SiLU(), nn.Dropout(DROPPED)]


def bend(
    crossing: Crossing,
    a: Tensor,
    b: Tensor,
    draw_a: Draw,
    draw_b: Draw,
    rounds: int,
    seed: int,
    on_fit: Callable[[int], None] | None = None,
    share: float = 1.0,
) -> Bent:
    """The crossing with what it misses.

    Args:
        crossing: From the source to the target.
        a: Items of the source (N, ...), two at least.
        b: Items of the target (M, ...), two at least.
        draw_a: Draws items (N, ...) that are nearly of the source towards it.
        draw_b: The same for the target.
        rounds: How often the way there is learned; in between the way back is. 0 adds nothing.
        seed: Of weights and order.
        on_fit: Called with the number of fits done, of 2 * rounds - 1.
        share: Of the usual steps of each fit.
    """
    steps = max(1, round(share * STEPS))
    with torch.random.fork_rng(devices=[a.device] if a.device.type == "cuda" else []):
        torch.manual_seed(seed)
        there, back = Bent(crossing, a), Bent(crossing.back, b)
        for k in range(2 * rounds - 1):
            if k % 2:
                _fit(back, _through(there, a, draw_b), a, steps)
            else:
                _fit(there, _through(back, b, draw_a), b, steps)
            if on_fit is not None:
                on_fit(k + 1)
    return there.requires_grad_(False)


@torch.no_grad()
def _through(way: Bent, z: Tensor, draw: Draw) -> Tensor:
    """What items become at the other end."""
    return draw(way(z))


def _fit(way: Bent, x: Tensor, y: Tensor, steps: int) -> None:
    """Learn to give y (N, ...) for x (N, ...), stopping where items held back are met best."""
    rest = (y - way.crossing(x)).detach()
    count = len(x) - max(1, round(HELD * len(x)))
    optimizer = torch.optim.AdamW(way.net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def missed(index: Tensor) -> Tensor:
        return (way.added(x[index]) - rest[index]).square().mean()

    def held() -> float:
        way.eval()
        with torch.no_grad():
            return float(missed(torch.arange(count, len(x))))

    best, kept = held(), copy.deepcopy(way.net.state_dict())
    for step in range(steps):
        way.train()
        loss = missed(torch.randint(count, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if ((step + 1) % LOOK == 0 or step + 1 == steps) and (now := held()) < best:
            best, kept = now, copy.deepcopy(way.net.state_dict())
    way.net.load_state_dict(kept)
    way.eval()
