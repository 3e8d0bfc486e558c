"""Output paths: sources are never replaced, and nothing is written that makes a folder unreadable."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.data.output import save_picture
from sfumato.errors import UserError
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import animation, write_images
from sfumato.model import Model
from tests.training.common import small_fit

SOURCE_TASKS = ["edit", "inpaint", "outpaint", "transfer", "reconstruct", "augment"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four labelled digits, and a mask next to the folder."""
    data, _ = read_images("digits")
    Image.new("L", (8, 8), "white").save(tmp_path / "mask.png")
    return write_images(tmp_path / "in", data.batch(range(4)).data, [{"label": int(k)} for k in data.labels[:4]])


def run(task: str, model: Model, source: Path, **outputs: object) -> None:
    settings = {
        "inpaint": {"mask": source.parent / "mask.png"},
        "outpaint": {"left": 2},
        "transfer": {"label": "3"},
    }
    getattr(sfumato, task)(model, source, **settings.get(task, {}), **outputs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", SOURCE_TASKS)
def test_sources_are_never_replaced(model: Model, source: Path, task: str):
    before = contents(source.parent)
    (source.parent / "link").symlink_to(source)
    file = source / "000001.png"
    for path, out, relation in (
        (source, source, "is the source"),
        (source, source.parent / "link", "is the source"),
        (source, source / ".." / "in", "is the source"),
        (file, source, "contains the source"),
        (source, source.parent, "contains the source"),
    ):
        for overwrite in (True, False):
            with pytest.raises(UserError, match=f"exists and {relation}.*choose another path") as error:
                run(task, model, path, out=out, overwrite=overwrite)
            assert error.value.code == 2 and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"000001\.png: exists and is the source"):
        run(task, model, file, sheet=file, overwrite=True)
    (source.parent / "link").unlink()
    assert contents(source.parent) == before


def test_parts_of_sources_masks_and_ends_are_never_replaced(model: Model, source: Path, tmp_path: Path):
    data, _ = read_images("digits")
    for name in ("classes/3", "classes/4", "masks"):
        write_images(tmp_path / name, data.batch(range(4)).data)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is part of the source"):
        sfumato.edit(model, tmp_path / "classes", out=tmp_path / "classes" / "3", overwrite=True)
    with pytest.raises(UserError, match="masks: exists and is the source"):
        sfumato.inpaint(model, source, mask=tmp_path / "masks", out=tmp_path / "masks", overwrite=True)
    with pytest.raises(UserError, match="in: exists and contains the source"):
        sfumato.interpolate(model, source / "000000.png", "3", out=source, overwrite=True)
    assert contents(tmp_path) == before


def test_a_table_is_not_replaced_by_its_edited_copy(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    model, before = small_fit(table, tmp_path / "run", "train.denoiser.batch=16"), table.read_text()
    with pytest.raises(UserError, match=r"t\.csv: exists and is the source"):
        sfumato.edit(model, table, out=table, overwrite=True)
    assert table.read_text() == before


def test_a_folder_named_like_a_builtin_set_may_be_the_output(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(sfumato.reconstruct(model, "digits", n=3, out=Path("digits")).items) == 3


TASKS: dict[str, Callable[..., object]] = {
    "generate": lambda model, source, **outputs: sfumato.generate(model, n=2, **outputs),
    "interpolate": lambda model, source, **outputs: sfumato.interpolate(model, n=2, **outputs),
    **{task: lambda model, source, task=task, **outputs: run(task, model, source, **outputs) for task in SOURCE_TASKS},
}


@pytest.mark.parametrize("task", TASKS)
def test_sheets_are_checked_before_any_work(
    model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
):
    (tmp_path / "old.png").write_bytes(b"precious")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(Model, "decode", lambda *_: pytest.fail("work was done"))
    before = contents(tmp_path)
    for sheet, message in (
        ("old.png", r"old\.png: exists; pass --overwrite or name another file"),
        ("folder.png", r"folder\.png: exists"),
        ("s.foo", r"s\.foo: not the name of a picture; .*\.png"),
        ("out/sheet.png", r"sheet\.png: is inside .*out, where it would be read as an item; choose another --sheet"),
        ("old.png/s.png", r"s\.png: cannot be written"),
    ):
        with pytest.raises(UserError, match=message) as error:
            TASKS[task](model, source, out=tmp_path / "out", sheet=tmp_path / sheet)
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_animations_are_checked_before_any_work(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "old.gif").write_bytes(b"precious")
    with monkeypatch.context() as patch:
        patch.setattr(Model, "decode", lambda *_: pytest.fail("work was done"))
        for name, sheet, message in (
            ("old.gif", None, "exists"),
            ("out/x.gif", None, "is inside .* choose another --animation"),
            ("x.gif", "x.gif", "choose two files"),
        ):
            outputs = {"out": tmp_path / "out", "sheet": sheet and tmp_path / sheet}
            with pytest.raises(UserError, match=message):
                sfumato.interpolate(model, n=2, animation=tmp_path / name, **outputs)
    sfumato.interpolate(model, n=2, out=tmp_path / "out", animation=tmp_path / "old.gif", overwrite=True)
    with Image.open(tmp_path / "old.gif") as frames:
        assert frames.n_frames == 2


def test_pictures_are_replaced_with_overwrite(model: Model, tmp_path: Path):
    sfumato.generate(model, n=2, sheet=tmp_path / "new" / "s.png")
    before = (tmp_path / "new" / "s.png").read_bytes()
    sfumato.generate(model, n=2, seed=1, sheet=tmp_path / "new" / "s.png", overwrite=True)
    assert (tmp_path / "new" / "s.png").read_bytes() != before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.png"]


def test_pictures_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a failure the old file is still there, and no other."""

    def broken(self: Image.Image, file: Path, *_: object, **__: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    for name in ("s.png", "x.gif"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(UserError, match=r"s\.png: cannot be written \(No space left"):
        save_picture(Image.new("L", (8, 8)), tmp_path / "s.png")
    with pytest.raises(UserError, match=r"x\.gif: cannot be written \(No space left"):
        animation(tmp_path / "x.gif")(torch.zeros(2, 1, 8, 8))
    assert contents(tmp_path) == {"s.png": b"old", "x.gif": b"old"}


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif"])
def test_formats_of_pictures(tmp_path: Path, suffix: str):
    save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / f"s.{suffix}")
    with Image.open(tmp_path / f"s.{suffix}") as picture:
        assert picture.size == (8, 8)
