"""Output files and folders, written completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.data.cache import atomic
from sfumato.errors import UserError

PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}  # suffix of a picture -> Pillow's name of its format


def json_text(value: object, indent: int | None = None) -> str:
    """JSON with non-ASCII letters unescaped; escaped if UTF-8 cannot encode one, as in some file names."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


@contextmanager
def swapped_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`: it replaces `out` when the block succeeds, and is removed when it raises.

    Raises:
        UserError: It cannot be written.
    """
    try:
        out = out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            if out.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
                os.rename(out, old)
                os.rename(partial, out)
                shutil.rmtree(old)
            else:
                os.rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); nothing was written", code=1) from error


def check_writable(out: Path) -> None:
    """Check before any work that a path can be created and written; nothing is left behind.

    Raises:
        UserError: It cannot.
    """
    out = out.absolute()
    folder = out if out.is_dir() else next(path for path in out.parents if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); name another folder", code=1) from error


def check_swappable(out: Path) -> None:
    """Check before any work that `swapped_folder` can replace a folder.

    Raises:
        UserError: It cannot.
    """
    out = out.resolve()
    if out.is_mount():
        raise UserError(f"{out}: something is mounted there, so it cannot be replaced; name a folder in it", code=1)
    check_writable(out)
    check_writable(out.parent)


def check_file_target(path: Path, overwrite: bool) -> None:
    """Check before any work that a file may be written.

    Raises:
        UserError: It exists and may not be overwritten, or cannot be written.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise UserError(f"{path}: exists; pass --overwrite or name another file")
    check_writable(path)


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block succeeds, with the permissions of a new file.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with atomic(path) as draft:
            yield draft
            draft.chmod(0o666 & ~_umask())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})", code=1) from error


def picture_format(path: Path) -> str:
    """Pillow's format of a picture, from its suffix.

    Raises:
        UserError: The suffix is not in `PICTURES`.
    """
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path}: not the name of a picture; it must end in one of {', '.join(PICTURES)}")
    return PICTURES[path.suffix.lower()]


def save_picture(picture: Any, path: Path | str) -> None:
    """Write a picture (PIL), completely or not at all, in the format of the suffix."""
    path = Path(path)
    format_name = picture_format(path)
    with draft_file(path) as draft:
        picture.save(draft, format_name)


def _umask() -> int:
    """The process's umask: permission bits that new files do not get."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask
