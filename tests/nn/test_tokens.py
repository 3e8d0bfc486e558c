"""Condition tokens, latents that are tokens of several lengths, clocks per position, and the names of weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sfumato.nn import NETS, count_parameters, make_net, net_size
from sfumato.nn.layers import CrossAttention, from_grid, pad_clock_weights, to_grid
from sfumato.types import Cond

SMALL: dict[str, dict[str, object]] = {
    "mlp": {"width": 32, "depth": 2, "embedding_dim": 16},
    "dit": {"width": 32, "depth": 3, "heads": 2, "embedding_dim": 16, "skips": True},
    # a group norm over fewer than four channels amplifies rounding errors where an item has one or two positions
    "unet": {"width": 64, "depth": 1, "heads": 2, "embedding_dim": 16, "multipliers": (1, 1, 2)},
}
LONGEST, CHANNELS, TOKEN_DIM = 11, 3, 5
names = pytest.mark.parametrize("name", list(NETS))
attending = pytest.mark.parametrize("name", ["dit", "unet"])


def small(name: str, shape: tuple[int, ...] = (LONGEST, CHANNELS), **settings: object) -> nn.Module:
    """A small network for tokens (N, D) whose zero weights are perturbed, as after some training."""
    torch.manual_seed(0)
    options = {"channels_last": True, "token_dim": 0 if name == "mlp" else TOKEN_DIM}
    net = make_net(name, latent_shape=shape, **(SMALL[name] | options | settings))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def latents(batch: int = 2, length: int = LONGEST) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, length, CHANNELS), torch.randn(batch, 1)


def text(lengths: list[int], longest: int = 4) -> Cond:
    """Condition tokens of these lengths, with noise after their end."""
    torch.manual_seed(2)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Cond(tokens=torch.randn(len(lengths), longest, TOKEN_DIM), mask=mask)


def tokens_of(cond: Cond) -> tuple[Tensor, Tensor]:
    assert cond.tokens is not None and cond.mask is not None
    return cond.tokens, cond.mask


def test_new_cross_attention_outputs_zero() -> None:
    h = CrossAttention(8, 2, TOKEN_DIM)(torch.randn(2, 6, 8), torch.randn(2, 4, TOKEN_DIM))
    assert torch.equal(h, torch.zeros(2, 6, 8))


def test_cross_attention_is_the_mean_of_values_when_all_keys_are_equal() -> None:
    layer = CrossAttention(8, 2, TOKEN_DIM)
    nn.init.eye_(layer.out.weight)
    nn.init.zeros_(layer.kv.weight[:8])  # type: ignore[arg-type]
    tokens, mask = tokens_of(text([4, 2]))
    values = tokens @ layer.kv.weight[8:].T + layer.kv.bias[8:]
    expected = torch.stack([values[0].mean(0), values[1, :2].mean(0)])[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(layer(torch.randn(2, 6, 8), tokens, mask), expected)


@attending
@pytest.mark.parametrize("per_position", [False, True])
def test_condition_tokens_matter_and_masked_ones_do_not(name: str, per_position: bool) -> None:
    z, clocks = latents()
    if per_position:
        clocks = clocks[:, None] + torch.linspace(0, 1, LONGEST)[:, None]
    net, cond = small(name), text([2, 2])
    tokens, mask = tokens_of(cond)
    out = net(z, clocks, cond)
    assert torch.allclose(out, net(z, clocks, replace(cond, tokens=torch.where(mask[..., None], tokens, 50))))
    assert torch.allclose(out, net(z, clocks, Cond(tokens=tokens[:, :2])), atol=1e-5)
    for other in (replace(cond, tokens=torch.where(mask[..., None], -tokens, tokens)), Cond(tokens=tokens), Cond()):
        assert (out - net(z, clocks, other)).abs().amax((1, 2)).min() > 1e-3


@attending
def test_order_of_condition_tokens_does_not_matter(name: str) -> None:
    z, clocks = latents()
    tokens, _ = tokens_of(text([4, 4]))
    net = small(name)
    assert torch.allclose(net(z, clocks, Cond(tokens=tokens)), net(z, clocks, Cond(tokens=tokens.flip(1))), atol=1e-5)


@attending
def test_rows_without_condition_tokens_get_none(name: str) -> None:
    z, clocks = latents(3)
    net, cond = small(name), text([3, 0, 0])
    out, without = net(z, clocks, cond), net(z, clocks)
    assert torch.equal(out[1:], without[1:])
    assert (out[0] - without[0]).abs().max() > 1e-3


@attending
def test_gradients_are_finite_and_zero_at_masked_condition_tokens(name: str) -> None:
    z, clocks = latents(3)
    net, cond = small(name), text([3, 0, 4])
    tokens, mask = tokens_of(cond)
    tokens.requires_grad_()
    net(z, clocks, cond).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    assert torch.equal(tokens.grad.abs().amax(-1) > 0, mask)
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key


@attending
def test_a_few_steps_from_zero_reach_the_cross_attention(name: str) -> None:
    z, clocks = latents()
    net = make_net(name, latent_shape=(LONGEST, CHANNELS), channels_last=True, token_dim=TOKEN_DIM, **SMALL[name])
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(z, clocks, text([4, 2])) - z.roll(1, 1)).square().mean().backward()
        optimizer.step()
    moved = [key for key, p in net.named_parameters() if not torch.equal(p, before[key])]
    assert {key for key in before if "cross" in key} <= set(moved)


@attending
def test_without_condition_tokens_the_cross_attention_is_skipped(name: str) -> None:
    z, clocks = latents()
    with_tokens, without = small(name), small(name, token_dim=0)
    weights = {key: p for key, p in with_tokens.state_dict().items() if "cross_attention" not in key}
    without.load_state_dict(weights)
    assert torch.equal(with_tokens(z, clocks), without(z, clocks))


@attending
def test_bf16_autocast_takes_condition_tokens(name: str) -> None:
    z, clocks = latents()
    net, cond = small(name), text([3, 0])
    exact = net(z, clocks, cond)
    with torch.autocast("cpu", torch.bfloat16):
        low_precision = net(z, clocks, cond)
    assert (low_precision.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("shape", "channels_last", "grid"),
    [((7,), False, (1, 7)), ((7,), True, (1, 7)), ((3, 4, 5), False, (3, 4, 5)), ((7, 3), True, (3, 7))],
)
def test_from_grid_inverts_to_grid(shape: tuple[int, ...], channels_last: bool, grid: tuple[int, ...]) -> None:
    z = torch.randn(2, *shape)
    x = to_grid(z, channels_last)
    assert x.shape == (2, *grid)
    assert torch.equal(from_grid(x, z.shape, channels_last), z)


@names
def test_channels_last_equals_channels_first(name: str) -> None:
    z, clocks = latents()
    first, last = small(name, (CHANNELS, LONGEST), channels_last=False), small(name)
    assert torch.allclose(first(z.mT, clocks).mT, last(z, clocks), atol=1e-6)


@names
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
def test_padding_after_an_item_does_not_change_it(name: str, length: int, per_position: bool) -> None:
    z, clocks = latents()
    concat = torch.randn(2, 1, LONGEST)
    clocks = clocks[:, None].expand(-1, LONGEST, -1) + torch.rand(2, LONGEST, 1) if per_position else clocks
    net, mask = small(name, concat=1), (torch.arange(LONGEST) < length).expand(2, -1)

    def padded_to(n: int, masked: bool = True) -> Tensor:
        part = clocks[:, :n] if per_position else clocks
        return net(z[:, :n], part, Cond(concat=concat[..., :n]), mask[:, :n] if masked else None)

    alone = padded_to(length, masked=False)
    assert alone.shape == (2, length, CHANNELS) and alone.std() > 1e-3
    for n in range(length, LONGEST + 1):
        assert padded_to(n).shape == (2, n, CHANNELS)
        assert torch.allclose(padded_to(n)[:, :length], alone, atol=1e-5), n


@names
def test_items_of_several_lengths_are_as_each_alone(name: str) -> None:
    lengths = [4, LONGEST, 1, 7]
    z, clocks = latents(4)
    net = small(name, (LONGEST + 3, CHANNELS))
    cond = Cond() if name == "mlp" else text([1, 4, 0, 2])
    out = net(z, clocks, cond, torch.arange(LONGEST) < torch.tensor(lengths)[:, None])
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        own = Cond() if name == "mlp" else Cond(tokens=tokens_of(cond)[0][row], mask=tokens_of(cond)[1][row])
        assert torch.allclose(out[row, :length], net(z[row, :length], clocks[row], own), atol=1e-5)


@names
def test_an_item_without_tokens_does_no_harm(name: str) -> None:
    z, clocks = latents()
    net = small(name)
    out = net(z, clocks, None, torch.arange(LONGEST) < torch.tensor([[5], [0]]))
    assert out.isfinite().all()
    assert torch.allclose(out[:1, :5], net(z[:1, :5], clocks[:1]), atol=1e-5)
    out[:1, :5].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("length", [*range(1, 18), 31])
@pytest.mark.parametrize("width", [16, 64])
def test_unet_takes_tokens_of_any_length(length: int, width: int) -> None:
    z, clocks = torch.randn(1, length, CHANNELS), torch.randn(1, 1)
    out = small("unet", (31, CHANNELS), width=width)(z, clocks)
    assert out.shape == z.shape and out.isfinite().all()


def test_mlp_reads_missing_tokens_as_zeros() -> None:
    z, clocks = latents(length=6)
    net, padded = small("mlp"), torch.cat((z, torch.zeros(2, LONGEST - 6, CHANNELS)), 1)
    assert torch.allclose(net(z, clocks), net(padded, clocks)[:, :6], atol=1e-6)
    with pytest.raises(AssertionError, match="at most 11"):
        net(torch.zeros(2, LONGEST + 1, CHANNELS), clocks)


@names
def test_clocks_of_every_position_matter_in_their_segment(name: str) -> None:
    z, _ = latents()
    clocks = torch.randn(2, 2, 2).repeat_interleave(torch.tensor([6, 5]), 1)  # two segments, two clocks
    net = small(name, clocks=2, **({"segments": (6, 5)} if name == "mlp" else {}))
    out = net(z, clocks)
    for segment in (slice(0, 6), slice(6, 11)):
        for k in range(2):
            changed = clocks.clone()
            changed[:, segment, k] += 0.5
            assert (net(z, changed) - out).abs().amax((1, 2)).min() > 1e-3
    equal = torch.randn(2, 2)
    assert torch.allclose(net(z, equal), net(z, equal[:, None].expand(-1, LONGEST, -1)), atol=1e-5)


def test_mlp_takes_the_clocks_of_the_first_position_of_a_segment() -> None:
    z, _ = latents()
    clocks = torch.randn(2, LONGEST, 1)
    for segments, starts in [((), [0]), ((LONGEST,), [0]), ((6, 5), [0, 6]), ((2, 1, 8), [0, 2, 3])]:
        net = small("mlp", segments=segments)
        others = torch.ones(LONGEST, 1).index_fill(0, torch.tensor(starts), 0)
        assert torch.equal(net(z, clocks), net(z, clocks + others))
        for start in starts:
            changed = clocks.clone()
            changed[:, start] += 0.5
            assert (net(z, clocks) - net(z, changed)).abs().max() > 1e-3


def test_padded_clock_weights_fit_segments() -> None:
    z, _ = latents()
    clocks = torch.randn(2, LONGEST, 1)
    net, more = small("mlp", segments=(6, 5)), small("mlp", segments=(6, 5), clocks=2)
    more.load_state_dict(pad_clock_weights(net.state_dict(), 2))
    assert torch.allclose(net(z, clocks), more(z, torch.cat((clocks, torch.randn(2, LONGEST, 1)), -1)), atol=1e-6)


def weights(*layers: str) -> set[str]:
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


EMBEDDING = {"embedding.vector_in.weight", *weights("embedding.clock_in", "embedding.out")}
ATTENTION = {"q_norm.weight", "k_norm.weight", *weights("qkv", "out")}
CROSS_ATTENTION = {"q_norm.weight", "k_norm.weight", *weights("q", "kv", "out")}
RESIDUAL = weights("norm_in", "norm_out", "conv_in", "modulation", "conv_out")


def below(prefix: str, keys: set[str]) -> set[str]:
    return {f"{prefix}.{key}" for key in keys}


def keys(name: str, token_dim: int = 0, **settings: object) -> set[str]:
    with torch.device("meta"):
        return set(make_net(name, latent_shape=(4, 8), cond_dim=3, token_dim=token_dim, **settings).state_dict())


def test_names_of_weights_of_the_mlp() -> None:
    expected = EMBEDDING | weights("modulation", "z_in", "blocks.0.up", "blocks.0.down", "z_out")
    assert keys("mlp", width=32, depth=1) == expected


def test_names_of_weights_of_the_dit() -> None:
    expected = EMBEDDING | weights("modulation", "z_in", "z_out", "blocks.1.skip") | {"places"}
    for block in ("blocks.0", "blocks.1"):
        expected |= below(f"{block}.attention", ATTENTION)
        expected |= below(block, weights("modulation", "feed_forward.up", "feed_forward.down"))
    settings = {"width": 32, "depth": 2, "heads": 2, "skips": True}
    assert keys("dit", **settings) == expected
    cross = {key for i in (0, 1) for key in below(f"blocks.{i}.cross_attention", CROSS_ATTENTION)}
    assert keys("dit", 5, **settings) == expected | cross


def test_names_of_weights_of_the_unet() -> None:
    expected = EMBEDDING | weights("z_in", "shrink.0", "grow.0", "norm_out", "z_out")
    for block in ("down.0", "down.1", "middle.0", "middle.1", "up.0", "up.1"):
        expected |= below(f"{block}.residual", RESIDUAL)
    expected |= weights("up.0.residual.skip", "up.1.residual.skip")
    attending = ("down.1", "middle.0", "up.0")
    expected |= {key for block in attending for key in below(f"{block}.attention", ATTENTION)}
    settings = {"width": 16, "depth": 1, "heads": 2, "multipliers": (1, 2), "max_attention_positions": 4}
    assert keys("unet", **settings) == expected
    cross = {key for block in attending for key in below(f"{block}.cross_attention", CROSS_ATTENTION)}
    assert keys("unet", 5, **settings) == expected | cross


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("mlp", "s", 2_839_040),
        ("mlp", "m", 15_788_800),
        ("dit", "s", 8_880_912),
        ("dit", "m", 28_689_552),
        ("unet", "s", 3_537_604),
        ("unet", "m", 12_897_060),
    ],
)
def test_number_of_weights_without_condition_tokens(name: str, size: str, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(make_net(name, latent_shape=(4, 8, 8), cond_dim=10, **net_size(name, size))) == count
