"""Bottlenecks: their values, their gradients, their codes, and that nothing about them is left to chance."""

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
    Discrete,
    Plain,
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
    "none": lambda: Plain(4, noise=0.1),
}
DISCRETE = [name for name in BUILD if name.startswith(("vq", "fsq"))]
SPATIAL = [(), (3, 5), (2, 3, 2)]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str) -> Bottleneck:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILD[name]()


def codes_of(net: Bottleneck) -> Discrete:
    assert isinstance(net, Discrete)
    return net


def draw(net: Bottleneck, batch: int = 6, spatial: tuple[int, ...] = (3, 5), seed: int = 1) -> Tensor:
    return torch.randn(batch, net.in_channels, *spatial, generator=gen(seed))


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_shapes_on_grid_and_vector(name: str, spatial: tuple[int, ...]) -> None:
    net = build(name)
    z, loss, info = net(draw(net, spatial=spatial), gen())
    assert z.shape == (6, net.out_channels, *spatial) == net.mode(draw(net, spatial=spatial)).shape
    assert loss.shape == (6,) and z.dtype == loss.dtype == torch.float32
    assert all(v.shape == () and not v.requires_grad and v.isfinite() for v in info.values())
    assert net.in_channels == (8 if name == "kl" else 4)


@pytest.mark.parametrize("name", BUILD)
def test_snap_is_a_projection_onto_what_mode_gives(name: str) -> None:
    net = build(name)
    net(draw(net), gen())
    z = 2 * torch.randn(5, net.out_channels, 3, 3, generator=gen(2))
    assert torch.equal(net.snap(net.snap(z)), net.snap(z))
    h = draw(net, seed=3)
    assert torch.equal(net.snap(net.mode(h)), net.mode(h))
    net.eval()
    if name in DISCRETE:
        assert not torch.equal(net.snap(z), z)
        assert torch.equal(net(h)[0], net.mode(h)), "in eval mode there is one quantisation"
    else:
        assert torch.equal(net.snap(z), z)


