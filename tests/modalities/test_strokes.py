"""Items of several lengths in two segments, with texts: what the contract of modalities does not test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import sfumato
from sfumato.apps import cli
from sfumato.config import DataSettings
from sfumato.modalities import MODALITIES
from sfumato.model import Model
from sfumato.training.build import denoiser_step
from sfumato.types import Batch, Items, Latent, Raw
from tests.modalities.common import OVERRIDES, equal, values
from tests.modalities.strokes import (
    BOX,
    BOX_ROWS,
    MAX_POINTS,
    MIN_POINTS,
    StrokeDataset,
    Strokes,
    draw_strokes,
    write_strokes,
)
from tests.training.common import rows, weights

ROOT = Path(__file__).parents[2]
TRAINED = ("train.codec.steps=200", "train.denoiser.steps=300", "train.denoiser.lr=3e-3", "train.codec.batch=16")
FIXED = ("train.precision=fp32", "train.denoiser.batch=16", "sample.guidance=1.5", "sample.autoguidance=1")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model trained for seconds depends on the order of sums, and so on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for these tests, a machine that is not measured, and the strokes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sfumato.training.profile.measure_peak", lambda *_: 1e11)
        sfumato.register(Strokes())
        yield
        del MODALITIES["strokes"]


def write_source(folder: Path, count: int, keep: Callable[[np.ndarray], bool] = lambda stroke: True) -> Path:
    """A folder of those of `count` strokes that are to be kept."""
    folder.mkdir()
    kept = [pair for pair in zip(*draw_strokes(count, 0), strict=True) if keep(pair[0])]
    write_strokes(folder, [stroke for stroke, _ in kept], [{"text": text} for _, text in kept])
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("strokes") / "source", 200)


@pytest.fixture(scope="module")
def train(source: Path) -> StrokeDataset:
    return Strokes().read_split(str(source), DataSettings())[0]


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("strokes") / "run"
    return sfumato.fit(str(source), out=out, steps=500, overrides=[*TRAINED, *FIXED], device="cpu")


def new_strokes(count: int) -> Items:
    """Strokes that the model was not trained on."""
    return Items(torch.from_numpy(stroke) for stroke in draw_strokes(count, 1)[0])


def counts(items: Items) -> list[int]:
    """Number of points of each item."""
    return [len(item) - BOX_ROWS for item in items]


def centres(items: Items) -> Tensor:
    """Centre (N, 2) of the points of each item."""
    return torch.stack([(item[:-BOX_ROWS].amin(0) + item[:-BOX_ROWS].amax(0)) / 2 for item in items])


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# the latent


def test_segments_have_fixed_positions_and_lengths_are_kept(model: Model):
    x = new_strokes(30)
    latent = model.encode(x)
    assert latent.z.shape == (30, MAX_POINTS + BOX_ROWS, 4) and latent.mask is not None
    assert latent.mask[:, :MAX_POINTS].sum(1).tolist() == counts(x) and len(set(counts(x))) > 10
    assert bool(latent.mask[:, MAX_POINTS:].all()) and not latent.z[~latent.mask].any()
    again = model.decode(latent)
    assert counts(again) == counts(x)
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(x, again, strict=True))


def test_a_latent_does_not_depend_on_padding(model: Model):
    x = new_strokes(10)
    latent = model.encode(x)
    alone = Latent.concat([model.encode(x[i : i + 1]) for i in range(10)])
    data, mask = x.pad()
    assert mask is not None and latent.mask is not None and alone.mask is not None
    padded = torch.cat([data.masked_fill(~mask[..., None], torch.nan), torch.full((10, 5, 2), torch.nan)], 1)
    wider = model.codec.encode(padded, torch.cat([mask, mask.new_zeros(10, 5)], 1))
    for other in (alone, wider):
        torch.testing.assert_close(other.z, latent.z, rtol=0, atol=1e-6)
        assert other.mask is not None and torch.equal(other.mask, latent.mask)


def test_statistics_are_those_of_valid_positions(model: Model, train: StrokeDataset):
    tokens = torch.cat([model.codec.encoder(item) for item in values(train)]).double()
    std, mean = torch.std_mean(tokens, 0, correction=0)
    torch.testing.assert_close(model.codec.latent_mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.codec.latent_std.double(), std, rtol=1e-4, atol=0)


# the denoiser


def test_the_denoiser_does_not_see_padding(model: Model):
    latent = model.encode(new_strokes(6))
    assert latent.mask is not None
    level = model.denoiser.schedule(0.4)
    z = torch.where(latent.mask[..., None], latent.z, 7.0)
    texts = ["zigzag", None, "a text that is longer than the others", "circle small", "", "spiral left"]
    together, other = (model.denoise(Raw({"text": texts}), 6, mask=latent.mask)(x, level) for x in (z, latent.z))
    torch.testing.assert_close(together[latent.mask], other[latent.mask], rtol=0, atol=1e-5)
    for i in range(6):
        single = model.denoise(Raw({"text": texts[i : i + 1]}), 1, mask=latent.mask[i : i + 1])(z[i : i + 1], level)
        torch.testing.assert_close(single[0, latent.mask[i]], together[i, latent.mask[i]], rtol=0, atol=1e-5)


def test_segments_have_times_of_their_own_and_some_are_given(model: Model, monkeypatch: pytest.MonkeyPatch):
    step, seen = denoiser_step(model, Strokes().plan(*3 * (None,))), list[Tensor]()  # type: ignore[arg-type]
    net, forward, latent = model.denoiser.net, model.denoiser.net.forward, model.encode(new_strokes(200))
    monkeypatch.setattr(net, "forward", lambda z, clocks, *rest: seen.append(clocks) or forward(z, clocks, *rest))
    with torch.no_grad():
        loss = step(Batch(latent.z, torch.arange(200), mask=latent.mask), "denoiser", 0, torch.Generator())["loss"]
    points, box = (part[..., 0] for part in seen[0].split(model.codec.segments, 1))  # (B, 40), (B, 2)
    assert bool((points == points[:, :1]).all()) and bool((box == box[:, :1]).all()) and bool(loss.isfinite())
    given = torch.stack([points[:, 0], box[:, 0]], 1) == -1.75  # the clock at time 0
    assert given.sum(0).tolist() == pytest.approx([18, 18], abs=12) and not given.all(1).any()
    assert not bool((points[:, 0] == box[:, 0]).any())


# samples


def test_new_items_have_the_lengths_of_training_items(model: Model, train: StrokeDataset):
    mask = model.draw_mask(range(500), seed=3)
    assert mask is not None and bool(mask[:, MAX_POINTS:].all())
    drawn, trained = mask[:, :MAX_POINTS].sum(1).tolist(), counts(values(train))
    assert min(drawn) >= MIN_POINTS and max(drawn) <= MAX_POINTS and set(drawn) <= set(trained)
    shares = [[np.mean(np.array(numbers) <= n) for n in range(MAX_POINTS + 1)] for numbers in (drawn, trained)]
    assert float(np.abs(np.subtract(*shares)).max()) < 0.09  # of 500 draws, with probability 0.999
    assert torch.equal(model.draw_mask([7, 400], seed=3), mask[[7, 400]])  # type: ignore[arg-type]
    assert counts(model.generate(20, seed=3).items) == drawn[:20]


def test_points_follow_a_given_box(model: Model):
    x = new_strokes(100)
    latent = model.encode(x)
    new = model.sample(range(100), seed=2, given=(latent, [BOX]))
    assert torch.equal(new.z[:, MAX_POINTS:], latent.z[:, MAX_POINTS:])
    assert new.mask is not None and latent.mask is not None and torch.equal(new.mask, latent.mask)
    boxes, items = torch.stack([item[-BOX_ROWS] for item in x]), model.decode(new)
    assert correlation(centres(items), boxes) > 0.8 > 0.2 > abs(correlation(centres(items), boxes.roll(1, 0)))
    assert float((new.z - latent.z)[:, :MAX_POINTS].abs().max()) > 1  # the points are not the original ones


def test_the_box_follows_given_points(model: Model):
    x = new_strokes(100)
    items = model.decode(model.sample(range(100), seed=2, given=(model.encode(x), [1 - BOX])))
    assert correlation(torch.stack([item[-BOX_ROWS] for item in items]), centres(x)) > 0.8
    assert all(torch.allclose(a[:-BOX_ROWS], b[:-BOX_ROWS], atol=0.1) for a, b in zip(items, x, strict=True))


def test_a_text_changes_the_result(model: Model):
    texts = ("circle small", "circle large")
    small, large, free = (
        model.decode(model.sample(range(32), raw)) for raw in (*(Raw({"text": [text] * 32}) for text in texts), None)
    )
    assert counts(small) == counts(large) == counts(free) and not equal(small, free) and not equal(large, free)
    sizes = [float(torch.stack([item[-1] for item in items]).mean()) for items in (small, large)]
    assert sizes[1] > 2 * sizes[0]


def test_texts_are_requested_as_labels_and_written(model: Model, tmp_path: Path):
    result = model.generate(5, label="text=circle small", out=tmp_path / "a")
    assert [row["text"] for row in result.metadata] == ["circle small"] * 5
    expected = model.decode(model.sample(range(5), Raw({"text": ["circle small"] * 5})))
    assert equal(result.items, expected) and not equal(result.items, model.generate(5).items)
    words = f"generate {model.folder} -n 5 --label text=circle\\ small --out {tmp_path / 'b'} --quiet --device cpu"
    done = CliRunner().invoke(cli.app, [word.replace("\\", " ") for word in words.replace("\\ ", "\\").split()])
    assert done.exit_code == 0, done.output
    for folder in ("a", "b"):
        data, _ = Strokes().read(str(tmp_path / folder), DataSettings())
        assert equal(values(data), expected) and data.captions == ["circle small"] * 5
    assert model.generate(2, label=["text="]).metadata[0]["text"] == ""


# runs


@pytest.mark.slow
def test_a_run_with_a_guide_and_early_stopping(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfumato.training.stages.MIN_GUIDE_STEP", 1)
    options = ("train.early_stopping=true", "sample.autoguidance=2", "train.denoiser.steps=60", "sample.steps=2")
    overrides = [*FIXED[:2], *options]
    run = sfumato.fit(str(source), out=tmp_path / "run", steps=70, overrides=overrides, device="cpu")
    assert run.guide is not None and counts(run.generate(3, label="text=zigzag").items) == counts(run.generate(3).items)


@pytest.mark.parametrize("number", [MAX_POINTS, 30])
def test_items_that_all_have_one_length(number: int, tmp_path: Path):
    longest = write_source(tmp_path / "source", 800, lambda stroke: len(stroke) == number + BOX_ROWS)
    run = sfumato.fit(str(longest), out=tmp_path / "run", steps=8, overrides=OVERRIDES, device="cpu")
    assert (run.draw_mask(range(3), 0) is None) == (number == MAX_POINTS)
    assert set(counts(run.generate(4, out=tmp_path / "out").items)) == {number}
    assert set(counts(run.reconstruct(str(longest), n=3).items)) == {number}


CHILD = """
import sys, sfumato
from sfumato.training.trainer import Trainer
from tests.modalities.strokes import Strokes
from tests.training.common import reported_every_step
from time import sleep

def slowly(self, batch, advance=Trainer.advance):
    sleep(0.05)
    return advance(self, batch)

sfumato.register(Strokes())
Trainer.run, Trainer.advance = reported_every_step(), slowly
source, out, *overrides = sys.argv[1:]
sfumato.fit(source, out=out, steps=50, overrides=overrides, device="cpu")
"""


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(source: Path, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    overrides = [*OVERRIDES, "train.denoiser.steps=40"]
    words = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "killed"), *overrides]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and not _reached(tmp_path / "killed", 12):
        time.sleep(0.01)
    process.kill()
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGKILL
    for folder, resume in (("killed", True), ("whole", False)):
        out = tmp_path / folder
        sfumato.fit(str(source), out=out, steps=50, overrides=overrides, device="cpu", resume=resume)
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert resumed.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(resumed[name], value)] == []


def _reached(run: Path, step: int) -> bool:
    """Whether the denoiser of a run has recorded a step."""
    try:
        return any(row["stage"] == "denoiser" and row["step"] >= step for row in rows(run))
    except (OSError, json.JSONDecodeError):  # no file yet, or a partial line
        return False
