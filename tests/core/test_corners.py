"""Denoising categories: the exact chances where columns are independent, and where a network knows more."""

import torch
from torch import Tensor, nn

from sfumato.core import Denoiser, Objective, make_schedule, sample, time_grid
from sfumato.core.corners import log_softmax
from sfumato.types import Corners

SHARES = [[0.7, 0.2, 0.1], [0.5, 0.5]]
WIDTHS = (3, 2)


def corners(start: int = 1) -> Corners:
    """One number, then two groups of 3 and 2 levels."""
    p = [torch.tensor(shares) for shares in SHARES]
    s = [(q * (1 - q)).mean().sqrt().expand_as(q) for q in p]
    return Corners(start, WIDTHS, torch.cat(p), torch.cat(s))


def drawn(count: int, g: torch.Generator) -> Tensor:
    """Rows z (N, 6) of these shares, all independent."""
    levels = [torch.multinomial(torch.tensor(shares), count, True, generator=g) for shares in SHARES]
    e = torch.cat([nn.functional.one_hot(k, width) for k, width in zip(levels, WIDTHS, strict=True)], 1)
    return torch.cat([torch.randn(count, 1, generator=g), (e - corners().mean) / corners().std], 1)


class Constant(nn.Module):
    """A network that always says the same."""

    def __init__(self, f: Tensor) -> None:
        super().__init__()
        self.f = nn.Parameter(f)

    def forward(self, z: Tensor, clocks: Tensor, cond: object = None, mask: object = None) -> Tensor:
        return self.f.expand_as(z)


def denoiser(f: Tensor | None = None) -> Denoiser:
    return Denoiser(Constant(torch.zeros(6) if f is None else f), make_schedule("flow"), "v", corners=corners)


def test_log_softmax_is_that_of_each_group():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([part.log_softmax(1) for part in logits.split(WIDTHS, 1)], 1)
    torch.testing.assert_close(log_softmax(logits, WIDTHS), expected)


def test_without_a_network_it_is_bayes_for_independent_columns():
    g = torch.Generator().manual_seed(0)
    z, at = drawn(50, g), torch.full((50,), 0.6, dtype=torch.float64)
    z_t = denoiser().noised(z, torch.randn(50, 6, generator=g), at)
    start, found = 1, denoiser()(z_t, at)
    for shares, width in zip(SHARES, WIDTHS, strict=True):
        cut = slice(start, start + width)
        p = torch.tensor(shares)
        where = (torch.eye(width) - p) / (p * (1 - p)).mean().sqrt()  # (L, L): the corners
        distance = (z_t[:, None, cut] - 0.4 * where).square().sum(2) / (2 * 0.6**2)
        torch.testing.assert_close(found[:, cut], (p.log() - distance).softmax(1) @ where)
        start += width


def test_the_network_sees_what_each_column_alone_lets_expect():
    """That is what an untrained one answers; and of the number its noisy self."""
    seen: list[Tensor] = []

    class Watched(Constant):
        def forward(self, z: Tensor, clocks: Tensor, cond: object = None, mask: object = None) -> Tensor:
            seen.append(z)
            return super().forward(z, clocks)

    g = torch.Generator().manual_seed(1)
    z, at = drawn(20, g), torch.full((20,), 0.4, dtype=torch.float64)
    model = Denoiser(Watched(torch.zeros(6)), make_schedule("flow"), "v", corners=corners)
    z_t = model.noised(z, torch.randn(20, 6, generator=g), at)
    alone = model(z_t, at)
    torch.testing.assert_close(seen[0][:, 1:], alone[:, 1:])
    torch.testing.assert_close(seen[0][:, 0], z_t[:, 0] / (0.4**2 + 0.6**2) ** 0.5)


def test_a_number_is_denoised_as_before():
    z_t, at = torch.randn(3, 6), torch.full((3,), 0.5, dtype=torch.float64)
    plain = Denoiser(denoiser().net, make_schedule("flow"), "v")
    torch.testing.assert_close(denoiser()(z_t, at)[:, :1], plain(z_t, at)[:, :1])


def test_the_loss_is_twice_the_cross_entropy_and_learns_the_shares():
    """Where the prior is wrong, the network's output makes up for it; then the loss is that of the true shares."""
    g, wrong = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(6))
    model = denoiser(wrong.data + torch.tensor([0.0, -1.0, 2.0, 0.0, 1.0, 0.0]))
    objective = Objective("edm", "uniform")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        z = drawn(256, g)
        t = objective.draw(model.schedule, (256,), g)
        loss = objective.loss(model, z, None, None, t, torch.randn(z.shape, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    f = model.net.f.detach()
    assert (f[1:4] - f[1:4].mean()).abs().max() < 0.3 and (f[4:] - f[4:].mean()).abs().max() < 0.3
    at = torch.full((4000,), 1.0 - 1e-6, dtype=torch.float64)  # all noise: what is left to know is the entropy
    z = drawn(4000, g)
    loss = objective.loss(denoiser(), z, None, None, at, torch.randn(z.shape, generator=g)).mean()
    entropy = sum(float(torch.special.entr(torch.tensor(shares)).sum()) for shares in SHARES)
    torch.testing.assert_close(float(loss.detach()) * 6, 1 + 2 * entropy, rtol=0.05, atol=0)


def test_samples_land_on_corners_with_the_right_shares():
    g = torch.Generator().manual_seed(0)
    model = denoiser()
    with torch.no_grad():
        z = sample(model, model.schedule, torch.randn(4000, 6, generator=g), time_grid(model.schedule, 30), "heun")
    e = z[:, 1:] * corners().std + corners().mean
    assert (e - e.round()).abs().mean() < 0.01
    torch.testing.assert_close(e.mean(0), corners().mean, rtol=0, atol=0.03)


def test_at_the_data_it_stays():
    z = drawn(20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser()(z, torch.zeros(20, dtype=torch.float64))[:, 1:], z[:, 1:])