@pytest.mark.parametrize("name", BUILD)
def test_same_generator_same_everything(name: str) -> None:
    runs = []
    for noise_before in (1, 7):
        net = build(name)
        torch.manual_seed(noise_before)  # the global generator must not matter
        out = [net(draw(net, seed=i), gen(i)) for i in range(3)]
        runs.append([t for z, loss, info in out for t in (z, loss, *info.values())] + list(net.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["kl", "none"])
def test_other_generator_other_noise(name: str) -> None:
    net = build(name)
    assert not torch.equal(net(draw(net), gen(0))[0], net(draw(net), gen(1))[0])


@pytest.mark.parametrize("name", BUILD)
def test_saved_and_loaded_goes_on_equal(name: str) -> None:
    net = build(name)
    net(draw(net), gen())
    twin = BUILD[name]()
    twin.load_state_dict(net.state_dict())
    for seed in (5, 6):
        a, b = net(draw(net, seed=seed), gen(seed)), twin(draw(net, seed=seed), gen(seed))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", BUILD)
def test_eval_and_mode_leave_the_state_alone(name: str) -> None:
    net = build(name)
    net(draw(net), gen())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.mode(draw(net, seed=8)), net.snap(torch.zeros(2, net.out_channels)), net.eval()(draw(net, seed=9), gen())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", BUILD)
def test_no_parameters_and_float32_under_autocast(name: str) -> None:
    net = build(name).eval()
    assert not list(net.parameters())
    h = draw(net)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.mode(h)
    assert z.dtype == torch.float32 and torch.equal(z, net.mode(h))
    assert net(h.bfloat16(), gen())[0].dtype == torch.float32


def test_straight_through_value_is_q_and_gradient_is_that_of_h() -> None:
    h = (1e3 * torch.randn(100, generator=gen())).requires_grad_()
    q = torch.randn(100, generator=gen(1), requires_grad=True)
    z = straight_through(h, q)
    assert torch.equal(z, q)
    slope = torch.randn(100, generator=gen(2))
    (z * slope).sum().backward()
    assert h.grad is not None and torch.equal(h.grad, slope) and q.grad is None


# KL


def test_kl_is_that_of_torch_distributions() -> None:
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


def test_kl_survives_wild_log_variances() -> None:
    h = torch.tensor([[0.0, 1e4], [0.0, -1e4]], requires_grad=True)
    z, loss, _ = KL(1)(h, gen())
    (z.sum() + loss.sum()).backward()
    assert z.isfinite().all() and loss.isfinite().all() and h.grad is not None and h.grad.isfinite().all()


# VQ


def clusters(n: int, seed: int, k: int = 32, dim: int = 4) -> Tensor:
    """Points around k centres of very unequal weight, as (n, dim)."""
    centres = 3 * torch.randn(k, dim, generator=gen(99))
    which = torch.multinomial(1 / torch.arange(1.0, k + 1), n, replacement=True, generator=gen(seed))
    return centres[which] + 0.05 * torch.randn(n, dim, generator=gen(seed + 1))


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_uses_its_codes_on_clustered_data(cosine: bool) -> None:
    net = VQ(4, size=64, cosine=cosine)
    for step in range(30):
        net(clusters(512, 10 * step), gen(step))
    held = clusters(8192, 7)
    usage = code_usage(net.codes(held), net.size)
    assert usage["used"] >= 0.5 and usage["perplexity"] > 10
    assert (net.mode(held) - net.place(held)).square().mean() < 0.01 * net.place(held).var()


def test_vq_revives_dead_codes() -> None:
    used = {}
    for restart in (0.0, 0.1):
        net = VQ(4, size=64, restart=restart, decay=0.9)
        net.codebook.add_(100)
        net.ready.fill_(True)
        for step in range(30):
            net(clusters(512, 10 * step), gen(step))
        used[restart] = code_usage(net.codes(clusters(8192, 7)), 64)["used"].item()
    assert used[0.0] < 0.2 and used[0.1] > 0.5


def test_vq_begins_with_fewer_rows_than_codes() -> None:
    net = VQ(4, size=64)
    for step in range(10):
        net(clusters(16, 10 * step), gen(step))
    assert net.codebook.isfinite().all() and len(net.codebook.unique(dim=0)) >= 32


def test_vq_moving_average_is_that_of_its_formula() -> None:
    net = VQ(2, size=2, restart=0.0, decay=0.75)
    net.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    net.count.copy_(torch.tensor([4.0, 4.0]))
    net.total.copy_(net.codebook * 4)
    net.ready.fill_(True)
    z, loss, _ = net(torch.tensor([[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]), gen())
    assert torch.equal(z, torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 10.0]])), "this batch sees the old codes"
    torch.testing.assert_close(loss, 0.25 * torch.tensor([1.0, 5.0, 1.0]))
    torch.testing.assert_close(net.count, torch.tensor([0.75 * 4 + 0.25 * 2, 0.75 * 4 + 0.25]))
    expected = torch.tensor([[0.25 * 4 / 3.5, 0.25 * 2 / 3.5], [(30 + 2.25) / 3.25, (30 + 2.25) / 3.25]])
    torch.testing.assert_close(net.codebook, expected)


def test_vq_gradient_is_straight_through_and_commitment_only() -> None:
    net = VQ(4, size=16)
    h = draw(net).requires_grad_()
    z, loss, _ = net(h, gen())
    slope = torch.randn(z.shape, generator=gen(4))
    (grad,) = torch.autograd.grad((z * slope).sum(), h, retain_graph=True)
    assert torch.equal(grad, slope)
    (grad,) = torch.autograd.grad(loss.sum(), h)
    torch.testing.assert_close(grad, 0.25 * 2 * (h - z).detach() / h[0].numel())


def test_nearest_keeps_apart_codes_that_lie_close_and_far_out() -> None:
    codebook = 1000 + 1e-2 * torch.randn(300, 4, generator=gen())
    assert torch.equal(nearest(codebook, codebook), torch.arange(300))


def test_k_means_finds_separate_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=gen())
    found, count = k_means(x, 8, gen(1))
    assert count.sum() == 96 or count.sum() == 150
    assert torch.cdist(centres, found[count > 0]).min(1).values.max() < 0.3


