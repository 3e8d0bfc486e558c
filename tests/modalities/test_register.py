"""Modalities that are registered from outside the package."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import sfumato
from sfumato.modalities import MODALITIES, find_modality, recognise
from tests.modalities.common import refused
from tests.modalities.strokes import Strokes
from tests.modalities.toy import Waves, write_waves


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Both modalities; a folder of strokes looks like waves too."""
    before = dict(MODALITIES)
    sfumato.register(Waves())
    sfumato.register(Strokes())
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


def test_a_registered_modality_is_asked_first_and_can_be_replaced(tmp_path: Path):
    write_waves(tmp_path / "waves", 8, 0)
    strokes = Strokes().contract_source(tmp_path)
    assert list(MODALITIES)[:2] == ["strokes", "waves"] and recognise(str(tmp_path / "waves")).name == "waves"
    assert find_modality("waves").recognises(strokes) and recognise(strokes).name == "strokes"
    other = Waves()
    sfumato.register(other)
    assert find_modality("waves") is other and list(MODALITIES).count("waves") == 1
    assert recognise(strokes) is other


def test_an_unknown_modality_is_refused(tmp_path: Path):
    write_waves(tmp_path / "waves", 8, 0)
    with refused("did you mean 'waves'"):
        sfumato.fit(str(tmp_path / "waves"), out=tmp_path / "run", steps=2, modality="wave")
