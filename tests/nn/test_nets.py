"""All networks: shapes, zero output at the start, gradients, precision, masks, clocks, learning."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn import NETS, SIZES, DiT, ResMLP, UNet, make_net, net_size
from sfumato.types import Cond

SHAPES = [(6,), (3, 9), (2, 4, 4), (2, 7, 5), (1, 1, 1), (2, 3, 4, 5)]
SMALL: dict[str, dict[str, object]] = {
    "mlp": {"width": 32, "depth": 2, "embedding_dim": 16},
    "dit": {"width": 32, "depth": 3, "heads": 2, "embedding_dim": 16, "skips": True},
    "unet": {"width": 16, "depth": 1, "heads": 2, "embedding_dim": 16, "multipliers": (1, 2)},
}
names = pytest.mark.parametrize("name", list(NETS))


def small(name: str, shape: tuple[int, ...], cond_dim: int = 3, seed: int = 0, **settings: object) -> nn.Module:
    """A small network whose zero weights are perturbed, as after some training."""
    torch.manual_seed(seed)
    net = make_net(name, latent_shape=shape, cond_dim=cond_dim, **(SMALL[name] | settings))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def vector_of(cond: Cond) -> Tensor:
    assert cond.vector is not None
    return cond.vector


def inputs(shape: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    return torch.randn(batch, *shape), torch.randn(batch, 1), Cond(torch.randn(batch, 3))


@names
@pytest.mark.parametrize("shape", SHAPES)
def test_output_has_the_shape_of_the_input(name: str, shape: tuple[int, ...]) -> None:
    z, clocks, cond = inputs(shape)
    out = small(name, shape)(z, clocks, cond)
    assert out.shape == z.shape
    assert out.isfinite().all()
    assert out.std() > 1e-3 or out.numel() == 2


@names
def test_new_network_outputs_zero(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    net = make_net(name, latent_shape=(2, 5, 4), cond_dim=3, **SMALL[name])
    assert torch.equal(net(z, clocks, cond), torch.zeros_like(z))


@names
def test_gradients_reach_every_parameter(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    cond = replace(cond, concat=torch.randn(2, 1, 5, 4), tokens=None if name == "mlp" else torch.randn(2, 3, 7))
    net = small(name, (2, 5, 4), concat=1, token_dim=0 if name == "mlp" else 7)
    net(z, clocks, cond).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key


def test_swiglu_mlp_has_as_many_weights_and_multiplies() -> None:
    plain, gated = (ResMLP((6,), width=96, depth=2, swiglu=gated) for gated in (False, True))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (plain, gated)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
    block, off, on = gated.blocks[0], torch.zeros(1, 96), torch.ones(1, 96)
    torch.nn.init.zeros_(block.up.bias[64:])  # type: ignore[arg-type, index]
    torch.nn.init.zeros_(block.up.weight[64:])  # type: ignore[arg-type, index]
    x = torch.randn(1, 96)
    torch.testing.assert_close(block(x, off, off, on), x + block.down.bias)  # one factor is zero, so the product is too


def test_every_block_of_the_mlp_has_its_own_modulation() -> None:
    z, clocks, cond = inputs((2, 5, 4))
    net = small("mlp", (2, 5, 4))
    net(z, clocks, cond).square().sum().backward()
    assert (net.get_parameter("modulation.weight").grad.abs().amax(1) > 0).all()  # pyright: ignore


@names
def test_a_few_steps_from_zero_move_every_parameter(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    net = make_net(name, latent_shape=(2, 5, 4), cond_dim=3, **SMALL[name])
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(z, clocks, cond) - 1).square().mean().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if torch.equal(p, before[key])] == []


@names
def test_every_input_matters(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    concat = torch.randn(2, 1, 5, 4)
    cond = replace(cond, concat=concat)
    net = small(name, (2, 5, 4), concat=1)
    base = net(z, clocks, cond)
    others = (
        net(z + 0.1, clocks, cond),
        net(z, clocks + 0.1, cond),
        net(z, clocks, Cond(vector_of(cond) + 0.1, concat=cond.concat)),
        net(z, clocks, Cond(cond.vector, concat=concat + 0.1)),
        net(z, clocks, Cond(concat=cond.concat)),
    )
    for other in others:
        assert (other - base).abs().max() > 1e-4


@names
def test_items_do_not_influence_one_another(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4), batch=3)
    net = small(name, (2, 5, 4))
    alone = net(z[1:2], clocks[1:2], Cond(vector_of(cond)[1:2]))
    assert torch.allclose(net(z, clocks, cond)[1:2], alone, atol=1e-5)


@names
def test_bf16_autocast_is_close_to_float32(name: str) -> None:
    z, clocks, cond = inputs((2, 8, 8))
    net = small(name, (2, 8, 8))
    exact = net(z, clocks, cond)
    with torch.autocast("cpu", torch.bfloat16):
        low_precision = net(z, clocks, cond)
    assert low_precision.dtype == torch.bfloat16
    assert (low_precision.float() - exact).norm() < 0.03 * exact.norm()


@names
def test_saved_and_loaded_weights_give_equal_outputs(name: str, tmp_path) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    net, other = small(name, (2, 5, 4)), small(name, (2, 5, 4), seed=5)
    assert not torch.equal(net(z, clocks, cond), other(z, clocks, cond))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(net(z, clocks, cond), other(z, clocks, cond))


@names
@pytest.mark.parametrize("shape", [(2, 11), (2, 5, 4), (12,)])
def test_masked_positions_have_no_effect(name: str, shape: tuple[int, ...]) -> None:
    z, clocks, cond = inputs(shape)
    net = small(name, shape, **({"patch": 2} if name == "dit" else {}))
    grid = shape[1:] or shape
    mask = (torch.arange(z[0].numel() // (shape[0] if len(shape) > 1 else 1)) < 7).expand(2, -1)  # (B, N)
    inside = mask.reshape(2, *[1] * (len(shape) > 1), *grid).expand_as(z)
    changed = torch.where(inside, z, 100 * torch.randn_like(z))
    out, again = net(z, clocks, cond, mask), net(changed, clocks, cond, mask)
    assert torch.allclose(out[inside], again[inside], atol=1e-5)
    assert (net(z, clocks, cond)[inside] - out[inside]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize(("full", "short"), [((12,), (6,)), ((12,), (5,)), ((6, 7), (6, 3)), ((6, 7), (3, 5))])
def test_padding_equals_a_smaller_latent(name: str, full: tuple[int, ...], short: tuple[int, ...]) -> None:
    z, clocks, cond = inputs((2, *full))
    net = small(name, (2, *full), **({"patch": 2} if name == "dit" else {}))
    corner = tuple(slice(n) for n in short)
    mask = torch.zeros(2, *full, dtype=torch.bool)
    mask[(slice(None), *corner)] = True
    part = (slice(None), slice(None), *corner)
    assert torch.allclose(net(z, clocks, cond, mask.flatten(1))[part], net(z[part], clocks, cond), atol=1e-4)


@names
def test_a_full_mask_changes_nothing(name: str) -> None:
    z, clocks, cond = inputs((2, 5, 4))
    net = small(name, (2, 5, 4))
    assert torch.allclose(net(z, clocks, cond), net(z, clocks, cond, torch.ones(2, 20, dtype=torch.bool)), atol=1e-4)


@names
def test_equal_clocks_at_all_positions_equal_one_clock(name: str) -> None:
    z, _, cond = inputs((2, 5, 4))
    clocks = torch.randn(2, 2)
    settings = {"segments": (1,) * 20} if name == "mlp" else {}
    net = small(name, (2, 5, 4), clocks=2, **settings)  # pyright: ignore[reportArgumentType]
    each = clocks[:, None].expand(-1, 20, -1)
    assert torch.allclose(net(z, each, cond), net(z, clocks, cond), atol=1e-5)
    ramp = each + torch.linspace(0, 1, 20)[:, None]
    assert (net(z, ramp, cond) - net(z, clocks, cond)).abs().max() > 1e-4


@names
def test_blocks_are_listed_and_every_product_is_a_layer(name: str) -> None:
    net = small(name, (2, 5, 4))
    assert len(list(net.blocks)) >= 2  # pyright: ignore[reportArgumentType]
    layers = {id(p) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters()}
    assert [key for key, p in net.named_parameters() if p.ndim > 1 and id(p) not in layers and key != "places"] == []


def fit_batch(net: nn.Module, z: Tensor, clocks: Tensor, cond: Cond, target: Tensor) -> tuple[float, float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = (net(z, clocks, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@names
def test_overfits_one_batch(name: str) -> None:
    z, clocks, cond = inputs((2, 4, 4), batch=8)
    net = make_net(name, latent_shape=(2, 4, 4), cond_dim=3, **SMALL[name])
    first, last = fit_batch(net, z, clocks, cond, torch.randn_like(z))
    assert last < 0.05 * first


@names
def test_learns_from_clock_and_condition_alone(name: str) -> None:
    torch.manual_seed(0)
    clocks, vector = torch.randn(16, 1), torch.randn(16, 3)
    z = torch.zeros(16, 2, 4, 4)
    target = (clocks.sin() * vector[:, :1])[..., None, None].expand_as(z)
    net = make_net(name, latent_shape=(2, 4, 4), cond_dim=3, **SMALL[name])
    first, last = fit_batch(net, z, clocks, Cond(vector), target)
    assert last < 0.05 * first


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in SIZES for size in SIZES[name]])
def test_every_size_builds(name: str, size: str) -> None:
    with torch.device("meta"):
        net = make_net(name, latent_shape=(4, 8, 8), cond_dim=10, **net_size(name, size))
    assert isinstance(net, NETS[name])


@names
def test_sizes_grow(name: str) -> None:
    with torch.device("meta"):
        nets = [make_net(name, latent_shape=(4, 8, 8), **settings) for settings in SIZES[name].values()]
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert list(SIZES[name]) == ["xs", "s", "m", "l", "xl"]
    assert counts == sorted(counts) and counts[-1] > 20 * counts[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_net("dot", latent_shape=(4, 8, 8)), "'dit'"),
        (lambda: make_net("mlp", latent_shape=(4,), widht=3), "'width'"),
        (lambda: make_net("mlp", width=3), "'latent_shape'"),
        (lambda: net_size("unet", "xxl"), "'xl'"),
        (lambda: net_size("mlpp", "xl"), "'mlp'"),
        (lambda: DiT((4, 8, 8), width=30, heads=4), "width=30"),
        (lambda: DiT((4, 8, 8), positions="rop"), "rope"),
        (lambda: UNet((4, 8, 8), width=30, heads=4), "width=30"),
        (lambda: UNet((4, 80, 80), token_dim=5), "at least 400"),
        (lambda: make_net("mlp", latent_shape=(4,), token_dim=5), "network 'mlp' cannot take text .* use dit or unet"),
    ],
)
def test_errors_name_wrong_settings(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_unexpected_conditions_raise() -> None:
    z, clocks, cond = inputs((2, 4, 4))
    with pytest.raises(AssertionError, match="cond_dim"):
        ResMLP((2, 4, 4), width=8, depth=1)(z, clocks, cond)
    for name in NETS:
        with pytest.raises(AssertionError, match="condition tokens"):
            small(name, (2, 4, 4))(z, clocks, Cond(tokens=torch.zeros(2, 1, 4)))
    with pytest.raises(AssertionError, match="concat"):
        ResMLP((2, 4, 4), width=8, depth=1)(z, clocks, Cond(concat=torch.zeros(2, 1, 4, 4)))
