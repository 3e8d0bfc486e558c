"""An own cache for each test, and small image files."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SFUMATO_CACHE", str(folder))
    return folder


def _picture(seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    """Noise of `size` (width, height)."""
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0])
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, shape).astype(np.uint16))
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (*shape, *channels)).astype(np.uint8))


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Returns an image of noise for (seed, size, mode)."""
    return _picture


@pytest.fixture
def idx() -> Callable[[np.ndarray], bytes]:
    """Encodes bytes as an idx file."""

    def encode(array: np.ndarray) -> bytes:
        return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()

    return encode


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes {name: seed or (seed, size, mode) or content} as files, and returns the folder."""

    def write(files: dict[str, object], root: Path = tmp_path / "source") -> Path:
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str | bytes):
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            else:
                _picture(*content if isinstance(content, tuple) else (content,)).save(path)  # type: ignore[arg-type]
        return root

    return write
