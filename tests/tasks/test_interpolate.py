"""Interpolation: exact ends, even steps, usable files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.modalities.base import Modality
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import animation, write_images
from sfumato.model import Model
from sfumato.tasks.generate import generate
from sfumato.tasks.interpolate import interpolate
from tests.tasks.test_edit import token_model

CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two digits."""
    folder = tmp_path_factory.mktemp("digits") / "two"
    write_images(folder, read_images("digits")[0].batch([3, 9]).data)
    return [folder / "000000.png", folder / "000001.png"]


@pytest.fixture(scope="module")
def ends(model: Model, files: list[Path]) -> list[torch.Tensor]:
    return [model.autoencode(read_images(file)[0].batch([0]).data).stack().clamp(-1, 1)[0] for file in files]


def test_generated_ends_are_those_of_generate(model: Model):
    generated = generate(model, n=5, seed=4).items.stack()
    for path in ("flow", "latent"):
        curve = interpolate(model, "1", "4", n=5, seed=4, path=path).items.stack()
        assert torch.allclose(curve[[0, -1]], generated[[1, 4]], **CLOSE)
    assert torch.equal(interpolate(model, n=2).items.stack(), interpolate(model, "0", "1", n=2).items.stack())


def test_autoguidance_is_reported(model: Model, files: list[Path], monkeypatch: pytest.MonkeyPatch):
    """That of generate for generated ends; none if a file is inverted."""
    monkeypatch.setitem(model.config.sample, "autoguidance", 1.5)
    for ends, path, expected in (
        (("0", "1"), "flow", 1.5),
        ((files[0], "1"), "flow", 1.0),
        ((files[0], "1"), "latent", 1.5),
    ):
        result = interpolate(model, *ends, n=2, path=path, steps=3)
        assert result.statistics["autoguidance"] == result.metadata[0]["autoguidance"] == expected


@pytest.mark.parametrize("path", ["flow", "latent"])
def test_files_are_reproduced_at_the_ends(model: Model, files: list[Path], ends: list[torch.Tensor], path: str):
    curve = interpolate(model, *files, n=3, path=path, label_a="3", label_b="9").items.stack()
    assert torch.allclose(curve[0], ends[0], atol=2e-3) and torch.allclose(curve[-1], ends[1], atol=2e-3)
    assert min(float((curve[1] - end).abs().mean()) for end in ends) > 0.01


