"""Folders of samples, and sample sheets."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import cache
from sfumato.errors import UserError
from sfumato.modalities.image import write
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import sample_sheet, write_images


def levels(count: int, channels: int, mode: str = "L") -> tuple[torch.Tensor, np.ndarray]:
    """Random images (N, C, H, W) in [-1, 1], and their pixels (N, H, W, C)."""
    maximum, dtype = (65535, np.uint16) if mode == "I;16" else (255, np.uint8)
    pixels = np.random.default_rng(0).integers(0, maximum + 1, (count, channels, 6, 5)).astype(dtype)
    return torch.from_numpy(pixels.astype(np.float32)) / (maximum / 2) - 1, pixels.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_written_images_are_read_back(tmp_path: Path, mode: str) -> None:
    items, pixels = levels(9, {"RGB": 3, "RGBA": 4}.get(mode, 1), mode)
    rows = [{"label": i % 2, "text": f"é {i}", "seed": i} for i in range(9)]
    write_images(tmp_path / "new" / "out", items, rows, mode=mode)
    data = read_images(tmp_path / "new" / "out")[0]
    assert data.mode == mode and (data.pixels == pixels).all()
    assert data.labels is not None and data.labels.tolist() == [i % 2 for i in range(9)]
    assert data.captions == [f"é {i}" for i in range(9)]
    assert torch.allclose(data.batch(range(9)).data, items, atol=1e-6)


def test_pixels_are_converted_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    items, pixels = levels(9, 3)
    monkeypatch.setattr(cache, "IN_MEMORY", 10)
    monkeypatch.setattr(write, "batch_limit", lambda *_: 2)
    converted = write.to_pixels(items)
    assert isinstance(converted, np.memmap) and (converted == pixels).all()


def test_files_of_the_folder(tmp_path: Path) -> None:
    out = write_images(tmp_path / "out", levels(3, 1)[0], [{"label": None}] * 3)
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "metadata.jsonl"]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file_name": "000002.png", "label": None}
    assert read_images(out)[0].labels is None
    with Image.open(out / "000000.png") as image:
        image.verify()


def test_values_out_of_range_are_clipped(tmp_path: Path) -> None:
    items = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 1, 1, 5)
    write_images(tmp_path / "out", items)
    assert read_images(tmp_path / "out")[0].pixels.ravel().tolist() == [0, 0, 128, 255, 255]


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        write_images(tmp_path / "out", torch.full((1, 1, 2, 2), torch.nan))
    assert not list(tmp_path.iterdir())


def test_only_a_folder_of_images_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_images(out, levels(4, 1)[0])  # an empty folder may be used
    with pytest.raises(UserError, match="not empty; pass --overwrite") as error:
        write_images(out, levels(2, 1)[0])
    assert error.value.code == 2 and len(list(out.iterdir())) == 5
    write_images(out, levels(2, 1)[0], overwrite=True)
    assert len(list(out.iterdir())) == 3 and [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other things than images"):
        write_images(out, levels(2, 1)[0], overwrite=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        write_images(out / "thesis.tex", levels(2, 1)[0])


@pytest.mark.parametrize("name", ["café 猫.png", "caf\udce9.png", "a\u2028b\x85.png"])  # the second is not UTF-8
def test_any_text_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "x", torch.zeros(3, 1, 4, 4), [{"text": name}] * 3)
    assert read_images(tmp_path / "x")[0].captions == [name] * 3
    if name.startswith("café"):
        assert name in (tmp_path / "x" / "metadata.jsonl").read_text(encoding="utf-8")


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, raw: bytes) -> int:
        if path.name == "000003.png":
            raise OSError(28, "No space left on device")
        return write(path, raw)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left") as error:
        write_images(tmp_path / "out", levels(6, 1)[0])
    assert error.value.code == 1 and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").write_text("old")
    with pytest.raises(UserError):
        write_images(tmp_path / "out", levels(6, 1)[0], overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "000000.png"]  # the old folder is untouched


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a read-only folder")
def test_read_only_folder_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be written") as error:
        write_images("/proc/sfumato/out", levels(2, 1)[0])
    assert error.value.code == 1


def test_writing_is_fast(tmp_path: Path) -> None:
    items = torch.rand(1000, 1, 28, 28) * 2 - 1
    start = time.perf_counter()
    write_images(tmp_path / "out", items)
    assert time.perf_counter() - start < 2  # 0.15 s on an idle machine


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_sample_sheet_is_a_grid_of_enlarged_images(channels: int, mode: str) -> None:
    items, pixels = levels(7, channels)
    sheet = sample_sheet(items, 4)
    assert sheet.mode == mode and 640 <= sheet.width <= 1200 and sheet.height < sheet.width
    scale = next(k for k in range(400, 0, -1) if 4 * (5 * k + max(1, k // 2)) + max(1, k // 2) == sheet.width)
    gap = max(1, scale // 2)
    top, left = gap + (6 * scale + gap), gap + (5 * scale + gap) * 2  # the seventh tile
    tile = np.asarray(sheet)[top : top + 6 * scale : scale, left : left + 5 * scale : scale]
    if channels != 4:
        assert (tile.reshape(6, 5, -1) == pixels[6]).all()


def test_sample_sheet_of_large_images_is_not_reduced() -> None:
    assert sample_sheet(torch.zeros(9, 3, 500, 500)).size == (1504, 1504)
    assert sample_sheet(torch.zeros(1, 1, 8, 8), 8).width <= 1200