# FSQ


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (4,), (7, 16, 2)], ids=str)
def test_fsq_codes_make_the_round_trip(levels: tuple[int, ...]) -> None:
    net = FSQ(2 * len(levels), levels)
    assert net.size == math.prod(levels) and net.groups == 2
    index = torch.stack((torch.arange(net.size), torch.arange(net.size).flip(0)), dim=1)
    z = net.embed(index)
    assert torch.equal(net.codes(z), index)
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
    near = torch.linspace(-0.02, 0.02, 9)[:, None]
    assert len(net.mode(near).unique()) == 1, "h = 0 lies inside a step"
    assert torch.equal(net(h)[0], z)


def test_fsq_gradient_is_that_of_the_bound() -> None:
    net = FSQ(4, (8, 5, 4, 3))
    h = draw(net).requires_grad_()
    (grad,) = torch.autograd.grad(net(h)[0].sum(), h)
    smooth = net.merge(2 * (net.bound(h) + net.offset) / net.width)
    (expected,) = torch.autograd.grad(smooth.sum(), h)
    assert torch.equal(grad, expected) and (grad > 0).all()
    assert (net(h)[0] - smooth).abs().max() <= 1 / 2 + 1e-5, "half a step of the coarsest channel"


@pytest.mark.parametrize("name", DISCRETE)
def test_embed_undoes_codes(name: str) -> None:
    net = codes_of(build(name))
    index = torch.randint(0, net.size, (3, net.groups, 2, 5), generator=gen())
    z = net.embed(index)
    assert z.shape == (3, 4, 2, 5) and torch.equal(net.codes(z), index) and torch.equal(net.snap(z), z)


@pytest.mark.parametrize("name", DISCRETE)
def test_snap_takes_the_nearest_of_all_codes(name: str) -> None:
    net = codes_of(build(name))
    dim = 4 // net.groups
    book = net.embed(torch.arange(net.size)[:, None].expand(-1, net.groups))[:, :dim]
    z = torch.randn(50, 4, generator=gen()) * 0.7
    parts = z.reshape(-1, dim)
    assert torch.equal(
        net.codes(z).flatten(), torch.cdist(net.place(parts) if isinstance(net, VQ) else parts, book).argmin(1)
    )


# the rest


def test_code_usage_on_known_counts() -> None:
    usage = code_usage(torch.tensor([[0, 1], [2, 3]]), 8)
    torch.testing.assert_close(usage, {"perplexity": torch.tensor(4.0), "used": torch.tensor(0.5)})


def test_plain_adds_noise_in_training_only() -> None:
    net, h = Plain(3, noise=0.1), 5 * torch.randn(500, 3, generator=gen())
    assert abs((net(h, gen())[0] - h).std() / h.std() - 0.1) < 0.01
    assert torch.equal(net.eval()(h, gen())[0], h) and torch.equal(net(h)[1], torch.zeros(500))


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_made_by_name(name: str) -> None:
    assert type(make_bottleneck(name, 4)) is BOTTLENECKS[name]
    assert make_bottleneck(name, 4).out_channels == 4


@pytest.mark.parametrize("channels", range(1, 13))
def test_fsq_has_levels_for_any_number_of_channels(channels: int) -> None:
    net = FSQ(channels)
    assert net.groups * len(net.levels) == channels == net.mode(draw(net)).shape[1]


@pytest.mark.parametrize(
    ("name", "channels", "settings", "says"),
    [
        ("fqs", 4, {}, "fsq"),
        ("vq", 4, {"sise": 8}, "size"),
        ("kl", 4, {"size": 8}, "size"),
        ("vq", 4, {"groups": 3}, "groups"),
        ("fsq", 4, {"levels": [8, 5, 5]}, "levels"),
        ("fsq", 2, {"levels": [8, 1]}, "levels"),
    ],
)
def test_mistakes_are_named(name: str, channels: int, settings: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        make_bottleneck(name, channels, **settings)
    assert error.value.code == 2 and "\n" not in str(error.value)
