"""What stands between encoder and decoder: KL, VQ, FSQ or nothing, on a latent grid (B, C, H, W) or vector (B, C).

Every bottleneck works in float32 whatever autocast says, and gives its loss per item as a mean over latent numbers, so
that one weight serves every size of latent. Its state (the codebook of VQ) lives in buffers: copy them, never average.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from sfumato.choice import build
from sfumato.errors import UserError

Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def straight_through(h: Tensor, q: Tensor) -> Tensor:
    r"""The value of q, bit for bit, with the gradient of h: $q + (h - \mathrm{sg}[h])$, sg stopping the gradient.

    Args:
        h: What was rounded, (...).
        q: What it was rounded to, same shape.

    References:
        Bengio et al. 2013, https://arxiv.org/abs/1308.3432
    """
    return q.detach() + (h - h.detach())


def code_usage(index: Tensor, size: int) -> dict[str, Tensor]:
    r"""How well a codebook is used: `perplexity` $\exp(-\sum_k p_k \log p_k)$ and the share of codes that occur.

    Args:
        index: Codes 0..size-1, any shape; of one batch, or of a whole data set.
        size: Number of codes in the book.
    """
    count = torch.bincount(index.flatten(), minlength=size).float()
    p = count / count.sum().clamp(min=1)
    return {"perplexity": torch.special.entr(p).sum().exp(), "used": (count > 0).float().mean()}


def k_means(x: Tensor, k: int, generator: Generator | None = None, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k rows drawn without replacement (rows repeat where there are fewer than k).

    Args:
        x: Points, (N, D); at most 32 k of them are looked at.
        k: Number of centres.
        generator: CPU generator of the draw.
        steps: Rounds.

    Returns:
        Centres (k, D) and how many points each has (k,); without points a centre stays where it was drawn.
    """
    x = x[_draw(len(x), min(len(x), 32 * k), generator, x.device)]
    centres = x[torch.arange(k, device=x.device) % len(x)]
    for _ in range(steps):
        count, total = _gather(x, nearest(x, centres), k)
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centres)
    return centres, _gather(x, nearest(x, centres), k)[0]


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance: x (N, D), codebook (K, D) -> (N,); the first wins a tie."""
    # not by x² - 2xe + e²: that rounds, and a code could be taken for its neighbour
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, codebook, compute_mode=exact).argmin(1) for part in x.split(8192)])


def _gather(x: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Number (k,) and sum (k, D) of the rows of x (N, D) that chose each code by index (N,)."""
    count = torch.bincount(index, minlength=k).to(x.dtype)
    return count, x.new_zeros(k, x.shape[1]).index_add_(0, index, x)


def _draw(n: int, k: int, generator: Generator | None, device: torch.device) -> Tensor:
    """Draw k of the numbers 0..n-1, none twice before all were once."""
    return torch.randperm(n, generator=generator)[torch.arange(k) % n].to(device)


def _noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Standard normal numbers drawn on the CPU, so that every device sees the same."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


