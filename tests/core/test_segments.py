"""Segments: a time for each part of a latent gives marginal, conditional and joint sampling."""

import pytest
import torch

from sfumato.core import SAMPLERS, Segments, make_schedule, sample, steps, time_grid
from sfumato.core.schedule import masked_mean
from tests.core.exact import TWO_MODES

DOUBLE = {"dtype": torch.float64}
FLOW = make_schedule("flow")
SEGMENTS = Segments((2, 3))
PARTS = slice(0, 2), slice(2, 5)  # positions of both segments
SHAPE = (3, 5, 4)  # (B, N, D)
SCHEDULES = ["flow", "cosine", "edm", "linear"]


def test_shape_and_positions():
    assert Segments().shape(7) == (7,) and SEGMENTS.shape(7) == (7, 2)
    assert SEGMENTS.index.tolist() == [0, 0, 1, 1, 1]
    assert SEGMENTS.positions([1]).tolist() == [False, False, True, True, True]
    assert not SEGMENTS.positions([]).any() and SEGMENTS.positions([0, 1]).all()


def test_spread_gives_every_position_the_level_of_its_segment():
    level = FLOW(torch.rand(3, 2, generator=torch.Generator().manual_seed(0), **DOUBLE))
    at_positions = SEGMENTS.spread(level)
    for values, value in zip(at_positions, level, strict=True):
        assert values.shape == (3, 5)
        for part, of_segment in zip(PARTS, value.T, strict=True):
            assert torch.equal(values[:, part], of_segment[:, None].expand_as(values[:, part]))
    assert SEGMENTS.spread(level.map(lambda value: value[:1])).t.shape == (1, 5)


def test_spread_keeps_levels_without_segments():
    for t in (torch.tensor(0.3), torch.rand(3)):
        assert SEGMENTS.spread(FLOW(t)).t.shape == t.shape
    of_tokens = FLOW(torch.rand(3, 5))
    assert Segments().spread(of_tokens) is of_tokens
    with pytest.raises(AssertionError):
        SEGMENTS.spread(of_tokens)


@pytest.mark.parametrize("width", [4, 5], ids=["narrow", "as_wide_as_long"])
def test_mean_of_each_segment(width):
    value = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    means, masked = SEGMENTS.mean(value), SEGMENTS.mean(value, mask)
    assert means.shape == masked.shape == (3, 2)
    for i in range(3):
        for s, part in enumerate(PARTS):
            assert torch.allclose(means[i, s], value[i, part].mean(), atol=1e-6)
            kept = value[i, part][mask[i, part]]
            assert torch.allclose(masked[i, s], kept.mean() if len(kept) else torch.zeros(()), atol=1e-6)
    assert torch.equal(Segments().mean(value, mask), masked_mean(value, mask))


def test_grid_holds_the_given_segments_at_the_data():
    grid = time_grid(FLOW, 4)
    times = SEGMENTS.grid(grid, [1])
    assert times.shape == (5, 1, 2) and torch.equal(times[:, 0, 0], grid) and not times[:, 0, 1].any()
    assert torch.equal(SEGMENTS.grid(grid, []), grid[:, None, None].expand(5, 1, 2))


def draws(count, seed=0):
    """`count` draws of noise for a latent, the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def run(schedule, grids, z, sampler, noises):
    """All steps along a grid (steps + 1,) for each segment."""
    times = torch.stack(grids, 1)[:, None]  # (steps + 1, 1, S)
    levels = [SEGMENTS.spread(level) for level in schedule.levels(times)]
    rest = iter(noises)
    return list(steps(TWO_MODES.denoise, levels, z, sampler, lambda: next(rest)))


def run_alone(schedule, grid, part, z, sampler, noises):
    rest = iter(noises)
    noise = lambda: next(rest)[:, part]
    return sample(TWO_MODES.denoise, schedule.levels(grid), z[:, part], sampler, noise)


@pytest.mark.parametrize("still_at", [0.0, 1.0], ids=["conditional", "marginal"])
@pytest.mark.parametrize("moving", [0, 1])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_still_segment_stays_and_the_other_moves_as_alone(sampler, name, moving, still_at):
    schedule, (z, *noises) = make_schedule(name), draws(9)
    grid = time_grid(schedule, 8)
    grids = [torch.full_like(grid, still_at)] * 2
    grids[moving] = grid
    taken = run(schedule, grids, z, sampler, noises)
    still, part = PARTS[1 - moving], PARTS[moving]
    for step in taken:
        assert step.z.isfinite().all() and step.z_hat.isfinite().all()
        assert torch.equal(step.z[:, still], z[:, still])
    alone = run_alone(schedule, grid, part, z, sampler, noises)
    assert torch.allclose(taken[-1].z[:, part], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [(1.0, 0.1), (0.7, 0.0)], ids=["above_the_data", "at_the_data"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_segments_on_different_grids_move_as_alone(sampler, name, ends):
    schedule, (z, *noises) = make_schedule(name), draws(9)
    grids = [time_grid(schedule, 8), time_grid(schedule, 8, "both_ends", *ends)]
    z = run(schedule, grids, z, sampler, noises)[-1].z, z
    for grid, part in zip(grids, PARTS, strict=True):
        assert torch.allclose(z[0][:, part], run_alone(schedule, grid, part, z[1], sampler, noises), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_segments_one_after_the_other_move_as_alone(sampler, name):
    """The second segment waits at pure noise until the first has ended, which then waits at the data."""
    schedule, (z, *noises) = make_schedule(name), draws(13)
    grid = time_grid(schedule, 6)
    first, second = torch.cat([grid, grid[-1:].expand(6)]), torch.cat([grid[:1].expand(6), grid])
    taken = run(schedule, [first, second], z, sampler, noises)
    assert all(step.z.isfinite().all() and step.z_hat.isfinite().all() for step in taken)
    for part, used in zip(PARTS, (noises, noises[5:]), strict=True):  # the first segment's last step draws no noise
        alone = run_alone(schedule, grid, part, z, sampler, used)
        assert torch.allclose(taken[-1].z[:, part], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_segment_that_pauses_goes_on(sampler):
    """A pause restarts a multistep sampler; the result stays close to that without a pause."""
    (z, *noises), grid = draws(100), time_grid(FLOW, 40)
    paused = torch.cat([grid[:20], grid[19:20].expand(3), grid[20:]])
    other = time_grid(FLOW, 43)
    end = run(FLOW, [paused, other], z, sampler, noises)[-1].z
    assert end.isfinite().all()
    if not SAMPLERS[sampler].stochastic:
        plain = run_alone(FLOW, grid, PARTS[0], z, sampler, noises)
        assert torch.allclose(end[:, PARTS[0]], plain, rtol=0, atol=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_still_segments_cost_no_evaluation(sampler):
    """The last step takes one evaluation and no noise, as without segments."""
    calls, grid, (z, *noises) = [], time_grid(FLOW, 5), draws(5)
    rest = iter(noises[:4])
    levels = [SEGMENTS.spread(level) for level in FLOW.levels(SEGMENTS.grid(grid, [0]))]
    sample(lambda z, level: calls.append(level) or z, levels, z, sampler, lambda: next(rest))
    assert len(calls) == SAMPLERS[sampler].evaluations * 4 + 1
