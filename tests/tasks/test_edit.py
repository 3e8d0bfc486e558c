"""Editing: strength, labels and inversion; independence of the batch; errors in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.codecs import Codec
from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.config import DataSettings
from sfumato.core import initial_noise, sample, time_grid
from sfumato.data.dataset import Unlabelled
from sfumato.errors import UserError
from sfumato.modalities.base import Modality
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import write_images
from sfumato.model import Model
from sfumato.storage import ModelConfig
from sfumato.tasks.edit import edit, masked_denoiser
from sfumato.tasks.generate import generate
from sfumato.tasks.inputs import SourceItems
from sfumato.types import Batch, Items, Latent
from tests.training.common import stirred

CLOSE = {"atol": 1e-4, "rtol": 0.0}
STYLES = ("plain", "bold")


class TokenCodec(Codec):
    """Sequences of up to 8 pairs of numbers, each pair a token."""

    tokens = True

    def __init__(self) -> None:
        super().__init__((8, 2))
        self.encoder = self.decoder = torch.nn.Identity()
        self.bottleneck = make_bottleneck("none", 2)


class Sequences(Unlabelled):
    """Items (L_i, 2)."""

    def __init__(self, lengths: list[int]) -> None:
        self.items, self.notes = Items(torch.randn(n, 2) for n in lengths), list[str]()

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, index: list[int]) -> Batch:
        data, mask = self.items.select(index).pad()
        return Batch(data, torch.tensor(index), mask=mask)


def token_model(config: ModelConfig, modality: Modality, patch: pytest.MonkeyPatch) -> Model:
    """A model of sequences, with the methods of a modality."""
    patch.setattr(type(modality), "codec_class", TokenCodec)
    patch.setattr("sfumato.model.find_modality", lambda name: modality)
    net = {"name": "dit", "width": 32, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    model = Model(replace(config, shape=(8, 2), codec={}, conditioner={}, denoiser=config.denoiser | {"net": net}))
    stirred(model.denoiser.net)
    return model.eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six digits with their labels."""
    data, _ = read_images("digits")
    folder = tmp_path_factory.mktemp("digits") / "six"
    rows = [{"label": int(k)} for k in data.labels[:6]]
    return write_images(folder, data.batch(range(6)).data, rows)


@pytest.fixture(scope="module")
def x(digits: Path) -> torch.Tensor:
    return read_images(digits)[0].batch(range(6)).data


def test_strength_goes_from_the_codec_to_pure_noise(model: Model, digits: Path, x: torch.Tensor):
    codec = model.autoencode(x).stack().clamp(-1, 1)
    edited = [edit(model, digits, strength=s, guidance=1.0).items.stack() for s in (0, 0.05, 0.3, 1)]
    assert torch.allclose(edited[0], codec, **CLOSE)
    distances = [float((items - codec).abs().mean()) for items in edited]
    assert distances == sorted(distances) and distances[3] > 5 * distances[1] > 0
    sampling = replace(model.sampling, guidance=1.0)
    raw, schedule = read_images(digits)[0].batch(range(6)).raw, model.denoiser.schedule
    levels = schedule.levels(time_grid(schedule, sampling.steps, sampling.grid))
    noise, step = model.noise(range(6), 0, "edit"), model.step_rule(raw, 6, sampling)
    z = sample(model.denoise(raw, 6, sampling), levels, initial_noise(levels[0], noise), step, noise)
    new = model.decode(Latent(z)).stack().clamp(-1, 1)
    assert torch.allclose(edited[3], new, **CLOSE)  # x is gone; the noise is that of item i


def test_noise_differs_from_that_of_generate(model: Model, digits: Path):
    """With its original noise, a generated item would come back unchanged."""
    settings = {"label": "3", "guidance": 1.0, "seed": 2}
    generated, edited = generate(model, n=6, **settings), edit(model, digits, strength=1, **settings)
    assert not torch.allclose(generated.items.stack(), edited.items.stack(), atol=1e-2)


@pytest.mark.parametrize("method", ["noise", "invert"])
def test_an_item_is_the_same_whatever_the_batch(model: Model, digits: Path, method: str):
    settings = {"method": method, "steps": 6, "label": "3", "seed": 2}
    whole, parts = (edit(model, digits, batch=batch, **settings).items.stack() for batch in (64, 4))
    assert torch.allclose(whole, parts, **CLOSE) and len(whole) == 6
    other = edit(model, digits, **(settings | {"label": "4"})).items.stack()
    assert not torch.allclose(whole, other, atol=1e-2)
    other = edit(model, digits, **(settings | {"seed": 3})).items.stack()
    assert torch.allclose(whole, other) == (method == "invert")


