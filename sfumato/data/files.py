"""What lies in a folder or an archive: names, and how to read them without unpacking."""

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

from ..errors import UserError
from .cache import key_of, load_listing, save_listing

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz|tar\.xz|txz|tar\.bz2|zip)$", re.IGNORECASE)
LISTING = 2  # changes when other members of archives are listed
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)


@dataclass
class Files:
    """The regular files of a folder or archive.

    Args:
        root: The folder or archive.
        names: Names relative to it, with forward slashes, sorted.
        read: The bytes of a name.
        stamp: Changes when the content (sizes, dates) does.
        place: Where each name lies in an archive; None if `read` may be called in any order, by several threads.
        stack: Closes what is open.
    """

    root: Path
    names: list[str]
    read: Callable[[str], bytes]
    stamp: str
    place: dict[str, int] | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def text(self, name: str) -> str:
        """The text of a file; UTF-8, whatever else stands in it."""
        return self.read(name).decode("utf-8-sig", errors="replace")


def open_files(path: Path) -> Files:
    """List a folder or an archive; raises UserError when it cannot be read."""
    try:
        if path.is_dir():
            return _folder(path)
        return _zip(path) if path.suffix.lower() == ".zip" else _tar(path)
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read {error.filename or 'it'}", code=1) from error
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}); is the file whole?", code=1) from error


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _raise(error: OSError) -> None:
    raise error


def _folder(root: Path) -> Files:
    names: list[str] = []
    stats: list[tuple[str, int, int]] = []
    seen: set[str] = set()
    for where, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(where, file)
            name = path.relative_to(root).as_posix()
            lost = path.is_symlink() and not path.exists()  # it is listed all the same, and reading it will say why
            if _visible(name) and (lost or path.is_file()):
                state = path.lstat() if lost else path.stat()
                names.append(name)
                stats.append((name, state.st_size, state.st_mtime_ns))
    return Files(
        root, sorted(names), lambda name: (root / name).read_bytes(), key_of(str(root.resolve()), sorted(stats))
    )


def _archive_stamp(path: Path) -> str:
    state = path.stat()
    return key_of(LISTING, str(path.resolve()), state.st_size, state.st_mtime_ns)


def _target(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Where the bytes of a member lie: of a hard link, in the file that it is another name of, if that is there."""
    passed = {member.name}
    while member.islnk():
        first = members.get(str(PurePosixPath(member.linkname)))
        if first is None or first.name in passed:
            break
        passed.add(first.name)
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

    place = load_listing(stamp)  # a packed tar must be unpacked from end to end to learn its names
    if place is None:
        place = {name: member.offset_data for name, member in opened()[1].items() if _visible(name)}
        save_listing(stamp, place)
    return Files(path, sorted(place), read, stamp, place, stack)


def _zip(path: Path) -> Files:
    stack = ExitStack()
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}

    def read(name: str) -> bytes:
        try:
            return archive.read(members[name])
        except _BROKEN as error:  # RuntimeError: it wants a password
            raise UserError(f"{path}: damaged or locked at {name} ({_line(error)})", code=1) from error

    names = sorted(name for name in members if _visible(name))
    place = {name: members[name].header_offset for name in names}
    return Files(path, names, read, _archive_stamp(path), place, stack)


def is_image(name: str) -> bool:
    """Whether the name ends like an image file's."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def inventory(names: Iterable[str]) -> str:
    """What kinds of file there are, in words: "3 .csv, 1 .md"."""
    kinds = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """The first five, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
