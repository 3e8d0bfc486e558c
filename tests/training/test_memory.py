"""A data set larger than memory trains: its images and its latents are mapped from disk."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sfumato.model import load

ROOT = Path(__file__).parent.parent.parent
SIDE, COUNT = 64, 36_000  # 422 MiB of pixels, 141 MiB of latents
ROOM = 256 * 2**20  # bytes that a run may take beyond what its imports do

CHILD = """
import resource, sys
from pathlib import Path

import torch.utils.tensorboard  # what a run imports when it first needs it

from sfumato.data import cache
from sfumato.training import stages
from tests.training.common import PLAIN, small_fit

source, out, limit, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cache.IN_MEMORY, stages.ENCODED = limit, 50
used = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))  # of memory alone: mapped files are not part of it
small_fit(source, out, *PLAIN, "data.held_out=0.001", "denoiser.net=mlp", steps=12)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of noise, written piece by piece."""
    folder = tmp_path_factory.mktemp("large")
    store = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (COUNT, SIDE, SIDE, 3))
    some = np.random.default_rng(0).integers(0, 256, (100, SIDE, SIDE, 3), np.uint8)
    for start in range(0, COUNT, len(some)):
        store[start : start + len(some)] = some + np.uint8(start // len(some) % 256)
    store.flush()
    del store
    with zipfile.ZipFile(folder / "images.npz", "w") as archive:
        archive.write(folder / "images.npy", "images.npy")
    (folder / "images.npy").unlink()
    return folder / "images.npz"


def trained(source: Path, out: Path, in_memory: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", CHILD, str(source), str(out), str(in_memory), str(ROOM)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_data_larger_than_memory_train(large: Path, tmp_path: Path):
    assert COUNT * SIDE**2 * 3 > 1.6 * ROOM
    done = trained(large, tmp_path / "run", in_memory=2**22)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model.json").is_file()
    assert 4 * COUNT * load(tmp_path / "run").codec.latent_size > 2**22


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_held_in_memory_they_would_not(large: Path, tmp_path: Path):
    done = trained(large, tmp_path / "run", in_memory=2**40)
    assert done.returncode != 0 and "MemoryError" in done.stderr
