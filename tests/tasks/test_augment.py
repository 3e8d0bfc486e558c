"""Augmenting: a balanced set of given and made items; what is refused and why; mistakes in one line."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.data import read_images, write_images
from sfumato.errors import UserError
from sfumato.metrics import Copies
from sfumato.modality import sorter as sorters
from sfumato.model import Model
from sfumato.tasks import sorting
from sfumato.tasks.augment import augment
from sfumato.types import UNKNOWN


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and rounds that are filled in a moment."""
    for name, value in {"STEPS": 20, "SEMI_STEPS": 6}.items():
        monkeypatch.setattr(sorters, name, value)
    monkeypatch.setattr(sorting, "ROUND", 20)
    monkeypatch.setattr(sorting, "LARGEST", 40)


def seen_as(monkeypatch: pytest.MonkeyPatch, see: Callable[[Tensor], Tensor]) -> None:
    """Let the classifier see what is said."""
    monkeypatch.setattr(sorters.ImageSorter, "shown", lambda self, items: see(items))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine of each digit up to seven, four eights, and no nine."""
    data, _ = read_images("digits")
    index = np.concatenate([np.flatnonzero(data.labels == k)[:n] for k, n in enumerate([9] * 8 + [4])])
    folder = tmp_path_factory.mktemp("digits") / "few"
    return write_images(folder, data.batch(index).data, [{"label": int(data.labels[i])} for i in index])


def asked_of(monkeypatch: pytest.MonkeyPatch, make: Callable[[Tensor], Tensor] | None = None) -> list[int]:
    """Every class asked for, in turn, with a classifier that agrees; `make` says what the items look like."""
    asked: list[int] = []

    def made(self: sorting.Maker, numbers: range, labels: Tensor) -> Tensor:
        asked.extend(labels.tolist())
        items = torch.stack([torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in numbers])
        return items if make is None else make(items)

    monkeypatch.setattr(sorting.Maker, "__call__", made)
    seen_as(monkeypatch, lambda items: torch.tensor(asked[-len(items) :]))
    return asked


def test_a_balanced_set_of_given_and_made_items(
    model: Model, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = asked_of(monkeypatch)
    result = augment(model, digits, n=12, out=tmp_path / "out")
    assert Counter(row["label"] for row in result.rows) == dict.fromkeys(range(9), 12)  # of nines none was given
    assert Counter(asked) == {**dict.fromkeys(range(8), 3), 8: 8}
    assert asked[:9] == list(range(9))  # the first made ones, which the sheet shows, go through the classes
    given = read_images(digits)[0]
    back = read_images(tmp_path / "out")[0]
    assert np.array_equal(back.pixels[: len(given)], given.pixels) and len(back) == 9 * 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["source"] == "000000.png" and rows[-1]["item"] == len(asked) - 1 and "source" not in rows[-1]
    assert (tmp_path / "out-sheet.png").is_file()
    assert result.summary()["made"] == 32 and result.facts["refused"] == {"label": 0, "copy": 0, "double": 0}


def test_items_are_the_model_s_own_whatever_the_batch(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    seen_as(monkeypatch, lambda items: torch.arange(len(items)) % 9)
    whole, parts = (augment(model, digits, n=11, batch=batch, seed=3) for batch in (64, 5))
    assert torch.allclose(whole.items, parts.items, atol=1e-4) and whole.rows == parts.rows
    row = whole.rows[-1]
    label = torch.tensor([row["label"]])
    assert torch.allclose(model.decode(model.sample([row["item"]], label, seed=3))[0], whole.items[-1], atol=1e-4)


def test_what_the_classifier_sees_otherwise_is_refused_and_made_again(
    model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = asked_of(monkeypatch)
    seen_as(monkeypatch, lambda items: torch.where(items[:, 0, 0, 0] > 0, torch.tensor(asked[-len(items) :]), 9))
    result = augment(model, digits, n=12)
    assert 8 < result.facts["refused"]["label"] <= result.facts["tried"] - 32
    assert (result.items[-32:, 0, 0, 0] > 0).all() and "short" not in result.facts


def test_copies_and_doubles_are_refused(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    given = read_images(digits)[0].batch(range(1)).data
    asked_of(monkeypatch, lambda items: torch.cat([given, items[1:2], items[1:2], items[3:]])[: len(items)])
    result = augment(model, digits, n=12)
    rounds = result.facts["refused"]
    assert rounds["copy"] >= 1 and rounds["double"] >= 1 and result.facts["made"] == 32
    made = result.items[-32:].flatten(1)
    assert (torch.cdist(made, made) + 9 * torch.eye(32)).min() > 0


def test_a_class_that_cannot_be_filled_is_said(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sorting, "MOST_TRIED", 2)
    asked = asked_of(monkeypatch)
    seen_as(monkeypatch, lambda items: torch.tensor([k if k else 1 for k in asked[-len(items) :]]))
    result = augment(model, digits, n=12)
    assert result.facts["short"] == {"0": 3} and result.facts["made"] == 29


@pytest.mark.parametrize(("most", "enough"), [(50, 30), (2, 1_000)])
def test_a_class_that_is_never_seen_is_given_up_by_itself(
    model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch, most: int, enough: int
):
    """Soon, whatever the others need; they are filled."""
    for name, value in {"MOST_TRIED": most, "ENOUGH": enough, "RAREST": 20}.items():
        monkeypatch.setattr(sorting, name, value)
    asked = asked_of(monkeypatch)
    seen_as(monkeypatch, lambda items: torch.tensor([k if k != 8 else 1 for k in asked[-len(items) :]]))
    result = augment(model, digits, n=14)
    assert result.facts["short"] == {"8": 10} and result.facts["made"] == 8 * 5
    assert min(enough, most * 10) <= asked.count(8) <= min(2 * enough, most * 10)


def test_a_class_that_is_seen_now_and_then_is_not_given_up(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sorting, "ENOUGH", 30)
    monkeypatch.setattr(sorting, "RAREST", 20)
    asked, turn = asked_of(monkeypatch), iter(range(10**6))
    seen = lambda k: 1 if k == 8 and next(turn) % 15 else k
    seen_as(monkeypatch, lambda items: torch.tensor([seen(k) for k in asked[-len(items) :]]))
    result = augment(model, digits, n=10)
    assert "short" not in result.facts and asked.count(8) > 30


def test_autoguidance_may_be_left_out(model: Model, digits: Path, monkeypatch: pytest.MonkeyPatch):
    asked_of(monkeypatch)
    monkeypatch.setitem(model.card.sample, "autoguidance", 1.5)
    assert [augment(model, digits, n=10, autoguidance=w).rows[-1]["autoguidance"] for w in (None, 1)] == [1.5, 1]
    with pytest.raises(UserError, match="--autoguidance 2: this model has no weaker self"):
        augment(model, digits, n=10, autoguidance=2)


def test_a_set_that_is_large_enough_is_only_given_back(model: Model, digits: Path):
    result = augment(model, digits, n=4)
    assert result.facts["made"] == 0 and len(result.items) == 8 * 9 + 4


@pytest.mark.parametrize("apart", [False, True])
def test_images_without_a_label_teach_the_classifier_and_may_be_left_out(
    model: Model, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
):
    data, _ = read_images("digits")
    seen: list[np.ndarray] = []
    real = sorters.fit_semi
    monkeypatch.setattr(sorters, "fit_semi", lambda data, *a, **k: seen.append(data.labels) or real(data, *a, **k))
    index = np.arange(1000, 1060)
    labelled = data.batch(index).data
    labels = data.labels[index].tolist()
    if apart:
        write_images(tmp_path / "labelled", labelled[:30], [{"label": k} for k in labels[:30]])
        write_images(tmp_path / "others", labelled[30:])
        settings = {"source": tmp_path / "labelled", "unlabelled": tmp_path / "others"}
    else:
        write_images(tmp_path / "both", labelled, [{"label": k} if i < 30 else {} for i, k in enumerate(labels)])
        settings = {"source": tmp_path / "both"}
    monkeypatch.setattr(sorting, "MOST_TRIED", 0)
    result = augment(model, **settings, n=40, no_guess=True)
    assert (
        len(result.items) == 30
        and result.facts["guessed"] == 0
        and result.facts["unlabelled"] == 30
        and result.facts["tried"] == 0
    )
    monkeypatch.setattr(sorting, "MOST_TRIED", 1)
    augment(model, **settings, n=5, seed=1, no_guess=True)
    assert [(labels == UNKNOWN).sum() for labels in seen] == [30] and len(seen[0]) == 60


def with_open_ones(path: Path, other: Path | None = None) -> np.ndarray:
    """Thirty labelled digits and, there or elsewhere, thirty others; the true labels of these."""
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


@pytest.mark.parametrize("apart", [False, True])
def test_images_without_a_label_are_taken_before_any_is_made(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
):
    """Those whose class is sure, until it is full; only what is short then is made."""
    other = tmp_path / "others" if apart else None
    truth = with_open_ones(tmp_path / "some", other)
    opened = read_images(other or tmp_path / "some")[0].batch(range(0 if apart else 30, 30 if apart else 60)).data
    sure = truth % 2 == 0  # of odd ones none is

    def guessed(self: object, items: Tensor) -> Tensor:
        place = torch.cdist(items.flatten(1), opened.flatten(1)).argmin(1)
        return torch.where(torch.from_numpy(sure)[place], torch.from_numpy(truth)[place], UNKNOWN)

    monkeypatch.setattr(sorters.ImageSorter, "guessed", guessed)
    asked_of(monkeypatch)
    result = augment(model, tmp_path / "some", unlabelled=other, n=6, out=tmp_path / "out")
    assert Counter(row["label"] for row in result.rows) == dict.fromkeys(range(10), 6)
    rows = [row for row in result.rows if "guessed" in row]
    given = Counter(row["label"] for row in result.rows[:30])
    there = Counter(truth[sure].tolist())
    wanted = {k: min(there[k], 6 - given[k]) for k in range(0, 10, 2)}
    assert Counter(row["label"] for row in rows) == Counter({k: n for k, n in wanted.items() if n}) and rows
    assert result.facts["guessed"] == len(rows) and result.facts["made"] == 30 - len(rows)
    order = [("guessed" in row, "item" in row) for row in result.rows]
    assert order == sorted(order, key=[(False, False), (True, False), (False, True)].index)
    for row, item in zip(result.rows[30:], result.items[30:], strict=True):
        if "guessed" in row:  # they are the very images of these files
            place = int(row["source"].split(".")[0]) - (0 if apart else 30)
            assert torch.equal(item, opened[place]) and row["label"] == truth[place]
    back = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row.get("guessed") for row in back].count(True) == len(rows)


def test_a_guess_is_taken_only_if_it_is_sure(model: Model, tmp_path: Path):
    """Sure of nothing, the classifier gives no class; sure of everything, that which it sees."""
    with_open_ones(tmp_path / "some")
    sorter = sorters.ImageSorter(read_images(tmp_path / "some")[0], [], [str(k) for k in range(10)])
    items = sorter.given.batch(range(60)).data
    sorter.guessed(items)  # trains the classifier, as nothing has asked for it yet
    head = sorter.network.head
    head.weight.data.mul_(1e4)
    assert torch.equal(sorter.guessed(items), sorter.shown(items))
    head.weight.data.zero_()
    assert (sorter.guessed(items) == UNKNOWN).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "age"}, "--target age: is for tables"),
        ({"n": 0}, "-n must be at least 1, not 0"),
        ({"overrides": ["codec.width=3"]}, "only how the data are read"),
    ],
)
def test_wrong_settings(model: Model, digits: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        augment(model, digits, **settings)


def written(folder: Path, labels: list, shape: tuple[int, int, int] = (1, 8, 8)) -> Path:
    rows = [{} if label is None else {"label": label} for label in labels]
    return write_images(folder, torch.zeros(len(labels), *shape), rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([None, None], "has no labels"), (["3", "3"], "one class only"), (["3", "cat"], "label 'cat' is unknown")],
)
def test_a_source_without_two_classes_that_the_model_knows(model: Model, tmp_path: Path, labels: list, message: str):
    with pytest.raises(UserError, match=message):
        augment(model, written(tmp_path / "few", labels))


def test_a_model_or_a_source_of_another_kind(make_model: Callable[..., Model], model: Model, tmp_path: Path):
    two = written(tmp_path / "two", ["0", "1"])
    with pytest.raises(UserError, match="the model knows no classes"):
        augment(make_model(0), two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images here"):
        augment(model, tmp_path / "empty")
    with pytest.raises(UserError, match="its images are 8x8 L"):
        augment(model, written(tmp_path / "large", ["0", "1"], (3, 16, 16)))


def test_near_is_what_few_real_points_are_to_one_another():
    real = torch.arange(0, 100.0)[:, None] ** 1.5
    copies = Copies(lambda: real.split(30), real)
    assert copies.near == pytest.approx(1.0, rel=0.3)
    points = torch.tensor([[0.5], [1.9], [2.0], [2.1], [50.0]])
    assert copies.of_real(torch.tensor([[0.5], [-5.0]])).tolist() == [True, False]
    assert copies.of_made(points).tolist() == [False, False, True, True, False]
    assert copies.of_made(torch.tensor([[50.1], [70.0]])).tolist() == [True, False]
    doubled = torch.cat([real, real])
    exact = Copies(lambda: [doubled], doubled)
    assert exact.near == 0 and not exact.of_real(real).any()  # where doubles are usual, copies are
