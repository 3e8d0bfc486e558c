"""The benchmark of made images: labels left open, classical augmentation, and that it keeps records."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.data import read_images
from sfumato.types import UNKNOWN
from tests.loading import load_benchmark


@pytest.fixture
def augment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("augment", monkeypatch)


@pytest.mark.parametrize("labels", [3, 0])
def test_so_many_labels_of_each_class_are_left(
    augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: int
):
    data, _ = read_images("digits")
    few = augment.drawn(data, labels, seed=1)
    counts = np.bincount(few.labels[few.labels >= 0], minlength=10)
    assert (counts == (labels or np.bincount(data.labels, minlength=10))).all()
    assert (few.labels[few.labels >= 0] == data.labels[few.labels >= 0]).all()
    monkeypatch.setattr(augment, "HELD", 200)
    augment.write_source(few, tmp_path / "x.npz", 1)
    train, held = read_images(tmp_path / "x.npz")
    assert (len(train), len(held)) == (len(data) - 200, 200)
    if labels:  # none of the labelled ones is held out
        assert (held.labels == UNKNOWN).all() and len(augment.labelled(train)) == 10 * labels
    place = {image.tobytes(): i for i, image in enumerate(data.pixels)}
    for part in (train, held):
        assert (part.labels == few.labels[[place[image.tobytes()] for image in part.pixels]]).all()


def test_classical_augmentation_does_what_it_says(augment: ModuleType):
    x = torch.rand(50, 1, 8, 8) + 1.0
    g = torch.Generator().manual_seed(0)
    assert torch.equal(augment.moved_about(x, augment.Moves(), g), x)
    mirrored = augment.moved_about(x, augment.Moves(mirror=True), g)
    same = (mirrored == x).flatten(1).all(1)
    assert torch.equal(mirrored[~same], x[~same].flip(-1)) and 10 < int(same.sum()) < 40
    cut = (augment.moved_about(x, augment.Moves(cut=4), g) == 0).flatten(1).sum(1)
    assert (cut > 0).all() and (cut <= 25).all() and len(cut.unique()) > 1  # at borders less is left of the square


def test_a_network_learns_from_labelled_and_other_images(augment: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Of the digits two thirds teach what the others are; more images with wrong labels spoil it."""
    data, _ = read_images("digits")
    order = np.random.default_rng(0).permutation(len(data))
    train, test = data.subset(order[:1200]), data.subset(order[1200:])
    how = augment.Moves(steps=60)
    good = augment.accuracy(augment.train(train, None, 10, how, 0), test)
    wrong = augment.replace(train, labels=(train.labels + 1) % 10)
    spoilt = augment.accuracy(augment.train(train.subset(range(30)), augment.Joined([wrong]), 10, how, 0), test)
    assert good > 0.9 and spoilt < 0.3
    monkeypatch.setattr(augment, "ENOUGH", 20)  # labelled images that are many more than that are listened to
    kept = augment.accuracy(augment.train(train, augment.Joined([wrong]), 10, how, 0), test)
    assert kept > 0.9 > spoilt


def test_records_are_kept_by_what_was_asked(
    augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[tuple[int, int]] = []

    def measured(labels: int, seed: int, way: str, options: Any) -> dict[str, Any]:
        if way == "augment":
            seen.append((labels, seed))
            report = {"guessed": 50 + seed, "made": 7 * seed}
            return {"accuracy": 0.6 + 0.03 * seed, "fit": 60.0, "seconds": 9.0, "report": report}
        return {"accuracy": 0.5 + 0.01 * seed}

    monkeypatch.setattr(augment, "measured", measured)
    words = ["--data", "digits", "--labels", "20,all", "--seeds", "0,1", "--out", str(tmp_path)]
    assert augment.main(words) == augment.main(words) == 0
    assert seen == [(20, 0), (20, 1), (0, 0), (0, 1)]  # the second time nothing is done
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| digits | 20 | 2 | 50.5 ± 0.7 |")
    assert lines[2].endswith("| 0.0 ± 0.0 | 11.0 ± 1.4 | 60 | 9 | 50 | 4 |")
    assert augment.main([*words, "--budget", "1m"]) == 0 and len(seen) == 8
    assert augment.main([*words, "--budget", "2m", "--ways", "real,classical"]) == 0 and len(seen) == 8
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| digits | all | 2 | 50.5 ± 0.7 | 50.5 ± 0.7 | - | - | - | - | - | - | - | - | - | - |"


def test_each_way_learns_from_what_it_says(augment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only `pseudo`, `made` and `augment` get more than the labelled images, each something else."""
    seen: list[Any] = []
    monkeypatch.setattr(augment, "tuned", lambda *_: augment.Moves(shift=1))
    monkeypatch.setattr(augment, "teacher", lambda part: "the teacher")
    monkeypatch.setattr(augment, "predict_all", lambda net, data: np.full(len(data), 7))
    monkeypatch.setattr(augment, "accuracy", lambda net, data: 0.5)
    monkeypatch.setattr(augment, "train", lambda *told: seen.append(told))
    monkeypatch.setattr(augment, "added", lambda source, run, way, *_: (read_images("digits")[0], {"of": way}))
    tested = lambda place: read_images(place) if place != "digits" else (read_images(place)[0],) * 2
    monkeypatch.setattr(augment, "read_images", tested)
    options = augment.read_options(["--data", "digits", "--out", str(tmp_path)])
    facts = {way: augment.measured(3, 0, way, options) for way in options.ways}
    real, classical, pseudo, made, both = seen
    assert [len(told[0]) for told in seen] == [30] * 5
    assert [told[1] is None for told in seen] == [True, True, False, False, False]
    assert (pseudo[1].numbers == 7).all() and len(made[1]) == len(both[1]) == len(read_images("digits")[0])
    assert real[3].shift == 0 and classical[3].shift == both[3].shift == 1
    assert facts["made"]["of"] == "made" and facts["augment"]["of"] == "augment" and facts["teacher"]["accuracy"] == 0.5