class Bottleneck(nn.Module):
    """Base of all: takes h (B, in_channels, ...) from the encoder, gives z (B, out_channels, ...) to the decoder.

    The encoder must put out `in_channels`; z has `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, h: Tensor, generator: Generator | None = None) -> Result:
        """Encode for training: z (B, out_channels, ...), the loss of each item (B,), and scalars worth logging.

        Args:
            h: (B, in_channels, *spatial) or (B, in_channels).
            generator: CPU generator of all randomness; torch's global one if None.
        """
        raise NotImplementedError

    def mode(self, h: Tensor) -> Tensor:
        """The one z that stands for h: without noise, quantised, no state touched."""
        raise NotImplementedError

    def snap(self, z: Tensor) -> Tensor:
        """Bring z, as diffusion left it, to the nearest latent there is: itself for continuous bottlenecks."""
        return z


class KL(Bottleneck):
    r"""Gaussian posterior drawn towards the standard normal; h holds mean and log variance, one after the other.

    $z = \mu + e^{\ell/2} \epsilon$, and the loss, in nats per latent number, is
    $\tfrac12 (\mu^2 + e^\ell - 1 - \ell)$, the divergence from N(0, 1). The log variance is held in -30..20.

    Args:
        channels: Channels of z; the encoder gives twice as many.

    References:
        Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix B
    """

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels)

    def forward(self, h: Tensor, generator: Generator | None = None) -> Result:
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


class Discrete(Bottleneck):
    """Base of the quantisers: channels fall into groups, and each group of each position holds one of `size` codes.

    Attributes:
        groups: Codes per position; a position carries groups * log2(size) bits.
        size: Number of codes, shared by the groups.
    """

    def __init__(self, channels: int, groups: int, size: int) -> None:
        super().__init__(channels, channels)
        self.groups, self.size = groups, size

    def codes(self, z: Tensor) -> Tensor:
        """Index of the nearest codes: z (B, C, ...) -> int64 (B, groups, ...)."""
        raise NotImplementedError

    def embed(self, index: Tensor) -> Tensor:
        """Codes (B, groups, ...) -> z (B, C, ...)."""
        raise NotImplementedError

    def snap(self, z: Tensor) -> Tensor:
        return self.embed(self.codes(z))

    def split(self, z: Tensor) -> Tensor:
        """(B, C, ...) -> (B, groups, ..., C / groups), a view, in float32."""
        return z.float().unflatten(1, (self.groups, -1)).movedim(2, -1)

    def merge(self, parts: Tensor) -> Tensor:
        """What `split` took apart."""
        return parts.movedim(-1, 2).flatten(1, 2)


class VQ(Discrete):
    r"""Nearest of K learned codes: $z = e_k,\ k = \arg\min_j \lVert h - e_j \rVert$, straight-through.

    The loss is the commitment $\beta \lVert h - \mathrm{sg}[e_k] \rVert^2$ (mean). The codes, no parameters, are moving
    averages of the h that chose them, begun by k-means on the first training batch; neglected ones are set onto h anew.

    Args:
        channels: Channels of h and z.
        size: Number of codes K.
        groups: Codes per position, from one shared book in channels / groups dimensions.
        commitment: Weight beta; it is part of the loss.
        decay: Of the moving averages; 0.99 suits runs of many thousand steps, whose encoder moves slowly.
        restart: A code below this share of the mean count is set anew; 0 never.
        cosine: Compare directions: h and codes lie on the unit sphere.

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
        self.register_buffer("codebook", self.place(torch.randn(size, channels // groups)))
        self.register_buffer("count", torch.zeros(size))
        self.register_buffer("total", torch.zeros_like(self.codebook))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, h: Tensor, generator: Generator | None = None) -> Result:
        h = self.merge(self.place(self.split(h)))
        rows = self.split(h).detach().reshape(-1, self.codebook.shape[1])
        if self.training and not self.ready:
            self.begin(rows, generator)
        index = self.codes(h)
        z = self.embed(index)
        if self.training:
            self.update(rows, index.flatten(), generator)
        loss = self.commitment * (h - z).square().flatten(1).mean(1)
        return straight_through(h, z), loss, code_usage(index, self.size)

    def place(self, x: Tensor) -> Tensor:
        """Onto the unit sphere of the last axis if directions are compared."""
        return nn.functional.normalize(x, dim=-1) if self.cosine else x

    def mode(self, h: Tensor) -> Tensor:
        return self.snap(h)

    def codes(self, z: Tensor) -> Tensor:
        parts = self.place(self.split(z))
        return nearest(parts.reshape(-1, parts.shape[-1]), self.codebook).reshape(parts.shape[:-1])

    def embed(self, index: Tensor) -> Tensor:
        return self.merge(self.codebook[index])

    @torch.no_grad()
    def begin(self, rows: Tensor, generator: Generator | None) -> None:
        """Codes from k-means on the first batch; those left empty by a small batch are set anew by the next update."""
        centres, count = k_means(rows, self.size, generator)
        self.codebook.copy_(self.place(centres))
        self.count.copy_(count)
        self.total.copy_(self.codebook * count[:, None])
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, rows: Tensor, index: Tensor, generator: Generator | None) -> None:
        """Move every code towards the mean of the rows (N, D) that chose it by index (N,), and revive dead codes."""
        count, total = (_sum_over_processes(x) for x in _gather(rows, index, self.size))
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        fair = count.sum() / self.size
        # the draw has one size, whatever is dead: the generator moves on equally and nothing waits for the device
        fresh = rows[_draw(len(rows), self.size, generator, rows.device)]
        dead = self.count < self.restart * fair
        self.count.copy_(torch.where(dead, fair, self.count))
        self.total.copy_(torch.where(dead[:, None], fresh * fair, self.total))
        self.codebook.copy_(self.place(self.total / self.count.clamp(min=1e-6)[:, None]))


def _sum_over_processes(x: Tensor) -> Tensor:
    """Codes follow the global batch; rank 0's buffers reach the other ranks at DDP's next forward."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


LEVELS = {2: (24, 24), 3: (8, 6, 5), 5: (8, 8, 8, 6, 5), 1: (8,)}
"""Levels per channel where none are given: the first key that divides the channels. Pairs of fine levels hold a little
more than codes of 512; the others are of Mentzer et al. 2023, table 1."""


class FSQ(Discrete):
    r"""Each channel rounded to one of a few levels, evenly spaced on [-1, 1], straight-through; no codebook, no loss.

    With L levels, $u = \tanh(h + s)(L - 1)/2 - o$ is rounded, where $o = 1/2$ for even L (else 0) and
    $s = \tanh^{-1}(2o / (L - 1))$ keep h = 0 in the middle of a step.

    Args:
        channels: Channels of h and z.
        levels: Levels of each channel of one group; repeated over channels / len(levels) groups.

    References:
        Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, section 3.1 and appendix A.1
    """

    width: Tensor
    offset: Tensor
    basis: Tensor

    def __init__(self, channels: int, levels: Sequence[int] | None = None) -> None:
        levels = tuple(levels or next(LEVELS[n] for n in LEVELS if channels % n == 0))
        if channels % len(levels):
            raise UserError(f"fsq: {len(levels)} levels {levels} do not divide channels={channels}")
        if min(levels) < 2:
            raise UserError(f"fsq: every one of levels={levels} must be 2 or more")
        basis = torch.tensor((1, *levels[:-1])).cumprod(0)
        super().__init__(channels, channels // len(levels), math.prod(levels))
        self.levels = levels
        count = torch.tensor(levels)
        self.register_buffer("width", (count - 1).float(), persistent=False)
        self.register_buffer("offset", (1 - count % 2).float() / 2, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, h: Tensor, generator: Generator | None = None) -> Result:
        u = self.bound(h)
        digits = self.digits(u)
        z = straight_through(2 * (u + self.offset) / self.width, self.grid(digits))
        return self.merge(z), u.new_zeros(len(h)), code_usage((digits.long() * self.basis).sum(-1), self.size)

    def bound(self, h: Tensor) -> Tensor:
        """Map h (B, C, ...) to u (B, groups, ..., len(levels)), which rounds to L integers from -(L // 2) on."""
        half = self.width * (1 - 1e-3) / 2
        # a channel of two levels needs no shift: half a step would be all there is
        shift = torch.atanh((self.offset / half).clamp(max=0.5))
        return torch.tanh(self.split(h) + shift) * half - self.offset

    def digits(self, u: Tensor) -> Tensor:
        """Round u to level numbers 0..L-1, as floats."""
        return (u.round() + (self.width + 2 * self.offset) / 2).clamp(u.new_zeros(()), self.width)

    def grid(self, digits: Tensor) -> Tensor:
        """Level numbers 0..L-1 -> values in [-1, 1]."""
        return 2 * digits / self.width - 1

    def mode(self, h: Tensor) -> Tensor:
        return self.merge(self.grid(self.digits(self.bound(h))))

    def codes(self, z: Tensor) -> Tensor:
        digits = ((self.split(z) + 1) / 2 * self.width).round().clamp(z.new_zeros(()), self.width)
        return (digits.long() * self.basis).sum(-1)

    def embed(self, index: Tensor) -> Tensor:
        return self.merge(self.grid(index[..., None] // self.basis % (self.width.long() + 1)))


class Plain(Bottleneck):
    """No bottleneck: z is h, in training with a little noise if asked for; the loss is zero.

    Args:
        channels: Channels of h and z.
        noise: Standard deviation of the noise as a share of the batch's own, so that growing h does not drown it.
    """

    def __init__(self, channels: int, noise: float = 0.0) -> None:
        super().__init__(channels, channels)
        self.noise = noise

    def forward(self, h: Tensor, generator: Generator | None = None) -> Result:
        z = h.float()
        if self.training and self.noise:
            z = z + self.noise * z.detach().std() * _noise(z, generator)
        return z, z.new_zeros(len(z)), {}

    def mode(self, h: Tensor) -> Tensor:
        return h.float()


BOTTLENECKS: dict[str, type[Bottleneck]] = {"kl": KL, "vq": VQ, "fsq": FSQ, "none": Plain}

Setting = int | float | bool | Sequence[int] | None


def make_bottleneck(name: str, channels: int, **settings: Setting) -> Bottleneck:
    """Build a bottleneck by name.

    Args:
        name: One of `BOTTLENECKS`.
        channels: Channels of z.
        settings: The other arguments of its constructor.

    Raises:
        UserError: The name or a setting is unknown; the nearest one is suggested.
    """
    return build(BOTTLENECKS, "bottleneck", name, {"channels": channels, **settings})
