"""A table through every task: fit, generate, reconstruct, edit, augment, evaluate, info."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.modalities.table.columns import Column
from sfumato.modalities.table.labeler import TableLabeler, fit_plausibility
from sfumato.modalities.table.read import read_table
from sfumato.model import Model, load
from sfumato.tasks.augment import augment
from sfumato.tasks.edit import edit
from sfumato.tasks.evaluate import evaluate
from sfumato.tasks.generate import generate
from sfumato.tasks.info import info
from sfumato.tasks.inpaint import _FixedValues, _Repaint
from sfumato.tasks.interpolate import interpolate
from sfumato.tasks.reconstruct import reconstruct
from sfumato.types import Items, Raw
from tests.training.common import assert_same_run, small_fit

HEADER = ["name", "height", "kind", "visits", "since", "country", "married"]
TINY = ("denoiser.width=32", "denoiser.depth=1", "train.denoiser.batch=16", "sample.steps=3")


def people(count: int = 240, seed: int = 0) -> list[list[str]]:
    """Rows with an id, numbers with missing values, categories, dates, a constant and a yes or no."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        kind = rng.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1])
        height = "" if rng.random() < 0.1 else f"{150 + 30 * (kind == 'b') + rng.normal(0, 5):.1f}"
        day = f"2021-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}"
        rows.append([f"p{i}", height, kind, str(int(rng.exponential(3))), day, "FR", str(rng.choice(["yes", "no"]))])
    return rows


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "people.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *people()])
    return path


@pytest.fixture(scope="session")
def table_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "people"
    small_fit(table, run, *TINY)
    return run


