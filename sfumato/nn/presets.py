"""Networks by name, their sizes, and the function that builds them."""

import inspect

from sfumato.errors import UserError
from sfumato.nn.dit import DiT
from sfumato.nn.mlp import ResMLP
from sfumato.nn.unet import UNet
from sfumato.registry import build, choose

NETS: dict[str, type[ResMLP] | type[DiT] | type[UNet]] = {"mlp": ResMLP, "dit": DiT, "unet": UNet}

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "mlp": {
        "xs": {"width": 256, "depth": 3, "embedding_dim": 64},
        "s": {"width": 512, "depth": 4, "embedding_dim": 64},
        "m": {"width": 1024, "depth": 6, "embedding_dim": 128},
        "l": {"width": 1536, "depth": 8, "embedding_dim": 192},
        "xl": {"width": 2048, "depth": 12, "embedding_dim": 256},
    },
    "dit": {
        "xs": {"width": 128, "depth": 4, "heads": 2, "embedding_dim": 128},
        "s": {"width": 256, "depth": 8, "heads": 4, "embedding_dim": 192},
        "m": {"width": 384, "depth": 12, "heads": 6, "embedding_dim": 256},
        "l": {"width": 768, "depth": 12, "heads": 12, "embedding_dim": 256},
        "xl": {"width": 1024, "depth": 24, "heads": 16, "embedding_dim": 384},
    },
    "unet": {
        "xs": {"width": 32, "depth": 1, "heads": 2, "embedding_dim": 128},
        "s": {"width": 64, "depth": 1, "heads": 4, "embedding_dim": 192},
        "m": {"width": 96, "depth": 2, "heads": 4, "embedding_dim": 256},
        "l": {"width": 128, "depth": 3, "heads": 4, "embedding_dim": 384},
        "xl": {"width": 192, "depth": 3, "heads": 6, "embedding_dim": 512},
    },
}


def net_size(name: str, size: str) -> dict[str, int]:
    """The settings of a network size.

    Args:
        name: A name in `NETS`.
        size: `xs`, `s`, `m`, `l` or `xl`.

    Raises:
        UserError: The name or the size is unknown; the error suggests the nearest.
    """
    choose(NETS, "network", name)
    return dict(choose(SIZES[name], f"size of network {name!r}", size))


def make_net(name: str, **settings: object) -> ResMLP | DiT | UNet:
    """Build a network from its name and the arguments of its constructor.

    Args:
        name: A name in `NETS`.
        **settings: Arguments of the constructor: `latent_shape`, `cond_dim`, `width`, ...

    Raises:
        UserError: The name or a setting is unknown (the error suggests the nearest), or a required one is missing.
    """
    parameters = inspect.signature(choose(NETS, "network", name)).parameters
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"network {name!r} requires the setting {key!r}")
    return build(NETS, "network", name, settings)
