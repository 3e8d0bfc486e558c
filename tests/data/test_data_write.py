"""Folders of samples, and sheets."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import cache, check_swappable, read_images, sample_sheet, write, write_images
from sfumato.errors import UserError


def levels(count: int, channels: int, mode: str = "L") -> tuple[torch.Tensor, np.ndarray]:
    top, dtype = (65535, np.uint16) if mode == "I;16" else (255, np.uint8)
    pixels = np.random.default_rng(0).integers(0, top + 1, (count, channels, 6, 5)).astype(dtype)
    return torch.from_numpy(pixels.astype(np.float32)) / (top / 2) - 1, pixels.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_what_is_written_is_read_back(tmp_path: Path, mode: str) -> None:
    items, pixels = levels(9, {"RGB": 3, "RGBA": 4}.get(mode, 1), mode)
    rows = [{"label": i % 2, "text": f"é {i}", "seed": i} for i in range(9)]
    write_images(tmp_path / "new" / "out", items, rows, mode=mode)
    data = read_images(tmp_path / "new" / "out")[0]
    assert data.mode == mode and (data.pixels == pixels).all()
    assert data.labels is not None and data.labels.tolist() == [i % 2 for i in range(9)]
    assert data.captions == [f"é {i}" for i in range(9)]
    again = data.batch(range(9)).data
    assert torch.allclose(again, items, atol=1e-6)


def test_pixels_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    items, pixels = levels(9, 3)
    monkeypatch.setattr(cache, "IN_MEMORY", 10)
    monkeypatch.setattr(write, "at_once", lambda *_: 2)
    made = write.to_pixels(items)
    assert isinstance(made, np.memmap) and (made == pixels).all()


def test_layout(tmp_path: Path) -> None:
    out = write_images(tmp_path / "out", levels(3, 1)[0], [{"label": None}] * 3)
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "metadata.jsonl"]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file_name": "000002.png", "label": None}
    assert read_images(out)[0].labels is None
    with Image.open(out / "000000.png") as image:
        image.verify()


def test_values_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    items = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 1, 1, 5)
    write_images(tmp_path / "out", items)
    assert read_images(tmp_path / "out")[0].pixels.ravel().tolist() == [0, 0, 128, 255, 255]


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        write_images(tmp_path / "out", torch.full((1, 1, 2, 2), torch.nan))
    assert not list(tmp_path.iterdir())


def test_existing_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_images(out, levels(4, 1)[0])  # an empty one is taken
    with pytest.raises(UserError, match="not empty; pass --overwrite") as told:
        write_images(out, levels(2, 1)[0])
    assert told.value.code == 2 and len(list(out.iterdir())) == 5
    write_images(out, levels(2, 1)[0], overwrite=True)
    assert len(list(out.iterdir())) == 3 and [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other things than images"):
        write_images(out, levels(2, 1)[0], overwrite=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        write_images(out / "thesis.tex", levels(2, 1)[0])


@pytest.mark.parametrize("name", ["café 猫.png", "caf\udce9.png", "a\u2028b\x85.png"])  # the second is no UTF-8
def test_any_name_can_be_written_and_read_back(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "x", torch.zeros(3, 1, 4, 4), [{"text": name}] * 3)
    assert read_images(tmp_path / "x")[0].captions == [name] * 3
    if name.startswith("café"):
        assert name in (tmp_path / "x" / "metadata.jsonl").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a mount")
def test_what_cannot_be_swapped_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/proc: something is mounted there"):
        check_swappable(Path("/proc"))
    with pytest.raises(UserError, match="/proc/new: cannot be written"):
        check_swappable(Path("/proc/new"))
    check_swappable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, raw: bytes) -> int:
        if path.name == "000003.png":
            raise OSError(28, "No space left on device")
        return write(path, raw)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left") as told:
        write_images(tmp_path / "out", levels(6, 1)[0])
    assert told.value.code == 1 and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").write_text("old")
    with pytest.raises(UserError):
        write_images(tmp_path / "out", levels(6, 1)[0], overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "000000.png"]  # the old one is still there


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder nobody can write to")
def test_read_only_place() -> None:
    with pytest.raises(UserError, match="cannot be written") as told:
        write_images("/proc/sfumato/out", levels(2, 1)[0])
    assert told.value.code == 1


def test_ten_thousand_take_seconds(tmp_path: Path) -> None:
    items = torch.rand(1000, 1, 28, 28) * 2 - 1
    start = time.perf_counter()
    write_images(tmp_path / "out", items)
    assert time.perf_counter() - start < 2  # a tenth of the number; 0.15 s on a quiet machine


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_sheet(channels: int, mode: str) -> None:
    items, pixels = levels(7, channels)
    sheet = sample_sheet(items, 4)
    assert sheet.mode == mode and 640 <= sheet.width <= 1200 and sheet.height < sheet.width
    scale = next(k for k in range(400, 0, -1) if 4 * (5 * k + max(1, k // 2)) + max(1, k // 2) == sheet.width)
    gap = max(1, scale // 2)
    top, left = gap + (6 * scale + gap), gap + (5 * scale + gap) * 2  # the seventh tile
    tile = np.asarray(sheet)[top : top + 6 * scale : scale, left : left + 5 * scale : scale]
    if channels != 4:
        assert (tile.reshape(6, 5, -1) == pixels[6]).all()


def test_sheet_of_large_images_is_not_shrunk() -> None:
    assert sample_sheet(torch.zeros(9, 3, 500, 500)).size == (1504, 1504)
    assert sample_sheet(torch.zeros(1, 1, 8, 8), 8).width <= 1200
