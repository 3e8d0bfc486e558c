"""The cost of a network: its parameters and the floating-point operations of a call."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module; a shared parameter counts once."""
    return sum(p.numel() for p in module.parameters())


def count_flops(fn: Callable[..., object], *inputs: object) -> int:
    """The number of floating-point operations of matrix products and convolutions in `fn(*inputs)`, forward only.

    A multiply-add is two operations. A training step takes about three times as many.

    Args:
        fn: A function or a module.
        *inputs: Its arguments.
    """
    # the math backend consists of counted products; the fused CPU kernel is not counted
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn(*inputs)
    return counter.get_total_flops()
