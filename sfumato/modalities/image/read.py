"""Read images from any source: a built-in name, the Hugging Face hub, a folder, an archive or a file."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sfumato.data import hub
from sfumato.data.conditions import Known, Labels
from sfumato.data.dataset import split
from sfumato.data.files import ARCHIVE, Files, first_few, inventory, is_image, open_files
from sfumato.data.metadata import (
    METADATA,
    ConditionOptions,
    match_metadata,
    read_conditions,
    read_metadata,
    split_by_folder,
)
from sfumato.errors import UserError
from sfumato.modalities.image import arrays, builtin
from sfumato.modalities.image.dataset import CHANNELS, ImageDataset, Parts
from sfumato.modalities.image.decode import Decoded, convert, decode_all, image_files

MIN_IMAGES = 8  # images that training needs, at least


@dataclass(frozen=True)
class ReadOptions:
    """How to read images.

    Args:
        resolution: Crop to the central square and resize to this side, in pixels; None keeps the size.
        mode: Convert to "L", "RGB", "RGBA" or "I;16"; None keeps the mode.
        skip_bad: Leave out unreadable files, with a note, instead of raising.
        conditions: Where the conditions are found.
    """

    resolution: int | None = None
    mode: str | None = None
    skip_bad: bool = False
    conditions: ConditionOptions = field(default_factory=ConditionOptions)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in CHANNELS:
            raise UserError(f"data.mode {self.mode!r} is not one of {', '.join(CHANNELS)}")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"data.resolution must be at least 1, not {self.resolution}")


def _assemble(names: list[str], conditions: dict[str, Known], decoded: Decoded, notes: list[str]) -> ImageDataset:
    """The data set of the images that could be decoded."""
    kept = {name: known.select(decoded.index) for name, known in conditions.items()}
    kept = {name: known.without_empty_classes() if isinstance(known, Labels) else known for name, known in kept.items()}
    if decoded.bad:
        notes.append(f"{len(decoded.bad)} of {len(names)} files left out: {first_few(decoded.bad)}")
    file_names = [names[i] for i in decoded.index]
    return ImageDataset(decoded.pixels, decoded.mode, conditions=kept, names=file_names, notes=notes)


def read_files(files: Files, options: ReadOptions) -> Parts:
    """All images of a folder or archive; test/, validation/ or val/ beside train/ is the held-out part."""
    notes: list[str] = []
    names = [name for name in files.names if is_image(name)]
    if not names:
        found = inventory(files.names)
        raise UserError(f"{files.root}: no images here (found {found}); check the path", code=1)
    rows = read_metadata(files)
    if rows is not None:
        names = match_metadata(names, rows, files, options.skip_bad, notes)
    train, held = split_by_folder(names, notes)
    names = train + held
    if not names:
        raise UserError(f"{files.root}: the metadata names none of the images", code=1)
    conditions = read_conditions(names, rows, bool(held), files, options.conditions, notes)
    decoded = decode_all(names, files, resolution=options.resolution, mode=options.mode, skip_bad=options.skip_bad)
    data = _assemble(names, conditions, decoded, notes)
    if not held:
        return data, None
    return _split_at(data, int(np.searchsorted(decoded.index, len(train))), files.root)


def _split_at(data: ImageDataset, first: int, root: object) -> Parts:
    """Training part before item `first`, held-out part from it on."""
    for condition, known in data.conditions.items():
        if isinstance(known, Labels):
            trained = known.select(range(first)).without_empty_classes().names
            arrays.check_classes(condition, known.names, trained, root)
    return data.subset(np.arange(first)), data.subset(np.arange(first, len(data)))


def _read_folder(path: Path, options: ReadOptions) -> Parts:
    """Images of a folder: image files, idx files, or train.tar and the like."""
    with open_files(path) as files:
        top = [name for name in files.names if "/" not in name]
        if not any(is_image(name) for name in files.names):
            idx = [name for name in top if arrays.IDX.search(name)]
            if idx:
                return arrays.read_idx_folder(path, idx)
            archives = [name for name in top if ARCHIVE.search(name) and name.lower().startswith("train.")]
            if archives:
                return _read_archives(path, archives[0], top, options)
        return read_files(files, options)


def _read_archives(folder: Path, train: str, names: Sequence[str], options: ReadOptions) -> Parts:
    """A folder with train.tar.xz (or another archive) and perhaps test.tar.xz."""
    test = next(
        (n for n in names if ARCHIVE.search(n) and n.split(".")[0].lower() in ("test", "validation", "val")), None
    )
    data = read_path(folder / train, options)[0]
    like_train = replace(options, conditions=options.conditions.like(data.conditions))
    held = read_path(folder / test, like_train)[0] if test else None
    if held is not None and (held.shape, held.mode) != (data.shape, data.mode):
        remedy = "--set data.resolution=64 or --set data.mode=RGB"
        raise UserError(f"{folder}: {train} and {test} differ in size or mode; convert with {remedy}", code=1)
    return arrays.align_classes(data, held, folder)


def read_path(path: Path, options: ReadOptions) -> Parts:
    """Images of a folder or a file."""
    if path.is_dir():
        return _read_folder(path, options)
    if path.suffix.lower() == ".npz":
        return arrays.read_npz(path, options.conditions)
    if path.suffix.lower() == ".npy":
        return arrays.read_npy(path), None
    if arrays.IDX.search(path.name):
        return arrays.read_idx_images(path), None
    if ARCHIVE.search(path.name) or is_image(path.name):
        with image_files(path) as files:
            return read_files(files, options)
    raise UserError(f"{path}: not a source of images; want a folder, .npz, .npy, idx, .tar, .zip or an image", code=1)


def _not_found(source: str) -> UserError:
    similar = difflib.get_close_matches(source, builtin.BUILTINS, 1)
    hint = f"did you mean the built-in {similar[0]}?" if similar else f"built-in sets are {', '.join(builtin.BUILTINS)}"
    return UserError(f"{source}: no such file or folder; {hint}")


def read_images(
    source: str | Path,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    label_from: str | None = None,
    label_column: Sequence[str] = (),
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    skip_bad: bool = False,
) -> Parts:
    """All images of a source, and its official held-out part, or None.

    Args:
        source: A built-in's name, hf://owner/name, a folder, an archive, .npz, .npy, idx, or one image. A built-in's
            name wins over a folder of this name (./mnist is the folder).
        resolution: Crop to the central square and resize to this side in pixels (Lanczos); None requires equal sizes.
        mode: Convert to "L", "RGB", "RGBA" or "I;16"; None keeps the mode and requires one mode.
        label_from: Regular expression for file names: its named groups are conditions, or its first group is the label.
        label_column: Columns of the metadata (or arrays of an .npz) that are conditions; empty for `label` alone.
        numeric: Conditions that are numbers although they look like classes.
        categorical: Conditions that are classes although they look like numbers.
        skip_bad: Leave out unreadable files, with a line in `ImageDataset.notes`, instead of raising.

    Raises:
        UserError: The source cannot be read; the message says why and what to do.
    """
    conditions = ConditionOptions(label_from, label_column, numeric, categorical)
    options = ReadOptions(resolution, mode, skip_bad, conditions)
    try:
        train, held = _read(str(source), options)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})", code=1) from error
    if label_from and train.names is None:
        raise UserError(f"{source}: --label-from needs file names, and these images have none")
    if any(name not in train.conditions for name in label_column):
        raise UserError(f"{source}: --label-column needs {' or '.join(METADATA)}, and these images have none")
    return convert(train, resolution, mode), None if held is None else convert(held, resolution, mode)


def _read(source: str, options: ReadOptions) -> Parts:
    if source in builtin.BUILTINS:
        return builtin.read_builtin(source, lambda path: read_path(path, options))
    if source.startswith("hf://"):
        return hub.read_hub(source, lambda files: read_files(files, options), options.conditions.label_column)
    path = Path(source).expanduser()
    if not path.exists():
        raise _not_found(source)
    return read_path(path, options)


def read_source(
    source: str | Path,
    *,
    resolution: int | None = None,
    mode: str | None = None,
    label_from: str | None = None,
    label_column: Sequence[str] = (),
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    skip_bad: bool = False,
    held_out: float = 0.1,
) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out images of a source: its official parts, else a deterministic split.

    Args:
        source: As for `read_images`.
        resolution: As for `read_images`.
        mode: As for `read_images`.
        label_from: As for `read_images`.
        label_column: As for `read_images`.
        numeric: As for `read_images`.
        categorical: As for `read_images`.
        skip_bad: As for `read_images`.
        held_out: Share of the images held out if there is no official part.

    Raises:
        UserError: As for `read_images`; or there are fewer than `MIN_IMAGES` images.
    """
    data, held = read_images(
        source,
        resolution=resolution,
        mode=mode,
        label_from=label_from,
        label_column=label_column,
        numeric=numeric,
        categorical=categorical,
        skip_bad=skip_bad,
    )
    if len(data) < MIN_IMAGES:
        raise UserError(
            f"{source}: only {len(data)} image{'s' * (len(data) != 1)}; at least {MIN_IMAGES} are needed", code=1
        )
    return split(data, held_out) if held is None else (data, held)
