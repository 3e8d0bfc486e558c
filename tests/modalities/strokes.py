"""A small modality from outside the package: strokes of several lengths with captions, each with the box around it."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sfumato.codecs import Codec
from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.config import CodecSettings, DataSettings, DenoiserSettings, Settings, StageSettings, TrainSettings
from sfumato.data import check_swappable, json_text, swapped_folder
from sfumato.data.conditions import CAPTION, Index, Known, Texts, positions
from sfumato.data.dataset import Conditioned, Fingerprinted
from sfumato.errors import UserError
from sfumato.metrics import Extractor, frechet
from sfumato.modalities.base import Modality, PlanContext
from sfumato.types import Batch, Items, Latent, Progress

MIN_POINTS, MAX_POINTS = 3, 40
BOX_ROWS = 2  # the last rows of an item: centre and size of the box around its points
BOX = 1  # number of the latent's segment that is the box; segment 0 is the points
LATENT_DIM = 4
CAPTIONS = "captions.jsonl"
POINTS = {  # text -> least and largest number of points
    "zigzag": (3, 10),
    "circle small": (8, 16),
    "circle large": (12, 24),
    "spiral left": (20, 40),
    "spiral right": (20, 40),
}


@dataclass(eq=False)
class StrokeDataset(Conditioned, Fingerprinted):
    """Strokes in memory, with their captions.

    Args:
        strokes: N arrays (n + 2, 2), float32: n points, then centre and size of the box around them.
    """

    min_held_out: ClassVar[int] = 4

    strokes: list[NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.strokes)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the longest item that there can be."""
        return MAX_POINTS + BOX_ROWS, 2

    @property
    def spec(self) -> dict[str, Any]:
        return {"rows": ["point", "box"]}

    @property
    def split_key(self) -> str:
        return self.fingerprint

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for stroke in self.strokes:
            digest.update(repr(stroke.shape).encode() + stroke.tobytes())
        for known in self.conditions.values():
            digest.update(known.content())
        return digest.hexdigest()

    def batch(self, index: Index) -> Batch:
        where = positions(index)
        data, mask = Items(torch.from_numpy(self.strokes[i]) for i in where).pad()
        return Batch(data, torch.from_numpy(where), self.raw(where), mask)

    def subset(self, index: Index) -> "StrokeDataset":
        where = positions(index)
        conditions = {name: known.select(where) for name, known in self.conditions.items()}
        part = replace(self, strokes=[self.strokes[i] for i in where], conditions=conditions)
        part._inherit_fingerprint(self, where)
        return part


