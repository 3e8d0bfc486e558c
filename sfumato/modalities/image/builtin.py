"""Built-in data sets: searched in $SFUMATO_DATA and the user's cache, else downloaded and verified."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sfumato.data.cache import cache_root
from sfumato.data.conditions import LABEL, Labels
from sfumato.data.download import RemoteFiles, fetch
from sfumato.errors import UserError
from sfumato.modalities.image.arrays import read_idx_images
from sfumato.modalities.image.dataset import ImageDataset, Parts

DIGITS = [str(k) for k in range(10)]  # class names of MNIST and `digits`
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

BUILTINS: dict[str, RemoteFiles] = {
    "digits": RemoteFiles("", {}, DIGITS),
    "mnist": RemoteFiles(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        DIGITS,
    ),
    "fashion-mnist": RemoteFiles(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        FASHION,
    ),
    "cifar10": RemoteFiles(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        CIFAR,
    ),
}


def candidate_folders(name: str) -> list[Path]:
    """Folders where a built-in data set is searched, in this order."""
    data = os.environ.get("SFUMATO_DATA")
    roots = ([Path(data)] if data else []) + [cache_root()]
    names = (name, f"{name}_jpeg") if name == "cifar10" else (name,)
    return [root / folder for root in roots for folder in names]


def _digits() -> ImageDataset:
    """The 1,797 digits of scikit-learn, 8x8 pixels, their range 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(column) for column in load_digits(return_X_y=True))
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ImageDataset(pixels, "L", conditions={LABEL: Labels(labels.astype(np.int64), DIGITS)})


def _mnist(name: str) -> Parts:
    """MNIST or Fashion-MNIST, from idx files."""
    folder = next((p for p in candidate_folders(name) if all(_find_idx(p, file) for file in IDX_FILES)), None)
    if folder is None:
        folder = cache_root() / name
        for file in BUILTINS[name].md5:
            fetch(name, BUILTINS[name], file, folder)
    train, held = (_find_idx(folder, IDX_FILES[k]) for k in (0, 2))
    assert train and held
    return read_idx_images(train), read_idx_images(held)


def _find_idx(folder: Path, file: str) -> Path | None:
    """An idx file, compressed or not; None if there is none."""
    return next((p for p in (folder / f"{file}.gz", folder / file) if p.exists()), None)


def _cifar10(read_path: Callable[[Path], Parts]) -> Parts:
    """CIFAR-10, from the binary version or a folder of its images."""
    for folder in candidate_folders("cifar10"):
        binary = folder / "cifar-10-binary.tar.gz"
        if binary.exists():
            return _cifar10_binary(binary)
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            return read_path(folder)
    return _cifar10_binary(fetch("cifar10", BUILTINS["cifar10"], "cifar-10-binary.tar.gz", cache_root() / "cifar10"))


def _cifar10_binary(path: Path) -> Parts:
    """CIFAR-10 from its tar file of records: one label byte and 3x32x32 pixel bytes."""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                file = archive.extractfile(member) if member.name.endswith(".bin") else None
                if file is not None:
                    part = "held" if "test" in member.name else "train"
                    parts[part] = parts.get(part, b"") + file.read()
        records = {part: np.frombuffer(raw, np.uint8).reshape(-1, 3073) for part, raw in parts.items()}
        train, held = records["train"], records["held"]
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to download it again", code=1) from error
    return _cifar10_images(train), _cifar10_images(held)


def _cifar10_images(records: np.ndarray) -> ImageDataset:
    pixels = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageDataset(pixels, "RGB", conditions={LABEL: Labels(records[:, 0].astype(np.int64), CIFAR)})


def read_builtin(name: str, read_path: Callable[[Path], Parts]) -> Parts:
    """Training and test part (None for `digits`) of a built-in data set, with its own class numbers.

    Args:
        name: One of `BUILTINS`.
        read_path: Reads a folder or archive of images.
    """
    if name == "digits":
        return _digits(), None
    parts = _cifar10(read_path) if name == "cifar10" else _mnist(name)
    for data in parts:
        known = None if data is None else data.conditions.get(LABEL)
        if data is not None and isinstance(known, Labels) and len(known.names) == len(BUILTINS[name].classes):
            data.conditions[LABEL] = Labels(known.numbers, BUILTINS[name].classes)
    return parts
