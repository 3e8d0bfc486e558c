"""A run on images with several conditions: the model, its guide, resume, few-step model, and requests for new items."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.conditioners import Conditioner
from sfumato.config import Settings, read_settings
from sfumato.data.conditions import Numbers
from sfumato.modalities import find_modality
from sfumato.model import Model, load
from sfumato.sampling import new_conditions, random_conditions
from sfumato.training import stages
from sfumato.training.build import conditions_config
from sfumato.training.guidance_search import generated_features
from sfumato.training.trainer import Trainer
from sfumato.types import UNKNOWN, Raw
from tests.training.common import (
    PLAIN,
    Killed,
    assert_same_run,
    at_step,
    pictures,
    record,
    reported_every_step,
    rows,
    same_bits,
    small_fit,
    weights,
)

COLUMNS = ("digit", "style", "age")
SETTINGS = (*PLAIN, "sample.autoguidance=2", "train.early_stopping=true", "train.denoiser.batch=32")
Known = tuple[str | None, str | None, float | None]


def known(i: int) -> Known:
    """The conditions of image i: digits 0 and 2 have one style each, and the age tells the digit; some are unknown."""
    style = {0: "plain", 1: ("bold", "plain")[i // 3 % 2], 2: "thin"}[i % 3]
    return str(i % 3), None if i % 8 == 5 else style, None if i % 10 == 7 else 10 * (i % 3) + i / 100


def write_images(root: Path, conditions: Callable[[int], Known], count: int = 64) -> Path:
    """Images of 8 x 8 with a metadata.csv; unknown values are blank."""
    root.mkdir()
    x, _ = pictures(count, (1, 8, 8))
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file_name", *COLUMNS))
        for i, image in enumerate(x[..., 0]):
            Image.fromarray(image).save(root / f"{i:02d}.png")
            table.writerow((f"{i:02d}.png", *conditions(i)))
    return root


def fitted(source: Path, out: Path, resume: bool = False) -> Model:
    return small_fit(source, out, *SETTINGS, label_column=",".join(COLUMNS), resume=resume)


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("portraits") / "in", known)


@pytest.fixture(scope="module", autouse=True)
def early_guide() -> Iterator[None]:
    """Ten steps are enough for a guide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "MIN_GUIDE_STEP", 1)
        yield


