"""The mathematics: schedules, denoisers, objectives, noise, samplers, guidance, constraints. No I/O and no modality."""

from .align import Crossing, Spread, align, measure_spread, shortest
from .constrain import Again, Known, consistent, strength_time
from .denoiser import PREDICT, Denoiser
from .guidance import autoguide, cfg, interval, rescale
from .inversion import flow_grid, invert, regenerate, slerp
from .noise import Noise, item_generator, item_noise, step_generator
from .objective import TIMES, WEIGHTS, Objective, make_times, make_weight
from .sampler import GRIDS, SAMPLERS, Step, prior, sample, time_grid
from .schedule import SCHEDULES, Schedule, make_schedule

__all__ = [
    "GRIDS",
    "PREDICT",
    "SAMPLERS",
    "SCHEDULES",
    "TIMES",
    "WEIGHTS",
    "Again",
    "Crossing",
    "Denoiser",
    "Known",
    "Noise",
    "Objective",
    "Schedule",
    "Spread",
    "Step",
    "align",
    "autoguide",
    "cfg",
    "consistent",
    "flow_grid",
    "interval",
    "invert",
    "item_generator",
    "item_noise",
    "make_schedule",
    "make_times",
    "make_weight",
    "measure_spread",
    "prior",
    "regenerate",
    "rescale",
    "sample",
    "shortest",
    "slerp",
    "step_generator",
    "strength_time",
    "time_grid",
]
