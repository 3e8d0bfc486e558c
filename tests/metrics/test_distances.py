"""Distances against closed forms, other implementations and examples counted by hand."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from sfumato.metrics import distances
from sfumato.metrics.distances import (
    Moments,
    density_coverage,
    frechet,
    kernel_distance,
    memorisation,
    moments,
    nearest_distances,
    precision_recall,
)
from sfumato.modalities.image.metrics import psnr, ssim


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_of_a_stream_equal_those_of_the_whole():
    x = 1e4 + normal(3000, 7)  # a large mean must not cost the covariance its digits
    whole, parts = moments(x), moments(x.split(251))
    assert whole.count == parts.count == 3000
    for result in (whole, parts):
        assert torch.allclose(result.mean, x.double().mean(0), rtol=1e-12)
        assert torch.allclose(result.cov, torch.cov(x.double().T), atol=1e-9)
    with pytest.raises(ValueError, match="2 vectors"):
        moments(x[:1])


def test_frechet_of_gaussians_in_closed_form():
    eye = torch.eye(6, dtype=torch.float64)
    a, b = Moments(torch.zeros(6).double(), 4 * eye, 10), Moments(torch.full((6,), 2.0).double(), 9 * eye, 10)
    assert frechet(a, b) == pytest.approx(6 * (2**2 + (2 - 3) ** 2), rel=1e-12)


def test_frechet_of_full_covariances_equals_the_matrix_square_root():
    a, b = normal(500, 12) @ normal(12, 12, seed=1), normal(400, 12, seed=2) @ normal(12, 12, seed=3) + 1
    m, n = moments(a), moments(b)
    root = sqrtm(m.cov.numpy() @ n.cov.numpy()).real
    expected = float((m.mean - n.mean).square().sum() + (m.cov + n.cov).trace()) - 2 * np.trace(root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_ignores_rotations_and_survives_singular_covariances():
    a, b = normal(300, 10), 1.5 * normal(300, 10, seed=1) + 0.3
    rotation = torch.linalg.qr(normal(10, 10, seed=2).double())[0]
    assert frechet(a.double() @ rotation, b.double() @ rotation) == pytest.approx(frechet(a, b), rel=1e-9)
    few = normal(5, 40)
    assert frechet(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet(few, few + 1) == pytest.approx(40, rel=1e-5)


def test_kernel_distance_is_unbiased_and_detects_a_shift():
    same = [kernel_distance(normal(200, 8, seed=2 * s), normal(200, 8, seed=2 * s + 1)) for s in range(60)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3.5 * error
    assert 10 < sum(value > 0 for value in same) < 50  # a biased estimate would nearly always be above zero
    assert kernel_distance(normal(200, 8), normal(200, 8, seed=1) + 0.5) > 20 * error


def test_kernel_distance_by_hand_and_in_blocks():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    within_a, within_b = (1 * 2 + 1) ** 3, (0 + 1) ** 3
    across = np.mean([1, 2**3, 1, 3**3])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)
    x, y = normal(700, 4), normal(900, 4, seed=1)
    assert kernel_distance(x, y, block=100) == kernel_distance(x, y, block=100)
    assert kernel_distance(x, y, block=100) == pytest.approx(kernel_distance(x, y), abs=0.1)


def test_density_and_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])  # k = 1: every ball has radius 1
    fake = torch.tensor([[0.5], [1.5], [100.0]])
    # balls of 0 and 1 hold 0.5; those of 1 and 2 hold 1.5; the three on the right hold nothing
    density, coverage = density_coverage(real, fake, k=1)
    assert coverage == pytest.approx(3 / 6)
    assert density == pytest.approx(4 / 3)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    fake = torch.tensor([[0.1], [1.1], [2.1], [50.0]])  # a dropped mode and one outlier whose ball has radius 47.9
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(3 / 4)
    assert recall == pytest.approx(6 / 6)  # the outlier's ball swallows the other mode: the known weakness
    assert precision_recall(real, fake[:3], k=1) == (1.0, pytest.approx(3 / 6))


def test_samples_of_the_same_distribution_cover_it_and_collapsed_ones_do_not():
    real, same, collapsed = normal(600, 5), normal(600, 5, seed=1), 0.05 * normal(600, 5, seed=2)
    assert density_coverage(real, same)[1] > 0.9 > 0.2 > density_coverage(real, collapsed)[1]
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.1


def test_the_block_size_does_not_change_the_result(monkeypatch):
    real, fake = normal(200, 6), normal(150, 6, seed=1)
    whole = (density_coverage(real, fake), precision_recall(real, fake), nearest_distances(fake, real))
    monkeypatch.setattr(distances, "BLOCK_ELEMENTS", 700)  # three rows at once
    assert density_coverage(real, fake) == whole[0]
    assert precision_recall(real, fake) == whole[1]
    assert torch.equal(nearest_distances(fake, real), whole[2])


def test_blocks_of_distances_are_bounded():
    a, b = normal(5000, 2), normal(50_000, 2, seed=1)
    sizes = [square.numel() for _, square in distances._blocks(a, b)]
    assert sum(sizes) == 5000 * 50_000 and max(sizes) <= distances.BLOCK_ELEMENTS


def test_nearest_distances_are_exactly_zero_for_copies_and_right_otherwise():
    a, b = 100 + normal(50, 30), 100 + normal(80, 30, seed=1)
    assert torch.allclose(nearest_distances(a, b), torch.cdist(a.double(), b.double()).min(1).values.float(), rtol=1e-3)
    assert (nearest_distances(b[:20], b) == 0).all()


def test_memorisation_finds_copies_and_not_new_samples():
    train, held, fresh = normal(2000, 16), normal(500, 16, seed=1), normal(500, 16, seed=2)
    good = memorisation(fresh, train, held)
    assert good["novelty"] == pytest.approx(1, abs=0.05) and good["copies"] < 0.04
    assert good["novelty_floor"] == 1 and good["copies_floor"] == pytest.approx(0.01)
    mixed = memorisation(torch.cat([train[:100], fresh[:400]]), train, held)
    assert 0.2 <= mixed["copies"] < 0.24
    copied = memorisation(train[:500] + 1e-3 * normal(500, 16, seed=3), train, held)
    assert copied["copies"] == 1 and copied["novelty"] < 0.01
    assert memorisation(fresh, train.split(300), held) == pytest.approx(good)


def test_psnr_by_hand():
    x = torch.zeros(2, 1, 4, 4)
    assert psnr(x, x) == pytest.approx(100)
    assert psnr(x, x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)) == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_ssim_equals_an_independent_computation():
    x = normal(3, 2, 24, 30).clamp(-1, 1)
    y = (x + 0.3 * normal(3, 2, 24, 30, seed=1)).clamp(-1, 1)

    def one(u, v):
        blur = lambda w: gaussian_filter(w, 1.5, truncate=3.5)[5:-5, 5:-5]
        m_u, m_v = blur(u), blur(v)
        uu, vv, uv = blur(u * u) - m_u**2, blur(v * v) - m_v**2, blur(u * v) - m_u * m_v
        c_1, c_2 = 0.02**2, 0.06**2
        return np.mean((2 * m_u * m_v + c_1) * (2 * uv + c_2) / ((m_u**2 + m_v**2 + c_1) * (uu + vv + c_2)))

    pairs = zip(x.double().numpy().reshape(-1, 24, 30), y.double().numpy().reshape(-1, 24, 30), strict=True)
    assert ssim(x, y) == pytest.approx(np.mean([one(u, v) for u, v in pairs]), abs=1e-9)
    assert ssim(x, x) == pytest.approx(1)
    assert 0 < ssim(x[..., :8, :8], y[..., :8, :8]) < 1  # smaller than the window
