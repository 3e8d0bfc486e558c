"""Outpainting: images extended beyond their borders."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import write_images
from sfumato.model import Model
from sfumato.tasks import outpaint as module
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.outpaint import outpaint, window_offsets
from sfumato.types import Items

QUICK = {"steps": 3, "resample": 1}
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four digits of eight pixels."""
    data, _ = read_images("digits")
    rows = [{"label": int(k)} for k in data.labels[:4]]
    return write_images(tmp_path_factory.mktemp("digits") / "four", data.batch(range(4)).data, rows)


@pytest.mark.parametrize("before", [0, 1, 4, 9])
@pytest.mark.parametrize("after", [0, 3, 8, 21])
def test_windows_reach_both_ends_and_overlap_by_half(before: int, after: int):
    offsets = list(window_offsets(8, before, after))
    assert offsets[0] == before and min(offsets) == 0 and max(offsets) == before + after
    assert len(set(offsets)) == len(offsets)
    for side in (sorted(k for k in offsets if k <= before), sorted(k for k in offsets if k >= before)):
        assert all(b - a <= 4 for a, b in pairwise(side))


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_the_original_is_kept_inside_the_extended_image(model: Model, source: Path, tmp_path: Path, method: str):
    originals = read_images(source)[0]
    result = outpaint(model, source, left=3, top=6, bottom=2, method=method, out=tmp_path / "out", **QUICK)
    items = result.items.stack()
    assert items.shape == (4, 1, 16, 11) and result.statistics["size"] == "11x16"
    assert torch.isfinite(items).all() and items.abs().max() <= 1
    back = read_images(tmp_path / "out")[0]
    assert (back.pixels[:, 6:14, 3:] == originals.pixels).all()  # bit for bit
    assert items[:, :, :6].std() > 0.01 and items[..., :3].std() > 0.01
    assert (tmp_path / "out-sheet.png").is_file()
    assert [row["label"] for row in result.metadata] == [int(k) for k in originals.labels]


def test_an_item_does_not_depend_on_its_batch(model: Model, source: Path):
    whole, parts = (outpaint(model, source, right=5, batch=n, seed=3, **QUICK).items.stack() for n in (32, 3))
    assert torch.allclose(whole, parts, **CLOSE)
    assert not torch.allclose(whole, outpaint(model, source, right=5, seed=4, **QUICK).items.stack(), **CLOSE)


def test_each_window_has_its_own_noise_and_sees_earlier_windows(
    model: Model, source: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    class Inpainter:
        def __init__(self, model, masks, raw, sampling, resample, seed):
            self.masks, self.seed = masks, seed

        def __call__(self, numbers, items):
            x = items.stack()
            seen.append((self.seed, self.masks[numbers[0]].clone(), x.clone()))
            return Items(torch.where(self.masks[numbers][:, None], float(self.seed), x))

    monkeypatch.setitem(module.METHODS, "repaint", Inpainter)
    items = outpaint(model, source, right=8, bottom=4, seed=10, method="repaint", **QUICK).items.stack()
    assert [seed for seed, _, _ in seen] == [11, 12, 13, 14, 15]
    assert [int(mask.sum()) for _, mask, _ in seen] == [32, 32, 32, 16, 16]  # halves, then quarters in the corner
    assert (seen[1][2][:, :, :, :4] == 11).all()
    assert (items[:, :, :8, 8:12] == 11).all() and (items[:, :, 8:, 12:] == 15).all()


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_a_window_is_inpainted_whatever_is_under_the_mask(model: Model, source: Path, tmp_path: Path, method: str):
    """The second window equals inpainting of the same kept half beside random pixels."""
    x, mask = read_images(source)[0].batch(range(4)).data, torch.zeros(8, 8)
    mask[:, 4:] = 255
    Image.fromarray(mask.byte().numpy()).save(tmp_path / "mask.png")
    random = torch.rand(4, 1, 8, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = write_images(tmp_path / "in", torch.cat([x[..., 4:], random], -1))
    settings = {**QUICK, "method": method, "label": "3"}
    wide = outpaint(model, source, right=4, seed=5, **settings).items.stack()
    assert torch.allclose(
        inpaint(model, images, mask=tmp_path / "mask.png", seed=6, **settings).items.stack(), wide[..., 4:], **CLOSE
    )


def test_a_table_has_no_borders(tmp_path: Path):
    from tests.training.common import small_fit

    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    model = small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16")
    with pytest.raises(UserError, match="outpaint: not supported for models of modality table"):
        outpaint(model, tmp_path / "t.csv", left=2)
