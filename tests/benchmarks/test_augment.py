"""The benchmark of augmentation: label sampling, classical augmentation, training, records."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.modalities.image.read import read_images
from sfumato.types import UNKNOWN
from tests.benchmarks.loading import load_benchmark


@pytest.fixture
def augment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("augment", monkeypatch)


@pytest.mark.parametrize("labels", [3, 0])
def test_each_class_keeps_the_given_number_of_labels(
    augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: int
):
    data, _ = read_images("digits")
    few = augment.draw_labels(data, labels, seed=1)
    counts = np.bincount(few.labels[few.labels >= 0], minlength=10)
    assert (counts == (labels or np.bincount(data.labels, minlength=10))).all()
    assert (few.labels[few.labels >= 0] == data.labels[few.labels >= 0]).all()
    monkeypatch.setattr(augment, "HELD_OUT", 200)
    augment.write_source(few, tmp_path / "x.npz", 1)
    train, held = read_images(tmp_path / "x.npz")
    assert (len(train), len(held)) == (len(data) - 200, 200)
    if labels:  # no labelled image is held out
        assert (held.labels == UNKNOWN).all() and len(augment.labelled_part(train)) == 10 * labels
    position = {image.tobytes(): i for i, image in enumerate(data.pixels)}
    for part in (train, held):
        assert (part.labels == few.labels[[position[image.tobytes()] for image in part.pixels]]).all()


def test_classical_augmentation_mirrors_and_cuts_out(augment: ModuleType):
    x = torch.rand(50, 1, 8, 8) + 1.0
    g = torch.Generator().manual_seed(0)
    assert torch.equal(augment.augment_batch(x, augment.Augmentation(), g), x)
    mirrored = augment.augment_batch(x, augment.Augmentation(mirror=True), g)
    same = (mirrored == x).flatten(1).all(1)
    assert torch.equal(mirrored[~same], x[~same].flip(-1)) and 10 < int(same.sum()) < 40
    cut = (augment.augment_batch(x, augment.Augmentation(cut=4), g) == 0).flatten(1).sum(1)
    assert (cut > 0).all() and (cut <= 25).all() and len(cut.unique()) > 1  # at borders the square is clipped


def test_a_network_learns_from_labelled_and_other_images(augment: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Two thirds of the digits suffice to classify the rest; added images with wrong labels spoil it."""
    data, _ = read_images("digits")
    order = np.random.default_rng(0).permutation(len(data))
    train, test = data.subset(order[:1200]), data.subset(order[1200:])
    options = augment.Augmentation(steps=60)
    good = augment.accuracy(augment.train(train, None, 10, options, 0), test)
    wrong = train.relabel((train.labels + 1) % 10, list(train.label_names), [])
    spoilt = augment.accuracy(
        augment.train(train.subset(range(30)), augment.ConcatDataset([wrong]), 10, options, 0), test
    )
    assert good > 0.9 and spoilt < 0.3
    monkeypatch.setattr(augment, "FULL_WEIGHT", 20)  # far more labelled images than that: they outweigh the wrong ones
    kept = augment.accuracy(augment.train(train, augment.ConcatDataset([wrong]), 10, options, 0), test)
    assert kept > 0.9 > spoilt


def test_records_are_reused_for_equal_requests(
    augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[tuple[int, int]] = []

    def measure_accuracy(labels: int, seed: int, method: str, options: Any) -> dict[str, Any]:
        if method == "augment":
            seen.append((labels, seed))
            report = {"guessed": 50 + seed, "made": 7 * seed}
            return {"accuracy": 0.6 + 0.03 * seed, "fit": 60.0, "seconds": 9.0, "report": report}
        return {"accuracy": 0.5 + 0.01 * seed}

    monkeypatch.setattr(augment, "measure_accuracy", measure_accuracy)
    argv = ["--data", "digits", "--labels", "20,all", "--seeds", "0,1", "--out", str(tmp_path)]
    assert augment.main(argv) == augment.main(argv) == 0
    assert seen == [(20, 0), (20, 1), (0, 0), (0, 1)]  # the second call runs nothing
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| digits | 20 | 2 | 50.5 ± 0.7 |")
    assert lines[2].endswith("| 0.0 ± 0.0 | 11.0 ± 1.4 | 60 | 9 | 50 | 4 |")
    assert augment.main([*argv, "--budget", "1m"]) == 0 and len(seen) == 8
    assert augment.main([*argv, "--budget", "2m", "--methods", "real,classical"]) == 0 and len(seen) == 8
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| digits | all | 2 | 50.5 ± 0.7 | 50.5 ± 0.7 | - | - | - | - | - | - | - | - | - | - |"


def test_each_method_trains_on_its_own_images(augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only `pseudo`, `made` and `augment` add images to the labelled ones, each different ones."""
    seen: list[Any] = []
    monkeypatch.setattr(augment, "tune", lambda *_: augment.Augmentation(shift=1))
    monkeypatch.setattr(augment, "teacher", lambda part: "the teacher")
    monkeypatch.setattr(augment, "predict_all", lambda net, data: np.full(len(data), 7))
    monkeypatch.setattr(augment, "accuracy", lambda net, data: 0.5)
    monkeypatch.setattr(augment, "train", lambda *args: seen.append(args))
    monkeypatch.setattr(
        augment, "added_images", lambda source, run, method, *_: (read_images("digits")[0], {"of": method})
    )
    with_test = lambda path: read_images(path) if path != "digits" else (read_images(path)[0],) * 2
    monkeypatch.setattr(augment, "read_images", with_test)
    options = augment.read_options(["--data", "digits", "--out", str(tmp_path)])
    records = {method: augment.measure_accuracy(3, 0, method, options) for method in options.methods}
    real, classical, pseudo, made, both = seen
    assert [len(args[0]) for args in seen] == [30] * 5
    assert [args[1] is None for args in seen] == [True, True, False, False, False]
    assert (pseudo[1].labels == 7).all() and len(made[1]) == len(both[1]) == len(read_images("digits")[0])
    assert real[3].shift == 0 and classical[3].shift == both[3].shift == 1
    assert (
        records["made"]["of"] == "made"
        and records["augment"]["of"] == "augment"
        and records["teacher"]["accuracy"] == 0.5
    )
