"""Numbers as a condition: a column of a table, a measured quantity."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.conditioners.conditioner import Condition
from sfumato.nn.layers import fourier, norm
from sfumato.types import Cond

NUMBER_FREQUENCIES = (0.25, 16.0)  # lowest and highest, in radians per standard deviation: periods from 25 to 0.4
NUMBER_FEATURES = 16  # frequencies between them, with equal ratios
RESOLVED_RANGE = 4.0  # standard deviations from the mean within which Fourier features tell values apart
LARGEST_VALUE = 100.0  # standard deviations from the mean at which a value is clamped


class NumberCondition(Condition[Tensor]):
    r"""A perceptron on a standardised number u and its Fourier features, and a learned null vector.

    .. math:: u = (x - \mu) / s, \quad v = \mathrm{norm}(W_2\, \mathrm{silu}(W_1 [u, \mathrm{fourier}(r \tanh(u / r))]))

    Far from the mean the Fourier features saturate, so that v continues through u alone, without oscillation. The layer
    norm gives v the scale of a new label's embedding.

    Args:
        mean: Mean of the number over the training set.
        std: Standard deviation of the number over the training set; 0, that of a constant, counts as 1.
        dim: Length of the vector, above 1.
        dropout: Share of training values replaced by the null.

    References:
        Tancik et al. 2020, Fourier Features Let Networks Learn High Frequency Functions, arXiv:2006.10739.
    """

    kind = "number"

    frequencies: Tensor

    def __init__(self, mean: float, std: float, dim: int = 128, dropout: float = 0.1) -> None:
        super().__init__(dim, 0, dropout)
        self.mean, self.std = mean, std or 1.0
        low, high = (math.log10(w) for w in NUMBER_FREQUENCIES)
        self.register_buffer("frequencies", torch.logspace(low, high, NUMBER_FEATURES), persistent=False)
        self.features_in = nn.Linear(1 + 2 * NUMBER_FEATURES, dim)
        self.out = nn.Linear(dim, dim)
        self.null_vector = nn.Parameter(torch.randn(dim))

    def known(self, values: Tensor) -> Tensor:
        return values.isfinite()

    def embed(self, values: Tensor) -> Cond:
        """The embeddings of numbers (B,)."""
        x = torch.where(self.known(values), values, self.mean).float().to(self.frequencies.device)
        u = ((x - self.mean) / self.std).clamp(-LARGEST_VALUE, LARGEST_VALUE)[:, None]  # (B, 1)
        bounded = RESOLVED_RANGE * torch.tanh(u / RESOLVED_RANGE)
        features = torch.cat((u, fourier(bounded, self.frequencies)), dim=-1)  # (B, 1 + 2n)
        return Cond(vector=norm(self.out(F.silu(self.features_in(features)))))  # (B, dim)

    def null(self, count: int) -> Cond:
        return Cond(vector=self.null_vector.expand(count, -1))
