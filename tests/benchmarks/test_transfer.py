"""The benchmark of transfer: styles, disjoint parts, scores."""

from types import ModuleType

import numpy as np
import pytest
import torch

from sfumato.data.conditions import LABEL, Labels
from sfumato.modalities.image.dataset import ImageDataset
from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("transfer", monkeypatch)


def strokes(count: int) -> np.ndarray:
    """Vertical strokes, three pixels wide, each with its own brightness."""
    x = np.zeros((count, 28, 28), np.uint8)
    x[:, 4:24, 13:16] = np.arange(100, 100 + count)[:, None, None]
    return x


def test_styles(transfer: ModuleType):
    x = strokes(3)
    assert (transfer.thick(x)[:, 10] > 0).sum() == 3 * 5
    outline = transfer.outlined(x)[:, 10] > 0
    assert outline.sum() == 3 * 4 and not outline[:, 14].any()
    assert (transfer.inverted(transfer.inverted(x)) == x).all() and transfer.inverted(x)[0, 0, 0] == 255
    slanted = transfer.slanted(x)[0] > 50
    middle = [np.flatnonzero(slanted[row]).mean() for row in (6, 20)]
    assert middle[0] - middle[1] == pytest.approx(7, abs=1)  # 14 rows, half a pixel each: the top leans to the right


def test_no_digit_has_two_styles(transfer: ModuleType):
    labels = Labels(np.arange(50), [str(k) for k in range(50)])
    data = ImageDataset(strokes(50)[..., None], "L", conditions={LABEL: labels})
    images, names, digits = transfer.styled(data)
    assert sorted(digits) == list(range(50)) and {name: names.count(name) for name in names} == dict.fromkeys(
        transfer.STYLES, 10
    )
    for x, name, digit in zip(images, names, digits, strict=True):
        assert (x == transfer.STYLES[name](strokes(50)[digit : digit + 1])[0]).all()


def test_scores_of_the_truth(transfer: ModuleType):
    x = torch.rand(4, 1, 28, 28) * 2 - 1
    bytes_ = transfer.pixels(x)
    assert np.abs(transfer.from_pixels(bytes_).numpy() - x.numpy()).max() <= 1 / 255 + 1e-6
    transfer.predict = lambda net, items: torch.full((len(items),), 2)
    scores = transfer.score(transfer.Classifiers(None, None), x, x, torch.tensor([2, 2, 0, 1]), "outlined")
    assert scores.label == 0.5 and scores.style == 1.0 and scores.psnr == 100.0
