"""The codec contract, for every bottleneck, kind of latent and image shape."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.modalities.image.codec import ImageCodec
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.storage import load_part, save_part
from sfumato.training.steps import CodecStep
from sfumato.types import Batch, Latent
from tests.training.common import images, pictures

BOTTLENECKS = ("kl", "vq", "fsq", "none")
LATENTS = ("grid", "vector")
SHAPES = ((1, 8, 8), (3, 32, 32), (4, 20, 28), (1, 28, 28))
COUNT = 250  # training images, and as many held-out ones

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
    """A briefly trained codec with its statistics, and its latents of the training images."""
    codec, x = make_codec(bottleneck, latent, shape), images(COUNT, shape)
    train(codec, x, steps=12, batch=16)
    with torch.no_grad():
        h = codec.encode_raw(x)
        codec.learn_statistics(h)
        z = codec.whiten(h).z
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
        x_hat = codec.decode(Latent(z[:3]))
    assert x_hat.shape == (3, *shape) and x_hat.dtype == torch.float32
    assert codec.latent_size == z[0].numel()


def excess(held_out: Tensor, train: Tensor, expected: float) -> Tensor:
    """Error of the mean of held-out values (N, C), relative to the tolerance of the contract.

    The statistics come from a training sample, whose standard error counts beside that of the held-out sample.
    """
    error = (held_out.var(0) / len(held_out) + train.var(0) / len(train)).sqrt()
    return (held_out.mean(0) - expected).abs() / (0.02 + 3 * error)


@each
@both
@every_shape
def test_held_out_latents_have_mean_0_and_variance_1(bottleneck: str, latent: str, shape: tuple[int, int, int]):
    codec, z = trained(bottleneck, latent, shape)
    with torch.no_grad():
        z_held_out = codec.encode(images(COUNT, shape, seed=1)).z
    held_out, train = (v.reshape(COUNT, v.shape[1], -1) for v in (z_held_out, z))
    alive = codec.latent_std.flatten() > 2e-3 * codec.latent_std.max()
    assert bool(alive.any())
    assert float(excess(held_out.mean(2), train.mean(2), 0.0)[alive].max()) <= 1
    assert float(excess(held_out.square().mean(2), train.square().mean(2), 1.0)[alive].max()) <= 1


@each
@both
def test_training_latents_are_whitened_exactly(bottleneck: str, latent: str):
    codec, z = trained(bottleneck, latent, (1, 28, 28))
    axes = (0, *range(2, z.ndim))
    std, mean = torch.std_mean(z, axes, correction=0)
    alive = codec.latent_std.flatten() > 2e-3 * codec.latent_std.max()
    assert float(mean.abs().max()) < 1e-4 and float((std - 1)[alive].abs().max()) < 1e-4
    with torch.no_grad():
        again = codec.encode(images(COUNT, (1, 28, 28))).z
    assert torch.equal(again, z)


@each
def test_the_deviation_of_a_dead_channel_has_a_floor(bottleneck: str):
    codec = make_codec(bottleneck, "grid", (1, 8, 8))
    h = torch.randn(50, 4, 2, 2)
    h[:, 2] = 0.25 + 1e-7 * torch.randn(50, 2, 2)
    codec.learn_statistics(h)
    z = codec.whiten(h).z
    assert float(codec.latent_std[2] / codec.latent_std.max()) == pytest.approx(1e-3)
    assert float(z[:, 2].abs().max()) < 1e-2  # rounding errors are not amplified
    assert torch.allclose(z[:, [0, 1, 3]].var((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_statistics_can_be_computed_in_parts():
    """Without cancellation when the mean is large relative to the deviation."""
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
    z = codec.whiten(h).z
    assert bool((z == 0).all()) and bool((codec.latent_std > 0).all())


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
@both
def test_discrete_latents_are_quantized_again_on_decoding(bottleneck: str, latent: str):
    """Whitening and weak noise do not change the codes."""
    codec, z = trained(bottleneck, latent, (3, 32, 32))
    raw = z * codec.latent_std + codec.latent_mean
    with torch.no_grad():
        index = codec.bottleneck.indices(codec.bottleneck.quantize(raw))
        assert torch.equal(index, codec.bottleneck.indices(raw))
        noisy = Latent(z + 1e-4 * torch.randn_like(z))
        assert torch.equal(codec.decode(noisy), codec.decode(Latent(z)))


@each
@both
@every_shape
def test_a_saved_codec_is_loaded_unchanged(bottleneck: str, latent: str, shape: tuple[int, int, int], tmp_path: Path):
    codec, z = trained(bottleneck, latent, shape)
    save_part(tmp_path, codec, {})
    torch.manual_seed(99)
    other = make_codec(bottleneck, latent, shape).eval()
    load_part(tmp_path, other)
    x = images(4, shape)
    with torch.no_grad():
        assert torch.equal(other.encode(x).z, codec.encode(x).z)
        assert torch.equal(other.decode(Latent(z[:4])), codec.decode(Latent(z[:4])))


@each
@both
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_one_batch_can_be_overfitted(bottleneck: str, latent: str, shape: tuple[int, int, int]):
    losses = train(make_codec(bottleneck, latent, shape), images(8, shape), steps=60, batch=8, lr=1e-2)
    coarse = bottleneck == "vq" and latent == "vector"  # one code of 16 per image hardly distinguishes eight images
    assert losses[-1] < (0.5 if coarse else 0.35) * losses[0]


@each
def test_training_is_deterministic(bottleneck: str):
    """All randomness comes from the generator argument."""
    a, b = (make_codec(bottleneck, "grid", (1, 8, 8)) for _ in range(2))
    x = images(16, (1, 8, 8))
    losses = train(a, x, steps=3, batch=16)
    torch.manual_seed(5)
    assert train(b, x, steps=3, batch=16) == losses
    states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(value, other) for value, other in states)


def test_16_bit_images():
    """They keep their resolution in [-1, 1]."""
    pixels, _ = pictures(40, (1, 8, 8))
    fine = pixels.astype("uint16") * 257 + 5
    data = ImageDataset(fine, "I;16")
    x = data.batch(torch.arange(40)).data
    assert x.shape == (40, 1, 8, 8) and float(x.min()) >= -1 and float(x.max()) <= 1
    assert torch.equal(((x + 1) * 32767.5).round().int()[:, 0], torch.from_numpy(fine[..., 0].astype("int32")))
    codec = make_codec("kl", "grid", data.shape)
    losses = train(codec, x, steps=40, batch=40, lr=1e-2)
    assert losses[-1] < 0.5 * losses[0]


# initialisation by principal components


def smooth(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images of low rank: random mixtures of six patterns."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(6, *shape, generator=generator)
    return 0.1 * torch.einsum("nk,kchw->nchw", torch.randn(count, 6, generator=generator), patterns) + 0.2


@pytest.mark.parametrize("bottleneck", ["kl", "none"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 24)])
def test_a_prepared_codec_reconstructs_as_well_as_principal_components(bottleneck: str, shape: tuple[int, int, int]):
    x = smooth(400, shape)
    codec = ImageCodec(shape, bottleneck=bottleneck, downsample=4, channels=5, width=16)
    torch.manual_seed(0)
    codec.prepare(x)
    codec.learn_statistics(codec.encode_raw(x))
    with torch.no_grad():
        error = float((codec.decode(codec.encode(x)) - x).square().mean())
    patches = torch.nn.functional.unfold(x - x.mean((0, 2, 3))[:, None, None], 4, stride=4)
    values = torch.linalg.svdvals(patches.transpose(1, 2).flatten(0, 1).double())
    best = float(values[5:].square().sum()) / x.numel()
    assert error == pytest.approx(best, rel=0.02)
    variance = codec.encode_raw(x).transpose(0, 1).flatten(1).square().mean(1)
    assert variance.tolist() == pytest.approx([1.0] * 5, rel=0.02)


def test_preparation_with_more_channels_than_directions():
    """Uniform images: a patch has one principal direction, the latent eight channels."""
    codec = ImageCodec((1, 8, 8), bottleneck="kl", downsample=2, channels=8, width=16)
    x = torch.ones(30, 1, 8, 8) * torch.linspace(-1, 1, 30)[:, None, None, None]
    codec.prepare(x)
    codec.learn_statistics(codec.encode_raw(x))
    with torch.no_grad():
        assert torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-3)


def test_a_vector_latent_is_not_prepared():
    codec = make_codec("kl", "vector", (1, 28, 28))
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.prepare(images(20, (1, 28, 28)))
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())


@pytest.mark.parametrize("width", [1, 50, 100, 112, 176])
def test_any_width_works(width: int):
    codec = ImageCodec((1, 16, 16), bottleneck="none", downsample=8, channels=4, width=width)
    assert codec.decode(codec.encode(torch.zeros(2, 1, 16, 16))).shape == (2, 1, 16, 16)


def test_preparation_depends_on_the_images_alone():
    x, states = images(40, (1, 16, 16)), list[Tensor]()
    for seed in (0, 1):
        torch.manual_seed(seed)
        codec = ImageCodec((1, 16, 16), bottleneck="none", downsample=8, channels=4, width=16)
        codec.prepare(x)
        states.append(codec.encoder.patch.weight.clone())
    assert torch.equal(*states)
