"""The mathematics: schedules, denoisers, objectives, samplers, guidance, inpainting, noise. No I/O, no modality."""

from sfumato.core.consistency import ConsistencyStep, Trajectories, concat, integrate_trajectories, jitter
from sfumato.core.denoiser import PREDICTIONS, Denoiser, GuideTerm
from sfumato.core.grid import GRIDS, time_grid
from sfumato.core.guidance import cfg, interval, rescale
from sfumato.core.inpainting import Replace, Resample, reconstruction_guidance, strength_time
from sfumato.core.inversion import integrate_to_data, inversion_grid, invert, slerp
from sfumato.core.likelihood import class_log_likelihood_ratio
from sfumato.core.objective import LOSS_WEIGHTS, TIME_SAMPLINGS, Objective, make_time_sampling, make_weight
from sfumato.core.rng import Noise, item_generator, item_noise, step_generator
from sfumato.core.sampler import SAMPLERS, Step, denoiser_evaluations, initial_noise, sample
from sfumato.core.schedule import SCHEDULES, Schedule, make_schedule

__all__ = [
    "GRIDS",
    "LOSS_WEIGHTS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "TIME_SAMPLINGS",
    "ConsistencyStep",
    "Denoiser",
    "GuideTerm",
    "Noise",
    "Objective",
    "Replace",
    "Resample",
    "Schedule",
    "Step",
    "Trajectories",
    "cfg",
    "class_log_likelihood_ratio",
    "concat",
    "denoiser_evaluations",
    "initial_noise",
    "integrate_to_data",
    "integrate_trajectories",
    "interval",
    "inversion_grid",
    "invert",
    "item_generator",
    "item_noise",
    "jitter",
    "make_schedule",
    "make_time_sampling",
    "make_weight",
    "reconstruction_guidance",
    "rescale",
    "sample",
    "slerp",
    "step_generator",
    "strength_time",
    "time_grid",
]
