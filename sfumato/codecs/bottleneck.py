"""Bottlenecks between encoder and decoder: KL, VQ, FSQ or none, on a latent grid (B, C, H, W) or vector (B, C).

Every bottleneck computes in float32, also under autocast. Its loss per item is a mean over latent elements, so one
weight suits every latent size. Its state (the codebook of VQ) is in buffers, which an EMA must copy, not average.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from sfumato.errors import UserError
from sfumato.registry import build

BottleneckOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def straight_through(h: Tensor, q: Tensor) -> Tensor:
    r"""Straight-through estimator $q + (h - \mathrm{sg}[h])$: exactly the value of q, with the gradient of h.

    Args:
        h: The value before quantization, (...).
        q: The quantized value, same shape.

    References:
        Bengio et al. 2013, https://arxiv.org/abs/1308.3432
    """
    return q.detach() + (h - h.detach())


def code_usage(index: Tensor, size: int) -> dict[str, Tensor]:
    r"""Codebook usage: `perplexity` $\exp(-\sum_k p_k \log p_k)$ and `used`, the fraction of codes that occur.

    Args:
        index: Codes 0..size-1, any shape; from one batch or a whole data set.
        size: Number of codes in the codebook.
    """
    count = torch.bincount(index.flatten(), minlength=size).float()
    p = count / count.sum().clamp(min=1)
    return {"perplexity": torch.special.entr(p).sum().exp(), "used": (count > 0).float().mean()}


def k_means(x: Tensor, k: int, generator: Generator | None = None, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """k-means by Lloyd's algorithm, initialised with k points drawn without replacement (repeated if there are fewer).

    Args:
        x: Points, (N, D); at most 32 k of them are used.
        k: Number of centres.
        generator: CPU generator that draws the points.
        iterations: Number of iterations.

    Returns:
        Centres (k, D) and the number of points of each (k,); a centre without points keeps its value.
    """
    x = x[_sample_indices(len(x), min(len(x), 32 * k), generator, x.device)]
    centres = x[torch.arange(k, device=x.device) % len(x)]
    for _ in range(iterations):
        count, total = _code_sums(x, nearest(x, centres), k)
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centres)
    return centres, _code_sums(x, nearest(x, centres), k)[0]


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in Euclidean distance: x (N, D), codebook (K, D) -> (N,); ties go to the first."""
    # not by x² - 2xe + e²: its rounding can confuse neighbouring codes
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, codebook, compute_mode=exact).argmin(1) for part in x.split(8192)])


