"""outpaint: images continued beyond their borders."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato.data import read_images, write_images
from sfumato.errors import UserError
from sfumato.model import Model
from sfumato.tasks import outpaint as module
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.outpaint import offsets, outpaint

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
    places = list(offsets(8, before, after))
    assert places[0] == before and min(places) == 0 and max(places) == before + after
    assert len(set(places)) == len(places)
    for side in (sorted(p for p in places if p <= before), sorted(p for p in places if p >= before)):
        assert all(b - a <= 4 for a, b in pairwise(side))


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_what_is_given_is_in_the_middle_of_more(model: Model, source: Path, tmp_path: Path, method: str):
    given = read_images(source)[0]
    result = outpaint(model, source, left=3, top=6, bottom=2, method=method, out=tmp_path / "out", **QUICK)
    assert result.items.shape == (4, 1, 16, 11) and result.facts["size"] == "11x16"
    assert torch.isfinite(result.items).all() and result.items.abs().max() <= 1
    back = read_images(tmp_path / "out")[0]
    assert (back.pixels[:, 6:14, 3:] == given.pixels).all()  # to the bit
    assert result.items[:, :, :6].std() > 0.01 and result.items[..., :3].std() > 0.01
    assert (tmp_path / "out-sheet.png").is_file()
    assert [row["label"] for row in result.rows] == [int(k) for k in given.labels]


def test_an_item_is_the_same_whatever_the_batch(model: Model, source: Path):
    whole, parts = (outpaint(model, source, right=5, batch=n, seed=3, **QUICK).items for n in (32, 3))
    assert torch.allclose(whole, parts, **CLOSE)
    assert not torch.allclose(whole, outpaint(model, source, right=5, seed=4, **QUICK).items, **CLOSE)


def test_each_window_has_noise_of_its_own_and_sees_what_was_painted(
    model: Model, source: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    class Fill:
        def __init__(self, model, masks, labels, how, resample, seed):
            self.masks, self.seed = masks, seed

        def __call__(self, items, x):
            seen.append((self.seed, self.masks[items[0]].clone(), x.clone()))
            return torch.where(self.masks[items][:, None], float(self.seed), x)

    monkeypatch.setitem(module.METHODS, "repaint", Fill)
    items = outpaint(model, source, right=8, bottom=4, seed=10, method="repaint", **QUICK).items
    assert [seed for seed, _, _ in seen] == [11, 12, 13, 14, 15]
    assert [int(mask.sum()) for _, mask, _ in seen] == [32, 32, 32, 16, 16]  # halves, then quarters in the corner
    assert (seen[1][2][:, :, :, :4] == 11).all()
    assert (items[:, :, :8, 8:12] == 11).all() and (items[:, :, 8:, 12:] == 15).all()


@pytest.mark.parametrize("method", ["gradient", "repaint"])
def test_a_window_is_inpainted_whatever_lay_there(model: Model, source: Path, tmp_path: Path, method: str):
    """The second window is what inpaint makes of the same kept half with anything beside it."""
    x, mask = read_images(source)[0].batch(range(4)).data, torch.zeros(8, 8)
    mask[:, 4:] = 255
    Image.fromarray(mask.byte().numpy()).save(tmp_path / "mask.png")
    beside = torch.rand(4, 1, 8, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = write_images(tmp_path / "in", torch.cat([x[..., 4:], beside], -1))
    how = {**QUICK, "method": method, "label": "3"}
    wide = outpaint(model, source, right=4, seed=5, **how).items
    assert torch.allclose(
        inpaint(model, given, mask=tmp_path / "mask.png", seed=6, **how).items, wide[..., 4:], **CLOSE
    )


def test_a_table_has_no_borders(tmp_path: Path):
    from tests.training.common import small_fit

    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    model = small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16")
    with pytest.raises(UserError, match=r"outpaint: not for a model of this modality \(table\)"):
        outpaint(model, tmp_path / "t.csv", left=2)
