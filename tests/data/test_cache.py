"""The cache of latents, and large temporary files."""

import tempfile
from pathlib import Path

import pytest
import torch

from sfumato.data import TensorCache, cache, latent_key
from sfumato.data.cache import atomic


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 3, 2, generator=generator)
    return {"z": z, "half": z.bfloat16(), "mask": z[:, 0] > 0}


def same(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor]) -> bool:
    return (
        a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    )


def test_put_and_get(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "latents", latent_key("data", "codec", {"bf16": True}))
    assert cache.get() is None
    cache.put(tensors())
    assert same(cache.get(), tensors())
    assert [p.name for p in (tmp_path / "latents").iterdir()] == [cache.path.name]


def test_loaded_tensors_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorCache(tmp_path, "k").put(tensors())
    for limit in (2**20, 8):  # in memory, and mapped
        monkeypatch.setattr(cache, "IN_MEMORY", limit)
        loaded = TensorCache(tmp_path, "k").get()
        assert same(loaded, tensors())
        loaded["z"].zero_()
    assert same(TensorCache(tmp_path, "k").get(), tensors())


@pytest.mark.parametrize("tmpdir", [True, False])
def test_large_temporary_files_are_unnamed_and_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpdir: bool
) -> None:
    """They lie in $TMPDIR or else in the cache: /tmp may be held in memory."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "given")) if tmpdir else monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(cache, "IN_MEMORY", 10)
    seen: list[Path] = []
    file = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: seen.append(dir) or file(dir=dir))
    tensor = cache.allocate_tensor((3, 4), torch.bfloat16)
    assert tensor.shape == (3, 4) and tensor.dtype == torch.bfloat16
    assert seen == [tmp_path / ("given" if tmpdir else "cache/scratch")] and list(seen[0].iterdir()) == []


def test_key_depends_on_data_codec_and_settings() -> None:
    keys = {
        latent_key(*parts) for parts in (("a", "b", {}), ("a", "c", {}), ("d", "b", {}), ("a", "b", {"flip": True}))
    }
    assert len(keys) == 4
    assert latent_key("a", "b", {"x": 1, "y": 2}) == latent_key("a", "b", {"y": 2, "x": 1})


@pytest.mark.parametrize("position", [0, 20, -3])
def test_a_damaged_file_is_not_loaded(tmp_path: Path, position: int) -> None:
    cache = TensorCache(tmp_path, "key")
    cache.put(tensors())
    raw = bytearray(cache.path.read_bytes())
    raw[position] ^= 1
    cache.path.write_bytes(raw)
    assert cache.get() is None
    cache.path.write_bytes(raw[:30])
    assert cache.get() is None
    assert same(cache.compute(tensors), tensors()) and same(cache.get(), tensors())


def test_a_file_of_another_key_is_not_loaded(tmp_path: Path) -> None:
    TensorCache(tmp_path, "a").put(tensors())
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert TensorCache(tmp_path, "b").get() is None


def test_latents_are_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def encode() -> dict[str, torch.Tensor]:
        calls.append(1)
        return tensors()

    for _ in range(3):
        TensorCache(tmp_path, "k").compute(encode)
    assert len(calls) == 1


def test_atomic_keeps_the_old_file_if_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