def _code_sums(x: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Number (k,) and sum (k, D) of the vectors x (N, D) assigned to each code by index (N,)."""
    count = torch.bincount(index, minlength=k).to(x.dtype)
    return count, x.new_zeros(k, x.shape[1]).index_add_(0, index, x)


def _sample_indices(n: int, k: int, generator: Generator | None, device: torch.device) -> Tensor:
    """Draw k of the numbers 0..n-1 without replacement; for k > n the permutation repeats."""
    return torch.randperm(n, generator=generator)[torch.arange(k) % n].to(device)


def _noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Standard normal noise, drawn on the CPU so that it is equal on every device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


class Bottleneck(nn.Module):
    """Base class: maps h (B, in_channels, ...) of the encoder to z (B, out_channels, ...) for the decoder."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, h: Tensor, generator: Generator | None = None) -> BottleneckOutput:
        """The training path: z (B, out_channels, ...), the loss of each item (B,), and scalars to log.

        Args:
            h: (B, in_channels, *spatial) or (B, in_channels).
            generator: CPU generator of all randomness; torch's global one if None.
        """
        raise NotImplementedError

    def mode(self, h: Tensor) -> Tensor:
        """The deterministic z of h: without noise, quantized; changes no state."""
        raise NotImplementedError

    def quantize(self, z: Tensor) -> Tensor:
        """Quantize z from the diffusion model to the nearest valid latent; the identity for continuous bottlenecks."""
        return z


class KL(Bottleneck):
    r"""Gaussian posterior of a VAE, regularised to N(0, 1); h is the concatenation of mean and log variance.

    $z = \mu + e^{\ell/2} \epsilon$. The loss is the KL divergence to N(0, 1) in nats per latent element,
    $\tfrac12 (\mu^2 + e^\ell - 1 - \ell)$. The log variance is clamped to -30..20.

    Args:
        channels: Channels of z; the encoder outputs twice as many.

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix B
    """

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels)

    def forward(self, h: Tensor, generator: Generator | None = None) -> BottleneckOutput:
        mean, logvar = self.posterior(h)
        std = (logvar / 2).exp()
        nats = (mean.square() + logvar.exp() - 1 - logvar) / 2
        info = {"nats": nats.detach().flatten(1).sum(1).mean(), "std": std.detach().mean()}
        return mean + std * _noise(std, generator), nats.flatten(1).mean(1), info

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log variance, each (B, channels, ...)."""
        mean, logvar = h.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def mode(self, h: Tensor) -> Tensor:
        return self.posterior(h)[0]


class Quantizer(Bottleneck):
    """Base class of quantizers: channels are split into groups, each with one of `size` codes per position.

    Attributes:
        groups: Codes per position; a position carries groups * log2(size) bits.
        size: Number of codes, shared by the groups.
    """

    def __init__(self, channels: int, groups: int, size: int) -> None:
        super().__init__(channels, channels)
        self.groups, self.size = groups, size

    def indices(self, z: Tensor) -> Tensor:
        """Index of the nearest codes: z (B, C, ...) -> int64 (B, groups, ...)."""
        raise NotImplementedError

    def embed(self, index: Tensor) -> Tensor:
        """Codes (B, groups, ...) -> z (B, C, ...)."""
        raise NotImplementedError

    def quantize(self, z: Tensor) -> Tensor:
        return self.embed(self.indices(z))

    def split(self, z: Tensor) -> Tensor:
        """(B, C, ...) -> (B, groups, ..., C / groups), a view, in float32."""
        return z.float().unflatten(1, (self.groups, -1)).movedim(2, -1)

    def merge(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        return parts.movedim(-1, 2).flatten(1, 2)


class VQ(Quantizer):
    r"""Vector quantization: $z = e_k,\ k = \arg\min_j \lVert h - e_j \rVert$, with a straight-through gradient.

    The loss is the commitment loss $\beta \lVert h - \mathrm{sg}[e_k] \rVert^2$ (mean). The codes are no parameters but
    moving averages of the h assigned to them, initialised by k-means on the first training batch; dead codes restart
    at random h.

    Args:
        channels: Channels of h and z.
        size: Number of codes K.
        groups: Codes per position, from one shared codebook with channels / groups dimensions.
        commitment: Weight beta, included in the loss.
        decay: Decay per step of the moving averages; 0.99 suits runs of many thousand steps, with a slow encoder.
        restart: A code restarts if its count is below this fraction of the mean count; 0 disables restarts.
        cosine: Use cosine similarity: h and codes are normalised to the unit sphere.

    References:
        van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, eq. 3 and appendix A.1; Razavi et al. 2019,
        https://arxiv.org/abs/1906.00446; restarts: Dhariwal et al. 2020, https://arxiv.org/abs/2005.00341
    """

    codebook: Tensor
    count: Tensor
    total: Tensor
    ready: Tensor

    def __init__(
        self,
        channels: int,
        size: int = 512,
        groups: int = 1,
        commitment: float = 0.25,
        decay: float = 0.9,
        restart: float = 0.1,
        cosine: bool = False,
    ) -> None:
        if channels % groups:
            raise UserError(f"vq: groups={groups} does not divide channels={channels}")
        super().__init__(channels, groups, size)
        self.commitment, self.decay, self.restart, self.cosine = commitment, decay, restart, cosine
        self.register_buffer("codebook", self.project(torch.randn(size, channels // groups)))
        self.register_buffer("count", torch.zeros(size))
        self.register_buffer("total", torch.zeros_like(self.codebook))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, h: Tensor, generator: Generator | None = None) -> BottleneckOutput:
        h = self.merge(self.project(self.split(h)))
        vectors = self.split(h).detach().reshape(-1, self.codebook.shape[1])
        if self.training and not self.ready:
            self.init_codebook(vectors, generator)
        index = self.indices(h)
        z = self.embed(index)
        if self.training:
            self.update(vectors, index.flatten(), generator)
        loss = self.commitment * (h - z).square().flatten(1).mean(1)
        return straight_through(h, z), loss, code_usage(index, self.size)

    def project(self, x: Tensor) -> Tensor:
        """Normalise the last axis to the unit sphere if `cosine`."""
        return nn.functional.normalize(x, dim=-1) if self.cosine else x

    def mode(self, h: Tensor) -> Tensor:
        return self.quantize(h)

    def indices(self, z: Tensor) -> Tensor:
        parts = self.project(self.split(z))
        return nearest(parts.reshape(-1, parts.shape[-1]), self.codebook).reshape(parts.shape[:-1])

    def embed(self, index: Tensor) -> Tensor:
        return self.merge(self.codebook[index])

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor, generator: Generator | None) -> None:
        """Initialise the codes by k-means on the first batch; the next update restarts those without vectors."""
        centres, count = k_means(vectors, self.size, generator)
        self.codebook.copy_(self.project(centres))
        self.count.copy_(count)
        self.total.copy_(self.codebook * count[:, None])
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, vectors: Tensor, index: Tensor, generator: Generator | None) -> None:
        """Move every code toward the mean of the vectors (N, D) assigned to it by index (N,); restart dead codes."""
        count, total = (_sum_over_processes(x) for x in _code_sums(vectors, index, self.size))
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        mean_count = count.sum() / self.size
        # one per code, dead or not: the generator advances by the same amount, and nothing waits for the device
        replacements = vectors[_sample_indices(len(vectors), self.size, generator, vectors.device)]
        dead = self.count < self.restart * mean_count
        self.count.copy_(torch.where(dead, mean_count, self.count))
        self.total.copy_(torch.where(dead[:, None], replacements * mean_count, self.total))
        self.codebook.copy_(self.project(self.total / self.count.clamp(min=1e-6)[:, None]))


def _sum_over_processes(x: Tensor) -> Tensor:
    """Sum over processes, so that codes follow the global batch; DDP's next forward broadcasts rank 0's buffers."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


