"""Checks of output paths."""

from pathlib import Path

import pytest

from sfumato.data.output import check_swappable
from sfumato.errors import UserError


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a mount")
def test_folders_that_cannot_be_replaced_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/proc: something is mounted there"):
        check_swappable(Path("/proc"))
    with pytest.raises(UserError, match="/proc/new: cannot be written"):
        check_swappable(Path("/proc/new"))
    check_swappable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
