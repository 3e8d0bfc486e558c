"""The mathematics: schedules, denoisers, objectives, samplers, guidance, inpainting, noise. No I/O, no modality."""

from sfumato.core.consistency import ConsistencyStep, Trajectories, concat, integrate_trajectories, jitter
from sfumato.core.denoiser import (
    PREDICTIONS,
    BoundDenoiser,
    Denoise,
    Denoiser,
    Prediction,
    TrajectoryDenoiser,
    make_prediction,
)
from sfumato.core.guidance import autoguidance, cfg, interval, rescale
from sfumato.core.inpainting import Replace, Resample, reconstruction_guidance, strength_time
from sfumato.core.inversion import integrate_to_data, inversion_grid, invert, slerp
from sfumato.core.likelihood import class_log_likelihood_ratio
from sfumato.core.objective import LOSS_WEIGHTS, TIME_SAMPLINGS, Objective, make_time_sampling, make_weight
from sfumato.core.rng import Noise, item_generator, item_noise, step_generator
from sfumato.core.sampler import GRIDS, SAMPLERS, Step, denoiser_evaluations, initial_noise, sample, steps, time_grid
from sfumato.core.schedule import SCHEDULES, NoiseLevel, Schedule, Segments, make_schedule

__all__ = [
    "GRIDS",
    "LOSS_WEIGHTS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "TIME_SAMPLINGS",
    "BoundDenoiser",
    "ConsistencyStep",
    "Denoise",
    "Denoiser",
    "Noise",
    "NoiseLevel",
    "Objective",
    "Prediction",
    "Replace",
    "Resample",
    "Schedule",
    "Segments",
    "Step",
    "Trajectories",
    "TrajectoryDenoiser",
    "autoguidance",
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
    "make_prediction",
    "make_schedule",
    "make_time_sampling",
    "make_weight",
    "reconstruction_guidance",
    "rescale",
    "sample",
    "slerp",
    "step_generator",
    "steps",
    "strength_time",
    "time_grid",
]