FSQ_LEVELS = {2: (24, 24), 3: (8, 6, 5), 5: (8, 8, 8, 6, 5), 1: (8,)}
"""Default levels: those of the first key that divides the number of channels. (24, 24) has slightly more codes than a
codebook of 512; the others are from Mentzer et al. 2023, table 1."""


class FSQ(Quantizer):
    r"""Finite scalar quantization: each channel is rounded to L levels, uniform on [-1, 1]; no codebook, no loss.

    $u = \tanh(h + s)(L - 1)/2 - o$ is rounded, with a straight-through gradient, where $o = 1/2$ for even L (else 0)
    and $s = \tanh^{-1}(2o / (L - 1))$ keep h = 0 inside a rounding interval.

    Args:
        channels: Channels of h and z.
        levels: Numbers of levels L of the channels of one group; repeated over channels / len(levels) groups.

    References:
        Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, section 3.1 and appendix A.1
    """

    width: Tensor
    offset: Tensor
    basis: Tensor

    def __init__(self, channels: int, levels: Sequence[int] | None = None) -> None:
        levels = tuple(levels or next(FSQ_LEVELS[n] for n in FSQ_LEVELS if channels % n == 0))
        if channels % len(levels):
            raise UserError(f"fsq: the length of levels={levels} does not divide channels={channels}")
        if min(levels) < 2:
            raise UserError(f"fsq: all levels={levels} must be at least 2")
        basis = torch.tensor((1, *levels[:-1])).cumprod(0)
        super().__init__(channels, channels // len(levels), math.prod(levels))
        self.levels = levels
        count = torch.tensor(levels)
        self.register_buffer("width", (count - 1).float(), persistent=False)
        self.register_buffer("offset", (1 - count % 2).float() / 2, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, h: Tensor, generator: Generator | None = None) -> BottleneckOutput:
        u = self.bound(h)
        level_indices = self.level_indices(u)
        z = straight_through(2 * (u + self.offset) / self.width, self.level_values(level_indices))
        return self.merge(z), u.new_zeros(len(h)), code_usage((level_indices.long() * self.basis).sum(-1), self.size)

    def bound(self, h: Tensor) -> Tensor:
        """Map h (B, C, ...) to u (B, groups, ..., len(levels)), which rounds to L integers from -(L // 2) up."""
        half = self.width * (1 - 1e-3) / 2
        # the clamp is for two levels, whose shift would not be finite
        shift = torch.atanh((self.offset / half).clamp(max=0.5))
        return torch.tanh(self.split(h) + shift) * half - self.offset

    def level_indices(self, u: Tensor) -> Tensor:
        """Round u to level indices 0..L-1, as floats."""
        return (u.round() + (self.width + 2 * self.offset) / 2).clamp(u.new_zeros(()), self.width)

    def level_values(self, level_indices: Tensor) -> Tensor:
        """Level indices 0..L-1 -> values in [-1, 1]."""
        return 2 * level_indices / self.width - 1

    def mode(self, h: Tensor) -> Tensor:
        return self.merge(self.level_values(self.level_indices(self.bound(h))))

    def indices(self, z: Tensor) -> Tensor:
        level_indices = ((self.split(z) + 1) / 2 * self.width).round().clamp(z.new_zeros(()), self.width)
        return (level_indices.long() * self.basis).sum(-1)

    def embed(self, index: Tensor) -> Tensor:
        return self.merge(self.level_values(index[..., None] // self.basis % (self.width.long() + 1)))


class Identity(Bottleneck):
    """No bottleneck: z = h, optionally with noise during training; the loss is zero.

    Args:
        channels: Channels of h and z.
        noise: Standard deviation of the noise relative to that of the batch, so that a larger h does not hide it.
    """

    def __init__(self, channels: int, noise: float = 0.0) -> None:
        super().__init__(channels, channels)
        self.noise = noise

    def forward(self, h: Tensor, generator: Generator | None = None) -> BottleneckOutput:
        z = h.float()
        if self.training and self.noise:
            z = z + self.noise * z.detach().std() * _noise(z, generator)
        return z, z.new_zeros(len(z)), {}

    def mode(self, h: Tensor) -> Tensor:
        return h.float()


BOTTLENECKS: dict[str, type[Bottleneck]] = {"kl": KL, "vq": VQ, "fsq": FSQ, "none": Identity}

Setting = int | float | bool | Sequence[int] | None


def make_bottleneck(name: str, channels: int, **settings: Setting) -> Bottleneck:
    """Build a bottleneck by name.

    Args:
        name: A name in `BOTTLENECKS`.
        channels: Channels of z.
        settings: The other arguments of its constructor.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    return build(BOTTLENECKS, "bottleneck", name, {"channels": channels, **settings})
