"""Counts of parameters and operations, compared with counts by hand."""

import torch
from torch import nn

from sfumato.nn import DiT, ResMLP, UNet, count_flops, count_parameters
from sfumato.types import Cond


def test_parameters_count_once() -> None:
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, layer)) == 16


def test_mlp_operations_by_hand() -> None:
    batch, width, depth, embed, size = 5, 64, 3, 16, 2 * 4 * 4
    net = ResMLP((2, 4, 4), width=width, depth=depth, embedding_dim=embed, expansion=2)
    products = 64 * embed + embed * embed  # 32 frequencies, each sine and cosine
    products += embed * (3 * depth + 2) * width
    products += size * width + depth * 2 * width * (2 * width) + width * size
    assert count_flops(net, torch.zeros(batch, 2, 4, 4), torch.zeros(batch, 1)) == 2 * batch * products


def test_mlp_parameters_by_hand() -> None:
    net = ResMLP((8,), 3, width=16, depth=2, embedding_dim=4)
    embedding = 64 * 4 + 4 + 3 * 4 + 4 * 4 + 4
    modulation = (4 + 1) * 8 * 16
    blocks = 2 * 2 * (16 * 16 + 16)
    assert count_parameters(net) == embedding + modulation + blocks + (8 * 16 + 16) + (16 * 8 + 8)


def test_dit_operations_by_hand() -> None:
    batch, width, depth, embed, tokens, patch = 3, 32, 2, 16, 4 * 4, 2 * 2 * 2
    net = DiT((2, 8, 8), width=width, depth=depth, heads=2, patch=2, embedding_dim=embed, swiglu=False)
    per_call = 64 * embed + embed * embed + depth * embed * 6 * width + embed * 2 * width
    per_block = tokens * (3 * width * width + width * width + 8 * width * width) + 2 * tokens * tokens * width
    products = per_call + depth * per_block + 2 * tokens * patch * width
    assert count_flops(net, torch.zeros(batch, 2, 8, 8), torch.zeros(batch, 1)) == 2 * batch * products


def test_cross_attention_operations_by_hand() -> None:
    batch, width, depth, positions, count, dim = 3, 32, 2, 4 * 4, 5, 7
    z, clocks, tokens = torch.zeros(batch, 2, 8, 8), torch.zeros(batch, 1), torch.zeros(batch, count, dim)
    net = DiT((2, 8, 8), width=width, depth=depth, heads=2, patch=2, token_dim=dim)
    products = 2 * positions * width * width + count * dim * 2 * width + 2 * positions * count * width
    extra = count_flops(net, z, clocks, Cond(tokens=tokens)) - count_flops(net, z, clocks)
    assert extra == 2 * batch * depth * products


def test_unet_operations_are_dominated_by_its_convolutions() -> None:
    net = UNet((2, 8, 8), width=16, depth=1, heads=2, multipliers=(1,), max_attention_positions=0, embedding_dim=16)
    convolutions = 64 * 9 * (2 * 16 + 16 * 16 * 2 + (16 * 16 * 2) * 2 + 32 * 16 + 16 * 16 + 16 * 2) + 64 * 32 * 16
    linear = 64 * 16 + 16 * 16 + 4 * 16 * 32
    assert count_flops(net, torch.zeros(1, 2, 8, 8), torch.zeros(1, 1)) == 2 * (convolutions + linear)
