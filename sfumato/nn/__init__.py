"""Networks `net(z, clocks, cond, mask)`, independent of schedule, codec and data; clocks are the time inputs."""

from sfumato.nn.dit import DiT
from sfumato.nn.flops import count_flops, count_parameters
from sfumato.nn.mlp import ResMLP
from sfumato.nn.presets import NETS, SIZES, make_net, net_size
from sfumato.nn.unet import UNet

__all__ = ["NETS", "SIZES", "DiT", "ResMLP", "UNet", "count_flops", "count_parameters", "make_net", "net_size"]
