"""Numbers of any distribution as standard normal ones, and back: exact for spikes and grids."""

import torch
from torch import Tensor, nn

REPEATED = 5  # rows that a value has on average, or at least, to be more than a chance meeting on a fine grid


def knots(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""The empirical distribution function as a polygon through (x_k, u_k), both non-decreasing.

    A value that takes a share of the rows is a vertical stretch: it holds an interval of u. If there are few different
    values, often repeated, each has its interval. Else those have one that occur more often than 2 N / K times, and the
    others lie on straight lines between `quantiles`, so that new values appear between them.

    Args:
        x: Values (N,), float64, none missing; may be empty.
        count: Number of knots K.

    Returns:
        x_k and u_k, each (K,).
    """
    if not len(x):
        return torch.zeros(count, dtype=torch.float64), torch.linspace(0, 1, count, dtype=torch.float64)
    value, times = torch.unique(x, return_counts=True)
    above = times.cumsum(0).double() / len(x)
    below = torch.cat([above.new_zeros(1), above[:-1]])
    few = 2 * len(value) <= count and len(x) >= REPEATED * len(value)
    held = torch.full_like(value, True, dtype=torch.bool) if few else times > max(2 * len(x) / count, REPEATED)
    x_k, u_k = value[held].repeat_interleave(2), torch.stack([below[held], above[held]], 1).flatten()
    if not few:
        at = quantiles(count - len(x_k) - 2, len(x))
        middle = (at * (len(x) - 1) + 0.5) / len(x)  # of the row that a value is, so that the outermost come back too
        x_k = torch.cat([x_k, x.min()[None], torch.quantile(x, at), x.max()[None]])
        u_k = torch.cat([u_k, u_k.new_zeros(1), middle, u_k.new_ones(1)])
        order = torch.argsort(u_k, stable=True)
        x_k, u_k = x_k[order].cummax(0).values, u_k[order]
    missing = count - len(x_k)
    return torch.cat([x_k, x_k[-1:].expand(missing)]), torch.cat([u_k, u_k.new_ones(missing)])


def quantiles(count: int, rows: int) -> Tensor:
    """Where an empirical distribution of `rows` values is read: half evenly spread, half dense in both tails.

    At every value, if there are not more of them.
    """
    if rows <= count:
        return torch.cat([torch.linspace(0, 1, rows, dtype=torch.float64), torch.ones(count - rows).double()])
    farthest = torch.special.ndtri(torch.tensor(1 - 0.5 / max(rows, 2), dtype=torch.float64))
    tails = torch.special.ndtr(torch.linspace(-1, 1, count // 2, dtype=torch.float64) * farthest)
    return torch.cat([torch.linspace(0, 1, count - count // 2, dtype=torch.float64), tails]).sort().values


class Scores(nn.Module):
    r"""Normal scores of several columns: $f = \Phi^{-1}(u)$ with u drawn from the interval that the value holds.

    A value that occurs once has one score; one that takes a share of the rows has all scores of an interval, so that
    what diffusion sees is continuous, and every score in it means that value: exactly. Others come back but for
    float32 rounding.

    Args:
        columns: Number of columns D.
        count: Knots K of each column.
    """

    x: Tensor
    u: Tensor
    edge: Tensor

    def __init__(self, columns: int, count: int = 2048) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("x", torch.zeros(columns, count, dtype=torch.float64))
        self.register_buffer("u", torch.linspace(0, 1, count, dtype=torch.float64).repeat(columns, 1))
        self.register_buffer("edge", torch.full((columns,), 1e-6, dtype=torch.float64))

    def fit(self, x: Tensor) -> None:
        """Learn the columns' distributions from x (N, D), float64, NaN where missing."""
        for column, (x_k, u_k) in enumerate(zip(self.x, self.u, strict=True)):
            values = x[:, column]
            for buffer, found in zip((x_k, u_k), knots(values[~values.isnan()], self.count), strict=True):
                buffer.copy_(found)
        self.edge.copy_(0.5 / (~x.isnan()).sum(0).clamp_min(2))

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end (B, D) of what x (B, D) holds of (0, 1): all of it where x is missing."""
        missing = x.isnan()
        value = torch.where(missing, 0.0, x).T.contiguous()  # (D, B)
        ends = [self._place(value, upper) for upper in (False, True)]
        return torch.where(missing, 0.0, ends[0].T), torch.where(missing, 1.0, ends[1].T)

    def _place(self, value: Tensor, upper: bool) -> Tensor:
        """Where (D, B) values are on (0, 1): on straight lines between knots, at either end of vertical ones."""
        after = torch.searchsorted(self.x, value, right=upper).clamp(1, self.count - 1)
        x_0, x_1 = self.x.gather(1, after - 1), self.x.gather(1, after)
        u_0, u_1 = self.u.gather(1, after - 1), self.u.gather(1, after)
        along = torch.where(x_1 > x_0, (value - x_0) / (x_1 - x_0).clamp_min(1e-300), float(upper)).clamp(0, 1)
        return u_0 + along * (u_1 - u_0)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scores (B, D), float32, of x (B, D): the interval's middle, or drawn from it by the CPU's generator.

        Of what is missing always the middle, 0: noise there would be all that a rarely filled column teaches.
        """
        low, high = self.interval(x)
        share: float | Tensor = 0.5
        if generator is not None:
            drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
            share = torch.where(x.isnan(), share, drawn)
        u = (low + share * (high - low)).clamp(self.edge, 1 - self.edge)
        return torch.special.ndtri(u).float()

    def inverse(self, f: Tensor) -> Tensor:
        """Values (B, D), float64, of scores f (B, D)."""
        u = torch.special.ndtr(f.double()).T.contiguous()  # (D, B)
        after = torch.searchsorted(self.u, u, right=True).clamp(1, self.count - 1)
        x_0, x_1 = self.x.gather(1, after - 1), self.x.gather(1, after)
        u_0, u_1 = self.u.gather(1, after - 1), self.u.gather(1, after)
        along = torch.where(u_1 > u_0, (u - u_0) / (u_1 - u_0).clamp_min(1e-300), 0.5).clamp(0, 1)
        return (x_0 + along * (x_1 - x_0)).T
