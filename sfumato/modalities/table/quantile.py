"""Quantile transform of columns to standard normal scores, and back; exact for atoms and grids."""

import torch
from torch import Tensor, nn

MIN_ATOM_ROWS = 5  # rows of an atom, so that values that coincide by chance on a fine grid are none


def cdf_knots(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""Piecewise linear empirical distribution function through knots (x_k, u_k), both non-decreasing.

    An atom, a value with a positive share of the rows, is a vertical segment: it has an interval of u. If there are few
    distinct values, often repeated, all are atoms. Otherwise those that occur more than 2 N / K times are, and the
    function interpolates the others linearly between quantiles, so that new values between them can appear.

    Args:
        x: Values (N,), float64, none missing; may be empty.
        count: Number of knots K.

    Returns:
        x_k and u_k, each (K,).
    """
    if not len(x):
        return torch.zeros(count, dtype=torch.float64), torch.linspace(0, 1, count, dtype=torch.float64)
    value, times = torch.unique(x, return_counts=True)
    upper = times.cumsum(0).double() / len(x)
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    discrete = 2 * len(value) <= count and len(x) >= MIN_ATOM_ROWS * len(value)
    min_rows = max(2 * len(x) / count, MIN_ATOM_ROWS)
    atom = torch.full_like(value, True, dtype=torch.bool) if discrete else times > min_rows
    x_k, u_k = value[atom].repeat_interleave(2), torch.stack([lower[atom], upper[atom]], 1).flatten()
    if not discrete:
        q = quantile_grid(count - len(x_k) - 2, len(x))
        middle = (q * (len(x) - 1) + 0.5) / len(x)  # of each row's interval of u, so that the extremes come back too
        x_k = torch.cat([x_k, x.min()[None], torch.quantile(x, q), x.max()[None]])
        u_k = torch.cat([u_k, u_k.new_zeros(1), middle, u_k.new_ones(1)])
        order = torch.argsort(u_k, stable=True)
        x_k, u_k = x_k[order].cummax(0).values, u_k[order]
    padding = count - len(x_k)
    return torch.cat([x_k, x_k[-1:].expand(padding)]), torch.cat([u_k, u_k.new_ones(padding)])


def quantile_grid(count: int, rows: int) -> Tensor:
    """Levels of the quantiles of `rows` values: half of them uniform, half dense in both tails.

    One level per value, if there are no more than `count` values.
    """
    if rows <= count:
        return torch.cat([torch.linspace(0, 1, rows, dtype=torch.float64), torch.ones(count - rows).double()])
    extreme = torch.special.ndtri(torch.tensor(1 - 0.5 / max(rows, 2), dtype=torch.float64))
    tails = torch.special.ndtr(torch.linspace(-1, 1, count // 2, dtype=torch.float64) * extreme)
    return torch.cat([torch.linspace(0, 1, count - count // 2, dtype=torch.float64), tails]).sort().values


class QuantileTransform(nn.Module):
    r"""Normal scores of several columns, $f = \Phi^{-1}(u)$, with u drawn from the value's interval of the CDF.

    A value that occurs once has one score. An atom has all scores of an interval, so that diffusion sees a continuous
    distribution, and every score of the interval decodes to the atom exactly. Other values come back up to float32
    rounding.

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
        """Fit the distribution of each column of x (N, D), float64, NaN if missing."""
        for column, (x_k, u_k) in enumerate(zip(self.x, self.u, strict=True)):
            values = x[:, column]
            for buffer, knots in zip((x_k, u_k), cdf_knots(values[~values.isnan()], self.count), strict=True):
                buffer.copy_(knots)
        self.edge.copy_(0.5 / (~x.isnan()).sum(0).clamp_min(2))

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end (B, D) of the interval of u of each value of x (B, D); (0, 1) for missing ones."""
        missing = x.isnan()
        value = torch.where(missing, 0.0, x).T.contiguous()  # (D, B)
        ends = [self._cdf(value, upper) for upper in (False, True)]
        return torch.where(missing, 0.0, ends[0].T), torch.where(missing, 1.0, ends[1].T)

    def _cdf(self, value: Tensor, upper: bool) -> Tensor:
        """The CDF u (D, B) of values (D, B), interpolated linearly; at the lower or upper end of vertical segments."""
        after = torch.searchsorted(self.x, value, right=upper).clamp(1, self.count - 1)
        x_0, x_1 = self.x.gather(1, after - 1), self.x.gather(1, after)
        u_0, u_1 = self.u.gather(1, after - 1), self.u.gather(1, after)
        weight = torch.where(x_1 > x_0, (value - x_0) / (x_1 - x_0).clamp_min(1e-300), float(upper)).clamp(0, 1)
        return u_0 + weight * (u_1 - u_0)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scores (B, D), float32, of x (B, D): of the interval's middle, or of a random u if given a CPU generator.

        Missing values always get the middle, 0: with random scores, a mostly missing column would teach only noise.
        """
        low, high = self.interval(x)
        weight: float | Tensor = 0.5
        if generator is not None:
            uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
            weight = torch.where(x.isnan(), weight, uniform)
        u = (low + weight * (high - low)).clamp(self.edge, 1 - self.edge)
        return torch.special.ndtri(u).float()

    def inverse(self, f: Tensor) -> Tensor:
        """Values (B, D), float64, of scores f (B, D)."""
        u = torch.special.ndtr(f.double()).T.contiguous()  # (D, B)
        after = torch.searchsorted(self.u, u, right=True).clamp(1, self.count - 1)
        x_0, x_1 = self.x.gather(1, after - 1), self.x.gather(1, after)
        u_0, u_1 = self.u.gather(1, after - 1), self.u.gather(1, after)
        weight = torch.where(u_1 > u_0, (u - u_0) / (u_1 - u_0).clamp_min(1e-300), 0.5).clamp(0, 1)
        return (x_0 + weight * (x_1 - x_0)).T
