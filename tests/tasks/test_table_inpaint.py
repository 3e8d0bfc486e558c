"""Tables: imputation of missing cells, balanced categories, rows of rare strata."""

import csv
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sfumato.errors import UserError
from sfumato.modalities.table.write import write_table
from sfumato.model import Model, load
from sfumato.sampling import JUMP, Sampling
from sfumato.tasks.generate import generate
from sfumato.tasks.inpaint import inpaint, inpaint_fixed
from tests.training.common import small_fit

TINY = ("denoiser.width=64", "denoiser.depth=2", "train.denoiser.batch=128", "sample.steps=6")
HEADER = ["id", "size", "weight", "kind", "rare", "note"]
QUICK = {"steps": 6, "resample": 2}


def things(count: int = 600, seed: int = 0) -> list[list[str]]:
    """Sizes of 1, 2 or 3 that determine the kind; weights near ten times the size; a category in 1 % of the rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size = rng.integers(1, 4)
        weight = "" if rng.random() < 0.05 else f"{10 * size + rng.normal():.2f}"
        rare = "yes" if i % 100 == 50 else "no"
        rows.append([f"t{i:04d}", str(size), weight, "abc"[size - 1], rare, "as it is"])
    return rows


def write(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([HEADER, *rows])
    return path


def cells(path: Path, delimiter: str = ",") -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("things")
    small_fit(write(folder / "things.csv", things()), folder / "run", *TINY, steps=250, categorical="size,kind,rare")
    return folder / "run"


def with_holes(rows: list[list[str]]) -> list[list[str]]:
    """Every third row without its kind, every third without size and weight, under several markers."""
    rows = [list(row) for row in rows]
    for i, row in enumerate(rows):
        if i % 3 == 0:
            row[3] = ""
        elif i % 3 == 1:
            row[1], row[2] = "?", " NA "
    return rows


def test_missing_cells_are_imputed_and_other_cells_keep_their_text(run: Path, tmp_path: Path):
    rows = things(90, seed=1)
    rows[2][2], rows[5][3] = "10.50", "zzz"  # a number in another format, an unknown category
    holes = with_holes(rows)
    result = inpaint(run, write(tmp_path / "in.csv", holes), out=tmp_path / "out.csv", **QUICK)
    header, *filled = cells(tmp_path / "out.csv")
    assert header == HEADER and len(filled) == 90 and result.statistics["method"] == "repaint"
    for before, after in zip(holes, filled, strict=True):
        for old, new in zip(before, after, strict=True):
            assert new == old if old.strip() not in ("", "?", "NA") else new.strip() not in ("", "?", "NA")
    accuracy = np.mean([after[3] == row[3] for row, after in zip(rows[::3], filled[::3], strict=True)])
    assert accuracy > 0.6  # a third by chance
    near = [abs(float(row[2] or 20) - 10 * int(row[1])) < 6 for row in filled[1::3]]
    assert np.mean(near) > 0.5


def test_imputation_does_not_depend_on_the_batch(run: Path, tmp_path: Path):
    source = write(tmp_path / "in.csv", with_holes(things(30, seed=2)))
    first, second = (inpaint(run, source, batch=batch, **QUICK).items.stack() for batch in (7, 30))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert not torch.equal(first, inpaint(run, source, seed=1, **QUICK).items.stack())


def test_dialects_and_parquet_types_are_kept(run: Path, tmp_path: Path):
    rows = with_holes(things(40, seed=3))
    inpaint(run, write(tmp_path / "in.csv", rows, ";"), out=tmp_path / "out.csv", **QUICK)
    assert [row[0] for row in cells(tmp_path / "out.csv", ";")[1:]] == [row[0] for row in rows]
    frame = pd.DataFrame(things(40, seed=3), columns=HEADER)
    frame["weight"] = pd.to_numeric(frame["weight"])
    frame["size"] = frame["size"].astype("int32")
    frame.loc[::2, "weight"] = np.nan
    frame.to_parquet(tmp_path / "in.parquet", index=False)
    inpaint(run, tmp_path / "in.parquet", out=tmp_path / "out.parquet", **QUICK)
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back["weight"].notna().all() and list(back.dtypes) == list(frame.dtypes)
    complete = frame["weight"].notna()
    pd.testing.assert_frame_equal(back[complete], frame[complete])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "mask.png"}, "--mask is for images"),
        ({"invert_mask": True}, "--invert-mask needs --mask"),
        ({"method": "gradient"}, "--method gradient"),
        ({"out": "out.parquet"}, "name it like in.csv"),
        ({"out": "in.csv"}, "exists"),
    ],
)
def test_mistakes_are_one_line(run: Path, tmp_path: Path, settings: dict[str, str], message: str):
    source = write(tmp_path / "in.csv", with_holes(things(20)))
    settings = {key: tmp_path / value if key == "out" else value for key, value in settings.items()}
    with pytest.raises(UserError, match=message) as error:
        inpaint(run, source, **QUICK, **settings)
    assert "\n" not in str(error.value)


def test_a_complete_table_is_refused(run: Path, tmp_path: Path):
    rows = [row for row in things(30) if row[2]]
    with pytest.raises(UserError, match="no cell is empty"):
        inpaint(run, write(tmp_path / "in.csv", rows), **QUICK)


def test_a_learned_codec_cannot_impute(tmp_path: Path):
    source = write(tmp_path / "in.csv", things(100))
    learned = (*TINY, "codec.bottleneck=kl", "codec.latent_dim=4", "train.codec.batch=16")
    small_fit(source, tmp_path / "run", *learned, categorical="size,kind,rare")
    with pytest.raises(UserError, match=r"codec\.bottleneck=identity"):
        inpaint(tmp_path / "run", write(tmp_path / "holes.csv", with_holes(things(20))), **QUICK)


def test_balanced_categories(run: Path, tmp_path: Path):
    result = generate(run, n=31, balance="kind", out=tmp_path / "samples.csv")
    kinds = [row[3] for row in cells(tmp_path / "samples.csv")[1:]]
    assert sorted(kinds.count(kind) for kind in "abc") == [10, 10, 11] and kinds != sorted(kinds)
    numbers = [row["item"] for row in result.metadata]
    assert numbers == sorted(set(numbers))
    everything = generate(run, n=numbers[-1] + 1).items.stack()
    torch.testing.assert_close(result.items.stack(), everything[numbers], equal_nan=True)


def test_balance_combines_with_conditions_and_rare_categories(run: Path):
    model = load(run, "cpu")
    names = [column["name"] for column in model.config.spec["columns"] if column["kind"] not in ("id", "constant")]
    result = generate(model, n=40, balance="rare", where=("weight>0",))
    items = result.items.stack()
    assert items[:, names.index("rare")].sum() == 20 and (items[:, names.index("weight")] > 0).all()


def test_a_rare_stratum_is_inpainted_around_its_fixed_cells(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfumato.tasks.rejection.MAX_TRIES_PER_ROW", 1)
    result = generate(run, n=200, where=("rare=yes", "kind=b"), out=tmp_path / "samples.csv")
    rows = cells(tmp_path / "samples.csv")[1:]
    assert len(rows) == 200 and {(row[4], row[3]) for row in rows} == {("yes", "b")}
    assert len({row["item"] for row in result.metadata}) == 200
    assert np.mean([row[1] == "2" for row in rows]) > 0.42  # the other columns fit; a third by chance


@pytest.mark.parametrize(("balance", "message"), [("knd", "did you mean 'kind'"), ("weight", "holds numbers")])
def test_columns_that_cannot_be_balanced(run: Path, balance: str, message: str):
    with pytest.raises(UserError, match=message):
        generate(run, n=2, balance=balance)


def test_imputation_keeps_constants_and_ids(run: Path, tmp_path: Path):
    rows = with_holes(things(20, seed=5))
    rows[0][5], rows[1][0] = "another", "named"
    inpaint(run, write(tmp_path / "in.csv", rows), out=tmp_path / "out.csv", **QUICK)
    assert [(row[0], row[5]) for row in cells(tmp_path / "out.csv")[1:]] == [(row[0], row[5]) for row in rows]


def test_written_tables_are_read_back(tmp_path: Path):
    """`write_table` uses the same text writer as imputation."""
    from sfumato.modalities.table.read import read_table

    data, _ = read_table(write(tmp_path / "a.csv", things(60)), categorical=("size",))
    write_table(tmp_path / "b.csv.gz", data.columns, data.store)
    again, _ = read_table(tmp_path / "b.csv.gz", categorical=("size",))
    assert np.array_equal(again.store, data.store, equal_nan=True)


def test_an_imputed_file_keeps_the_permissions_of_its_source(run: Path, tmp_path: Path):
    source = write(tmp_path / "in.csv", with_holes(things(30, seed=9)))
    inpaint(run, source, out=tmp_path / "out.csv", **QUICK)
    assert (tmp_path / "out.csv").stat().st_mode == source.stat().st_mode


def test_parquet_files_of_a_folder_may_differ_in_order_and_type(run: Path, tmp_path: Path):
    """A column has integers in a file without missing cells, and floats in the other."""
    frame = pd.read_csv(write(tmp_path / "in.csv", things(30, seed=9)))
    frame["rare"] = "no"
    (tmp_path / "in").mkdir()
    frame.to_parquet(tmp_path / "in" / "train.parquet", index=False)
    holes = frame.astype({"size": "float64"})
    holes.loc[::2, "size"] = np.nan
    holes[frame.columns[::-1]].to_parquet(tmp_path / "in" / "test.parquet", index=False)
    inpaint(run, tmp_path / "in", out=tmp_path / "out.parquet", **QUICK)
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert list(back) == list(frame) and len(back) == 60 and back["size"].notna().all()
    assert back["size"][:30].tolist() == frame["size"].tolist()


@pytest.mark.parametrize("task", ["edit", "inpaint", "reconstruct"])
def test_a_table_without_rows_is_refused(run: Path, tmp_path: Path, task: str):
    import sfumato

    source = write(tmp_path / "in.csv", [])
    with pytest.raises(UserError, match=r"in\.csv: has no rows"):
        getattr(sfumato, task)(run, source)


@pytest.mark.parametrize(("default", "steps"), [(Sampling(JUMP, 2), 12), (Sampling("abm2", 10), 10)])
def test_a_few_step_model_inpaints_fixed_cells_with_the_steps_of_its_teacher(
    default: Sampling, steps: int, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Sampling] = []
    inpainter = lambda model, mask, raw, sampling, *rest: seen.append(sampling) or (lambda numbers, fixed: fixed)
    monkeypatch.setattr(sys.modules["sfumato.tasks.inpaint"], "_FixedValues", inpainter)
    config = SimpleNamespace(
        distilled={"steps": 12, "grid": "both_ends", "guidance": 1.2} if default.sampler == JUMP else None
    )
    model: Any = SimpleNamespace(config=config, sampling=default, guide=None)
    model.choose_sampling = partial(Model.choose_sampling, model)
    assert inpaint_fixed(model, [0, 1], torch.tensor([1.0, torch.nan]), default, 0).stack().shape == (2, 2)
    assert (seen[0].sampler, seen[0].steps) == ("ddpm", steps)
