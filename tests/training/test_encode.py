"""Encoding: latents of all items or a subset, in memory or memory-mapped, or none for a stochastic codec."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.data import cache
from sfumato.data.conditions import Labels
from sfumato.modalities.image.codec import ImageCodec
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.training import stages
from sfumato.training.stages import encode_all, encoded_subset
from tests.training.common import PLAIN, assert_same_run, pictures, record, small_fit

SHAPE = (1, 8, 8)


def make_run(folder: Path, done: bool = False, max_encoded: int | None = None) -> Any:
    """The parts of a run that encoding needs."""
    x, label = pictures(50, SHAPE)
    return SimpleNamespace(
        train=ImageDataset(x, "L", conditions={"label": Labels(label, ["0", "1", "2"])}),
        settings=SimpleNamespace(seed=0, train=SimpleNamespace(max_encoded=max_encoded)),
        accelerator=SimpleNamespace(autocast=nullcontext),
        log=SimpleNamespace(show=lambda *_: None),
        folder=folder,
        device="cpu",
        precision="fp32",
        done=lambda stage: done,
    )


def make_model(stochastic: bool = False) -> Any:
    torch.manual_seed(0)
    codec = ImageCodec(SHAPE, bottleneck="none", downsample=4, channels=2, width=16)
    codec.stochastic = stochastic
    return SimpleNamespace(codec=codec.eval())


@pytest.fixture(params=["in memory", "mapped"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ENCODE_BATCH", 7)
    if request.param == "mapped":
        monkeypatch.setattr(cache, "IN_MEMORY", 10)


def test_latents_are_whitened_and_cached(storage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, run = make_model(), make_run(tmp_path)
    z = encode_all(run, model, run.train).z
    with torch.no_grad():
        h = model.codec.encode_raw(run.train.batch(range(50)).data)
    std, mean = torch.std_mean(h, (0, 2, 3), correction=0)
    assert torch.allclose(model.codec.latent_mean.flatten(), mean, atol=1e-6)
    assert torch.allclose(model.codec.latent_std.flatten(), std, rtol=1e-5)
    assert torch.allclose(z, model.codec.whiten(h).z, atol=1e-5)

    monkeypatch.setattr(stages, "encode_batches", lambda *_: 1 / 0)  # in another session, nothing is encoded again
    again = encode_all(make_run(tmp_path, done=True), model, run.train).z
    assert torch.equal(again, z)


def test_a_stochastic_codec_stores_no_latents(storage: None, tmp_path: Path):
    """Those of a table may be many times larger than the table."""
    model, run = make_model(stochastic=True), make_run(tmp_path)
    assert encode_all(run, model, run.train).z.shape == (0, *model.codec.latent_shape)
    other = make_model()
    encode_all(run, other, run.train)
    assert torch.allclose(model.codec.latent_mean, other.codec.latent_mean, atol=1e-6)
    assert torch.allclose(model.codec.latent_std, other.codec.latent_std, rtol=1e-5)
    assert not len(encode_all(make_run(tmp_path, done=True), model, run.train))


def test_a_subset_of_the_items_is_encoded(tmp_path: Path):
    run = make_run(tmp_path, max_encoded=20)
    subset = encoded_subset(run)
    assert len(subset) == 20 and subset.rows is not None and len(set(subset.rows.tolist())) == 20
    assert np.array_equal(subset.labels, run.train.labels[subset.rows])
    assert np.array_equal(encoded_subset(run).rows, subset.rows)
    assert all(encoded_subset(make_run(tmp_path, max_encoded=n)) is not subset for n in (None, 50, 99))
    everything = make_run(tmp_path, max_encoded=99)
    assert encoded_subset(everything) is everything.train


def test_a_run_on_a_subset_is_resumed(source: Path, tmp_path: Path):
    """It continues with the same items."""
    small_fit(source, tmp_path / "a", *PLAIN, "train.max_encoded=20")
    assert record(tmp_path / "a")["plan"]["train"]["max_encoded"] == 20 and not (tmp_path / "a" / "cache").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stages, "train_denoiser", lambda *_: 1 / 0)
        small_fit(source, tmp_path / "b", *PLAIN, "train.max_encoded=20")
    cached = [load_file(path)["h"] for path in (tmp_path / "b" / "cache").iterdir()]
    assert [len(h) for h in cached] == [20]
    small_fit(source, tmp_path / "b", steps=None, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