def test_the_curve_has_no_jumps(model: Model, files: list[Path]):
    curve = interpolate(model, *files, n=33, steps=8).items.stack()
    steps = (curve[1:] - curve[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < 0.5 * float((curve[-1] - curve[0]).norm()) and steps.min() > 0


def test_items_do_not_depend_on_the_batch_or_on_each_other(model: Model, files: list[Path]):
    mixed = {"steps": 6, "label_b": "2"}
    whole = interpolate(model, files[0], "5", n=9, **mixed).items.stack()
    assert torch.allclose(interpolate(model, files[0], "5", n=9, batch=2, **mixed).items.stack(), whole, **CLOSE)
    assert torch.allclose(interpolate(model, files[0], "5", n=5, **mixed).items.stack(), whole[::2], **CLOSE)
    reverse = interpolate(model, "5", files[0], n=9, steps=6, label_a="2").items.stack()
    assert torch.allclose(reverse.flip(0), whole, atol=1e-3)


@pytest.mark.parametrize("path", ["flow", "latent"])
def test_a_stochastic_sampler_is_replaced_by_a_deterministic_one(
    model: Model, path: str, monkeypatch: pytest.MonkeyPatch
):
    curves: list[torch.Tensor] = []
    for sampler in ("heun", "sde", "ddpm"):
        monkeypatch.setitem(model.config.sample, "sampler", sampler)
        curves.append(interpolate(model, "1", "4", n=3, path=path).items.stack())
    assert torch.equal(curves[0], curves[1]) and torch.equal(curves[0], curves[2])


def test_conditions_matter(model: Model, files: list[Path]):
    three, eight = (interpolate(model, "0", "1", n=3, label_a="3", label_b=b).items.stack() for b in ("3", "8"))
    assert torch.allclose(three[0], eight[0], **CLOSE) and not torch.allclose(three[1], eight[1], atol=1e-3)


def test_what_is_written(model: Model, tmp_path: Path):
    reports: list[tuple] = []
    interpolate(
        model,
        "2",
        "7",
        n=5,
        label_a="3",
        label_b="3",
        out=tmp_path / "out",
        animation=str(tmp_path / "animations" / "curve.gif"),
        batch=2,
        progress=lambda *report: reports.append(report),
    )
    data, _ = read_images(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert len(data) == 5 and [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert {(row["label"], row["a"], row["b"], row["path"]) for row in rows} == {(3, "2", "7", "flow")}
    assert (tmp_path / "out-sheet.png").is_file() and reports == [("interpolate", i, 5) for i in (2, 4, 5)]
    with Image.open(tmp_path / "animations" / "curve.gif") as frames:
        assert frames.n_frames == 5 and frames.size == (256, 256)
    assert "label" not in interpolate(model, "0", "1", n=2, label_a="3", label_b="4").metadata[0]


@pytest.mark.parametrize(("channels", "suffix"), [(1, ".gif"), (3, ".gif"), (4, ".gif"), (3, ".webp"), (4, ".webp")])
def test_animations_show_the_items(tmp_path: Path, channels: int, suffix: str):
    """With few colours, as a GIF needs."""
    levels = np.random.default_rng(0).integers(0, 2, (4, channels, 6, 7)) * 255
    if channels == 4:
        levels[:, 3] = 255
    animation(tmp_path / f"x{suffix}")(torch.from_numpy(levels / 127.5 - 1).float())
    with Image.open(tmp_path / f"x{suffix}") as frames:
        assert frames.n_frames == 4
        for i in range(4):
            frames.seek(i)
            frame = np.asarray(frames.convert("RGB"))[18::37, 18::37]
            expected = levels[i].transpose(1, 2, 0)[..., :3]
            assert np.abs(frame.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "-n must be at least 2"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"path": "scenic"}, "unknown path 'scenic'"),
        ({"label_a": "zebra"}, "zebra.*unknown to the model"),
        ({"animation": Path("x.mp4")}, r"x\.mp4: an animation's name ends in \.gif or \.webp"),
        ({"a": "nowhere.png"}, r"nowhere\.png: no such file"),
        ({"a": "-1"}, "-1: no such file"),
    ],
)
def test_wrong_settings(model: Model, tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        interpolate(model, out=tmp_path / "out", **settings)
    assert error.value.code == 2 and "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_wrong_files_and_models(make_model: Callable[..., Model], sound: Modality, files: list[Path], tmp_path: Path):
    model = make_model()
    with pytest.raises(UserError, match="holds 2 items; give a file with one item") as error:
        interpolate(model, files[0].parent, files[0])
    assert error.value.code == 1
    write_images(tmp_path / "colour", torch.rand(1, 3, 12, 10) * 2 - 1)
    with pytest.raises(UserError, match="its images are 8x8 L"):
        interpolate(model, files[0], tmp_path / "colour" / "000000.png")
    model.modality = sound
    with pytest.raises(UserError, match="--animation: not supported for models of modality sound"):
        interpolate(model, animation=tmp_path / "x.gif")


def test_every_condition_is_interpolated(portraits: Model):
    settings = {"n": 3, "seed": 4, "steps": 8}
    mixed, plain, bold = (
        interpolate(
            portraits, label_a=["3", "age=23", f"style={a}"], label_b=["digit=3", "age=28", f"style={b}"], **settings
        )
        for a, b in (("plain", "bold"), ("plain", "plain"), ("bold", "bold"))
    )
    curve, ends = mixed.items.stack(), [plain.items.stack(), bold.items.stack()]
    assert torch.allclose(curve[0], ends[0][0], **CLOSE) and torch.allclose(curve[2], ends[1][2], **CLOSE)
    assert not any(torch.allclose(curve[1], end[1], atol=1e-3) for end in ends)
    shared = [
        {name: row.get(name) for name in ("digit", "style", "age")} for row in (*mixed.metadata, bold.metadata[0])
    ]
    assert shared == [{"digit": 3, "style": None, "age": None}] * 3 + [{"digit": 3, "style": "bold", "age": None}]


def test_generated_ends_have_all_conditions_of_generate(portraits: Model):
    for label in (None, "digit=3", ["style=bold", "age=22"]):
        generated = generate(portraits, n=5, seed=4, label=label).items.stack()
        curve = interpolate(portraits, "1", "4", n=2, seed=4, label_a=label, label_b=label).items.stack()
        assert torch.allclose(curve, generated[[1, 4]], **CLOSE)


@pytest.mark.parametrize("path", ["flow", "latent"])
def test_items_of_one_length_among_several(model: Model, sound: Modality, path: str, monkeypatch: pytest.MonkeyPatch):
    model = token_model(replace(model.config, sample={"steps": 4}), sound, monkeypatch)
    model.codec.learn_lengths([torch.arange(8) < torch.tensor([[3], [5], [3], [3]])])
    lengths = [int(model.draw_mask([i], 0).sum()) for i in range(20)]
    a, b, other = lengths.index(3), len(lengths) - 1 - lengths[::-1].index(3), lengths.index(5)
    curve = interpolate(model, str(a), str(b), n=3, path=path).items
    new = model.decode(model.sample([a, b]))
    assert [item.shape for item in curve] == [(3, 2)] * 3
    assert torch.allclose(curve[0], new[0], **CLOSE) and torch.allclose(curve[2], new[1], **CLOSE)
    with pytest.raises(UserError, match="not supported between items of different lengths"):
        interpolate(model, str(a), str(other), path=path)