@pytest.fixture(scope="module")
def run(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("run")
    fitted(portraits, folder)
    return folder


def rows_of(conditioner: Conditioner, raw: Raw) -> list[Known]:
    """What is known of each item, as in `known`."""
    columns: list[list[object]] = []
    for name in COLUMNS:
        values = raw.values[name]
        assert isinstance(values, torch.Tensor)
        if name == "age":
            columns.append([None if np.isnan(v) else round(v, 4) for v in values.tolist()])
        else:
            names = conditioner.labels[name].names
            columns.append([None if k == UNKNOWN else names[k] for k in values.tolist()])
    return list(zip(*columns, strict=True))  # type: ignore[arg-type]


def metadata_row(row: dict[str, Any]) -> Known:
    """The conditions of a generated item, as in `known`."""
    return str(row["digit"]), row.get("style"), row.get("age")


def test_the_model_has_all_conditions(run: Path):
    config = json.loads((run / "conditioner" / "config.json").read_text())
    assert list(config) == list(COLUMNS)
    assert config["digit"] == {"kind": "label", "names": ["0", "1", "2"], "dropout": 0.1}
    assert config["style"] == {"kind": "label", "names": ["bold", "plain", "thin"], "dropout": 0.1}
    model = load(run, "cpu")
    observed = model.conditioner.observed
    assert observed is not None
    ages = observed.numbers[torch.isfinite(observed.numbers)].unique().double()
    assert config["age"].keys() == {"kind", "mean", "std", "dropout"} and config["age"]["kind"] == "number"
    assert config["age"]["mean"] == pytest.approx(float(ages.mean()), abs=1e-5)
    assert config["age"]["std"] == pytest.approx(float(ages.std(correction=0)), abs=1e-5)
    assert "label_names" not in json.loads((run / "model.json").read_text())
    assert model.config.label_names == ["0", "1", "2"] and model.conditioner.primary_label == "digit"
    assert record(run)["plan"]["data"]["label_column"] == list(COLUMNS)


def test_previews_are_written(run: Path):
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert any("samples" in name for name in names) and any("reconstructions" in name for name in names), names


def test_the_held_out_loss_is_measured(run: Path):
    assert [row["step"] for row in rows(run) if "held_out" in row] == [10]


def test_conditions_of_training_items_are_stored(run: Path, portraits: Path):
    conditioner = load(run, "cpu").conditioner
    observed = conditioner.observed
    assert observed is not None
    raw = Raw({"digit": observed.labels[:, 0], "style": observed.labels[:, 1], "age": observed.numbers[:, 0]})
    settings = read_settings(record(run)["plan"]).data
    train, _ = find_modality("image").read_split(str(portraits), settings)
    training = Raw({name: values.raw(range(len(train))) for name, values in train.conditions.items()})
    assert 0 < len(train) < 64 and set(rows_of(conditioner, raw)) == set(rows_of(conditioner, training))


@pytest.mark.parametrize("digit", ["0", "1", "2"])
def test_a_request_is_completed_by_training_items_of_its_label(run: Path, digit: str):
    model, present = load(run, "cpu"), {known(i) for i in range(64) if i % 3 == int(digit)}
    drawn = set(rows_of(model.conditioner, new_conditions(model.conditioner, range(200), 0, {"digit": int(digit)})))
    assert drawn <= present and len(drawn) > 10
    items = sfumato.generate(run, n=20, label=f"digit={digit}")
    assert {row["digit"] for row in items.metadata} == {int(digit)}
    assert {metadata_row(row) for row in items.metadata} <= present


def test_a_request_without_a_match_keeps_its_values(run: Path):
    """No training image of digit 0 is bold."""
    new = sfumato.generate(run, n=10, label=["digit=0", "style=bold", "age=3.5"]).metadata
    assert {(row["digit"], row["style"], row["age"]) for row in new} == {(0, "bold", 3.5)}


def test_without_a_request_the_classes_are_balanced(run: Path):
    new = sfumato.generate(run, n=30).metadata
    present = {known(i) for i in range(64)}
    assert sorted(row["digit"] for row in new) == [0] * 10 + [1] * 10 + [2] * 10
    assert {metadata_row(row) for row in new} <= present


def test_every_condition_and_the_guide_change_the_samples(run: Path):
    model = load(run, "cpu")
    assert model.guide is not None and model.config.guide == 2
    assert model.guide.conditioner.observed is not None and model.conditioner.observed is not None
    for name, buffer in model.conditioner.observed.named_buffers():
        assert same_bits(model.guide.conditioner.observed.get_buffer(name), buffer)
    base = Raw({"digit": torch.tensor([1]), "style": torch.tensor([0]), "age": torch.tensor([10.1])})
    other = {"digit": torch.tensor([2]), "style": torch.tensor([1]), "age": torch.tensor([25.0])}
    requests = (base, Raw(), *(base.with_value(name, value) for name, value in other.items()))
    samples = [model.sample([0], raw).z for raw in requests]
    samples.append(model.sample([0], base, sampling=model.choose_sampling(None, None, None)).z)  # without autoguidance
    assert all(not torch.equal(a, b) for i, a in enumerate(samples) for b in samples[:i])


def test_the_guidance_search_samples_conditions_of_training_items(run: Path, monkeypatch: pytest.MonkeyPatch):
    model, seen, sample = load(run, "cpu"), list[Raw](), Model.sample
    monkeypatch.setattr(
        Model, "sample", lambda self, items, raw, **k: (seen.append(raw), sample(self, items, raw, **k))[1]
    )
    network: Any = SimpleNamespace(features=lambda x: x.flatten(1))
    search: Any = SimpleNamespace(
        train=SimpleNamespace(shape=(1, 8, 8)), settings=SimpleNamespace(seed=0), device="cpu"
    )
    labels = torch.arange(30) % 3
    assert generated_features(search, model, network, labels, 1.5).shape == (30, 64)
    (raw,) = seen
    assert set(rows_of(model.conditioner, raw)) <= {known(i) for i in range(64)}
    assert isinstance(raw.values["digit"], torch.Tensor) and torch.equal(raw.values["digit"], labels)


def test_a_killed_run_is_continued_exactly(portraits: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "run", reported_every_step())
    for i, (stage, step) in enumerate((("codec", 6), ("denoiser", 1), ("denoiser", 7))):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            at_step(stage, step)(patch)
            fitted(portraits, tmp_path, resume=i > 0)
    fitted(portraits, tmp_path, resume=True)
    assert_same_run(tmp_path, run)


def test_a_few_step_model_has_the_same_conditions(run: Path, tmp_path: Path):
    student = sfumato.distill(run, out=tmp_path / "student", steps=4, device="cpu")
    assert student.config.conditioner == load(run, "cpu").config.conditioner
    a, b = weights(run), weights(tmp_path / "student")
    observed = [name for name in a if "observed" in name]
    assert len(observed) == 4  # those of the guide, too
    assert all(same_bits(a[name], b[name]) for name in observed if name in b)
    new = sfumato.generate(tmp_path / "student", n=6, label="style=thin").metadata
    assert {(row["digit"], row["style"], row["sampler"]) for row in new} == {(2, "thin", "jump")}
    assert sfumato.generate(student, n=3).items.stack().shape == (3, 1, 8, 8)
    assert any((tmp_path / "student" / "samples").iterdir())


def test_trajectories_have_the_conditions_of_training_items(run: Path):
    """Apart from those that are dropped, some together and some alone."""
    conditioner = load(run, "cpu").conditioner
    drawn = rows_of(conditioner, random_conditions(conditioner, 500, torch.Generator().manual_seed(0)))
    present = {known(i) for i in range(64)}
    matches = lambda row: any(all(a is None or a == b for a, b in zip(row, other, strict=True)) for other in present)
    assert all(map(matches, drawn))
    assert (None, None, None) in drawn and {row[0] for row in drawn} == {None, "0", "1", "2"}
    assert any(row[0] is None and row[2] is not None for row in drawn)


def test_a_number_that_no_training_item_has(tmp_path: Path):
    """Then it is no condition, for it has neither mean nor standard deviation."""
    source, modality = write_images(tmp_path / "in", lambda i: (str(i % 3), "plain", i)), find_modality("image")
    train, _ = modality.read_split(str(source), Settings().data.model_copy(update={"label_column": COLUMNS}))
    ages = train.conditions["age"]
    assert isinstance(ages, Numbers)
    train.conditions = {**train.conditions, "age": Numbers(np.full_like(ages.values, np.nan))}
    assert conditions_config(train, modality, 0.1).keys() == {"digit"}
