"""A small modality from outside the package: waves, 16 float numbers each, in .npy files."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.codecs import Codec
from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.config import CodecSettings, DataSettings, Settings, StageSettings, TrainSettings
from sfumato.data import check_swappable, json_text, swapped_folder
from sfumato.data.dataset import Index, Unlabelled
from sfumato.errors import UserError
from sfumato.metrics import Extractor, frechet
from sfumato.modalities.base import Modality, PlanContext
from sfumato.types import Batch, Items, Progress

LENGTH, LATENT_DIM = 16, 6


class WaveDataset(Unlabelled):
    """Waves x (N, 16), float32."""

    min_held_out: ClassVar[int] = 4

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.notes = x, list[str]()

    @property
    def shape(self) -> tuple[int]:
        return (self.x.shape[1],)

    @property
    def spec(self) -> dict[str, Any]:
        return {"samples": self.x.shape[1]}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.x.tobytes()).hexdigest()

    split_key = fingerprint

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Index) -> Batch:
        where = torch.as_tensor(index)
        return Batch(torch.from_numpy(self.x[where]), where)

    def subset(self, index: Index) -> "WaveDataset":
        return WaveDataset(self.x[np.asarray(index)])

    def describe(self) -> list[str]:
        return []


class WaveCodec(Codec):
    """Waves <-> a vector, by two linear maps that are trained."""

    def __init__(self, length: int, latent_dim: int) -> None:
        super().__init__((latent_dim,))
        self.bottleneck = make_bottleneck("none", latent_dim)
        self.encoder, self.decoder = nn.Linear(length, latent_dim), nn.Linear(latent_dim, length)


class WaveEvaluator:
    """The Fréchet distance to the training part."""

    by_label = True

    def __init__(self, train: WaveDataset) -> None:
        self.train = torch.from_numpy(train.x)

    def report(self, fake: WaveDataset, held: WaveDataset, cas: bool, seed: int) -> dict[str, Any]:
        distance, floor = (frechet(torch.from_numpy(data.x), self.train) for data in (fake, held))
        return {"n": len(fake), "frechet": distance, "frechet_floor": floor, "memorised": False}

    def reconstruction_metrics(self, x: Items, x_hat: Items) -> dict[str, float]:
        return errors(x, x_hat)


def errors(x: Items, x_hat: Items) -> dict[str, float]:
    return {"l1": float((x.stack() - x_hat.stack()).abs().mean())}


class Waves(Modality[WaveDataset]):
    """A folder of .npy files."""

    name = "waves"
    codec_class = WaveCodec
    codec_share = 0.5
    preview_items = 8
    min_items = 4
    example_output = "waves"

    def recognises(self, source: str) -> bool:
        return any(Path(source).glob("*.npy"))

    def read(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[WaveDataset, None]:
        waves = [np.load(file) for file in sorted(Path(source).glob("*.npy"))]
        if {wave.shape for wave in waves} != {(LENGTH,)}:
            raise UserError(f"{source}: no waves of {LENGTH} numbers here", code=1)
        return WaveDataset(np.stack(waves)), None

    def from_samples(self, items: Items, labels: Tensor | None, spec: Any, label_names: list[str]) -> WaveDataset:
        return WaveDataset(items.stack().numpy())

    def plan(self, given: Settings, context: PlanContext, seconds: float) -> Settings:
        codec = CodecSettings(latent_dim=LATENT_DIM, reconstruction="l2")
        return Settings(codec=codec, train=TrainSettings(codec=StageSettings(lr=2e-2)))

    def codec_config(self, codec: CodecSettings, shape: tuple[int, ...], spec: Any) -> dict[str, Any]:
        return {"length": shape[0], "latent_dim": codec.latent_dim}

    def evaluator(
        self, train: WaveDataset, device: str | None, progress: Progress | None, target_column: str | None
    ) -> WaveEvaluator:
        return WaveEvaluator(train)

    def reconstruction_metrics(
        self, x: Items, x_hat: Items, spec: Any, features: Extractor | None = None
    ) -> dict[str, float]:
        return errors(x, x_hat)

    def check_output(self, out: Path, overwrite: bool) -> None:
        check_swappable(out)
        if out.exists() and not overwrite:
            raise UserError(f"{out}: exists; pass --overwrite or name another folder")

    def write(self, out: Path, items: Items, metadata: list[dict[str, Any]], spec: Any, overwrite: bool) -> None:
        with swapped_folder(out) as folder:
            for i, item in enumerate(items):
                np.save(folder / f"{i:06d}.npy", item.numpy(), allow_pickle=False)
            lines = [json_text({"file_name": f"{i:06d}.npy", **values}) for i, values in enumerate(metadata)]
            (folder / "metadata.jsonl").write_text("\n".join(lines))

    def preview(self, items: Items, spec: Any, reconstructed: Items | None = None, columns: int | None = None) -> Any:
        both = torch.cat([part.stack() for part in (items, reconstructed) if part is not None], 1)
        return Image.fromarray(((both.tanh() + 1) * 127.5).byte().numpy())

    def contract_source(self, folder: Path) -> str:
        write_waves(folder / "source", count=60, seed=0)
        return str(folder / "source")


def write_waves(folder: Path, count: int, seed: int) -> None:
    """Sine waves of random phase and frequency."""
    rng = np.random.default_rng(seed)
    phase, frequency = rng.uniform(0, 6.28, (count, 1)), rng.uniform(0.5, 1.5, (count, 1))
    folder.mkdir()
    for i, wave in enumerate(np.sin(phase + frequency * np.arange(LENGTH) / 3)):
        np.save(folder / f"{i:03d}.npy", wave.astype(np.float32))
