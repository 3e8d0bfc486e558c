"""The mathematics: schedules, denoisers, objectives, noise, samplers, guidance. No I/O and no modality."""

from .denoiser import PREDICT, Denoiser
from .guidance import autoguide, cfg, interval, rescale
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
    "Denoiser",
    "Noise",
    "Objective",
    "Schedule",
    "Step",
    "autoguide",
    "cfg",
    "interval",
    "item_generator",
    "item_noise",
    "make_schedule",
    "make_times",
    "make_weight",
    "prior",
    "rescale",
    "sample",
    "step_generator",
    "time_grid",
]
