"""Training on data larger than memory: images and latents are memory-mapped."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sfumato.model import load

ROOT = Path(__file__).parent.parent.parent
SIDE, COUNT = 64, 36_000  # 422 MiB of pixels, 141 MiB of latents
MEMORY = 256 * 2**20  # bytes that a run may use in addition to its imports

CHILD = """
import resource, sys
from pathlib import Path

import torch.utils.tensorboard  # imported by a run on first use

from sfumato.data import cache
from sfumato.training import stages
from tests.training.common import PLAIN, small_fit

source, out, limit, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cache.IN_MEMORY, stages.ENCODE_BATCH = limit, 50
used = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))  # limits memory only, not mapped files
small_fit(source, out, *PLAIN, "data.held_out=0.001", "denoiser.net=mlp", steps=12)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of noise, written in parts."""
    folder = tmp_path_factory.mktemp("large")
    store = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (COUNT, SIDE, SIDE, 3))
    noise = np.random.default_rng(0).integers(0, 256, (100, SIDE, SIDE, 3), np.uint8)
    for start in range(0, COUNT, len(noise)):
        store[start : start + len(noise)] = noise + np.uint8(start // len(noise) % 256)
    store.flush()
    del store
    with zipfile.ZipFile(folder / "images.npz", "w") as archive:
        archive.write(folder / "images.npy", "images.npy")
    (folder / "images.npy").unlink()
    return folder / "images.npz"


def trained(source: Path, out: Path, in_memory: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(in_memory), str(MEMORY)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA needs Linux")
def test_data_larger_than_memory_can_be_trained_on(large: Path, tmp_path: Path):
    assert COUNT * SIDE**2 * 3 > 1.6 * MEMORY
    process = trained(large, tmp_path / "run", in_memory=2**22)
    assert process.returncode == 0, process.stderr[-2000:]
    assert (tmp_path / "run" / "model.json").is_file()
    assert 4 * COUNT * load(tmp_path / "run").codec.latent_size > 2**22


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA needs Linux")
def test_the_same_data_held_in_memory_exceed_the_limit(large: Path, tmp_path: Path):
    process = trained(large, tmp_path / "run", in_memory=2**40)
    assert process.returncode != 0 and "MemoryError" in process.stderr
