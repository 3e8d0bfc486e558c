"""Image reports: floors, copies, label accuracy, and that they repeat."""

import numpy as np
import pytest
import torch

from sfumato.errors import UserError
from sfumato.metrics import NamedExtractor
from sfumato.modalities.image.metrics import GeneratedImages, image_report, reconstruction_report

PAIRS = ["fd", "kd", "precision", "recall", "density", "coverage", "novelty", "copies"]
extractor = NamedExtractor("halves", lambda x: torch.cat([x[..., :4, :].mean(2), x[..., 4:, :].mean(2)], 1))


def pictures(n, seed, shift=0.0):
    """Noise, brighter on the left (label 0) or on the right (label 1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=generator) + shift
    side = torch.where(torch.arange(8) < 4, -0.4, 0.4)
    return GeneratedImages(x + torch.where(labels == 0, -1, 1)[:, None, None, None] * side, labels)


def sides(x):
    return torch.stack([x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def real():
    return pictures(1500, 0), pictures(600, 1)


def test_every_metric_has_its_floor_and_fresh_samples_reach_it(real):
    report = image_report(pictures(600, 2), *real, extractor, classifier=sides)
    assert report["n"] == report["n_floor"] == 600 and report["extractor"] == "halves"
    for name in [*PAIRS, "accuracy"]:
        assert isinstance(report[name], float) and isinstance(report[f"{name}_floor"], float)
    assert report["fd"] == pytest.approx(report["fd_floor"], rel=0.5)
    for name in ("precision", "recall", "coverage", "accuracy"):
        assert report[name] == pytest.approx(report[f"{name}_floor"], abs=0.1)
    assert report["novelty"] == pytest.approx(1, abs=0.05) and report["copies"] < 0.04
    assert "cas" not in report and "fd_equal" not in report


def test_worse_samples_score_worse(real):
    train, held = real
    shifted = image_report(pictures(600, 2, shift=0.2), train, held, extractor)
    assert shifted["fd"] > 5 * shifted["fd_floor"] and shifted["kd"] > 5 * abs(shifted["kd_floor"])
    one_class = image_report(pictures(1200, 2).subset(torch.arange(0, 1200, 2)), train, held, extractor)
    assert one_class["coverage"] < 0.6 * one_class["coverage_floor"]
    assert one_class["recall"] < 0.6 * one_class["recall_floor"]
    copies = image_report(train.subset(torch.arange(600)), train, held, extractor)
    assert copies["copies"] == 1 and copies["novelty"] == 0


def test_wrong_labels_score_low_and_missing_ones_are_refused(real):
    fake = pictures(400, 2)
    swapped = GeneratedImages(fake.x, 1 - fake.labels)
    assert image_report(swapped, *real, extractor, classifier=sides)["accuracy"] < 0.05
    with pytest.raises(UserError, match="labels"):
        image_report(GeneratedImages(fake.x), *real, extractor, classifier=sides)
    with pytest.raises(UserError, match="400 images but 3 labels"):
        GeneratedImages(fake.x, np.arange(3))


def test_cas_trains_on_samples_and_on_as_many_real_images(real):
    trained = []

    def train(data):
        trained.append(data)
        means = torch.stack([data.x[torch.from_numpy(data.labels) == c].mean(0) for c in (0, 1)]).flatten(1)
        return lambda x: x.flatten(1) @ means.T

    fake = pictures(400, 2)
    report = image_report(fake, *real, extractor, cas=train)
    assert [len(data) for data in trained] == [400, 400] and trained[0] is fake
    assert report["cas"] > 0.95 and report["cas_floor"] > 0.95
    noise = GeneratedImages(torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(4)), fake.labels)
    assert image_report(noise, *real, extractor, cas=train)["cas"] < report["cas_floor"]


def test_reports_repeat_with_and_without_a_cache(real, tmp_path):
    fake = pictures(900, 2)
    plain = image_report(fake, *real, extractor)
    cached = [image_report(fake, *real, extractor, cache=tmp_path) for _ in range(2)]
    assert plain == cached[0] == cached[1]
    assert plain["n_floor"] == 600 and plain["fd_equal"] > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_large_images_are_compared_as_thumbnails():
    train, held, fake = (
        GeneratedImages(torch.randn(n, 3, 40, 48, generator=torch.Generator().manual_seed(n))) for n in (30, 20, 10)
    )
    means = NamedExtractor("means", lambda x: x.mean((2, 3)))
    report = image_report(fake, train, held, means)
    assert 0.5 < report["novelty"] < 1.5
    assert image_report(train, train, held, means)["copies"] == 1


def test_reconstruction_report_of_equal_and_of_worse_images(real):
    x = real[1].x
    same = reconstruction_report(x.clamp(-1, 1), x.clamp(-1, 1), extractor)
    assert same == {
        "psnr": pytest.approx(100),
        "ssim": pytest.approx(1),
        "l1": 0,
        "rfd": pytest.approx(0, abs=1e-6),
    }
    worse = reconstruction_report(x, 0.5 * x, extractor)
    assert worse["psnr"] < 30 and worse["ssim"] < 0.95 and worse["l1"] > 0.05 and worse["rfd"] > 0.01
    assert "rfd" not in reconstruction_report(x, x)
