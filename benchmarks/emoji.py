"""Style transfer between two emoji sets: a sheet of images, and a Markdown table with a row per method.

    python benchmarks/emoji.py --data DATA --budget 30m

DATA holds noto_emoji_64 and fluent_emoji_3d_128, two sets of images with the same captions; both are used at 64 pixels.
Some of the shared captions form the test set. Of the others, one half is trained on in one style and the other half in
the other, so that there are no pairs. `sfumato fit` trains with the style as the class. Test emoji of the first set are
translated to the second by `transfer`, by `edit` at each strength from 0.2 to 0.9 (the one with the best PSNR is
printed), or not at all (nothing).

`style` is the share of images in which a style classifier, trained on the same images, sees the second style. PSNR is
to the image of the same caption in that style; `retrieval` is the share of images whose nearest test image of that
style, by pixels, has the same caption (chance: 1/N). The row `truth` is these images themselves, `coded` their
reconstructions by the codec. OUT/sheet.png shows, from top to bottom: input, transfer, edit, truth. The model is stored
in OUT and reused; with other --items (it may have seen the test captions) or other --set it is refused.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from quality import fit_once, print_all
from torch import Tensor

import sfumato
from sfumato.data.conditions import LABEL, Labels
from sfumato.modalities.image.classifier import Classifier, fit_classifier, predict
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.metrics import psnr
from sfumato.modalities.image.write import sample_sheet, write_images

STYLES = {"noto": "noto_emoji_64", "fluent": "fluent_emoji_3d_128"}
SIDE = 64
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 300  # training steps of the style classifier
SHEET_COLUMNS = 12  # images per row of the sheet


class Emoji(NamedTuple):
    """Images (N, 64, 64, 3) of each style: with disjoint captions for training, with shared captions for the test."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def caption_files(folder: Path) -> dict[str, Path]:
    """Caption -> file."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {row["text"]: folder / row["file_name"] for row in rows}


def load_images(paths: Sequence[Path]) -> np.ndarray:
    """Images (N, 64, 64, 3)."""
    images = (Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for path in paths)
    return np.stack([np.asarray(image) for image in images])


def read(data: Path, test: int) -> Emoji:
    """Both sets, split by caption."""
    files = {style: caption_files(data / folder) for style, folder in STYLES.items()}
    shared = sorted(set.intersection(*(set(captions) for captions in files.values())))
    mixed = [shared[i] for i in np.random.default_rng(0).permutation(len(shared))]
    halves = dict(zip(STYLES, (mixed[test::2], mixed[test + 1 :: 2]), strict=True))
    return Emoji(
        {style: load_images([files[style][caption] for caption in halves[style]]) for style in STYLES},
        {style: load_images([files[style][caption] for caption in mixed[:test]]) for style in STYLES},
    )


def tensor(x: np.ndarray) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def retrieval(x: Tensor, truth: Tensor) -> float:
    """Share of images whose nearest truth is their own."""
    nearest = torch.cdist(x.flatten(1), truth.flatten(1)).argmin(1)
    return float((nearest == torch.arange(len(x))).float().mean())


def style_classifier(emoji: Emoji) -> Classifier:
    """A classifier of the style of an image."""
    x = np.concatenate([emoji.train[style] for style in STYLES])
    labels = np.concatenate([np.full(len(emoji.train[style]), k) for k, style in enumerate(STYLES)])
    data = ImageDataset(x, "RGB", conditions={LABEL: Labels(labels, list(STYLES))})
    return fit_classifier(data, len(STYLES), steps=STEPS)


def train_model(emoji: Emoji, options: argparse.Namespace) -> Path:
    """The run folder, trained if it is missing."""
    run = options.out / f"{options.budget}-{options.seed}"

    def source() -> Path:
        rows = [{"label": style} for style in STYLES for _ in emoji.train[style]]
        x = tensor(np.concatenate([emoji.train[style] for style in STYLES]))
        return write_images(options.out / "styles", x, rows, overwrite=True)

    fit_once(source, run, {"set": options.set, "items": options.items}, options)
    return run


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the Markdown table."""
    options.out.mkdir(parents=True, exist_ok=True)
    emoji = read(options.data, options.items)
    run, classifier = train_model(emoji, options), style_classifier(emoji)
    source, target = STYLES
    x, truth = (tensor(emoji.test[style]) for style in STYLES)
    given = write_images(options.out / "given", x, overwrite=True)
    transferred = sfumato.transfer(run, given, source_label=source, label=target, budget=options.search).items.stack()
    edited = {s: sfumato.edit(run, given, label=target, strength=s).items.stack() for s in STRENGTHS}
    best = max(edited, key=lambda strength: psnr(edited[strength], truth))
    coded = sfumato.reconstruct(run, write_images(options.out / "truth", truth, overwrite=True)).items.stack()
    results = {"transfer": transferred, f"edit at {best}": edited[best], "nothing": x, "coded": coded, "truth": truth}
    yield "| method | style | retrieval | PSNR |"
    yield "|---|---|---|---|"
    for name, items in results.items():
        style = float((predict(classifier, items) == list(STYLES).index(target)).float().mean())
        yield f"| {name} | {style:.3f} | {retrieval(items, truth):.3f} | {psnr(items, truth):.1f} |"
    shown = torch.cat([items[:SHEET_COLUMNS] for items in (x, transferred, edited[best], truth)])
    sample_sheet(shown, len(shown) // 4).save(options.out / "sheet.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of both sets")
    parser.add_argument("--budget", default="30m", help="training budget")
    parser.add_argument("--search", help="time limit of transfer's search, such as 10m (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=96, help="number of test captions")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the run")
    options = parser.parse_args(argv)
    return print_all([("emoji", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
