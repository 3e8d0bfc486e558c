"""Every kind of source, with labels and captions; and errors of sources."""

import gzip
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sfumato.errors import UserError
from sfumato.modalities.image.read import read_images, read_source
from sfumato.types import UNKNOWN

Folder = Callable[..., Path]
CLASSES = {f"{kind}/{i}.png": 10 * k + i for k, kind in enumerate(("cat", "dog")) for i in range(6)}


def jsonl(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pack(root: Path, out: Path, prefix: str = "") -> Path:
    """An archive of a folder, its files under `prefix`."""
    files = [p for p in root.rglob("*") if p.is_file()]
    if out.suffix == ".zip":
        with zipfile.ZipFile(out, "w") as archive:
            for path in files:
                archive.write(path, prefix + path.relative_to(root).as_posix())
        return out
    mode = "w:" + {"gz": "gz", "xz": "xz", "tar": ""}[out.name.rsplit(".", 1)[1]]
    with tarfile.open(out, mode) as archive:  # type: ignore[call-overload]
        for path in reversed(sorted(files)):
            archive.add(path, prefix + path.relative_to(root).as_posix())
    return out


def test_folders_are_classes(folder: Folder) -> None:
    data, held = read_images(folder(CLASSES))
    assert held is None and data.shape == (3, 6, 8) and data.mode == "RGB"
    assert data.label_names == ["cat", "dog"] and data.labels is not None
    assert data.labels.tolist() == [0] * 6 + [1] * 6 and data.captions is None
    assert data.names == sorted(CLASSES)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.zip"])
@pytest.mark.parametrize("prefix", ["", "./", "photos/"])
def test_archive_reads_like_its_folder(folder: Folder, tmp_path: Path, name: str, prefix: str) -> None:
    root = folder(CLASSES | {".hidden.png": "no", "__MACOSX/x.png": "no"})
    data = read_images(root)[0]
    if name == "a.zip" and prefix == "./":
        return  # a zip has no ./
    archive = pack(root, tmp_path / name, prefix)
    before = sorted(p.name for p in tmp_path.iterdir())
    for _ in range(2):  # the second time from the cached listing
        assert read_images(archive)[0].fingerprint == data.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_flat_folder_has_no_labels(folder: Folder) -> None:
    data = read_images(folder({f"{i}.jpg": i for i in range(8)}))[0]
    assert data.labels is None and data.label_names == [] and len(data) == 8


def test_a_single_folder_is_no_class(folder: Folder) -> None:
    assert read_images(folder({f"images/{i}.png": i for i in range(8)}))[0].labels is None


def test_images_outside_class_folders_mean_no_classes(folder: Folder) -> None:
    data = read_images(folder(CLASSES | {"x.png": 99}))[0]
    assert data.labels is None and "1 images lie in no class folder" in data.notes[0]


def test_metadata_labels_override_folders(folder: Folder) -> None:
    rows = jsonl(*({"file_name": name, "label": i % 3, "text": f"n {i}"} for i, name in enumerate(sorted(CLASSES))))
    data = read_images(folder(CLASSES | {"metadata.jsonl": rows}))[0]
    assert data.label_names == ["0", "1", "2"] and data.captions is not None and data.captions[4] == "n 4"
    assert data.labels is not None and data.labels.tolist() == [i % 3 for i in range(12)]


def test_folders_are_classes_if_metadata_has_no_labels(folder: Folder) -> None:
    rows = jsonl(*({"file_name": name, "prompt": "p"} for name in CLASSES))
    data = read_images(folder(CLASSES | {"metadata.jsonl": rows}))[0]
    assert data.label_names == ["cat", "dog"] and data.captions == ["p"] * 12


def test_metadata_may_be_a_csv_in_a_subfolder(folder: Folder) -> None:
    lines = "file_name,label,text\n" + "".join(f"{i}.png,{10 - i},t{i}\n" for i in range(8))
    data = read_images(folder({f"pictures/{i}.png": i for i in range(8)} | {"pictures/metadata.csv": lines}))[0]
    assert data.label_names == [str(k) for k in range(3, 11)]  # integers in numerical order
    assert data.labels is not None and data.labels[0] == 7 and data.captions == [f"t{i}" for i in range(8)]


def test_captions_from_text_files(folder: Folder) -> None:
    texts = {f"{i}.txt": f" caption {i}\n" for i in range(7)}
    data = read_images(folder({f"{i}.png": i for i in range(8)} | texts | {"README.txt": "hello"}))[0]
    assert data.captions == [*(f"caption {i}" for i in range(7)), None]
    assert "1 of 8 images have no caption" in data.notes[0]


@pytest.mark.parametrize("held", ["test", "validation", "val"])
def test_official_held_out_part(folder: Folder, held: str) -> None:
    files = {f"train/{name}": seed for name, seed in CLASSES.items()} | {f"{held}/dog/9.png": 77}
    data, rest = read_source(folder(files))
    assert len(data) == 12 and len(rest) == 1 and data.label_names == rest.label_names == ["cat", "dog"]
    assert rest.labels is not None and rest.labels.tolist() == [1]


def test_unused_parts_are_noted(folder: Folder) -> None:
    files = {f"{part}/{i}.png": i for part in ("train", "test", "val") for i in range(8)}
    data, held = read_source(folder(files))
    assert len(data) == len(held) == 8 and "val: 8 images not used" in data.notes[0]


def test_a_folder_of_train_and_test_archives(folder: Folder, tmp_path: Path) -> None:
    root = folder(CLASSES)
    archives = tmp_path / "archives"
    archives.mkdir()
    pack(root, archives / "train.tar.xz", "train/")
    pack(root, archives / "test.tar.xz", "test/")
    data, held = read_images(archives)
    assert held is not None and len(data) == len(held) == 12 and data.label_names == ["cat", "dog"]
    assert read_images(archives / "train.tar.xz")[1] is None  # the archive beside it is ignored


def test_label_from_file_name(folder: Folder) -> None:
    root = folder({f"{i % 3}_{name}_{i}.png": i for i in range(9) for name in ("ann", "bob")})
    data = read_images(root, label_from=r"_([a-z]+)_")[0]
    assert data.label_names == ["ann", "bob"] and data.labels is not None and data.labels.sum() == 9
    with pytest.raises(UserError, match=r"finds nothing in 18 file names: 0_ann_0\.png"):
        read_images(root, label_from=r"cat(.)")
    with pytest.raises(UserError, match="not a regular expression") as error:
        read_images(root, label_from="(")
    assert error.value.code == 2


@pytest.mark.parametrize("shape", [(9, 6, 5), (9, 6, 5, 1), (9, 6, 5, 3), (9, 3, 6, 5), (9, 6, 5, 4)])
def test_npz_arrays_of_any_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=images, y_train=np.arange(9)[:, None] % 2, x_test=images[:4], y_test=[0, 1, 0, 1]
    )
    data, held = read_source(tmp_path / "a.npz")
    channels = 1 if len(shape) == 3 else next(c for c in shape[1:] if c in (1, 3, 4))
    assert data.shape == (channels, 6, 5) and len(held) == 4 and data.label_names == ["0", "1"]
    expected = (
        images.reshape(9, channels, 6, 5) if shape[1] == 3 else images.reshape(9, 6, 5, channels).transpose(0, 3, 1, 2)
    )
    assert np.allclose(data.batch(range(9)).data.numpy(), expected / 127.5 - 1, atol=1e-6)


