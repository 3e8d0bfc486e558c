"""Only for the transformer: patches, positions, clocks of patches, skips."""

import pytest
import torch
from torch import Tensor

from sfumato.nn import DiT
from sfumato.nn.dit import patchify, unpatchify
from sfumato.nn.layers import rotary_angles, rotate


def net(shape: tuple[int, ...], **settings: object) -> DiT:
    torch.manual_seed(0)
    net = DiT(shape, **({"width": 32, "depth": 2, "heads": 2, "embedding_dim": 16} | settings))  # pyright: ignore
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize(("shape", "patch"), [((3, 9), (2,)), ((2, 6, 5), (2, 3)), ((1, 3, 4, 5), (2, 2, 2))])
def test_unpatchify_inverts_patchify(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    h, grid = patchify(x, patch)
    assert h.shape[1] == torch.tensor(grid).prod()
    assert torch.equal(unpatchify(h, grid, patch, shape[1:]), x)


def test_a_token_holds_one_patch() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    h, _ = patchify(x, (2, 2))
    assert h[0, 1].tolist() == [2, 3, 6, 7]


def test_rotary_products_depend_on_the_offset_alone() -> None:
    angles = rotary_angles((5, 6), 16, 100.0, torch.device("cpu"))
    assert angles.shape == (30, 8)
    assert torch.allclose(
        angles[2 * 6 + 3], torch.tensor([2.0, 3.0])[:, None].mul(100.0 ** -(torch.arange(4) / 4)).flatten()
    )
    q, k = rotate(torch.randn(16).expand(1, 1, 30, 16), angles), rotate(torch.randn(16).expand(1, 1, 30, 16), angles)
    table = (q @ k.transpose(-1, -2))[0, 0].reshape(5, 6, 5, 6)
    assert torch.allclose(table[0, 0, 2, 3], table[2, 1, 4, 4], atol=1e-4)
    assert (table[0, 0, 2, 3] - table[0, 0, 3, 2]).abs() > 1e-3
    assert torch.allclose(q.norm(dim=-1), q[0, 0, 0].norm().expand(1, 1, 30), atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "learned", "both"])
def test_positions_are_distinguished(positions: str) -> None:
    z = torch.ones(1, 2, 4, 4)
    z[0, :, 0, 0] = 2  # rotary positions give offsets only, so one position needs to differ
    out = net((2, 4, 4), patch=1, positions=positions)(z, torch.zeros(1, 1))
    assert (out[0, :, 1, 2] - out[0, :, 3, 1]).abs().max() > 1e-4


def test_without_positions_order_does_not_matter() -> None:
    """The counterpart of the test above: with rotary angles of zero the same two positions agree."""
    z = torch.ones(1, 2, 4, 4)
    z[0, :, 0, 0] = 2
    no_positions = net((2, 4, 4), patch=1, positions="rope")
    no_positions.theta = 0.0
    out = no_positions(z, torch.zeros(1, 1))
    assert torch.allclose(out[0, :, 1, 2], out[0, :, 3, 1], atol=1e-5)


def test_clocks_of_masked_positions_have_no_effect() -> None:
    z, clocks = torch.randn(2, 3, 8), torch.randn(2, 8, 1)
    mask = (torch.arange(8) < 5).expand(2, -1)
    model = net((3, 8), patch=1)
    changed = torch.where(mask[..., None], clocks, 3.0)
    out = model(z, clocks, mask=mask)
    assert torch.allclose(out[..., :5], model(z, changed, mask=mask)[..., :5], atol=1e-5)
    assert (out - model(z, clocks + 0.1, mask=mask))[..., :5].abs().max() > 1e-4


def test_a_patch_takes_the_clock_of_its_first_position() -> None:
    z, clocks = torch.randn(2, 3, 5, 4), torch.randn(2, 20, 1)
    model = net((3, 5, 4), patch=2)
    first = clocks.reshape(2, 5, 4, 1)[:, ::2, ::2].flatten(1, 2)
    assert torch.allclose(model(z, clocks), model(z, first), atol=1e-6)


def test_skips_carry_the_first_half_to_the_second() -> None:
    z, clocks = torch.randn(2, 3, 8), torch.randn(2, 1)
    model = net((3, 8), depth=5, skips=True)
    assert [block.skip is not None for block in model.blocks] == [False, False, False, True, True]
    recorded: dict[int, list[Tensor]] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: recorded.update({i: [args[5], out]}))
    model(z, clocks)
    assert recorded[3][0] is recorded[1][1] and recorded[4][0] is recorded[0][1]
