"""What a network costs: its parameters, and the floating-point operations of a call."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def count_flops(fn: Callable[..., object], *inputs: object) -> int:
    """Count the floating-point operations of the matrix products and convolutions in `fn(*inputs)`, forward only.

    A multiplication and an addition are two operations. A training step takes about three times as many.

    Args:
        fn: A function or a module.
        *inputs: What to call it with.
    """
    # the mathematical kernel is made of counted products, the fused one for CPU is not counted
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn(*inputs)
    return counter.get_total_flops()
