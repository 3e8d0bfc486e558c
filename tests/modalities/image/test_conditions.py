"""Several conditions of images: from file names, from columns of the metadata, and from arrays."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.data.conditions import Labels, Numbers, Texts
from sfumato.errors import UserError
from sfumato.modalities.image.read import read_images, read_source
from sfumato.types import UNKNOWN

Folder = Callable[..., Path]
COLUMNS = ["digit", "style", "thickness"]


def jsonl(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(i: int) -> dict[str, object]:
    """A digit, a style, a thickness and a serial number; the sixth has no style, the third no thickness."""
    styles = ["plain", "bold", ""]
    thickness = 0.5 + i / 10 if i != 2 else None
    return {
        "digit": i % 3,
        "style": styles[i % 2 if i != 5 else 2],
        "thickness": thickness,
        "serial": i,
        "text": f"t{i}",
    }


@pytest.fixture
def described(folder: Folder) -> Path:
    """24 images with the columns of `row`."""
    rows = [{"file_name": f"{i:02d}.png", **row(i)} for i in range(24)]
    return folder({f"{i:02d}.png": i for i in range(24)} | {"metadata.jsonl": jsonl(*rows)})


def refused(source: Path | str, match: str, code: int, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        read_images(source, **options)
    assert error.value.code == code and "\n" not in str(error.value)


def labels(data: Any, name: str) -> list[str | None]:
    """The class names of a label condition."""
    known = data.conditions[name]
    assert isinstance(known, Labels)
    return [None if k == UNKNOWN else known.names[k] for k in known.numbers]


def numbers(data: Any, name: str) -> np.ndarray:
    known = data.conditions[name]
    assert isinstance(known, Numbers)
    return known.values


def test_columns_of_the_metadata_are_conditions(described: Path) -> None:
    data, held = read_images(described, label_column=COLUMNS)
    assert held is None and list(data.conditions) == [*COLUMNS, "text"]
    assert labels(data, "digit") == [str(i % 3) for i in range(24)]
    assert labels(data, "style") == [row(i)["style"] or None for i in range(24)]
    expected = np.array([np.nan if i == 2 else 0.5 + i / 10 for i in range(24)], np.float32)
    assert np.array_equal(numbers(data, "thickness"), expected, equal_nan=True)
    assert isinstance(data.conditions["text"], Texts) and data.captions == [f"t{i}" for i in range(24)]
    assert data.label_names == ["0", "1", "2"] and data.classes == 3  # the first label is the primary one
    assert data.notes == ["1 of 24 images have no style: 05.png", "1 of 24 images have no thickness: 02.png"]
    line = "conditions: digit (3 classes), style (2 classes), thickness (numbers from 0.5 to 2.8), text (texts)"
    assert data.describe() == [line]


def test_columns_keep_the_order_of_the_user(described: Path) -> None:
    data = read_images(described, label_column=("thickness", "style", "digit"))[0]
    assert list(data.conditions)[:3] == ["thickness", "style", "digit"] and data.label_names == ["bold", "plain"]


def test_many_integers_are_numbers_unless_the_user_says_otherwise(described: Path) -> None:
    assert numbers(read_images(described, label_column=["serial"])[0], "serial").tolist() == list(range(24))
    data = read_images(described, label_column=["serial", "thickness", "digit"], categorical=["serial", "thickness"])[0]
    assert labels(data, "serial") == [str(i) for i in range(24)] and labels(data, "thickness")[2] is None
    data = read_images(described, label_column=["digit"], numeric=["digit"])[0]
    assert numbers(data, "digit").tolist() == [i % 3 for i in range(24)] and data.labels is None


def test_csv_columns_are_read_as_json_ones(described: Path) -> None:
    expected = read_images(described, label_column=COLUMNS)[0]
    header = ["file_name", *row(0)]
    rows = [[f"{i:02d}.png", *("" if v is None else str(v) for v in row(i).values())] for i in range(24)]
    (described / "metadata.jsonl").unlink()
    (described / "metadata.csv").write_text("\n".join(map(",".join, [header, *rows])))
    assert read_images(described, label_column=COLUMNS)[0].fingerprint == expected.fingerprint


def test_the_column_label_alone_is_the_default(folder: Folder) -> None:
    rows = [{"file_name": f"{i:02d}.png", "label": i, "digit": i % 2} for i in range(24)]
    root = folder({f"{i:02d}.png": i for i in range(24)} | {"metadata.jsonl": jsonl(*rows)})
    data = read_images(root)[0]
    assert list(data.conditions) == ["label"] and data.classes == 24 and data.describe() == []
    assert list(read_images(root, label_column=["digit", "label"])[0].conditions) == ["digit", "label"]
    assert read_images(root, label_column=["digit", "label"])[0].classes == 24  # `label` is the primary one
    assert numbers(read_images(root, numeric=["label"])[0], "label")[-1] == 23


def test_wrong_columns_are_refused(described: Path) -> None:
    refused(described, "no column 'digitt'; did you mean 'digit'", 2, label_column=["digitt"])
    refused(described, "no column 'file_name'", 2, label_column=["file_name"])
    refused(described, "thickness.* named twice", 2, label_column=["thickness", "thickness"])
    refused(described, r"style of 00\.png is 'plain', not a number", 1, label_column=["style"], numeric=["style"])
    refused(described, "no condition 'serial'", 2, label_column=["digit"], numeric=["serial"])
    text = (described / "metadata.jsonl").read_text().replace('"bold"', '""').replace('"plain"', '""')
    (described / "metadata.jsonl").write_text(text)
    refused(described, "style has no values", 1, label_column=["digit", "style"])


def test_columns_need_metadata(folder: Folder, tmp_path: Path) -> None:
    root = folder({f"{i}.png": i for i in range(9)})
    refused(root, r"--label-column needs metadata\.jsonl or metadata\.csv, and there is none", 2, label_column=["a"])
    refused("digits", r"digits: --label-column needs metadata.*these images have none", 2, label_column=["a"])
    np.save(tmp_path / "a.npy", np.zeros((9, 4, 4), np.uint8))
    refused(tmp_path / "a.npy", "--label-column needs metadata", 2, label_column=["a"])


def test_a_name_with_an_equals_sign_is_refused(folder: Folder) -> None:
    root = folder({"a.png": 1, "metadata.csv": "file_name,a=b\na.png,1\n"})
    refused(root, r"'a=b'.*rename the column", 2, label_column=["a=b"])


def test_named_groups_of_file_names_are_conditions(folder: Folder) -> None:
    root = folder({f"{i % 3}.5_{name}_{i}.png": i for i in range(9) for name in ("ann", "bob")})
    pattern = r"(?P<digit>\d\.5)_(?P<speaker>\w+)_"
    data = read_images(root, label_from=pattern)[0]
    assert list(data.conditions) == ["digit", "speaker"] and data.label_names == ["0.5", "1.5", "2.5"]
    assert data.names is not None and labels(data, "speaker") == [name[4:7] for name in data.names]
    data = read_images(root, label_from=pattern, numeric=["digit"])[0]
    assert numbers(data, "digit").tolist() == [float(name[:3]) for name in data.names or ()]
    assert data.label_names == ["ann", "bob"]
    wrong = r"speaker of 0\.5_ann_0\.png is 'ann', not a number"
    refused(root, wrong, 1, label_from=pattern, numeric=["speaker"])
    refused(root, "extra has no values", 1, label_from=r"(?P<digit>\d)(?P<extra>x?)")


def test_file_names_and_columns_together(described: Path) -> None:
    data = read_images(described, label_from=r"(?P<tens>\d)\d", label_column=["style"])[0]
    assert list(data.conditions) == ["tens", "style", "text"] and data.label_names == ["0", "1", "2"]
    assert list(read_images(described, label_from=r"\d", label_column=["style"])[0].conditions)[:2] == [
        "label",
        "style",
    ]


def test_files_that_are_left_out_take_their_values_and_classes_with_them(described: Path) -> None:
    for i in range(0, 24, 3):  # all of digit 0
        (described / f"{i:02d}.png").write_text("bad")
    data = read_images(described, label_column=COLUMNS, skip_bad=True)[0]
    assert data.label_names == ["1", "2"] and labels(data, "digit")[:3] == ["1", "2", "1"]
    assert numbers(data, "thickness")[2:4].tolist() == np.float32([0.9, 1.0]).tolist()


def parts(train: int, test: int) -> dict[str, object]:
    """Images and metadata of train/ and test/; the digits of test/ are 2 and 1, its years 3 and 4."""
    rows = [{"file_name": f"train/{i:02d}.png", "digit": i % 3, "size": i % 2, "year": i} for i in range(train)]
    rows += [{"file_name": f"test/{i:02d}.png", "digit": 2 - i % 2, "size": 1, "year": 3 + i % 2} for i in range(test)]
    return {str(r["file_name"]): i for i, r in enumerate(rows)} | {"metadata.jsonl": jsonl(*rows)}


def check_held_out(data: Any, held: Any) -> None:
    """The held-out part of `parts` has the class numbers and kinds of the training part."""
    assert held is not None and labels(held, "digit") == ["2", "1", "2", "1"] and labels(held, "size") == ["1"] * 4
    for name in ("digit", "size"):
        assert list(held.conditions[name].names) == list(data.conditions[name].names)
    assert held.conditions["size"].numbers.tolist() == [1] * 4
    assert numbers(held, "year").tolist() == [3, 4, 3, 4] and len(numbers(data, "year")) == 24


def test_held_out_folders_have_the_same_class_numbers(folder: Folder) -> None:
    root = folder(parts(24, 4))
    check_held_out(*read_images(root, label_column=["digit", "size", "year"]))
    text = (root / "metadata.jsonl").read_text()
    lines = [line.replace('"size": 1', '"size": 7') if "test/" in line else line for line in text.splitlines()]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    refused(root, "size: held-out classes the training part lacks: 7", 1, label_column=["digit", "size", "year"])


def test_held_out_archives_have_the_same_class_numbers(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    root = folder(parts(24, 4))
    rows = (root / "metadata.jsonl").read_text().splitlines()
    for part in ("train", "test"):
        own = [line.replace(f"{part}/", "") for line in rows if f"{part}/" in line]
        (root / part / "metadata.jsonl").write_text("\n".join(own))
        with tarfile.open(tmp_path / "archives" / f"{part}.tar", "w") as archive:
            archive.add(root / part, ".")
    # read alone, the few years of the test archive would be classes
    check_held_out(*read_images(tmp_path / "archives", label_column=["digit", "size", "year"]))


def test_splits_keep_all_conditions(described: Path) -> None:
    data, held = read_source(described, label_column=COLUMNS, held_out=0.25)
    assert list(held.conditions) == list(data.conditions) and len(held) == 6
    assert held.labels is not None and np.bincount(held.labels).tolist() == [2, 2, 2]
    whole = read_images(described, label_column=COLUMNS)[0]
    assert held.names is not None and whole.names is not None
    index = [whole.names.index(name) for name in held.names]
    assert labels(held, "style") == [labels(whole, "style")[i] for i in index]


def test_converted_images_keep_all_conditions(described: Path) -> None:
    data = read_images(described, label_column=COLUMNS, resolution=4, mode="L")[0]
    assert data.shape == (1, 4, 4) and list(data.conditions) == [*COLUMNS, "text"]


def test_arrays_of_an_npz_are_conditions(tmp_path: Path) -> None:
    images, path = np.random.default_rng(0).integers(0, 256, (30, 4, 4)).astype(np.uint8), tmp_path / "a.npz"
    ages = np.arange(30) + 0.5
    ages[4] = np.nan
    arrays = {
        "digit": np.arange(30)[:, None] % 10,
        "Age": ages,
        "year": np.arange(30),
        "site": np.array(["a", "b"] * 15),
    }
    np.savez(path, images=images, labels=np.arange(30) % 2, **arrays)
    assert list(read_images(path)[0].conditions) == ["label"]
    data = read_images(path, label_column=["digit", "Age", "year", "site"], categorical=["year"])[0]
    assert list(data.conditions) == ["label", "digit", "Age", "year", "site"] and data.label_names == ["0", "1"]
    assert labels(data, "digit") == [str(i % 10) for i in range(30)] and labels(data, "year")[-1] == "29"
    assert np.array_equal(numbers(data, "Age"), ages.astype(np.float32), equal_nan=True)
    assert labels(data, "site")[:3] == ["a", "b", "a"]
    assert list(read_images(path, label_column=["digit", "label"])[0].conditions) == ["digit", "label"]
    assert list(read_images(path, label_column=["labels"])[0].conditions) == ["labels"]
    refused(path, "no column 'sites'; did you mean 'site'", 2, label_column=["sites"])
    refused(path, r"site of item 0 is 'a', not a number", 1, label_column=["site"], numeric=["site"])
    refused(path, r"30 images but images of shape \(30, 4, 4\)", 1, label_column=["images"])
    np.savez(path, images=images, digit=np.arange(29))
    refused(path, r"30 images but digit of shape \(29,\)", 1, label_column=["digit"])
    assert read_images(path)[0].labels is None


def test_held_out_arrays_of_an_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 4, 4)).astype(np.uint8)
    arrays = {"x_train": images, "digit": np.arange(24) % 3, "size": np.arange(24) % 2, "year": np.arange(24)}
    arrays |= {"x_test": images[:4], "digit_test": np.array([2, 1, 2, 1]), "size_test": np.ones(4, np.int64)}
    np.savez(tmp_path / "a.npz", **arrays, test_year=np.array([3, 4, 3, 4]))
    check_held_out(*read_images(tmp_path / "a.npz", label_column=["digit", "size", "year"]))
    np.savez(tmp_path / "b.npz", **arrays)
    data, held = read_images(tmp_path / "b.npz", label_column=["digit", "size", "year"])
    assert held is not None and list(held.conditions) == ["digit", "size"]
    assert "the held-out images have no year (no array year_test)" in data.notes[0]
    np.savez(tmp_path / "c.npz", **{**arrays, "size_test": np.full(4, 5)})
    refused(tmp_path / "c.npz", "size: held-out classes the training part lacks: 5", 1, label_column=["size"])


def test_columns_of_the_hub_are_conditions(monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    datasets = pytest.importorskip("datasets")
    root = folder({f"{i}.png": i for i in range(12)})
    columns = {
        "image": [str(root / f"{i}.png") for i in range(12)],
        "label": [i % 2 for i in range(12)],
        "style": [i % 2 if i != 7 else -1 for i in range(12)],
        "age": [i / 2 for i in range(12)],
    }
    classes, value = datasets.ClassLabel(names=["plain", "bold"]), datasets.Value
    features = {"image": datasets.Image(), "label": value("int64"), "style": classes, "age": value("float64")}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    splits = datasets.DatasetDict({"train": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    data = read_images("hf://owner/name", label_column=["style", "age"])[0]
    assert list(data.conditions) == ["style", "age"] and labels(data, "style")[6:9] == ["plain", None, "plain"]
    assert numbers(data, "age").tolist() == [i / 2 for i in range(12)]
    assert list(read_images("hf://owner/name")[0].conditions) == ["label"]
    refused("hf://owner/name", "no column 'styles'; did you mean 'style'", 2, label_column=["styles"])


def test_sources_with_one_label_are_read_as_before(tmp_path: Path) -> None:
    """Their fingerprints of the time when a data set had one label; held-out splits and cached latents depend on it."""
    fingerprint = lambda source, **options: read_images(source, **options)[0].fingerprint[:16]
    assert fingerprint("digits") == "1165417701c9f35f"
    pixels = np.arange(6 * 8 * 3).reshape(6, 8, 3)
    for i in range(9):
        Image.fromarray((pixels * (i + 1) % 251).astype(np.uint8)).save(tmp_path / f"{i}.png")
    assert fingerprint(tmp_path, label_from=r"(\d)") == "8a8650d7640e83a8"
    assert fingerprint(tmp_path, label_from=r"(?P<digit>\d)") == "8a8650d7640e83a8"  # the name makes no difference
    rows = [
        {"file_name": f"{i}.png", "label": [2.0, "b", None][i % 3], "text": f"t{i}" if i else "", "age": i / 2}
        for i in range(9)
    ]
    (tmp_path / "metadata.jsonl").write_text(jsonl(*rows))
    assert fingerprint(tmp_path) == fingerprint(tmp_path, label_column=["label"]) == "f6abca2b2eb908b2"
    assert fingerprint(tmp_path, label_column=["label", "age"]) != "f6abca2b2eb908b2"
    images = np.arange(9 * 24).reshape(9, 6, 4).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(9) % 3)
    assert fingerprint(tmp_path / "a.npz") == "79a8e9508a49a5a6"
