"""Augmentation: a balanced set of real and generated items; rejections by reason; one-line errors."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.metrics import NearDuplicates
from sfumato.modalities.image import labeler as labelers
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import write_images
from sfumato.model import Model
from sfumato.tasks import augmentation
from sfumato.tasks.augment import augment
from sfumato.types import UNKNOWN, Items, Raw


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few training steps, and small rounds."""
    for name, value in {"LABELER_STEPS": 20, "LABELER_SEMI_STEPS": 6}.items():
        monkeypatch.setattr(labelers, name, value)
    monkeypatch.setattr(augmentation, "MIN_ROUND", 20)
    monkeypatch.setattr(augmentation, "MAX_ROUND", 40)


def predict_as(monkeypatch: pytest.MonkeyPatch, predict: Callable[[Tensor], Tensor]) -> None:
    """Replace the classifier's prediction."""
    monkeypatch.setattr(labelers.ImageLabeler, "predict", lambda self, items: predict(items.stack()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine of each digit up to seven, four eights, and no nine."""
    data, _ = read_images("digits")
    index = np.concatenate([np.flatnonzero(data.labels == k)[:n] for k, n in enumerate([9] * 8 + [4])])
    folder = tmp_path_factory.mktemp("digits") / "few"
    return write_images(folder, data.batch(index).data, [{"label": int(data.labels[i])} for i in index])


def record_requests(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor] | None = None) -> list[int]:
    """The requested classes in order, with random items that `change` may alter and a classifier that agrees."""
    requested: list[int] = []

    def generate(self: augmentation.ItemGenerator, numbers: range, labels: Tensor) -> Items:
        requested.extend(labels.tolist())
        items = torch.stack([torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in numbers])
        return Items(items if change is None else change(items))

    monkeypatch.setattr(augmentation.ItemGenerator, "__call__", generate)
    predict_as(monkeypatch, lambda items: torch.tensor(requested[-len(items) :]))
    return requested


def test_a_balanced_set_of_real_and_generated_items(
    model: Model, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    requested = record_requests(monkeypatch)
    result = augment(model, digits, n=12, out=tmp_path / "out")
    assert Counter(row["label"] for row in result.metadata) == dict.fromkeys(range(9), 12)  # there is no real nine
    assert Counter(requested) == {**dict.fromkeys(range(8), 3), 8: 8}
    assert requested[:9] == list(range(9))  # the sheet shows all classes
    real = read_images(digits)[0]
    back = read_images(tmp_path / "out")[0]
    assert np.array_equal(back.pixels[: len(real)], real.pixels) and len(back) == 9 * 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["source"] == "000000.png" and rows[-1]["item"] == len(requested) - 1 and "source" not in rows[-1]
    assert (tmp_path / "out-sheet.png").is_file()
    assert result.summary()["made"] == 32 and result.statistics["refused"] == {"label": 0, "copy": 0, "double": 0}


def test_items_are_those_of_the_model_whatever_the_batch(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    predict_as(monkeypatch, lambda items: torch.arange(len(items)) % 9)
    whole, parts = (augment(model, digits, n=11, batch=batch, seed=3) for batch in (64, 5))
    assert torch.allclose(whole.items.stack(), parts.items.stack(), atol=1e-4) and whole.metadata == parts.metadata
    row = whole.metadata[-1]
    raw = Raw({"label": torch.tensor([row["label"]])})
    assert torch.allclose(model.decode(model.sample([row["item"]], raw, seed=3))[0], whole.items[-1], atol=1e-4)


@pytest.fixture
def conditional(make_model: Callable[..., Model]) -> Model:
    """A model of digits, styles and ages, whose training items had the style and age of their digit."""
    styles = {"kind": "label", "names": ["thin", "bold"], "dim": 8}
    digits = {"kind": "label", "names": [str(k) for k in range(10)], "dim": 16}
    conditions = {"digit": digits, "style": styles, "age": {"kind": "number", "mean": 4.5, "std": 3.0, "dim": 8}}
    model = Model(replace(make_model().config, conditioner=conditions)).eval()
    digit = torch.arange(1_000) % 10
    assert model.conditioner.observed is not None
    model.conditioner.observed.learn(Raw({"digit": digit, "style": digit % 2, "age": digit / 2}), 1_000)
    return model


def test_other_conditions_of_generated_items_are_those_of_training_items(
    conditional: Model, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Raw] = []
    sample = Model.sample
    record = lambda self, items, raw, **settings: seen.append(raw) or sample(self, items, raw, **settings)
    monkeypatch.setattr(Model, "sample", record)
    predict_as(monkeypatch, lambda items: torch.arange(len(items)) % 9)
    result = augment(conditional, digits, n=11, batch=8)
    for raw in seen:
        digit = raw.values["digit"]
        assert torch.equal(raw.values["style"], digit % 2) and torch.equal(raw.values["age"], digit / 2)
    rows = result.metadata
    assert Counter(row["digit"] for row in rows) == dict.fromkeys(range(9), 11)
    assert all("label" not in row and ("style" in row) == ("age" in row) == ("item" in row) for row in rows)
    made = [(row["style"], row["age"]) for row in rows if "item" in row]
    assert made == [(["thin", "bold"][row["digit"] % 2], row["digit"] / 2) for row in rows if "item" in row]


def test_items_predicted_as_another_class_are_rejected_and_replaced(
    model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    requested = record_requests(monkeypatch)
    predict_as(monkeypatch, lambda items: torch.where(items[:, 0, 0, 0] > 0, torch.tensor(requested[-len(items) :]), 9))
    result = augment(model, digits, n=12)
    assert 8 < result.statistics["refused"]["label"] <= result.statistics["tried"] - 32
    assert (result.items.stack()[-32:, 0, 0, 0] > 0).all() and "short" not in result.statistics


def test_copies_and_duplicates_are_rejected(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    real = read_images(digits)[0].batch(range(1)).data
    record_requests(monkeypatch, lambda items: torch.cat([real, items[1:2], items[1:2], items[3:]])[: len(items)])
    result = augment(model, digits, n=12)
    rejected = result.statistics["refused"]
    assert rejected["copy"] >= 1 and rejected["double"] >= 1 and result.statistics["made"] == 32
    generated = result.items.stack()[-32:].flatten(1)
    assert (torch.cdist(generated, generated) + 9 * torch.eye(32)).min() > 0


def test_a_class_that_cannot_be_filled_is_reported(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(augmentation, "MAX_TRIES_PER_ITEM", 2)
    requested = record_requests(monkeypatch)
    predict_as(monkeypatch, lambda items: torch.tensor([k if k else 1 for k in requested[-len(items) :]]))
    result = augment(model, digits, n=12)
    assert result.statistics["short"] == {"0": 3} and result.statistics["made"] == 29


@pytest.mark.parametrize(("most", "enough"), [(50, 30), (2, 1_000)])
def test_a_class_that_is_never_accepted_is_given_up_alone(
    model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch, most: int, enough: int
):
    """Early, whatever the others need; these are filled."""
    limits = {"MAX_TRIES_PER_ITEM": most, "RATE_TRIES": enough, "MAX_TRIES_PER_SUCCESS": 20}
    for name, value in limits.items():
        monkeypatch.setattr(augmentation, name, value)
    requested = record_requests(monkeypatch)
    predict_as(monkeypatch, lambda items: torch.tensor([k if k != 8 else 1 for k in requested[-len(items) :]]))
    result = augment(model, digits, n=14)
    assert result.statistics["short"] == {"8": 10} and result.statistics["made"] == 8 * 5
    assert min(enough, most * 10) <= requested.count(8) <= min(2 * enough, most * 10)


def test_a_class_that_is_sometimes_accepted_is_not_given_up(
    model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(augmentation, "RATE_TRIES", 30)
    monkeypatch.setattr(augmentation, "MAX_TRIES_PER_SUCCESS", 20)
    requested, counter = record_requests(monkeypatch), iter(range(10**6))
    predict = lambda k: 1 if k == 8 and next(counter) % 15 else k
    predict_as(monkeypatch, lambda items: torch.tensor([predict(k) for k in requested[-len(items) :]]))
    result = augment(model, digits, n=10)
    assert "short" not in result.statistics and requested.count(8) > 30


def test_autoguidance_may_be_disabled(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    record_requests(monkeypatch)
    monkeypatch.setitem(model.config.sample, "autoguidance", 1.5)
    assert [augment(model, digits, n=10, autoguidance=w).metadata[-1]["autoguidance"] for w in (None, 1)] == [1.5, 1]
    with pytest.raises(UserError, match="--autoguidance 2: this model was trained without a guide"):
        augment(model, digits, n=10, autoguidance=2)


def test_a_set_that_is_large_enough_is_returned_unchanged(model: Model, digits: Path):
    result = augment(model, digits, n=4)
    assert result.statistics["made"] == 0 and len(result.items) == 8 * 9 + 4


@pytest.mark.parametrize("separate", [False, True])
def test_unlabelled_images_train_the_classifier_and_may_be_left_out(
    model: Model, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool
):
    data, _ = read_images("digits")
    seen: list[np.ndarray] = []
    fit = labelers.fit_semi_supervised
    record = lambda data, *a, **k: seen.append(data.labels) or fit(data, *a, **k)
    monkeypatch.setattr(labelers, "fit_semi_supervised", record)
    index = np.arange(1000, 1060)
    items = data.batch(index).data
    labels = data.labels[index].tolist()
    if separate:
        write_images(tmp_path / "labelled", items[:30], [{"label": k} for k in labels[:30]])
        write_images(tmp_path / "others", items[30:])
        settings = {"source": tmp_path / "labelled", "unlabelled": tmp_path / "others"}
    else:
        write_images(tmp_path / "both", items, [{"label": k} if i < 30 else {} for i, k in enumerate(labels)])
        settings = {"source": tmp_path / "both"}
    monkeypatch.setattr(augmentation, "MAX_TRIES_PER_ITEM", 0)
    result = augment(model, **settings, n=40, no_pseudo_labels=True)
    assert (
        len(result.items) == 30
        and result.statistics["guessed"] == 0
        and result.statistics["unlabelled"] == 30
        and result.statistics["tried"] == 0
    )
    monkeypatch.setattr(augmentation, "MAX_TRIES_PER_ITEM", 1)
    augment(model, **settings, n=5, seed=1, no_pseudo_labels=True)
    assert [(labels == UNKNOWN).sum() for labels in seen] == [30] and len(seen[0]) == 60


def write_partly_labelled(path: Path, other: Path | None = None) -> np.ndarray:
    """Thirty labelled and thirty unlabelled digits, these in `other` if given; returns their true labels."""
    data, _ = read_images("digits")
    index = np.arange(1000, 1060)
    items, labels = data.batch(index).data, data.labels[index]
    rows = [{"label": int(k)} if i < 30 else {} for i, k in enumerate(labels)]
    if other is None:
        write_images(path, items, rows)
    else:
        write_images(path, items[:30], rows[:30])
        write_images(other, items[30:])
    return labels[30:]


@pytest.mark.parametrize("separate", [False, True])
def test_pseudo_labelled_images_come_before_generated_ones(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool
):
    """Those with a confident prediction, until their class is full; only what is missing then is generated."""
    other = tmp_path / "others" if separate else None
    truth = write_partly_labelled(tmp_path / "partly", other)
    first = 0 if separate else 30
    unlabelled = read_images(other or tmp_path / "partly")[0].batch(range(first, first + 30)).data
    confident = truth % 2 == 0

    def pseudo_label(self: object, items: Items) -> Tensor:
        index = torch.cdist(items.stack().flatten(1), unlabelled.flatten(1)).argmin(1)
        return torch.where(torch.from_numpy(confident)[index], torch.from_numpy(truth)[index], UNKNOWN)

    monkeypatch.setattr(labelers.ImageLabeler, "pseudo_label", pseudo_label)
    record_requests(monkeypatch)
    result = augment(model, tmp_path / "partly", unlabelled=other, n=6, out=tmp_path / "out")
    assert Counter(row["label"] for row in result.metadata) == dict.fromkeys(range(10), 6)
    rows = [row for row in result.metadata if "guessed" in row]
    labelled = Counter(row["label"] for row in result.metadata[:30])
    available = Counter(truth[confident].tolist())
    expected = {k: min(available[k], 6 - labelled[k]) for k in range(0, 10, 2)}
    assert Counter(row["label"] for row in rows) == Counter({k: n for k, n in expected.items() if n}) and rows
    assert result.statistics["guessed"] == len(rows) and result.statistics["made"] == 30 - len(rows)
    order = [("guessed" in row, "item" in row) for row in result.metadata]
    assert order == sorted(order, key=[(False, False), (True, False), (False, True)].index)
    for row, item in zip(result.metadata[30:], result.items[30:], strict=True):
        if "guessed" in row:  # the image of that file
            i = int(row["source"].split(".")[0]) - first
            assert torch.equal(item, unlabelled[i]) and row["label"] == truth[i]
    back = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row.get("guessed") for row in back].count(True) == len(rows)


def test_only_confident_predictions_are_pseudo_labels(model: Model, tmp_path: Path):
    """Without confidence there is no pseudo-label; with full confidence it is the prediction."""
    write_partly_labelled(tmp_path / "partly")
    labeler = labelers.ImageLabeler(read_images(tmp_path / "partly")[0], [], [str(k) for k in range(10)])
    items = Items(labeler.given.batch(range(60)).data)
    labeler.pseudo_label(items)  # the first call trains the classifier
    head = labeler.classifier.head
    head.weight.data.mul_(1e4)
    assert torch.equal(labeler.pseudo_label(items), labeler.predict(items))
    head.weight.data.zero_()
    assert (labeler.pseudo_label(items) == UNKNOWN).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "age"}, "--target age applies to tables only"),
        ({"n": 0}, "-n must be at least 1, not 0"),
        ({"overrides": ["codec.width=3"]}, "only data settings can be set here"),
    ],
)
def test_wrong_settings(model: Model, digits: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        augment(model, digits, **settings)


def write_labelled(folder: Path, labels: list, shape: tuple[int, int, int] = (1, 8, 8)) -> Path:
    rows = [{} if label is None else {"label": label} for label in labels]
    return write_images(folder, torch.zeros(len(labels), *shape), rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([None, None], "has no labels"), (["3", "3"], "one class only"), (["3", "cat"], "label 'cat' is unknown")],
)
def test_a_source_without_two_classes_that_the_model_knows(model: Model, tmp_path: Path, labels: list, message: str):
    with pytest.raises(UserError, match=message):
        augment(model, write_labelled(tmp_path / "few", labels))


def test_models_and_sources_that_do_not_fit(make_model: Callable[..., Model], model: Model, tmp_path: Path):
    two = write_labelled(tmp_path / "two", ["0", "1"])
    with pytest.raises(UserError, match="the model knows no classes"):
        augment(make_model(0), two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images here"):
        augment(model, tmp_path / "empty")
    with pytest.raises(UserError, match="its images are 8x8 L"):
        augment(model, write_labelled(tmp_path / "large", ["0", "1"], (3, 16, 16)))


def test_the_duplicate_threshold_is_a_quantile_of_real_distances():
    real = torch.arange(0, 100.0)[:, None] ** 1.5
    duplicates = NearDuplicates(lambda: real.split(30), real)
    assert duplicates.threshold == pytest.approx(1.0, rel=0.3)
    points = torch.tensor([[0.5], [1.9], [2.0], [2.1], [50.0]])
    assert duplicates.of_real(torch.tensor([[0.5], [-5.0]])).tolist() == [True, False]
    assert duplicates.filter_generated(points).tolist() == [False, False, True, True, False]
    assert duplicates.filter_generated(torch.tensor([[50.1], [70.0]])).tolist() == [True, False]
    doubled = torch.cat([real, real])
    exact = NearDuplicates(lambda: [doubled], doubled)
    assert exact.threshold == 0 and not exact.of_real(real).any()  # real duplicates are common
