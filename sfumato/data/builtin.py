"""Data sets known by name: looked for under $SFUMATO_DATA, then in the user's cache, then fetched with a checksum."""

import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .arrays import idx_data
from .base import Data, Parts
from .cache import atomic, cache_root

DIGITS = [str(k) for k in range(10)]
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Home:
    """Where a set lives in public, the md5 sum of each file there, and the names of its classes."""

    url: str
    md5: dict[str, str]
    classes: list[str]


BUILTINS: dict[str, Home] = {
    "digits": Home("", {}, DIGITS),
    "mnist": Home(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        DIGITS,
    ),
    "fashion-mnist": Home(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        CLOTHES,
    ),
    "cifar10": Home(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        CIFAR,
    ),
}


def places(name: str) -> list[Path]:
    """Folders a built-in may lie in, best first."""
    given = os.environ.get("SFUMATO_DATA")
    roots = ([Path(given)] if given else []) + [cache_root()]
    names = (name, f"{name}_jpeg") if name == "cifar10" else (name,)
    return [root / folder for root in roots for folder in names]


def fetch(name: str, file: str, folder: Path) -> Path:
    """Download one file of a built-in into `folder` and check it; nothing is left of a bad or broken download."""
    home = BUILTINS[name]
    advice = f"get it on another machine and put it under $SFUMATO_DATA/{name}/"
    try:
        with atomic(folder / file) as temporary, temporary.open("wb") as target:
            digest = hashlib.md5(usedforsecurity=False)
            with urllib.request.urlopen(home.url + file, timeout=30) as answer:
                while block := answer.read(1 << 20):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != home.md5[file]:
                raise UserError(f"{name}: {home.url}{file} is not what it should be (checksum); {advice}", code=1)
    except urllib.error.URLError as error:
        raise UserError(f"{name}: {home.url}{file} cannot be fetched ({error.reason}); {advice}", code=1) from error
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be fetched or kept ({error}); {advice}", code=1) from error
    return folder / file


def _digits() -> Data:
    """1,797 digits of 8x8 pixels, 0..16 stretched to 0..255; they come with scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(column) for column in load_digits(return_X_y=True))
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Data(pixels, "L", None, labels.astype(np.int64), DIGITS)


def _idx_set(name: str) -> Parts:
    folder = next((p for p in places(name) if all(_packed(p, file) for file in _IDX)), None)
    if folder is None:
        folder = cache_root() / name
        for file in BUILTINS[name].md5:
            fetch(name, file, folder)
    train, held = (_packed(folder, _IDX[k]) for k in (0, 2))
    assert train and held
    return idx_data(train), idx_data(held)


def _packed(folder: Path, file: str) -> Path | None:
    return next((p for p in (folder / f"{file}.gz", folder / file) if p.exists()), None)


def _cifar10(read_path: Callable[[Path], Parts]) -> Parts:
    """The binary version (lossless), or a folder or tar files of its images."""
    for folder in places("cifar10"):
        binary = folder / "cifar-10-binary.tar.gz"
        if binary.exists():
            return _cifar10_binary(binary)
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            return read_path(folder)
    return _cifar10_binary(fetch("cifar10", "cifar-10-binary.tar.gz", cache_root() / "cifar10"))


def _cifar10_binary(path: Path) -> Parts:
    """Rows of one label byte and 3x32x32 pixel bytes."""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                file = archive.extractfile(member) if member.name.endswith(".bin") else None
                if file is not None:
                    part = "held" if "test" in member.name else "train"
                    parts[part] = parts.get(part, b"") + file.read()
        rows = {part: np.frombuffer(raw, np.uint8).reshape(-1, 3073) for part, raw in parts.items()}
        train, held = rows["train"], rows["held"]
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to fetch it again", code=1) from error
    return _rows(train), _rows(held)


def _rows(rows: np.ndarray) -> Data:
    pixels = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Data(pixels, "RGB", None, rows[:, 0].astype(np.int64), CIFAR)


def read_builtin(name: str, read_path: Callable[[Path], Parts]) -> Parts:
    """Training part and official test part (None for `digits`); labels are the set's own integers.

    Args:
        name: One of `BUILTINS`.
        read_path: Reads a folder or archive of images.
    """
    if name == "digits":
        return _digits(), None
    parts = _cifar10(read_path) if name == "cifar10" else _idx_set(name)
    for data in parts:
        if data is not None and len(data.label_names) == len(BUILTINS[name].classes):
            data.label_names = BUILTINS[name].classes
    return parts
