"""Addressed randomness: the address of a draw alone decides its value."""

import pytest
import torch

from sfumato.core import Noise, item_generator, item_noise, make_schedule, sample, step_generator, time_grid
from tests.core.exact import GAUSSIAN

SHAPE = (3, 8)


def test_noise_does_not_depend_on_the_batch():
    together = Noise(0, range(12), SHAPE)
    draws = [together(), together()]
    for items in ([0, 1, 2], [11, 4], [7]):
        part = Noise(0, items, SHAPE)
        for draw in draws:
            assert torch.equal(part(), draw[items])


TOKENS = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_noise_with_a_mask_does_not_depend_on_the_padding(width):
    """Items keep their noise if the batch is padded further, or less, or if other items are in it."""
    noise = Noise(3, range(4), (5, width), mask=TOKENS)
    draws = [noise(), noise()]
    for padding in (1, 30):
        longer = Noise(3, range(4), (5 + padding, width), mask=torch.nn.functional.pad(TOKENS, (0, padding)))
        for draw in draws:
            found = longer()
            assert torch.equal(found[:, :5], draw) and not found[:, 5:].any()
    shorter = Noise(3, [2, 0], (4, width), mask=TOKENS[[2, 0], :4])
    for draw in draws:
        assert torch.equal(shorter(), draw[[2, 0], :4])


def test_noise_with_a_mask_is_zero_where_no_token_is():
    noise = Noise(3, range(4), (5, 2), mask=TOKENS)
    first, second = noise(), noise()
    assert torch.equal((first != 0).all(-1), TOKENS) and torch.equal((first != 0).any(-1), TOKENS)
    assert not torch.equal(first[:3], second[:3])
    assert len(first[TOKENS].unique()) == first[TOKENS].numel()  # every element its own


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_mask_of_all_tokens_gives_the_noise_without_a_mask(width):
    plain, masked = Noise(3, range(4), (5, width)), Noise(3, range(4), (5, width), mask=torch.ones_like(TOKENS))
    assert torch.equal(plain(), masked()) and torch.equal(plain(), masked())


def test_samples_do_not_depend_on_the_batch():
    schedule = make_schedule("flow")

    def run(items):
        noise = Noise(5, items, SHAPE)
        return sample(GAUSSIAN.denoise, schedule.levels(time_grid(schedule, 6)), noise(), "ddpm", noise)

    assert torch.equal(run(range(6))[[5, 2]], run([5, 2]))


def test_seeds_items_and_streams_are_independent():
    rows = torch.cat(
        [item_noise(seed, range(400), (16,), stream) for seed in (0, 1, 2) for stream in ("noise", "other")]
    )
    assert len(torch.unique(rows.flatten().round(decimals=7))) > 0.99 * rows.numel()
    assert len(torch.unique(rows[:, 0])) == len(rows)
    correlation = torch.corrcoef(rows)
    assert float((correlation - torch.eye(len(rows))).abs().max()) < 0.99
    assert abs(float(rows.mean())) < 0.02 and float(rows.std()) == pytest.approx(1, abs=0.02)


def test_all_bits_of_a_seed_count():
    """Seeds with equal low 32 bits give different noise, and whole states differ, not only their first words."""
    assert not torch.equal(item_noise(7, [0], SHAPE), item_noise(7 + 2**32, [0], SHAPE))
    a, b = (item_generator(0, item).get_state().view(torch.int64)[3:627] for item in (0, 1))
    assert (a == b).sum() == 0


def test_generators_are_uniform_and_uncorrelated():
    """Setting the state by hand leaves no trend and no correlation."""
    u = torch.rand(100_000, generator=item_generator(3, 14))
    assert float((u.sort().values - torch.linspace(0, 1, 100_000)).abs().max()) < 0.006
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.015
    first = torch.cat([torch.rand(1, generator=item_generator(0, item)) for item in range(2000)])
    assert float((first.sort().values - torch.linspace(0, 1, 2000)).abs().max()) < 0.04


FIRST_WORDS = [3304989340, 2021548930]
FIRST_BITS = [868446300, 599782516]


def test_known_values():
    """The noise of a seed never changes: another value would break every seed that a user has recorded."""
    assert item_generator(0, 0).get_state().view(torch.int64)[3:5].tolist() == FIRST_WORDS
    bits = torch.randint(2**31, (2,), generator=step_generator(0, "diffusion", 1)).tolist()
    assert bits == FIRST_BITS


def test_steps_and_stages_differ():
    draw = lambda *address: torch.randn(4, generator=step_generator(*address))
    assert torch.equal(draw(0, "codec", 3), draw(0, "codec", 3))
    others = [draw(0, "codec", 4), draw(0, "diffusion", 3), draw(1, "codec", 3)]
    assert not any(torch.equal(draw(0, "codec", 3), other) for other in others)