def cells(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_generated_rows_have_the_columns_types_and_missing_values_of_the_original(
    table_run: Path, table: Path, tmp_path: Path
):
    result = generate(table_run, n=60, out=tmp_path / "samples.csv", sheet=tmp_path / "samples.png")
    header, *rows = cells(tmp_path / "samples.csv")
    assert header == HEADER and len(rows) == 60 and result.items.stack().shape == (60, 5)
    column = lambda name: [row[HEADER.index(name)] for row in rows]
    assert len(set(column("name"))) == 60 and set(column("country")) == {"FR"}
    assert set(column("kind")) <= {"a", "b", "c"} and set(column("married")) <= {"yes", "no"}
    assert all(text.isdecimal() for text in column("visits"))
    assert all(text == "" or len(text.partition(".")[2]) <= 1 for text in column("height"))
    height = next(c for c in read_table(table)[0].columns if c.name == "height")
    low, high = height.low, height.high
    assert all(low <= float(text) <= high for text in column("height") if text)
    assert all(text.startswith("2021-") for text in column("since"))
    with Image.open(tmp_path / "samples.png") as sheet:
        assert min(sheet.size) > 100


def test_notes_on_the_columns_are_logged_before_training(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", "sfumato")
    small_fit(table, tmp_path / "run", *TINY)
    messages = [record.message for record in caplog.records if record.name == "sfumato"]
    assert f"{table}: categories: kind" in messages and f"{table}: always the same, not learned: country" in messages
    assert any("name" in line and "every row" in line for line in messages)
    assert info(tmp_path / "run")["data"]["notes"] == read_table(table)[0].notes
    assert "--out samples.csv" in (tmp_path / "run" / "README.md").read_text()


def test_rows_around_fixed_cells_have_missing_values_too(table_run: Path):
    model = load(table_run, "cpu")
    fixed = torch.full((5,), torch.nan, dtype=torch.float64)
    fixed[1] = 2  # the rarest category
    for method, missing in ((_FixedValues, True), (_Repaint, False)):
        mask = fixed.isnan()[None].expand(400, 5)
        inpainter = method(model, mask, Raw(), replace(model.sampling, sampler="ddpm", steps=3), 1, 0)
        items = inpainter(list(range(400)), Items(fixed[None].expand(400, 5))).stack()
        assert (items[:, 1] == 2).all() and bool(items[:, 0].isnan().any()) == missing


def test_a_row_does_not_depend_on_n_or_batch(table_run: Path):
    model = load(table_run, "cpu")
    many = generate(model, n=40, batch=7).items.stack()
    assert torch.equal(many.isnan(), generate(model, n=40).items.stack().isnan())
    torch.testing.assert_close(generate(model, n=3).items.stack(), many[:3], equal_nan=True)
    assert not torch.equal(generate(model, n=40, seed=1).items.stack(), many)


def test_rows_are_reconstructed(table_run: Path, table: Path, tmp_path: Path):
    result = reconstruct(table_run, table, out=tmp_path / "back.csv")
    assert result.statistics["cells"] > 0.95 and result.statistics["error"] < 1e-3  # unseen values change a little
    original, back = cells(table), cells(tmp_path / "back.csv")
    assert len(back) == len(original)
    for name in ("kind", "married", "country"):
        j = HEADER.index(name)
        assert [row[j] for row in back] == [row[j] for row in original], name
    assert (tmp_path / "back.csv-sheet.png").is_file()


def test_parquet_is_written_for_its_suffix(table_run: Path, table: Path, tmp_path: Path):
    generate(table_run, n=30, out=tmp_path / "samples.parquet")
    for settings in ({}, {"target": "kind"}, {"target": "height"}, {"cas": True}):
        report = evaluate(tmp_path / "samples.parquet", table, **settings)
        assert ("downstream" in report) == bool(settings), settings
    with pytest.raises(UserError, match="--target kin: no such column"):
        evaluate(tmp_path / "samples.parquet", table, target="kin")
    report = evaluate(tmp_path / "samples.parquet", table)
    assert report["n"] == 30 and 0 <= report["c2st"] <= 1


def test_samples_are_evaluated_without_excluded_columns(table: Path, tmp_path: Path):
    small_fit(table, tmp_path / "run", *TINY, exclude="height,since", categorical="visits")
    generate(tmp_path / "run", n=60, out=tmp_path / "samples.csv")
    with pytest.raises(UserError, match="lacks the columns 'height', 'since'"):
        evaluate(tmp_path / "samples.csv", table)
    columns = {"exclude": "height,since", "categorical": "visits"}
    file, model = evaluate(tmp_path / "samples.csv", table, **columns), evaluate(tmp_path / "run", table, n=60)
    assert file["shape_error"] == model["shape_error"] and file["trend_error"] == model["trend_error"]
    with pytest.raises(UserError, match="--exclude applies only to sample files; a model already stores"):
        evaluate(tmp_path / "run", table, exclude="height")


def test_a_model_is_evaluated_with_floors(table_run: Path, table: Path, tmp_path: Path):
    report = evaluate(table_run, table, n=200)
    for name in ("c2st", "shape_error", "trend_error", "copy_auc"):
        assert np.isfinite(report[name]), name
    assert report["codec_cells"] > 0.9 and report["memorised"] in (True, False)
    copy = evaluate(table, table)
    assert copy["shape_error"] < report["shape_error"]


def test_info_describes_a_run_of_a_table(table_run: Path):
    report = info(table_run)
    assert report["modality"] == "table" and report["latent_shape"] == [10]


def test_a_learned_codec_and_resume(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learned = (*TINY, "codec.bottleneck=kl", "codec.latent_dim=6", "train.codec.batch=16")
    model = small_fit(table, tmp_path / "whole", *learned)
    assert isinstance(model, Model) and model.codec.latent_shape == (6,) and model.codec.trainable
    from sfumato.training import stages

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stages, "train_denoiser", lambda *a: 1 / 0)
        small_fit(table, tmp_path / "cut", *learned)
    small_fit(table, tmp_path / "cut", *learned, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda run, table, out: generate(run, n=2, out=out / "folder"), "not the name of a table"),
        (lambda run, table, out: generate(run, n=2, out=table), "exists; pass --overwrite"),
        (lambda run, table, out: generate(run, n=2, label="a"), "without labels"),
        (lambda run, table, out: evaluate(run, "digits"), "digits"),
        (lambda run, table, out: small_fit(table, out / "run", "codec.bottleneck=vqq"), "codec.bottleneck"),
        (lambda run, table, out: small_fit(table, out / "run", categorical="kindd"), "did you mean 'kind'"),
    ],
)
def test_mistakes_are_one_line(act, message: str, table_run: Path, table: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message) as error:
        act(table_run, table, tmp_path)
    assert "\n" not in str(error.value) and error.value.code in (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_match_conditions(table_run: Path, tmp_path: Path):
    conditions = ("kind=b", "visits>=1", "since<2021-07-01")
    result = generate(table_run, n=12, where=conditions, out=tmp_path / "samples.csv")
    _, *rows = cells(tmp_path / "samples.csv")
    assert len(rows) == 12
    for row in rows:
        cell = dict(zip(HEADER, row, strict=True))
        assert cell["kind"] == "b" and int(cell["visits"]) >= 1 and cell["since"] < "2021-07-01"
    numbers = [row["item"] for row in result.metadata]
    assert numbers == sorted(set(numbers)) and numbers[-1] > 11
    everything = generate(table_run, n=numbers[-1] + 1).items.stack()
    torch.testing.assert_close(result.items.stack(), everything[numbers], equal_nan=True)
    assert generate(table_run, n=5, where=("height=",)).items.stack()[:, 0].isnan().all()


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [("kind", "", "kind"), ("kind", "z", "kind"), ("visits", "", "visits"), ("height", "", None)],
)
def test_rows_lacking_cells_that_no_training_row_lacked_are_not_inverted(
    name: str, text: str, column: str | None, table_run: Path, tmp_path: Path
):
    row = people(1, seed=4)[0]
    row[1], row[HEADER.index(name)] = "170.0", text
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, row])
    tasks = (
        lambda: edit(table_run, tmp_path / "in.csv", method="invert", steps=2),
        lambda: interpolate(table_run, tmp_path / "in.csv", "1", n=2, steps=2),
    )
    for task in tasks:
        if column is None:  # training rows lacked it too
            assert len(task().items)
            continue
        with pytest.raises(
            UserError, match=rf"in\.csv: the column '{column}' .* fill them in first with inpaint"
        ) as error:
            task()
        assert error.value.code == 1 and "\n" not in str(error.value)
    assert len(edit(table_run, tmp_path / "in.csv").items) == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kind=d", "'d' was never seen"),
        ("knd=a", "did you mean 'kind'"),
        ("country=FR", "no column 'country'"),
        ("kind", "write COLUMN=VALUE"),
        ("kind>a", "holds categories"),
        ("visits=many", "holds numbers"),
        ("since>soon", "is not a date"),
        ("height>500", "only 0 of"),
    ],
)
def test_conditions_that_cannot_be_met(where: str, message: str, table_run: Path):
    with pytest.raises(UserError, match=message):
        generate(table_run, n=2, where=(where,))


