"""The mathematics: schedules, denoisers, objectives, noise, samplers, guidance, constraints. No I/O and no modality."""

from .align import Crossing, Spread, align, class_evidence, measure_spread, shortest
from .bend import Bent, bend
from .consistency import Jump, Trajectories, fly, joined, shaken
from .constrain import Again, Known, consistent, strength_time
from .denoiser import PREDICT, Denoiser, Weaker
from .guidance import cfg, interval, rescale
from .inversion import flow_grid, invert, regenerate, slerp
from .noise import Noise, item_generator, item_noise, step_generator
from .objective import TIMES, WEIGHTS, Objective, make_times, make_weight
from .sampler import GRIDS, SAMPLERS, Step, denoiser_calls, prior, sample, time_grid
from .schedule import SCHEDULES, Schedule, make_schedule

__all__ = [
    "GRIDS",
    "PREDICT",
    "SAMPLERS",
    "SCHEDULES",
    "TIMES",
    "WEIGHTS",
    "Again",
    "Bent",
    "Crossing",
    "Denoiser",
    "Jump",
    "Known",
    "Noise",
    "Objective",
    "Schedule",
    "Spread",
    "Step",
    "Trajectories",
    "Weaker",
    "align",
    "bend",
    "cfg",
    "class_evidence",
    "consistent",
    "denoiser_calls",
    "flow_grid",
    "fly",
    "interval",
    "invert",
    "item_generator",
    "item_noise",
    "joined",
    "make_schedule",
    "make_times",
    "make_weight",
    "measure_spread",
    "prior",
    "regenerate",
    "rescale",
    "sample",
    "shaken",
    "shortest",
    "slerp",
    "step_generator",
    "strength_time",
    "time_grid",
]
