"""What every codec promises, whatever its bottleneck, its latent and the images' shape."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.codecs import ImageCodec
from sfumato.data.base import Data
from sfumato.model import load_part, save_part
from sfumato.training.steps import CodecStep
from sfumato.types import Batch
from tests.training.common import images, pictures

BOTTLENECKS = ("kl", "vq", "fsq", "none")
LATENTS = ("grid", "vector")
SHAPES = ((1, 8, 8), (3, 32, 32), (4, 20, 28), (1, 28, 28))
COUNT = 250  # images that are trained on, and as many held out

each = pytest.mark.parametrize("bottleneck", BOTTLENECKS)
both = pytest.mark.parametrize("latent", LATENTS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_codec(bottleneck: str, latent: str, shape: tuple[int, int, int]) -> ImageCodec:
    torch.manual_seed(0)
    options = {"downsample": 4 if shape[1] < 16 else 8, "channels": 4, "width": 16, "codebook_size": 16}
    return ImageCodec(shape, bottleneck=bottleneck, latent_dim=12 if latent == "vector" else 0, **options)


def train(codec: ImageCodec, x: Tensor, steps: int, batch: int, lr: float = 3e-3) -> list[float]:
    """The reconstruction loss of each step."""
    step, losses = CodecStep(codec.train(), None, bottleneck_weight=1e-3), []
    optimizer = torch.optim.AdamW(codec.parameters(), lr)
    for i in range(steps):
        index = torch.arange(i * batch, (i + 1) * batch) % len(x)
        terms = step(Batch(x[index], index), "codec", i, torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["rec"].detach()))
    codec.eval()
    return losses


@cache
def trained(bottleneck: str, latent: str, shape: tuple[int, int, int]) -> tuple[ImageCodec, Tensor]:
    """A codec after a little training, whitened; and its latents of the training images."""
    codec, x = make_codec(bottleneck, latent, shape), images(COUNT, shape)
    train(codec, x, steps=12, batch=16)
    with torch.no_grad():
        h = codec.codes(x)
        codec.learn_statistics(h)
        z = codec.whitened(h)
    return codec, z


@each
@both
@every_shape
def test_shapes(bottleneck: str, latent: str, shape: tuple[int, int, int]):
    codec, z = trained(bottleneck, latent, shape)
    f = 4 if shape[1] < 16 else 8
    grid = (4, -(-shape[1] // f), -(-shape[2] // f))
    assert codec.latent_shape == ((12,) if latent == "vector" else grid)
    assert z.shape == (COUNT, *codec.latent_shape) and z.dtype == torch.float32
    with torch.no_grad():
        x_hat = codec.decode(z[:3])
    assert x_hat.shape == (3, *shape) and x_hat.dtype == torch.float32
    assert codec.latent_size == z[0].numel()


def excess(values: Tensor, others: Tensor, wanted: float) -> Tensor:
    """By how much the mean of per-item values (N, C) misses what is wanted, in units of what the contract allows.

    The statistics come from a sample as well: its own error counts beside that of the held-out one.
    """
    error = (values.var(0) / len(values) + others.var(0) / len(others)).sqrt()
    return (values.mean(0) - wanted).abs() / (0.02 + 3 * error)


@each
@both
@every_shape
def test_held_out_latents_have_mean_0_and_variance_1(bottleneck: str, latent: str, shape: tuple[int, int, int]):
    codec, z = trained(bottleneck, latent, shape)
    with torch.no_grad():
        held = codec.encode(images(COUNT, shape, seed=1)).z
    ours, theirs = (v.reshape(COUNT, v.shape[1], -1) for v in (held, z))
    alive = codec.latent_std.flatten() > 2e-3 * codec.latent_std.max()
    assert bool(alive.any())
    assert float(excess(ours.mean(2), theirs.mean(2), 0.0)[alive].max()) <= 1
    assert float(excess(ours.square().mean(2), theirs.square().mean(2), 1.0)[alive].max()) <= 1


@each
@both
def test_whitened_on_its_own_images_exactly(bottleneck: str, latent: str):
    codec, z = trained(bottleneck, latent, (1, 28, 28))
    axes = (0, *range(2, z.ndim))
    std, mean = torch.std_mean(z, axes, correction=0)
    alive = codec.latent_std.flatten() > 2e-3 * codec.latent_std.max()
    assert float(mean.abs().max()) < 1e-4 and float((std - 1)[alive].abs().max()) < 1e-4
    with torch.no_grad():
        again = codec.encode(images(COUNT, (1, 28, 28))).z
    assert torch.equal(again, z)


@each
def test_a_dead_channel_keeps_a_floor(bottleneck: str):
    codec = make_codec(bottleneck, "grid", (1, 8, 8))
    h = torch.randn(50, 4, 2, 2)
    h[:, 2] = 0.25 + 1e-7 * torch.randn(50, 2, 2)
    codec.learn_statistics(h)
    z = codec.whitened(h)
    assert float(codec.latent_std[2] / codec.latent_std.max()) == pytest.approx(1e-3)
    assert float(z[:, 2].abs().max()) < 1e-2  # rounding is not blown up to look like data
    assert torch.allclose(z[:, [0, 1, 3]].var((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_statistics_come_from_pieces_too():
    """Without losing digits to a mean that is large beside the deviation."""
    codec = make_codec("none", "grid", (1, 8, 8))
    h = 1000 + torch.randn(50, 4, 2, 2) * torch.tensor([1.0, 0.1, 3.0, 0.5]).view(4, 1, 1)
    codec.learn_statistics(h.split(7))
    std, mean = torch.std_mean(h.double(), (0, 2, 3), correction=0)
    assert torch.allclose(codec.latent_mean.flatten().double(), mean, rtol=1e-7)
    assert torch.allclose(codec.latent_std.flatten().double(), std, rtol=1e-4)


def test_all_channels_dead():
    codec = make_codec("none", "vector", (1, 8, 8))
    h = torch.full((10, 12), 3.0)
    codec.learn_statistics(h)
    z = codec.whitened(h)
    assert bool((z == 0).all()) and bool((codec.latent_std > 0).all())


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
@both
def test_discrete_latents_snap_back(bottleneck: str, latent: str):
    """Whitening and a little noise do not change the codes."""
    codec, z = trained(bottleneck, latent, (3, 32, 32))
    raw = z * codec.latent_std + codec.latent_mean
    with torch.no_grad():
        codes = codec.bottleneck.codes(codec.bottleneck.snap(raw))
        assert torch.equal(codes, codec.bottleneck.codes(raw))
        assert torch.equal(codec.decode(z + 1e-4 * torch.randn_like(z)), codec.decode(z))


@each
@both
@every_shape
def test_saved_and_loaded_it_is_the_same(bottleneck: str, latent: str, shape: tuple[int, int, int], tmp_path: Path):
    codec, z = trained(bottleneck, latent, shape)
    save_part(tmp_path, codec, {})
    torch.manual_seed(99)
    other = make_codec(bottleneck, latent, shape).eval()
    load_part(tmp_path, other)
    x = images(4, shape)
    with torch.no_grad():
        assert torch.equal(other.encode(x).z, codec.encode(x).z)
        assert torch.equal(other.decode(z[:4]), codec.decode(z[:4]))


@each
@both
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_one_batch_is_learned(bottleneck: str, latent: str, shape: tuple[int, int, int]):
    losses = train(make_codec(bottleneck, latent, shape), images(8, shape), steps=60, batch=8, lr=1e-2)
    few = bottleneck == "vq" and latent == "vector"  # one code of 16 per image is little to tell eight images by
    assert losses[-1] < (0.5 if few else 0.35) * losses[0]


@each
def test_training_repeats_itself(bottleneck: str):
    """All randomness comes from the generator that is handed in."""
    one, two = (make_codec(bottleneck, "grid", (1, 8, 8)) for _ in range(2))
    x = images(16, (1, 8, 8))
    first = train(one, x, steps=3, batch=16)
    torch.manual_seed(5)
    assert train(two, x, steps=3, batch=16) == first
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_16_bit_images():
    """They come as other numbers, and are as fine in [-1, 1] as they were."""
    pixels, _ = pictures(40, (1, 8, 8))
    fine = pixels.astype("uint16") * 257 + 5
    data = Data(fine, "I;16")
    x = data.batch(torch.arange(40)).data
    assert x.shape == (40, 1, 8, 8) and float(x.min()) >= -1 and float(x.max()) <= 1
    assert torch.equal(((x + 1) * 32767.5).round().int()[:, 0], torch.from_numpy(fine[..., 0].astype("int32")))
    codec = make_codec("kl", "grid", data.shape)
    losses = train(codec, x, steps=40, batch=40, lr=1e-2)
    assert losses[-1] < 0.5 * losses[0]


# the linear start


def smooth(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images that vary in few ways: random mixtures of six patterns."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(6, *shape, generator=generator)
    return 0.1 * torch.einsum("nk,kchw->nchw", torch.randn(count, 6, generator=generator), patterns) + 0.2


@pytest.mark.parametrize("bottleneck", ["kl", "none"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 24)])
def test_prepared_codec_loses_as_little_as_principal_components(bottleneck: str, shape: tuple[int, int, int]):
    x = smooth(400, shape)
    codec = ImageCodec(shape, bottleneck=bottleneck, downsample=4, channels=5, width=16)
    torch.manual_seed(0)
    codec.prepare(x)
    codec.learn_statistics(codec.codes(x))
    with torch.no_grad():
        error = float((codec.decode(codec.encode(x)) - x).square().mean())
    patches = torch.nn.functional.unfold(x - x.mean((0, 2, 3))[:, None, None], 4, stride=4)
    values = torch.linalg.svdvals(patches.transpose(1, 2).flatten(0, 1).double())
    best = float(values[5:].square().sum()) / x.numel()
    assert error == pytest.approx(best, rel=0.02)
    spread = codec.codes(x).transpose(0, 1).flatten(1).square().mean(1)
    assert spread.tolist() == pytest.approx([1.0] * 5, rel=0.02)


def test_preparation_copes_with_more_channels_than_directions():
    """Two pixels of two brightnesses: a patch has one direction, the latent eight channels."""
    codec = ImageCodec((1, 8, 8), bottleneck="kl", downsample=2, channels=8, width=16)
    x = torch.ones(30, 1, 8, 8) * torch.linspace(-1, 1, 30)[:, None, None, None]
    codec.prepare(x)
    codec.learn_statistics(codec.codes(x))
    with torch.no_grad():
        assert torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-3)


def test_a_vector_latent_starts_at_random():
    codec = make_codec("kl", "vector", (1, 28, 28))
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.prepare(images(20, (1, 28, 28)))
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())


@pytest.mark.parametrize("width", [1, 50, 100, 112, 176])
def test_any_width_will_do(width: int):
    codec = ImageCodec((1, 16, 16), bottleneck="none", downsample=8, channels=4, width=width)
    assert codec.decode(codec.encode(torch.zeros(2, 1, 16, 16))).shape == (2, 1, 16, 16)


def test_the_linear_start_depends_on_the_images_alone():
    x, states = images(40, (1, 16, 16)), list[Tensor]()
    for seed in (0, 1):
        torch.manual_seed(seed)
        codec = ImageCodec((1, 16, 16), bottleneck="none", downsample=8, channels=4, width=16)
        codec.prepare(x)
        states.append(codec.encoder.patch.weight.clone())
    assert torch.equal(*states)