def test_augmentation_balances_the_classes(
    table_run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[torch.Tensor] = []
    monkeypatch.setattr(TableLabeler, "is_plausible", lambda self, rows: shown.append(rows) or rows[:, 1] >= 0)
    result = augment(table_run, table, target="kind", n=100, out=tmp_path / "even.csv")
    header, *rows = cells(tmp_path / "even.csv")
    real = cells(table)[1:]
    kind = HEADER.index("kind")
    counts = Counter(row[kind] for row in rows)
    most = Counter(row[kind] for row in real)["a"]
    assert header == HEADER and counts == {"a": most, "b": 100, "c": 100} and result.statistics["given"] == 240
    assert [row[1:] for row in rows[:240]] == [row[1:] for row in real]  # names are numbered again
    assert (
        result.statistics["refused"]["label"] == 0 and result.statistics["tried"] > result.statistics["made"] and shown
    )


def test_rows_implausible_in_their_class_are_rejected():
    columns = [Column("x", "number"), Column("kind", "category", levels=["low", "high", "rare"])]
    rng = np.random.default_rng(0)
    real = np.concatenate([np.c_[rng.normal(4 * k, 1, 300), np.full(300, k)] for k in (0.0, 1.0)] + [[[2.0, 2.0]]])
    is_plausible = fit_plausibility(real, columns, 1)
    rows = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [4.0, 1.0], [0.0, 2.0]])
    assert is_plausible(rows).tolist() == [True, False, False, True, True]  # the last class has too few rows to judge
    assert 0.9 < is_plausible(real[:600]).mean() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "kin"}, "--target kin: no such column among those that are learned; did you mean 'kind'"),
        ({"target": "height"}, "--target height: the column holds numbers, not classes"),
        ({"target": "kind", "unlabelled": "other.csv"}, "--unlabelled: is for images"),
    ],
)
def test_tables_that_cannot_be_augmented(settings: dict, message: str, table_run: Path, table: Path):
    if "unlabelled" in settings:
        settings = {**settings, "unlabelled": table}
    with pytest.raises(UserError, match=message):
        augment(table_run, table, **settings)


def test_images_do_not_fit_a_model_of_tables(table_run: Path):
    with pytest.raises(UserError):
        augment(table_run, "digits")
