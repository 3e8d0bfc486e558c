"""Checkpoints: whole or not at all, whenever the process ends."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from sfumato.errors import UserError
from sfumato.training import state as state_module
from sfumato.training.state import load_state, save_state


class Killed(BaseException):
    """In place of a SIGKILL."""


def number(folder: Path) -> int | None:
    """Which state is found, and that its two files belong together."""
    found = load_state(folder)
    if found is None:
        return None
    tensors, facts = found
    assert int(tensors["x"][0]) == facts["done"]
    return facts["done"]


def save(folder: Path, done: int) -> None:
    save_state(folder, ({"x": torch.full((1000,), float(done))}, {"done": done}))


def calls_of_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch, die_at: int, done: int) -> bool:
    """Save, but die right before the `die_at`-th change of the file system; whether it died."""
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
        patch.setattr(state_module, "write_tensors", dying(state_module.write_tensors))
        try:
            save(folder, done)
        except Killed:
            return True
    return False


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    """`shutil.rmtree` in steps that can be counted."""
    if not path.is_dir():
        return
    for file in sorted(path.iterdir(), reverse=True):
        os.unlink(file)
    os.rmdir(path)


def test_killed_at_any_moment_one_whole_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moments = 0
    for die_at in range(30):
        folder = tmp_path / str(die_at) / "checkpoint"
        save(folder, 1)
        died = calls_of_a_save(folder, monkeypatch, die_at, 2)
        assert number(folder) in (1, 2), die_at
        moments += died
    assert 5 < moments < 30


def test_killed_in_two_saves_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for first in range(12):
        for second in range(12):
            folder = tmp_path / f"{first}-{second}" / "checkpoint"
            save(folder, 1)
            calls_of_a_save(folder, monkeypatch, first, 2)
            before = number(folder)
            calls_of_a_save(folder, monkeypatch, second, 3)
            assert number(folder) in (before, 3), (first, second)


def test_the_old_one_counts_while_the_new_one_is_not_in_place(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    folder.rename(tmp_path / "checkpoint.old")
    half = tmp_path / "checkpoint.new"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert number(folder) == 1
    save(folder, 2)
    assert number(folder) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_nothing_there(tmp_path: Path):
    assert load_state(tmp_path / "checkpoint") is None
    (tmp_path / "checkpoint.new").mkdir()
    assert load_state(tmp_path / "checkpoint") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_full_disk_leaves_the_checkpoint_before(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoint"
    save(folder, 1)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_module, "write_tensors" if name.endswith("tensors") else "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 2)
    assert number(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # half a file would fill the disk for good


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_damage_is_told(name: str, tmp_path: Path):
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
