"""Checkpoints: replaced atomically, whenever the process is killed."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from sfumato.errors import UserError
from sfumato.training import checkpoint
from sfumato.training.checkpoint import load_state, save_state


class Killed(BaseException):
    """Simulates SIGKILL."""


def steps_done(folder: Path) -> int | None:
    """Steps of the checkpoint that is loaded; checks that its two files belong together."""
    state = load_state(folder)
    if state is None:
        return None
    tensors, metadata = state
    assert int(tensors["x"][0]) == metadata["done"]
    return metadata["done"]


def save(folder: Path, done: int) -> None:
    save_state(folder, ({"x": torch.full((1000,), float(done))}, {"done": done}))


def killed_save(folder: Path, monkeypatch: pytest.MonkeyPatch, die_at: int, done: int) -> bool:
    """Save, but die right before the `die_at`-th change of the file system; returns whether it died."""
    left = [die_at]

    def dying(call):
        def wrapped(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            patch.setattr(module, name, dying(getattr(module, name)))
        patch.setattr(shutil, "rmtree", dying(remove_tree))
        patch.setattr(checkpoint, "write_tensors", dying(checkpoint.write_tensors))
        try:
            save(folder, done)
        except Killed:
            return True
    return False


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    """`shutil.rmtree` in countable steps."""
    if not path.is_dir():
        return
    for file in sorted(path.iterdir(), reverse=True):
        os.unlink(file)
    os.rmdir(path)


def test_a_complete_checkpoint_survives_a_kill_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moments = 0
    for die_at in range(30):
        folder = tmp_path / str(die_at) / "checkpoint"
        save(folder, 1)
        died = killed_save(folder, monkeypatch, die_at, 2)
        assert steps_done(folder) in (1, 2), die_at
        moments += died
    assert 5 < moments < 30


def test_a_complete_checkpoint_survives_two_kills_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for first in range(12):
        for second in range(12):
            folder = tmp_path / f"{first}-{second}" / "checkpoint"
            save(folder, 1)
            killed_save(folder, monkeypatch, first, 2)
            before = steps_done(folder)
            killed_save(folder, monkeypatch, second, 3)
            assert steps_done(folder) in (before, 3), (first, second)


def test_the_old_checkpoint_is_loaded_until_the_new_one_is_in_place(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    folder.rename(tmp_path / "checkpoint.old")
    half = tmp_path / "checkpoint.new"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert steps_done(folder) == 1
    save(folder, 2)
    assert steps_done(folder) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_no_checkpoint(tmp_path: Path):
    assert load_state(tmp_path / "checkpoint") is None
    (tmp_path / "checkpoint.new").mkdir()
    assert load_state(tmp_path / "checkpoint") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_full_disk_leaves_the_previous_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoint"
    save(folder, 1)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors" if name.endswith("tensors") else "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 2)
    assert steps_done(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # a partial file would keep the disk full


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_reported(name: str, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    (folder / name).write_bytes(b"\x80\x04pickle or whatever")
    with pytest.raises(UserError, match=r"checkpoint is damaged.*--overwrite") as caught:
        load_state(folder)
    assert caught.value.code == 1


def test_dtypes_survive(tmp_path: Path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor(True), "c": torch.tensor(2**60)}
    save_state(tmp_path / "c", (tensors, {"done": 0}))
    loaded = load_state(tmp_path / "c")
    assert loaded is not None
    assert all(torch.equal(loaded[0][k], v) and loaded[0][k].dtype == v.dtype for k, v in tensors.items())