def test_npz_dtypes_are_converted_or_refused(tmp_path: Path) -> None:
    unit = np.linspace(0, 1, 9 * 16).reshape(9, 4, 4)
    np.savez(tmp_path / "unit.npz", images=unit)
    data = read_images(tmp_path / "unit.npz")[0]
    assert data.mode == "L" and data.store.max() == 255 and "kept in 8 bits" in data.notes[0]
    np.savez(tmp_path / "deep.npz", data=(unit * 60000).astype(np.int64))
    assert read_images(tmp_path / "deep.npz")[0].mode == "I;16"
    np.savez(tmp_path / "odd.npz", images=unit * 4 - 2)
    with pytest.raises(UserError, match="float64 from -2 to 2"):
        read_images(tmp_path / "odd.npz")
    np.savez(tmp_path / "table.npz", X=unit.reshape(9, 16))
    with pytest.raises(UserError, match=r"shape \(9, 16\) is not images"):
        read_images(tmp_path / "table.npz")
    np.savez(tmp_path / "objects.npz", images=np.array([{}], object))
    with pytest.raises(UserError, match=r"not an \.npz of plain arrays"):
        read_images(tmp_path / "objects.npz")
    np.savez(tmp_path / "none.npz", weights=unit)
    with pytest.raises(UserError, match="found weights"):
        read_images(tmp_path / "none.npz")


def test_idx_folder_and_file(tmp_path: Path, idx: Callable[[np.ndarray], bytes]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(12) % 3))
    data, held = read_images(tmp_path)
    assert held is None and (data.pixels[..., 0] == images).all() and data.label_names == ["0", "1", "2"]
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[:3]))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([2, 2, 0]))))
    held = read_images(tmp_path)[1]
    assert held is not None and held.labels is not None and held.labels.tolist() == [2, 2, 0]
    alone = read_images(tmp_path / "train-images-idx3-ubyte.gz")[0]
    assert alone.fingerprint == data.fingerprint
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)[:-7]))
    with pytest.raises(UserError, match="truncated"):
        read_images(tmp_path)


