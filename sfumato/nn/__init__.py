"""Networks `net(z, clocks, cond, mask)`: they know no schedule, no codec and no data."""

from sfumato.nn.count import count_flops, count_parameters
from sfumato.nn.dit import DiT
from sfumato.nn.mlp import ResMLP
from sfumato.nn.sizes import NETS, SIZES, make_net, net_size
from sfumato.nn.unet import UNet

__all__ = ["NETS", "SIZES", "DiT", "ResMLP", "UNet", "count_flops", "count_parameters", "make_net", "net_size"]