class StrokeCodec(Codec):
    """Strokes <-> a token per row, by two linear maps that are trained.

    An item is padded at its end, but the segments of a latent have fixed positions: points from 0 on, then the box from
    `MAX_POINTS` on. The rows keep their order, so both are filled in the order of their masks.
    """

    tokens = True
    segments = (MAX_POINTS, BOX_ROWS)

    def __init__(self, latent_dim: int) -> None:
        super().__init__((sum(self.segments), latent_dim))
        self.bottleneck = make_bottleneck("none", latent_dim)
        self.encoder, self.decoder = nn.Linear(2, latent_dim), nn.Linear(latent_dim, 2)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Latent:
        return super().encode(x, _all_rows(x) if mask is None else mask)

    def encode_raw(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = _all_rows(x) if mask is None else mask
        return _move(super().encode_raw(x), mask, self.latent_mask(mask))

    def latent_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        points = torch.arange(MAX_POINTS, device=mask.device) < mask.sum(1, keepdim=True) - BOX_ROWS
        return torch.cat([points, mask.new_ones(len(mask), BOX_ROWS)], 1)

    def data_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        rows = mask.sum(1, keepdim=True)
        return torch.arange(int(rows.max()), device=mask.device) < rows

    def decode(self, latent: Latent) -> Tensor:
        x = super().decode(latent)
        return x if latent.mask is None else _move(x, latent.mask, self.data_mask(latent.mask))


def _all_rows(x: Tensor) -> Tensor:
    """The mask (B, L) of items x (B, L, 2) without padding."""
    return x.new_ones(x.shape[:2], dtype=torch.bool)


def _move(values: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
    """The values (B, N, D) where `mask` (B, N) is true, in their order, where `target` (B, M) is true; else zeros."""
    assert target is not None
    moved = values.new_zeros(*target.shape, values.shape[2])
    moved[target] = values[mask]
    return moved


class StrokeEvaluator:
    """The Fréchet distance to the training part."""

    by_label = True

    def __init__(self, train: StrokeDataset) -> None:
        self.train = features(train)

    def report(self, fake: StrokeDataset, held: StrokeDataset, cas: bool, seed: int) -> dict[str, Any]:
        distance, floor = (frechet(features(data), self.train) for data in (fake, held))
        return {"n": len(fake), "frechet": distance, "frechet_floor": floor, "memorised": False}

    def reconstruction_metrics(self, x: Items, x_hat: Items) -> dict[str, float]:
        return errors(x, x_hat)


def features(data: StrokeDataset) -> Tensor:
    """Number of points, box and four points along each stroke: (N, 13)."""

    def feature(stroke: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(stroke) - BOX_ROWS
        shown = np.linspace(0, count - 1, 4).round().astype(int)
        return np.concatenate([[count / MAX_POINTS], stroke[-BOX_ROWS:].ravel(), stroke[shown].ravel()])

    return torch.from_numpy(np.stack([feature(stroke) for stroke in data.strokes])).float()


def errors(x: Items, x_hat: Items) -> dict[str, float]:
    """`l1`: mean absolute difference of rows, absent ones counting as zeros; `rows`: that of the numbers of rows."""
    pairs = list(zip(x, x_hat, strict=True))
    padded = [pad_sequence(pair, batch_first=True) for pair in pairs]
    l1 = sum(float((a - b).abs().mean()) for a, b in padded) / len(pairs)
    return {"l1": l1, "rows": sum(abs(len(a) - len(b)) for a, b in pairs) / len(pairs)}


class Strokes(Modality[StrokeDataset]):
    """A folder of .npy files, and `captions.jsonl` with a row for each: `file_name` and, if it is known, `text`."""

    name = "strokes"
    codec_class = StrokeCodec
    codec_share = 0.3
    preview_items = 8
    min_items = 4
    example_output = "strokes"
    uses_texts = True

    def recognises(self, source: str) -> bool:
        return (Path(source) / CAPTIONS).is_file()

    def read(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[StrokeDataset, None]:
        if not self.recognises(source):
            raise UserError(f"{source}: no {CAPTIONS} here", code=1)
        rows = [json.loads(line) for line in (Path(source) / CAPTIONS).read_text().splitlines()]
        strokes = [np.load(Path(source) / row["file_name"]) for row in rows]
        texts = [row.get("text") for row in rows]
        conditions: dict[str, Known] = {CAPTION: Texts(texts)} if any(texts) else {}
        return StrokeDataset(strokes, conditions=conditions), None

    def from_samples(self, items: Items, labels: Tensor | None, spec: Any, label_names: list[str]) -> StrokeDataset:
        return StrokeDataset([item.numpy() for item in items])

    def plan(self, given: Settings, context: PlanContext, seconds: float) -> Settings:
        return Settings(
            codec=CodecSettings(latent_dim=LATENT_DIM, reconstruction="l2"),
            denoiser=DenoiserSettings(net="dit", width=64, depth=2),
            train=TrainSettings(codec=StageSettings(lr=2e-2)),
        )

    def codec_config(self, codec: CodecSettings, shape: tuple[int, ...], spec: Any) -> dict[str, Any]:
        return {"latent_dim": codec.latent_dim}

    def evaluator(
        self, train: StrokeDataset, device: str | None, progress: Progress | None, target_column: str | None
    ) -> StrokeEvaluator:
        return StrokeEvaluator(train)

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
            write_strokes(folder, [item.numpy() for item in items], metadata)

    def preview(self, items: Items, spec: Any, reconstructed: Items | None = None, columns: int | None = None) -> Any:
        """Drawings in rows; reconstructions are red, over the originals."""
        side, columns = 48, min(columns or 8, len(items))
        picture = Image.new("RGB", (columns * side, -(-len(items) // columns) * side), "white")
        draw = ImageDraw.Draw(picture)
        for strokes, colour in ((items, "black"), (reconstructed or (), "red")):
            for i, stroke in enumerate(strokes):
                corner = stroke.new_tensor([i % columns, i // columns]) * side
                points = corner + side * (stroke[:-BOX_ROWS] + 4) / 8
                draw.line([(float(x), float(y)) for x, y in points], fill=colour)
        return picture

    def contract_source(self, folder: Path) -> str:
        (folder / "source").mkdir()
        strokes, texts = draw_strokes(count=100, seed=0)
        write_strokes(folder / "source", strokes, [{"text": text} for text in texts])
        return str(folder / "source")


def write_strokes(folder: Path, strokes: list[NDArray[np.float32]], rows: list[dict[str, Any]]) -> None:
    """A file per stroke, and the captions."""
    lines = list[str]()
    for i, (stroke, row) in enumerate(zip(strokes, rows, strict=True)):
        np.save(folder / f"{i:06d}.npy", stroke, allow_pickle=False)
        lines.append(json_text({"file_name": f"{i:06d}.npy", **row}))
    (folder / CAPTIONS).write_text("\n".join(lines))


def draw_strokes(count: int, seed: int) -> tuple[list[NDArray[np.float32]], list[str]]:
    """Strokes of all kinds at random places, and their texts."""
    rng = np.random.default_rng(seed)
    texts = [list(POINTS)[i % len(POINTS)] for i in range(count)]
    strokes = list[NDArray[np.float32]]()
    for text in texts:
        least, most = POINTS[text]
        shape = _unit_stroke(text, int(rng.integers(least, most, endpoint=True)))
        points = rng.uniform(-2, 2, 2) + rng.uniform(0.8, 1.2) * shape  # (n, 2)
        low, high = points.min(0), points.max(0)
        strokes.append(np.concatenate([points, [(low + high) / 2, high - low]]).astype(np.float32))
    return strokes, texts


def _unit_stroke(text: str, count: int) -> NDArray[np.float64]:
    """The points (count, 2) of a stroke around 0, in about [-1, 1]."""
    u = np.linspace(0, 1, count)
    if text == "zigzag":
        return np.stack([2 * u - 1, np.where(np.arange(count) % 2, 0.5, -0.5)], 1)
    turns, radius = (1, 0.4 if text == "circle small" else 1.0) if "circle" in text else (2, 0.1 + 0.9 * u)
    angle = 2 * math.pi * turns * u * (-1 if text.endswith("left") else 1)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
