"""Latents kept on disk."""

import tempfile
from pathlib import Path

import pytest
import torch

from sfumato.data import LatentCache, cache, latent_key
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
    cache = LatentCache(tmp_path / "latents", latent_key("data", "codec", {"bf16": True}))
    assert cache.get() is None
    cache.put(tensors())
    assert same(cache.get(), tensors())
    assert [p.name for p in (tmp_path / "latents").iterdir()] == [cache.path.name]


def test_what_it_gives_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LatentCache(tmp_path, "k").put(tensors())
    for limit in (2**20, 8):  # in memory, and mapped
        monkeypatch.setattr(cache, "IN_MEMORY", limit)
        given = LatentCache(tmp_path, "k").get()
        assert same(given, tensors())
        given["z"].zero_()
    assert same(LatentCache(tmp_path, "k").get(), tensors())


@pytest.mark.parametrize("given", [True, False])
def test_where_large_temporary_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """Not into /tmp, which may be memory; and not a name is left of them."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "given")) if given else monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(cache, "IN_MEMORY", 10)
    seen: list[Path] = []
    file = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: seen.append(dir) or file(dir=dir))
    tensor = cache.allocate_tensor((3, 4), torch.bfloat16)
    assert tensor.shape == (3, 4) and tensor.dtype == torch.bfloat16
    assert seen == [tmp_path / ("given" if given else "cache/scratch")] and list(seen[0].iterdir()) == []


def test_key_says_it_all() -> None:
    keys = {
        latent_key(*parts) for parts in (("a", "b", {}), ("a", "c", {}), ("d", "b", {}), ("a", "b", {"flip": True}))
    }
    assert len(keys) == 4
    assert latent_key("a", "b", {"x": 1, "y": 2}) == latent_key("a", "b", {"y": 2, "x": 1})


@pytest.mark.parametrize("place", [0, 20, -3])
def test_damage_is_noticed(tmp_path: Path, place: int) -> None:
    cache = LatentCache(tmp_path, "key")
    cache.put(tensors())
    raw = bytearray(cache.path.read_bytes())
    raw[place] ^= 1
    cache.path.write_bytes(raw)
    assert cache.get() is None
    cache.path.write_bytes(raw[:30])
    assert cache.get() is None
    assert same(cache.compute(tensors), tensors()) and same(cache.get(), tensors())


def test_another_key_s_file_is_not_taken(tmp_path: Path) -> None:
    LatentCache(tmp_path, "a").put(tensors())
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert LatentCache(tmp_path, "b").get() is None


def test_compute_only_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return tensors()

    for _ in range(3):
        LatentCache(tmp_path, "k").compute(make)
    assert len(calls) == 1


def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
