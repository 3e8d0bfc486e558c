"""The public names and help texts, and how fast they load.

`public.txt` is their snapshot. After an intended change, rewrite it with
`WRITE_SNAPSHOT=1 pytest tests/test_public.py -k snapshot` and read the difference.
"""

import os
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sfumato

SNAPSHOT = Path(__file__).with_name("public.txt")
COMMANDS = (
    *("fit", "distill", "generate", "reconstruct", "edit", "inpaint", "outpaint", "interpolate", "transfer", "augment"),
    *("evaluate", "info", "doctor"),
)
HEAVY = ("torch", "pandas", "numpy", "rich", "sklearn", "accelerate", "PIL")


def seconds(*words: str) -> float:
    """CPU seconds of a fresh interpreter, the median of five, which do not depend on the machine's load."""
    measured: list[float] = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        measured.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(measured)


def test_import_is_fast():
    assert seconds("-c", "import sfumato") < 0.2


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["generate", "--help"]])
def test_help_is_fast(words: list[str]):
    assert seconds("-m", "sfumato", *words) < 0.3


@pytest.mark.parametrize("words", [[], ["--help"], ["fit", "--help"], ["evaluate", "--help"]])
def test_nothing_heavy_is_loaded_before_use(words: list[str]):
    code = f"""
        import sys
        import sfumato
        from sfumato.errors import UserError
        if {words}:
            sys.argv = ["sfumato", *{words}]
            from sfumato.apps.cli import main
            try:
                main()
            except SystemExit:
                pass
        print("LOADED", *[name for name in {HEAVY} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


def test_every_public_name_exists():
    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None
    assert sorted(sfumato.__all__) == sfumato.__all__ == dir(sfumato)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = sfumato.fitt


def help_text(*words: str) -> str:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "sfumato", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_snapshot():
    """Flags, defaults and names are promises: a change must be visible."""
    parts = [help_text(), *(help_text(command) for command in COMMANDS), "\n".join(sfumato.__all__) + "\n"]
    now = "\n".join(parts)
    if os.environ.get("WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(now, encoding="utf-8")
    assert SNAPSHOT.is_file(), "write it: WRITE_SNAPSHOT=1 pytest tests/test_public.py -k snapshot"
    assert now == SNAPSHOT.read_text(encoding="utf-8")


def test_images_load_neither_pandas_nor_pyarrow(tmp_path: Path):
    """They take half a second to load: not for importing the package, reading images or training on them."""
    code = f"""
        import sys
        import numpy as np
        import sfumato.data
        import sfumato.modalities
        from sfumato.config import DataSettings
        loaded = lambda: print("LOADED", *[name for name in ("pandas", "pyarrow") if name in sys.modules])
        loaded()
        pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
        np.savez("{tmp_path}/images.npz", images=pixels)
        small = ["codec.width=16", "codec.feature_steps=1", "denoiser.width=32", "denoiser.depth=1"]
        sfumato.fit("{tmp_path}/images.npz", out="{tmp_path}/run", steps=2, overrides=small, device="cpu")
        loaded()
        sfumato.modalities.recognise("{tmp_path}/table.csv").read("{tmp_path}/table.csv", DataSettings())
        loaded()
    """
    (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i % 7}.5,{i % 3}\n" for i in range(40)))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [[], [], ["pandas", "pyarrow"]]