def test_inversion_reproduces_items_under_their_own_label(model: Model, digits: Path, x: torch.Tensor):
    result = edit(model, digits, method="invert", guidance=1.5)
    assert torch.allclose(result.items.stack(), model.autoencode(x).stack().clamp(-1, 1), atol=2e-3)
    assert result.statistics["steps"] == 50 and 0 < result.statistics["inversion_error"] <= 1e-3
    assert max(row["inversion_error"] for row in result.metadata) <= 1e-3


def test_what_is_written(model: Model, digits: Path, tmp_path: Path):
    reports: list[tuple] = []
    edit(model, digits, out=tmp_path / "out", label="7", batch=4, progress=lambda *report: reports.append(report))
    data, _ = read_images(tmp_path / "out")
    assert len(data) == 6 and data.label_names == ["7"] and reports == [("edit", 4, 6), ("edit", 6, 6)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["source_label"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[2]["source"] == "000002.png" and rows[0]["strength"] == 0.6 and rows[0]["method"] == "noise"
    assert (tmp_path / "out-sheet.png").is_file()


def test_one_file_without_a_label(model: Model, digits: Path):
    labelled = edit(model, digits / "000003.png", method="invert", steps=4, source_label="3", label="5")
    assert labelled.items.stack().shape == (1, 1, 8, 8) and labelled.metadata[0]["label"] == 5
    unlabelled = edit(model, digits / "000003.png", method="invert", steps=4, label="5")
    assert not torch.allclose(labelled.items.stack(), unlabelled.items.stack(), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.5}, "strength must be between 0 and 1, not 1.5"),
        ({"strength": -0.1}, "strength must be between 0 and 1"),
        ({"label": "zebra"}, "zebra.*unknown to the model"),
        ({"source_label": "zebra"}, "zebra.*unknown to the model"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"method": "invert", "sampler": "ddpm"}, "--sampler applies only to --method noise"),
        ({"sampler": "huen"}, "did you mean 'heun'"),
        ({"steps": 0}, "--steps must be at least 1"),
    ],
)
def test_wrong_settings(model: Model, digits: Path, tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        edit(model, digits, out=tmp_path / "out", **settings)
    assert error.value.code == 2 and "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_wrong_sources(model: Model, make_model: Callable[..., Model], digits: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "colour", torch.rand(3, 3, 12, 10) * 2 - 1)
    write_images(tmp_path / "strange", torch.rand(3, 1, 8, 8) * 2 - 1, [{"label": "zebra"}] * 3)
    for source, message in (
        ("empty", "no images here"),
        ("colour", "its images are 8x8 L"),
        ("nowhere", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            edit(model, tmp_path / source)
    with pytest.raises(UserError, match="'zebra' is unknown to the model"):
        edit(model, tmp_path / "strange")
    with pytest.raises(UserError, match="trained without labels"):
        edit(make_model(0), digits, label="3")
    assert len(edit(make_model(0), digits).metadata) == 6  # a model without classes ignores labels


def test_a_model_of_another_modality(make_model: Callable[..., Model], tmp_path: Path):
    (tmp_path / "people.csv").write_text("a,b\n" + "1,2\n3,4\n" * 20)
    with pytest.raises(UserError, match=r"people\.csv"):
        edit(make_model(), tmp_path / "people.csv")


def test_inversion_at_strength_0_is_the_codec_alone(model: Model, digits: Path, x: torch.Tensor):
    result = edit(model, digits, method="invert", strength=0, label="3")
    assert result.statistics["sampler"] == "heun"
    assert torch.allclose(result.items.stack(), model.autoencode(x).stack().clamp(-1, 1), **CLOSE)
    assert result.statistics["inversion_error"] == 0


def test_method_noise_ignores_the_labels_of_the_source(model: Model, digits: Path, tmp_path: Path):
    """Unknown classes are allowed with a new label, except for inversion."""
    data, _ = read_images(digits)
    folder = write_images(
        tmp_path / "in", data.batch(range(6)).data, [{"label": "tree"}] * 3 + [{"label": "house"}] * 3
    )
    rows = edit(model, folder, label="3").metadata
    assert [(row["label"], row["source_label"]) for row in rows] == [(3, "tree")] * 3 + [(3, "house")] * 3
    with pytest.raises(UserError, match=r"tree|house"):
        edit(model, folder, label="3", method="invert")


def test_items_without_a_label_stay_without_one(model: Model, digits: Path, tmp_path: Path):
    data, _ = read_images(digits)
    rows = [{"label": 0}, {"label": 1}, {}, {}]
    folder = write_images(tmp_path / "in", data.batch(range(4)).data, rows)
    assert [row.get("label") for row in edit(model, folder).metadata] == [0, 1, None, None]
    assert [row.get("sampler") for row in edit(model, folder, sampler="euler").metadata] == ["euler"] * 4


@pytest.mark.parametrize("method", ["noise", "invert"])
def test_conditions_that_are_not_named_keep_their_values(
    portraits_run: Path, x: torch.Tensor, tmp_path: Path, method: str
):
    rows = [{"digit": i, "style": STYLES[i % 2], "age": 20.5 + i} for i in range(6)]
    folder, settings = write_images(tmp_path / "in", x, rows), {"method": method, "steps": 4}
    result = edit(portraits_run, folder, label="digit=7", **settings)
    edited = result.items.stack()
    plain, bold = (edit(portraits_run, folder, label=["7", f"style={k}"], **settings).items.stack() for k in STYLES)
    assert torch.equal(edited[::2], plain[::2]) and torch.equal(edited[1::2], bold[1::2])
    older = edit(portraits_run, folder, label=["7", "age=29"], **settings)
    assert not any(torch.allclose(edited, other, atol=1e-2) for other in (plain, bold, older.items.stack()))
    names = [f"{prefix}{name}" for name in ("digit", "style", "age") for prefix in ("", "source_")]
    for i, (row, old) in enumerate(zip(result.metadata, older.metadata, strict=True)):
        assert [row.get(name) for name in names] == [7, i, STYLES[i % 2], None, 20.5 + i, None]
        assert [old.get(name) for name in names] == [7, i, STYLES[i % 2], None, 29, 20.5 + i]


def test_a_condition_of_the_source_stays_unless_it_is_replaced(portraits: Model, digits: Path):
    file, settings = digits / "000003.png", {"source_label": ["digit=3", "style=bold"], "method": "invert", "steps": 4}
    kept = edit(portraits, file, label="digit=5", **settings).items.stack()
    bold, plain = (
        edit(portraits, file, label=["digit=5", f"style={style}"], **settings).items.stack()
        for style in ("bold", "plain")
    )
    assert torch.equal(kept, bold) and not torch.allclose(kept, plain, atol=1e-2)
    unchanged, x = edit(portraits, file, **settings).items.stack(), read_images(file)[0].batch([0]).data
    assert torch.allclose(unchanged, portraits.autoencode(x).stack().clamp(-1, 1), atol=2e-3)


def test_a_condition_is_given_once(portraits: Model, digits: Path):
    with pytest.raises(UserError, match="condition 'digit' is given twice"):
        edit(portraits, digits, label=["digit=5", "6"])


@pytest.mark.parametrize("method", ["noise", "invert"])
def test_items_of_several_lengths(model: Model, sound: Modality, monkeypatch: pytest.MonkeyPatch, method: str):
    lengths = [3, 8, 1, 5]
    torch.manual_seed(0)
    data = Sequences(lengths)
    monkeypatch.setattr("sfumato.tasks.inputs.read_items", lambda *_: SourceItems("x", [data], DataSettings()))
    model = token_model(model.config, sound, monkeypatch)
    settings = {"method": method, "steps": 4, "guidance": 1.0}
    whole, parts = (edit(model, "x", batch=batch, **settings).items for batch in (4, 1))
    assert [len(item) for item in whole] == lengths
    for edited, alone, original in zip(whole, parts, data.items, strict=True):
        assert torch.allclose(edited, alone, **CLOSE)
        assert torch.allclose(edited, original, atol=2e-3) == (method == "invert")


def test_inversion_sees_zeros_in_the_padding():
    mask, z = torch.tensor([[True, False], [True, True]]), torch.zeros(2, 2, 3)
    denoise = lambda z, level: z + 1
    assert torch.equal(masked_denoiser(denoise, mask)(z, None), mask[..., None].expand(2, 2, 3).float())
    assert torch.equal(masked_denoiser(denoise, None)(z, None), z + 1)
