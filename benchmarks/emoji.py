"""How emoji of one hand become those of another: a sheet to look at, and one row of a Markdown table a way.

    python benchmarks/emoji.py --data DATA --budget 30m

DATA holds noto_emoji_64 and fluent_emoji_3d_128, two sets of pictures under the same captions; both are taken at 64
pixels. Of the captions that both have some are kept for the test; of the others one half is learned in one style and
the other half in the other, so no two pictures belong together. `sfumato fit` learns them with the style for a class.
Test emoji of the first set are carried over into the second by `transfer`, by `edit` at each strength of 0.2 to 0.9
(the best one by distance is printed), or stay as they are (nothing).

`style` is the share in which a classifier of styles, trained on the same pictures, sees the second style. PSNR is to
the picture of the same caption there; `found` is the share whose nearest one among all test pictures of the second
style it is (by pixels; 1 in as many by chance). The row `truth` is these pictures themselves, `coded` these
through the codec and back. OUT/sheet.png shows, from above: given, transfer, edit, truth. The model is kept in OUT and
not made again; of other --items, which it may have learned from, or of other --set it is refused.
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
from sfumato.data import Data, write_images
from sfumato.data.write import sample_sheet
from sfumato.metrics import psnr
from sfumato.nn.classifier import Classifier, fit_classifier, predict

STYLES = {"noto": "noto_emoji_64", "fluent": "fluent_emoji_3d_128"}
SIDE = 64
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 300  # of the classifier
SHOWN = 12


class Emoji(NamedTuple):
    """Pictures (N, 64, 64, 3) of each style: of captions of its own, and of the same captions for the test."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def pictures(folder: Path) -> dict[str, Path]:
    """The file of each caption."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {row["text"]: folder / row["file_name"] for row in rows}


def loaded(paths: Sequence[Path]) -> np.ndarray:
    """Pictures (N, 64, 64, 3)."""
    images = (Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for path in paths)
    return np.stack([np.asarray(image) for image in images])


def read(data: Path, test: int) -> Emoji:
    """Both sets, divided by caption."""
    files = {style: pictures(data / folder) for style, folder in STYLES.items()}
    both = sorted(set.intersection(*(set(found) for found in files.values())))
    mixed = [both[i] for i in np.random.default_rng(0).permutation(len(both))]
    halves = dict(zip(STYLES, (mixed[test::2], mixed[test + 1 :: 2]), strict=True))
    return Emoji(
        {style: loaded([files[style][caption] for caption in halves[style]]) for style in STYLES},
        {style: loaded([files[style][caption] for caption in mixed[:test]]) for style in STYLES},
    )


def tensor(x: np.ndarray) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def found(x: Tensor, truth: Tensor) -> float:
    """The share of images whose nearest truth is their own."""
    nearest = torch.cdist(x.flatten(1), truth.flatten(1)).argmin(1)
    return float((nearest == torch.arange(len(x))).float().mean())


def judge(emoji: Emoji) -> Classifier:
    """A classifier of styles."""
    x = np.concatenate([emoji.train[style] for style in STYLES])
    labels = np.concatenate([np.full(len(emoji.train[style]), k) for k, style in enumerate(STYLES)])
    return fit_classifier(Data(x, "RGB", labels=labels), len(STYLES), steps=STEPS)


def trained(emoji: Emoji, options: argparse.Namespace) -> Path:
    """The model's folder."""
    run = options.out / f"{options.budget}-{options.seed}"

    def source() -> Path:
        rows = [{"label": style} for style in STYLES for _ in emoji.train[style]]
        x = tensor(np.concatenate([emoji.train[style] for style in STYLES]))
        return write_images(options.out / "styles", x, rows, overwrite=True)

    fit_once(source, run, {"set": options.set, "items": options.items}, options)
    return run


def table(options: argparse.Namespace) -> Iterator[str]:
    """The lines."""
    options.out.mkdir(parents=True, exist_ok=True)
    emoji = read(options.data, options.items)
    run, styles = trained(emoji, options), judge(emoji)
    begin, end = STYLES
    x, truth = (tensor(emoji.test[style]) for style in STYLES)
    given = write_images(options.out / "given", x, overwrite=True)
    made = {"transfer": sfumato.transfer(run, given, own_label=begin, label=end, budget=options.search).items}
    tried = {s: sfumato.edit(run, given, label=end, strength=s).items for s in STRENGTHS}
    best = max(tried, key=lambda strength: psnr(tried[strength], truth))
    coded = sfumato.reconstruct(run, write_images(options.out / "truth", truth, overwrite=True)).items
    made |= {f"edit at {best}": tried[best], "nothing": x, "coded": coded, "truth": truth}
    yield "| by | style | found | PSNR |"
    yield "|---|---|---|---|"
    for name, items in made.items():
        style = float((predict(styles, items) == list(STYLES).index(end)).float().mean())
        yield f"| {name} | {style:.3f} | {found(items, truth):.3f} | {psnr(items, truth):.1f} |"
    shown = torch.cat([items[:SHOWN] for items in (x, made["transfer"], tried[best], truth)])
    sample_sheet(shown, len(shown) // 4).save(options.out / "sheet.png")


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of both sets")
    parser.add_argument("--budget", default="30m", help="of the training")
    parser.add_argument("--search", help="what transfer's search may take, such as 10m (default: as long as it takes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=96, help="captions for the test")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    options = parser.parse_args(words)
    return print_all([("emoji", lambda: table(options))])


if __name__ == "__main__":
    sys.exit(main())
