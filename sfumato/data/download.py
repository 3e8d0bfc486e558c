"""Downloads, verified by checksum."""

import hashlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sfumato.data.cache import atomic
from sfumato.errors import UserError


@dataclass(frozen=True)
class RemoteFiles:
    """A public data set.

    Args:
        url: Address that file names are appended to.
        md5: Checksum of each file.
        classes: Names of the classes.
    """

    url: str
    md5: dict[str, str]
    classes: list[str]


def fetch(name: str, home: RemoteFiles, file: str, folder: Path) -> Path:
    """Download one file of a data set into `folder` and verify it; a failed download leaves nothing behind.

    Raises:
        UserError: The file cannot be downloaded or written, or its checksum is wrong.
    """
    advice = f"download it on another machine and put it into $SFUMATO_DATA/{name}/"
    try:
        with atomic(folder / file) as temporary, temporary.open("wb") as target:
            digest = hashlib.md5(usedforsecurity=False)
            with urllib.request.urlopen(home.url + file, timeout=30) as response:
                while block := response.read(1 << 20):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != home.md5[file]:
                raise UserError(f"{name}: {home.url}{file} has a wrong checksum; {advice}", code=1)
    except urllib.error.URLError as error:
        raise UserError(f"{name}: {home.url}{file} cannot be fetched ({error.reason}); {advice}", code=1) from error
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be fetched or saved ({error}); {advice}", code=1) from error
    return folder / file