def test_a_single_image_file(folder: Folder) -> None:
    root = folder({"a.png": 1})
    assert len(read_images(root / "a.png")[0]) == 1


def refused(source: Path | str, match: str, code: int = 1, **options: bool) -> None:
    with pytest.raises(UserError, match=match) as error:
        read_source(source, **options)  # type: ignore[arg-type]
    assert error.value.code == code and "\n" not in str(error.value)


def test_invalid_sources_are_refused(folder: Folder, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no images here \(found nothing\)")
    refused(tmp_path / "absent", "no such file or folder", 2)
    refused("fashionmnist", "did you mean the built-in fashion-mnist", 2)
    refused(folder({"a.csv": "x", "b.csv": "x", "c.md": "x"}), r"found 2 .csv, 1 .md")
    refused(folder({"a.csv": "x"}) / "a.csv", "not a source of images")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"hello")
    refused(broken, "cannot be read")
    (tmp_path / "broken.zip").write_bytes(b"hello")
    refused(tmp_path / "broken.zip", "cannot be read")


def test_unreadable_folder_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(CLASSES)

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr("os.scandir", deny)
    refused(root, "no permission to read")


def test_truncated_archives_are_refused(folder: Folder, tmp_path: Path) -> None:
    for name in ("a.tar.xz", "a.tar", "a.tar.gz", "a.zip"):
        archive = pack(folder(CLASSES), tmp_path / name)
        raw = archive.read_bytes()
        archive.write_bytes(raw[: len(raw) // 2])
        refused(archive, "cannot be read|damaged")


def test_too_few_images_are_refused(folder: Folder) -> None:
    refused(folder({"a.png": 1}), "only 1 image; at least 8 are needed")
    refused(folder({"b.png": 1}), "only 2 images; at least 8")


def test_metadata_errors(folder: Folder) -> None:
    files = {f"{i}.png": i for i in range(10)}
    rows = [{"file_name": name, "label": "a"} for name in files]
    missing = folder(files | {"metadata.jsonl": jsonl(*rows, {"file_name": "gone.png", "label": "a"})})
    refused(missing, "1 rows of the metadata name a missing file: gone.png")
    data = read_images(missing, skip_bad=True)[0]
    assert len(data) == 10 and "gone.png" in data.notes[0]
    refused(folder({"metadata.jsonl": jsonl(*rows[1:])}), "1 images are not in the metadata: 0.png")
    assert len(read_images(missing, skip_bad=True)[0]) == 9
    data = read_images(folder({"metadata.jsonl": jsonl(*rows[1:], {"file_name": "0.png"})}))[0]
    assert data.labels is not None  # a missing label is no error, but noted
    assert data.labels.tolist() == [UNKNOWN] + 9 * [0] and "1 of 10 images have no label" in data.notes[0]
    refused(folder({"metadata.jsonl": "{oops\n"}), "metadata.jsonl, line 1: not JSON")
    refused(folder({"metadata.jsonl": "[1]\n"}), "line 1: want one object a line")
    refused(folder({"metadata.jsonl": jsonl({"label": "a"})}), "row 1: has no file_name")
    (missing / "metadata.jsonl").rename(missing / "metadata.json1")
    refused(missing, "found metadata.json1, but only metadata.jsonl or metadata.csv")


def test_held_out_classes_must_be_in_the_training_part(folder: Folder) -> None:
    files = {f"train/{name}": seed for name, seed in CLASSES.items()} | {"test/emu/9.png": 77}
    refused(folder(files), "held-out classes the training part lacks: emu")


def test_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused("hf://owner/name", r"pip install 'sfumato\[data\]'")


def test_hub_data_sets_are_read(monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    datasets = pytest.importorskip("datasets")
    root = folder({f"{i}.png": i for i in range(12)})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )

    def table(count: int) -> object:
        names = [str(root / f"{i}.png") for i in range(count)]
        columns = {
            "image": names,
            "label": [i % 2 if i != 7 else -1 for i in range(count)],
            "text": [f"t{i}" for i in range(count)],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    splits = datasets.DatasetDict({"train": table(12), "test": table(4)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    data, held = read_source("hf://owner/name")
    assert len(data) == 12 and len(held) == 4 and data.label_names == ["cat", "dog"]
    assert (
        data.pixels
        == read_images(root, label_from=r"(\d)")[0].pixels[np.argsort([str(i) for i in range(12)]).argsort()]
    ).all()
    assert data.captions is not None and data.captions[3] == "t3"
    assert data.labels is not None and data.labels[6:9].tolist() == [0, UNKNOWN, 0]
