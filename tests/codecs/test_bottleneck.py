"""Bottlenecks: values, gradients, codes, and reproducibility."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sfumato.codecs.bottleneck import (
    BOTTLENECKS,
    FSQ,
    KL,
    VQ,
    Bottleneck,
    Identity,
    Quantizer,
    code_usage,
    k_means,
    make_bottleneck,
    nearest,
    straight_through,
)
from sfumato.errors import UserError

BUILD = {
    "kl": lambda: KL(4),
    "vq": lambda: VQ(4, size=16),
    "vq groups": lambda: VQ(4, size=16, groups=2),
    "vq cosine": lambda: VQ(4, size=16, cosine=True),
    "fsq": lambda: FSQ(4),
    "fsq groups": lambda: FSQ(4, levels=(3, 2)),
    "none": lambda: Identity(4, noise=0.1),
}
DISCRETE = [name for name in BUILD if name.startswith(("vq", "fsq"))]
SPATIAL = [(), (3, 5), (2, 3, 2)]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str) -> Bottleneck:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILD[name]()


def as_discrete(net: Bottleneck) -> Quantizer:
    assert isinstance(net, Quantizer)
    return net


def encoder_output(net: Bottleneck, batch: int = 6, spatial: tuple[int, ...] = (3, 5), seed: int = 1) -> Tensor:
    return torch.randn(batch, net.in_channels, *spatial, generator=gen(seed))


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_shapes_on_grid_and_vector(name: str, spatial: tuple[int, ...]) -> None:
    net = build(name)
    z, loss, info = net(encoder_output(net, spatial=spatial), gen())
    assert z.shape == (6, net.out_channels, *spatial) == net.mode(encoder_output(net, spatial=spatial)).shape
    assert loss.shape == (6,) and z.dtype == loss.dtype == torch.float32
    assert all(v.shape == () and not v.requires_grad and v.isfinite() for v in info.values())
    assert net.in_channels == (8 if name == "kl" else 4)


@pytest.mark.parametrize("name", BUILD)
def test_snap_is_a_projection_that_keeps_mode(name: str) -> None:
    net = build(name)
    net(encoder_output(net), gen())
    z = 2 * torch.randn(5, net.out_channels, 3, 3, generator=gen(2))
    assert torch.equal(net.quantize(net.quantize(z)), net.quantize(z))
    h = encoder_output(net, seed=3)
    assert torch.equal(net.quantize(net.mode(h)), net.mode(h))
    net.eval()
    if name in DISCRETE:
        assert not torch.equal(net.quantize(z), z)
        assert torch.equal(net(h)[0], net.mode(h)), "in eval mode forward and mode quantize equally"
    else:
        assert torch.equal(net.quantize(z), z)


@pytest.mark.parametrize("name", BUILD)
def test_equal_generators_give_equal_results(name: str) -> None:
    runs = []
    for global_seed in (1, 7):
        net = build(name)
        torch.manual_seed(global_seed)  # the global generator has no effect
        out = [net(encoder_output(net, seed=i), gen(i)) for i in range(3)]
        runs.append([t for z, loss, info in out for t in (z, loss, *info.values())] + list(net.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["kl", "none"])
def test_different_generators_give_different_noise(name: str) -> None:
    net = build(name)
    assert not torch.equal(net(encoder_output(net), gen(0))[0], net(encoder_output(net), gen(1))[0])


@pytest.mark.parametrize("name", BUILD)
def test_saved_and_loaded_bottleneck_continues_equally(name: str) -> None:
    net = build(name)
    net(encoder_output(net), gen())
    loaded = BUILD[name]()
    loaded.load_state_dict(net.state_dict())
    for seed in (5, 6):
        a, b = net(encoder_output(net, seed=seed), gen(seed)), loaded(encoder_output(net, seed=seed), gen(seed))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", BUILD)
def test_eval_and_mode_do_not_change_the_state(name: str) -> None:
    net = build(name)
    net(encoder_output(net), gen())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    (
        net.mode(encoder_output(net, seed=8)),
        net.quantize(torch.zeros(2, net.out_channels)),
        net.eval()(encoder_output(net, seed=9), gen()),
    )
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", BUILD)
def test_no_parameters_and_float32_under_autocast(name: str) -> None:
    net = build(name).eval()
    assert not list(net.parameters())
    h = encoder_output(net)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.mode(h)
    assert z.dtype == torch.float32 and torch.equal(z, net.mode(h))
    assert net(h.bfloat16(), gen())[0].dtype == torch.float32


def test_straight_through_has_the_value_of_q_and_the_gradient_of_h() -> None:
    h = (1e3 * torch.randn(100, generator=gen())).requires_grad_()
    q = torch.randn(100, generator=gen(1), requires_grad=True)
    z = straight_through(h, q)
    assert torch.equal(z, q)
    slope = torch.randn(100, generator=gen(2))
    (z * slope).sum().backward()
    assert h.grad is not None and torch.equal(h.grad, slope) and q.grad is None


# KL


def test_kl_equals_torch_distributions() -> None:
    net, h = KL(3), torch.randn(5, 6, 4, 4, generator=gen())
    mean, logvar = h.chunk(2, dim=1)
    exact = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    _, loss, info = net(h, gen())
    torch.testing.assert_close(loss, exact.flatten(1).mean(1))
    torch.testing.assert_close(info["nats"], exact.flatten(1).sum(1).mean())
    assert torch.equal(net.mode(h), mean)


def test_kl_samples_have_the_posterior_moments() -> None:
    h = torch.tensor([[1.5, math.log(0.25)]]).expand(40_000, 2)
    z, _, info = KL(1)(h, gen())
    assert abs(z.mean() - 1.5) < 0.01 and abs(z.std() - 0.5) < 0.01
    torch.testing.assert_close(info["std"], torch.tensor(0.5))


def test_kl_is_finite_for_extreme_log_variances() -> None:
    h = torch.tensor([[0.0, 1e4], [0.0, -1e4]], requires_grad=True)
    z, loss, _ = KL(1)(h, gen())
    (z.sum() + loss.sum()).backward()
    assert z.isfinite().all() and loss.isfinite().all() and h.grad is not None and h.grad.isfinite().all()


# VQ


def clusters(n: int, seed: int, k: int = 32, dim: int = 4) -> Tensor:
    """Points (n, dim) around k centers with very unequal weights."""
    centers = 3 * torch.randn(k, dim, generator=gen(99))
    component = torch.multinomial(1 / torch.arange(1.0, k + 1), n, replacement=True, generator=gen(seed))
    return centers[component] + 0.05 * torch.randn(n, dim, generator=gen(seed + 1))


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_uses_its_codes_on_clustered_data(cosine: bool) -> None:
    net = VQ(4, size=64, cosine=cosine)
    for step in range(30):
        net(clusters(512, 10 * step), gen(step))
    held_out = clusters(8192, 7)
    usage = code_usage(net.indices(held_out), net.size)
    assert usage["used"] >= 0.5 and usage["perplexity"] > 10
    assert (net.mode(held_out) - net.project(held_out)).square().mean() < 0.01 * net.project(held_out).var()


def test_vq_restarts_dead_codes() -> None:
    used = {}
    for restart in (0.0, 0.1):
        net = VQ(4, size=64, restart=restart, decay=0.9)
        net.codebook.add_(100)
        net.ready.fill_(True)
        for step in range(30):
            net(clusters(512, 10 * step), gen(step))
        used[restart] = code_usage(net.indices(clusters(8192, 7)), 64)["used"].item()
    assert used[0.0] < 0.2 and used[0.1] > 0.5


def test_vq_initializes_with_fewer_vectors_than_codes() -> None:
    net = VQ(4, size=64)
    for step in range(10):
        net(clusters(16, 10 * step), gen(step))
    assert net.codebook.isfinite().all() and len(net.codebook.unique(dim=0)) >= 32


def test_vq_moving_average_matches_its_formula() -> None:
    net = VQ(2, size=2, restart=0.0, decay=0.75)
    net.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    net.count.copy_(torch.tensor([4.0, 4.0]))
    net.total.copy_(net.codebook * 4)
    net.ready.fill_(True)
    z, loss, _ = net(torch.tensor([[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]), gen())
    assert torch.equal(z, torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 10.0]])), "this batch uses the old codes"
    torch.testing.assert_close(loss, 0.25 * torch.tensor([1.0, 5.0, 1.0]))
    torch.testing.assert_close(net.count, torch.tensor([0.75 * 4 + 0.25 * 2, 0.75 * 4 + 0.25]))
    expected = torch.tensor([[0.25 * 4 / 3.5, 0.25 * 2 / 3.5], [(30 + 2.25) / 3.25, (30 + 2.25) / 3.25]])
    torch.testing.assert_close(net.codebook, expected)


def test_vq_gradient_is_straight_through_and_commitment_only() -> None:
    net = VQ(4, size=16)
    h = encoder_output(net).requires_grad_()
    z, loss, _ = net(h, gen())
    slope = torch.randn(z.shape, generator=gen(4))
    (grad,) = torch.autograd.grad((z * slope).sum(), h, retain_graph=True)
    assert torch.equal(grad, slope)
    (grad,) = torch.autograd.grad(loss.sum(), h)
    torch.testing.assert_close(grad, 0.25 * 2 * (h - z).detach() / h[0].numel())


def test_nearest_distinguishes_close_codes_of_large_norm() -> None:
    codebook = 1000 + 1e-2 * torch.randn(300, 4, generator=gen())
    assert torch.equal(nearest(codebook, codebook), torch.arange(300))


def test_k_means_finds_separate_clusters() -> None:
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centers.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=gen())
    found_centers, count = k_means(x, 8, gen(1))
    assert count.sum() == 96 or count.sum() == 150
    assert torch.cdist(centers, found_centers[count > 0]).min(1).values.max() < 0.3


# FSQ


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (4,), (7, 16, 2)], ids=str)
def test_fsq_codes_round_trip(levels: tuple[int, ...]) -> None:
    net = FSQ(2 * len(levels), levels)
    assert net.size == math.prod(levels) and net.groups == 2
    index = torch.stack((torch.arange(net.size), torch.arange(net.size).flip(0)), dim=1)
    z = net.embed(index)
    assert torch.equal(net.indices(z), index)
    assert z.min() == -1 and z.max() == 1 and len(z.unique(dim=0)) == net.size
    for channel, count in enumerate(levels):
        torch.testing.assert_close(z[:, channel].unique(), torch.linspace(-1, 1, count))


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 15, 16])
def test_fsq_reaches_every_level_and_no_other(levels: int) -> None:
    net = FSQ(1, (levels,))
    h = torch.linspace(-20, 20, 20_001)[:, None]
    z = net.mode(h)
    torch.testing.assert_close(z.unique(), torch.linspace(-1, 1, levels))
    assert (z.diff(dim=0) >= 0).all()
    around_zero = torch.linspace(-0.02, 0.02, 9)[:, None]
    assert len(net.mode(around_zero).unique()) == 1, "h = 0 lies inside a rounding interval"
    assert torch.equal(net(h)[0], z)


def test_fsq_gradient_equals_that_of_the_bound() -> None:
    net = FSQ(4, (8, 5, 4, 3))
    h = encoder_output(net).requires_grad_()
    (grad,) = torch.autograd.grad(net(h)[0].sum(), h)
    smooth = net.merge(2 * (net.bound(h) + net.offset) / net.width)
    (expected,) = torch.autograd.grad(smooth.sum(), h)
    assert torch.equal(grad, expected) and (grad > 0).all()
    assert (net(h)[0] - smooth).abs().max() <= 1 / 2 + 1e-5, "half a level spacing of the coarsest channel"


@pytest.mark.parametrize("name", DISCRETE)
def test_embed_inverts_indices(name: str) -> None:
    net = as_discrete(build(name))
    index = torch.randint(0, net.size, (3, net.groups, 2, 5), generator=gen())
    z = net.embed(index)
    assert z.shape == (3, 4, 2, 5) and torch.equal(net.indices(z), index) and torch.equal(net.quantize(z), z)


@pytest.mark.parametrize("name", DISCRETE)
def test_snap_chooses_the_nearest_code(name: str) -> None:
    net = as_discrete(build(name))
    dim = 4 // net.groups
    codebook = net.embed(torch.arange(net.size)[:, None].expand(-1, net.groups))[:, :dim]
    z = torch.randn(50, 4, generator=gen()) * 0.7
    parts = z.reshape(-1, dim)
    assert torch.equal(
        net.indices(z).flatten(), torch.cdist(net.project(parts) if isinstance(net, VQ) else parts, codebook).argmin(1)
    )


# all bottlenecks


def test_code_usage_on_known_counts() -> None:
    usage = code_usage(torch.tensor([[0, 1], [2, 3]]), 8)
    torch.testing.assert_close(usage, {"perplexity": torch.tensor(4.0), "used": torch.tensor(0.5)})


def test_identity_adds_noise_in_training_only() -> None:
    net, h = Identity(3, noise=0.1), 5 * torch.randn(500, 3, generator=gen())
    assert abs((net(h, gen())[0] - h).std() / h.std() - 0.1) < 0.01
    assert torch.equal(net.eval()(h, gen())[0], h) and torch.equal(net(h)[1], torch.zeros(500))


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottlenecks_are_built_by_name(name: str) -> None:
    assert type(make_bottleneck(name, 4)) is BOTTLENECKS[name]
    assert make_bottleneck(name, 4).out_channels == 4


@pytest.mark.parametrize("channels", range(1, 13))
def test_fsq_has_default_levels_for_any_number_of_channels(channels: int) -> None:
    net = FSQ(channels)
    assert net.groups * len(net.levels) == channels == net.mode(encoder_output(net)).shape[1]


@pytest.mark.parametrize(
    ("name", "channels", "settings", "message"),
    [
        ("fqs", 4, {}, "fsq"),
        ("vq", 4, {"sise": 8}, "size"),
        ("kl", 4, {"size": 8}, "size"),
        ("vq", 4, {"groups": 3}, "groups"),
        ("fsq", 4, {"levels": [8, 5, 5]}, "levels"),
        ("fsq", 2, {"levels": [8, 1]}, "levels"),
    ],
)
def test_errors_name_the_mistake(name: str, channels: int, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_bottleneck(name, channels, **settings)
    assert error.value.code == 2 and "\n" not in str(error.value)
