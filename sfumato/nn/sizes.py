"""The networks by name, their sizes, and the one function that builds them."""

import inspect

from sfumato.choice import build, choose
from sfumato.errors import UserError
from sfumato.nn.dit import DiT
from sfumato.nn.mlp import ResMLP
from sfumato.nn.unet import UNet

NETS: dict[str, type[ResMLP] | type[DiT] | type[UNet]] = {"mlp": ResMLP, "dit": DiT, "unet": UNet}

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "mlp": {
        "xs": {"width": 256, "depth": 3, "embed": 64},
        "s": {"width": 512, "depth": 4, "embed": 64},
        "m": {"width": 1024, "depth": 6, "embed": 128},
        "l": {"width": 1536, "depth": 8, "embed": 192},
        "xl": {"width": 2048, "depth": 12, "embed": 256},
    },
    "dit": {
        "xs": {"width": 128, "depth": 4, "heads": 2, "embed": 128},
        "s": {"width": 256, "depth": 8, "heads": 4, "embed": 192},
        "m": {"width": 384, "depth": 12, "heads": 6, "embed": 256},
        "l": {"width": 768, "depth": 12, "heads": 12, "embed": 256},
        "xl": {"width": 1024, "depth": 24, "heads": 16, "embed": 384},
    },
    "unet": {
        "xs": {"width": 32, "depth": 1, "heads": 2, "embed": 128},
        "s": {"width": 64, "depth": 1, "heads": 4, "embed": 192},
        "m": {"width": 96, "depth": 2, "heads": 4, "embed": 256},
        "l": {"width": 128, "depth": 3, "heads": 4, "embed": 384},
        "xl": {"width": 192, "depth": 3, "heads": 6, "embed": 512},
    },
}


def net_size(name: str, size: str) -> dict[str, int]:
    """The settings of a network's size.

    Args:
        name: One of `NETS`.
        size: One of `xs s m l xl`.

    Raises:
        UserError: If either is unknown; it names the nearest.
    """
    choose(NETS, "network", name)
    return dict(choose(SIZES[name], f"size of network {name!r}", size))


def make_net(name: str, **settings: object) -> ResMLP | DiT | UNet:
    """Build a network from its name and the arguments of its constructor.

    Args:
        name: One of `NETS`.
        **settings: `latent_shape`, `cond_dim`, `width`, ...: what the class's signature lists, by name.

    Raises:
        UserError: If the name or a setting is unknown (it names the nearest), or a needed one is missing.
    """
    parameters = inspect.signature(choose(NETS, "network", name)).parameters
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"network {name!r} needs the setting {key!r}; give it")
    return build(NETS, "network", name, settings)
