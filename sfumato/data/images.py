"""From any source of images to Data, and back to a folder."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import arrays, builtin, hub
from .base import CHANNELS, Data, Parts, split
from .decode import Decoded, convert, decode_all
from .files import ARCHIVE, Files, first_few, inventory, is_image, open_files
from .labels import (
    encode_labels,
    folder_labels,
    labels_from_names,
    match,
    metadata_labels,
    read_captions,
    read_metadata,
    split_parts,
)
from .write import sample_sheet, write_images

__all__ = ["ReadOptions", "read_images", "read_source", "sample_sheet", "write_images"]

FEWEST = 8  # images from which a model can be trained at all


@dataclass(frozen=True)
class ReadOptions:
    """How to read images: square side and mode to convert to, where labels come from, whether bad files are skipped."""

    resolution: int | None = None
    mode: str | None = None
    label_from: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in CHANNELS:
            raise UserError(f"data.mode {self.mode!r} is not known; one of {', '.join(CHANNELS)}")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"data.resolution must be at least 1, not {self.resolution}")


def _labels(
    names: Sequence[str],
    rows: dict[str, dict[str, object]] | None,
    parted: bool,
    files: Files,
    options: ReadOptions,
    notes: list[str],
) -> Sequence[object] | None:
    """Labels by what is said most clearly: --label-from, then metadata, then folders."""
    if options.label_from:
        return labels_from_names(names, options.label_from)
    said = metadata_labels(names, rows, notes) if rows is not None else None
    return said or folder_labels(names, parted, notes)


def _assemble(
    names: list[str], labels: Sequence[object] | None, captions: list[str] | None, decoded: Decoded, notes: list[str]
) -> Data:
    """Data of the images that could be read."""
    good = decoded.good
    numbers, label_names = encode_labels([labels[i] for i in good]) if labels else (None, [])
    texts = [captions[i] for i in good] if captions else None
    if decoded.bad:
        notes.append(f"{len(decoded.bad)} of {len(names)} files left out: {first_few(decoded.bad)}")
    return Data(decoded.pixels, decoded.mode, None, numbers, label_names, texts, [names[i] for i in good], notes)


def read_files(files: Files, options: ReadOptions) -> Parts:
    """All images of a folder or archive; the held-out part is its test/, validation/ or val/ beside train/."""
    notes: list[str] = []
    names = [name for name in files.names if is_image(name)]
    if not names:
        found = inventory(files.names)
        raise UserError(f"{files.root}: no images here (found {found}); is it the right place?", code=1)
    rows = read_metadata(files)
    if rows is not None:
        names = match(names, rows, files, options.skip_bad, notes)
    train, held = split_parts(names, notes)
    names = train + held
    if not names:
        raise UserError(f"{files.root}: the metadata names none of the images", code=1)
    labels = _labels(names, rows, bool(held), files, options, notes)
    captions = read_captions(names, rows, files, notes)
    decoded = decode_all(names, files, resolution=options.resolution, mode=options.mode, skip_bad=options.skip_bad)
    data = _assemble(names, labels, captions, decoded, notes)
    if not held:
        return data, None
    first = int(np.searchsorted(decoded.good, len(train)))
    return _official(data, first, files.root)


def _official(data: Data, first: int, root: object) -> Parts:
    """Training part up to item `first`, held-out part from there."""
    if data.labels is not None:
        known = set(data.labels[:first].tolist())
        unknown = [name for k, name in enumerate(data.label_names) if k not in known]
        if unknown:
            raise UserError(f"{root}: held-out classes the training part lacks: {first_few(unknown)}", code=1)
    return data.subset(np.arange(first)), data.subset(np.arange(first, len(data)))


def _read_folder(path: Path, options: ReadOptions) -> Parts:
    with open_files(path) as files:
        here = [name for name in files.names if "/" not in name]
        if not any(is_image(name) for name in files.names):
            idx = [name for name in here if arrays.IDX.search(name)]
            if idx:
                return arrays.read_idx_folder(path, idx)
            packed = [name for name in here if ARCHIVE.search(name) and name.lower().startswith("train.")]
            if packed:
                return _read_archives(path, packed[0], here, options)
        return read_files(files, options)


def _read_archives(folder: Path, train: str, names: Sequence[str], options: ReadOptions) -> Parts:
    """A folder that holds train.tar.xz (or the like) and perhaps test.tar.xz."""
    test = next(
        (n for n in names if ARCHIVE.search(n) and n.split(".")[0].lower() in ("test", "validation", "val")), None
    )
    data = read_path(folder / train, options)[0]
    held = read_path(folder / test, options)[0] if test else None
    if held is not None and (held.shape, held.mode) != (data.shape, data.mode):
        remedy = "--set data.resolution=64 or --set data.mode=RGB"
        raise UserError(f"{folder}: {train} and {test} differ in size or mode; convert with {remedy}", code=1)
    return arrays.same_classes(data, held, folder)


def read_path(path: Path, options: ReadOptions) -> Parts:
    """Images of a folder or a file."""
    if path.is_dir():
        return _read_folder(path, options)
    if ARCHIVE.search(path.name):
        with open_files(path) as files:
            return read_files(files, options)
    if path.suffix.lower() == ".npz":
        return arrays.read_npz(path)
    if path.suffix.lower() == ".npy":
        return arrays.read_npy(path), None
    if arrays.IDX.search(path.name):
        return arrays.idx_data(path), None
    if is_image(path.name):
        single = Files(path, [path.name], lambda name: path.with_name(name).read_bytes(), str(path))
        return read_files(single, options)
    raise UserError(f"{path}: not a source of images; want a folder, .npz, .npy, idx, .tar, .zip or an image", code=1)


def _missing(source: str) -> UserError:
    near = difflib.get_close_matches(source, builtin.BUILTINS, 1)
    hint = f"did you mean the built-in {near[0]}?" if near else f"built-in sets are {', '.join(builtin.BUILTINS)}"
    return UserError(f"{source}: no such file or folder; {hint}")


def read_images(
    source: str | Path,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    label_from: str | None = None,
    skip_bad: bool = False,
) -> Parts:
    """Every image of a source, and its official held-out part where it has one (else None).

    Args:
        source: A built-in's name, hf://owner/name, a folder, an archive, .npz, .npy, idx, or one image. A built-in's
            name wins over a folder so called (say ./mnist for that).
        resolution: Crop to the middle square and resize to this side (Lanczos); None needs images of one size.
        mode: Convert to "L", "RGB", "RGBA" or "I;16"; None needs images of one mode, and keeps it.
        label_from: Regular expression whose first group, found in the file name, is the label.
        skip_bad: Leave bad files out (said in `Data.notes`) instead of raising.

    Raises:
        UserError: What is wrong with the source, and what to do.
    """
    options = ReadOptions(resolution, mode, label_from, skip_bad)
    try:
        train, held = _read(str(source), options)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})", code=1) from error
    if label_from and train.names is None:
        raise UserError(f"{source}: --label-from needs file names, and these images have none")
    return convert(train, resolution, mode), None if held is None else convert(held, resolution, mode)


def _read(source: str, options: ReadOptions) -> Parts:
    if source in builtin.BUILTINS:
        return builtin.read_builtin(source, lambda path: read_path(path, options))
    if source.startswith("hf://"):
        return hub.read_hub(source, lambda files: read_files(files, options))
    path = Path(source).expanduser()
    if not path.exists():
        raise _missing(source)
    return read_path(path, options)


def read_source(
    source: str | Path,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    label_from: str | None = None,
    skip_bad: bool = False,
    held_out: float = 0.1,
) -> tuple[Data, Data]:
    """Training and held-out images of a source: its official parts, else a deterministic split (see `split`).

    Arguments as for `read_images`, and the share held out where there is no official part; fewer than 8 images
    raise, as nothing can be learned from them.
    """
    data, held = read_images(source, resolution=resolution, mode=mode, label_from=label_from, skip_bad=skip_bad)
    if len(data) < FEWEST:
        raise UserError(
            f"{source}: only {len(data)} image{'s' * (len(data) != 1)}; at least {FEWEST} are needed", code=1
        )
    return split(data, held_out) if held is None else (data, held)
