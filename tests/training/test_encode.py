"""Latents of all items: in memory or mapped from disk, of all of them or of some, or none at all."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.codecs import ImageCodec
from sfumato.data import Data, cache
from sfumato.training import stages
from sfumato.training.stages import encode_all, encoded_part
from tests.training.common import PLAIN, assert_same_run, pictures, record, small_fit

SHAPE = (1, 8, 8)


def make_job(folder: Path, done: bool = False, encoded: int | None = None) -> Any:
    """As much of a run as encoding needs."""
    x, label = pictures(50, SHAPE)
    return SimpleNamespace(
        train=Data(x, "L", None, label, ["0", "1", "2"]),
        settings=SimpleNamespace(seed=0, train=SimpleNamespace(encoded=encoded)),
        accelerator=SimpleNamespace(autocast=nullcontext),
        log=SimpleNamespace(show=lambda *_: None),
        folder=folder,
        device="cpu",
        precision="fp32",
        done=lambda stage: done,
    )


def make_model(draws: bool = False) -> Any:
    torch.manual_seed(0)
    codec = ImageCodec(SHAPE, bottleneck="none", downsample=4, channels=2, width=16)
    codec.draws = draws
    return SimpleNamespace(codec=codec.eval())


@pytest.fixture(params=["in memory", "mapped"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ENCODED", 7)
    if request.param == "mapped":
        monkeypatch.setattr(cache, "IN_MEMORY", 10)


def test_latents_are_whitened_and_kept(room: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, job = make_model(), make_job(tmp_path)
    z = encode_all(job, model, job.train)
    with torch.no_grad():
        h = model.codec.codes(job.train.batch(range(50)).data)
    std, mean = torch.std_mean(h, (0, 2, 3), correction=0)
    assert torch.allclose(model.codec.latent_mean.flatten(), mean, atol=1e-6)
    assert torch.allclose(model.codec.latent_std.flatten(), std, rtol=1e-5)
    assert torch.allclose(z, model.codec.whitened(h), atol=1e-5)

    monkeypatch.setattr(stages, "raw_codes", lambda *_: 1 / 0)  # another session: nothing is encoded anew
    again = encode_all(make_job(tmp_path, done=True), model, job.train)
    assert torch.equal(again, z)


def test_where_latents_are_drawn_none_are_kept(room: None, tmp_path: Path):
    """Those of a table may be many times as large as the table."""
    model, job = make_model(draws=True), make_job(tmp_path)
    assert encode_all(job, model, job.train).shape == (0, *model.codec.latent_shape)
    other = make_model()
    encode_all(job, other, job.train)
    assert torch.allclose(model.codec.latent_mean, other.codec.latent_mean, atol=1e-6)
    assert torch.allclose(model.codec.latent_std, other.codec.latent_std, rtol=1e-5)
    assert encode_all(make_job(tmp_path, done=True), model, job.train).numel() == 0


def test_some_of_the_items(tmp_path: Path):
    job = make_job(tmp_path, encoded=20)
    part = encoded_part(job)
    assert len(part) == 20 and part.rows is not None and len(set(part.rows.tolist())) == 20
    assert np.array_equal(part.labels, job.train.labels[part.rows])
    assert np.array_equal(encoded_part(job).rows, part.rows)
    assert all(encoded_part(make_job(tmp_path, encoded=n)) is not part for n in (None, 50, 99))
    everything = make_job(tmp_path, encoded=99)
    assert encoded_part(everything) is everything.train


def test_a_run_on_some_of_the_items(source: Path, tmp_path: Path):
    """It goes on with the same ones."""
    small_fit(source, tmp_path / "a", *PLAIN, "train.encoded=20")
    assert record(tmp_path / "a")["plan"]["train"]["encoded"] == 20 and not (tmp_path / "a" / "cache").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stages, "train_denoiser", lambda *_: 1 / 0)
        small_fit(source, tmp_path / "b", *PLAIN, "train.encoded=20")
    kept = [load_file(path)["h"] for path in (tmp_path / "b" / "cache").iterdir()]
    assert [len(h) for h in kept] == [20]
    small_fit(source, tmp_path / "b", steps=None, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
