"""The files of a folder or an archive: their names, and their content without unpacking."""

import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from sfumato.data.cache import key_of, load_listing, save_listing
from sfumato.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz|tar\.xz|txz|tar\.bz2|zip)$", re.IGNORECASE)
LISTING_VERSION = 2  # part of the cache key: raise it when other members of archives are listed
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)


@dataclass
class Files:
    """The regular files of a folder or archive.

    Args:
        root: The folder or archive.
        names: Names relative to it, with forward slashes, sorted.
        read: Name -> bytes of the file.
        stamp: Cache key; it changes with the content (sizes, dates).
        offsets: Position of each name in an archive, the order to read in; None if `read` takes any order and threads.
        stack: Closes the archive.
    """

    root: Path
    names: list[str]
    read: Callable[[str], bytes]
    stamp: str
    offsets: dict[str, int] | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def text(self, name: str) -> str:
        """The text of a file, decoded as UTF-8; invalid bytes are replaced."""
        return self.read(name).decode("utf-8-sig", errors="replace")


def open_files(path: Path) -> Files:
    """List a folder or an archive.

    Raises:
        UserError: It cannot be read.
    """
    try:
        if path.is_dir():
            return _folder(path)
        return _zip(path) if path.suffix.lower() == ".zip" else _tar(path)
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read {error.filename or 'it'}", code=1) from error
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}); is the file complete?", code=1) from error


def _line(error: Exception) -> str:
    """The first line of an error's text, for a UserError to quote."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _visible(name: str) -> bool:
    """Whether no part of a path is hidden, or the resource folder that macOS adds to archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _raise(error: OSError) -> None:
    raise error


def _folder(root: Path) -> Files:
    names: list[str] = []
    stats: list[tuple[str, int, int]] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            broken = path.is_symlink() and not path.exists()  # listed nevertheless: reading it gives the reason
            if _visible(name) and (broken or path.is_file()):
                state = path.lstat() if broken else path.stat()
                names.append(name)
                stats.append((name, state.st_size, state.st_mtime_ns))
    return Files(
        root, sorted(names), lambda name: (root / name).read_bytes(), key_of(str(root.resolve()), sorted(stats))
    )


def _archive_stamp(path: Path) -> str:
    state = path.stat()
    return key_of(LISTING_VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns)


def _target(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The member that holds the bytes: of a hard link the file that it links to, if the archive has it."""
    visited = {member.name}
    while member.islnk():
        first = members.get(str(PurePosixPath(member.linkname)))
        if first is None or first.name in visited:
            break
        visited.add(first.name)
        member = first
    return member


def _tar(path: Path) -> Files:
    stack = ExitStack()
    stamp = _archive_stamp(path)

    @cache
    def opened() -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
        archive = stack.enter_context(tarfile.open(path))
        members = {str(PurePosixPath(m.name)): m for m in archive.getmembers() if m.isfile() or m.islnk()}
        return archive, {name: _target(member, members) for name, member in members.items()}

    def read(name: str) -> bytes:
        try:
            archive, members = opened()
            file = archive.extractfile(members[name])
            assert file is not None
            return file.read()
        except _BROKEN as error:
            raise UserError(f"{path}: damaged at {name} ({_line(error)})", code=1) from error

    offsets = load_listing(stamp)  # listing a compressed tar means to unpack all of it
    if offsets is None:
        offsets = {name: member.offset_data for name, member in opened()[1].items() if _visible(name)}
        save_listing(stamp, offsets)
    return Files(path, sorted(offsets), read, stamp, offsets, stack)


def _zip(path: Path) -> Files:
    stack = ExitStack()
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}

    def read(name: str) -> bytes:
        try:
            return archive.read(members[name])
        except _BROKEN as error:  # RuntimeError: it needs a password
            raise UserError(f"{path}: damaged or locked at {name} ({_line(error)})", code=1) from error

    names = sorted(name for name in members if _visible(name))
    offsets = {name: members[name].header_offset for name in names}
    return Files(path, names, read, _archive_stamp(path), offsets, stack)


def is_image(name: str) -> bool:
    """Whether a name has the suffix of an image file."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def inventory(names: Iterable[str]) -> str:
    """Number of files of each suffix, such as "3 .csv, 1 .md"; the five most frequent."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "nothing"


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names, and the number of further ones."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
