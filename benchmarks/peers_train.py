"""Trains a peer of `peers.py` until given seconds have passed, draws samples from it, plots; knows nothing of sfumato.

    PEER_PYTHON peers_train.py train ddpm-pytorch --data FOLDER --run RUN --seconds 300,600,1800
    PEER_PYTHON peers_train.py sample RUN --at 300 -n 1000 --steps 50 --out SAMPLES
    PEER_PYTHON peers_train.py plot POINTS.json fd.png

FOLDER holds images.npy, (N, H, W, C) of uint8, and labels.npy. The same for every peer: images lie in memory, so none
waits for files, in a new order each epoch, never flipped; a constant learning rate; gradients clipped to norm 1;
float32 or bf16, channels last or not, whichever was fastest in a few steps beforehand. The clock counts training steps
alone: importing, building, measuring and saving are free. Sides are padded in black to what the peer can halve, and
cropped again. Everything runs on the CPU.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peers_nets import PEERS, Peer, Shape, Stage, Weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

Facts = dict[str, Any]
TRIED = 2  # steps that each precision and layout is timed on, after one that is not
AT_ONCE = 100  # images that are sampled at once


class How(NamedTuple):
    """How a network computes: under autocast to bf16 or in float32, and in which layout."""

    bf16: bool
    channels_last: bool

    @property
    def name(self) -> str:
        """In words."""
        return f"{'bf16' if self.bf16 else 'fp32'}{', channels last' if self.channels_last else ''}"

    @classmethod
    def named(cls, name: str) -> "How":
        """The one of this name."""
        return cls("bf16" in name, "channels last" in name)


class Feed:
    """Batches without end: x (B, C, H, W) in [-1, 1] and y (B,), in a new order each epoch."""

    def __init__(self, folder: Path, multiple: int, seed: int = 0):
        self.pixels = np.load(folder / "images.npy")
        self.labels = torch.from_numpy(np.load(folder / "labels.npy")).long()
        height, width, channels = self.pixels.shape[1:]
        self.margins = margins(height, multiple), margins(width, multiple)  # above and below; left and right
        self.shape = (channels, height + sum(self.margins[0]), width + sum(self.margins[1]))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The next images and their labels."""
        while len(self.order) < count:
            self.order = torch.cat([self.order, torch.randperm(len(self.pixels), generator=self.generator)])
        rows, self.order = self.order[:count], self.order[count:]
        x = torch.from_numpy(self.pixels[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pad(x, [*self.margins[1], *self.margins[0]], value=-1.0), self.labels[rows]


def margins(side: int, multiple: int) -> tuple[int, int]:
    """Pixels to add before and behind, so that the side becomes a multiple."""
    missing = -side % multiple
    return missing // 2, missing - missing // 2


def step(stage: Stage, feed: Feed, how: How) -> None:
    """One step of the optimizer."""
    for _ in range(stage.portions):
        x, y = feed.draw(stage.batch)
        if how.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
            loss = stage.loss(x, y) / stage.portions
        loss.backward()
    nn.utils.clip_grad_norm_(stage.net.parameters(), 1.0)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    stage.average()


def run(
    stage: Stage, feed: Feed, how: How, seconds: Sequence[float], keep: Callable[[int, Weights, Facts], object]
) -> None:
    """Train on; at each of the times (of the clock of this stage) its number, weights and figures are kept."""
    spent, steps = 0.0, 0
    for number, mark in enumerate(seconds):
        start = time.perf_counter()
        while spent + time.perf_counter() - start < mark:
            step(stage, feed, how)
            steps += 1
        spent += time.perf_counter() - start
        weights = {name: value.detach().clone().contiguous() for name, value in stage.weights().items()}
        images = steps * stage.batch * stage.portions
        keep(number, weights, {"seconds": round(spent, 2), "steps": steps, "images": images, "how": how.name})


def fastest(make: Callable[[How], Stage], feed: Feed) -> How:
    """The quickest of all precisions and layouts, by a few steps of each on a stage that is thrown away."""
    times: dict[How, float] = {}
    for how in (How(*choice) for choice in product((False, True), repeat=2)):
        stage = make(how)
        step(stage, feed, how)  # the first one allocates
        start = time.perf_counter()
        for _ in range(TRIED):
            step(stage, feed, how)
        times[how] = (time.perf_counter() - start) / TRIED
    best = min(times, key=lambda how: times[how])
    told = "; ".join(f"{how.name} {taken:.2f} s" for how, taken in times.items())
    print(f"a step takes: {told}; taken: {best.name}", file=sys.stderr, flush=True)
    return best


def built(name: str, shape: Shape, classes: int, how: How, steps: int = 50) -> Peer:
    """A new peer in the layout it computes in."""
    layout: Any = {"memory_format": torch.channels_last} if how.channels_last else {}
    return PEERS[name](shape, classes, steps).to(**layout)


def train_marks(
    make: Callable[[How], Peer], feed: Feed, seconds: Sequence[float], keep: Callable[[int, Weights, Facts], object]
) -> None:
    """Train a peer, keeping at each time the weights to sample with and, by stage, the figures.

    Two stages have half of each time: the first trains on through all of them, the second anew on what that was then.
    """
    names = list(make(How(False, False)).stages())
    hows = {name: fastest(lambda how, name=name: make(how).stages()[name](), feed) for name in names}
    ends = [mark / len(names) for mark in seconds]
    found: list[tuple[Weights, Facts]] = []
    first, *later = names
    run(make(hows[first]).stages()[first](), feed, hows[first], ends, lambda _, *one: found.append(one))
    for number, (weights, facts) in enumerate(found):
        figures = {first: facts}
        for second in later:
            peer = make(hows[second])
            peer.begin(weights, feed.draw(AT_ONCE)[0])
            run(peer.stages()[second](), feed, hows[second], [ends[number]], lambda _, *one: found.append(one))
            more, figures[second] = found.pop()
            weights = {**weights, **more}
        keep(number, weights, figures)


def train(options: argparse.Namespace) -> Facts:
    """Train one peer: RUN/SECONDS.safetensors at each time, and RUN/peer.json, which is returned."""
    torch.manual_seed(options.seed)
    feed, run_folder = Feed(options.data, PEERS[options.peer].multiple, options.seed), options.run
    run_folder.mkdir(parents=True, exist_ok=True)
    classes = int(feed.labels.max()) + 1
    make = lambda how: built(options.peer, feed.shape, classes, how)
    parameters = sum(p.numel() for p in make(How(False, False)).parameters())
    about: Facts = {"peer": options.peer, "shape": feed.shape, "margins": feed.margins, "classes": classes}
    about |= {"parameters": parameters, "marks": {}}

    def keep(number: int, weights: Weights, figures: Facts) -> None:
        mark = f"{options.seconds[number]:g}"
        save_file(weights, run_folder / f"{mark}.safetensors")
        about["marks"][mark] = figures
        print(f"{options.peer}, {mark} s: {figures}", file=sys.stderr, flush=True)

    train_marks(make, feed, options.seconds, keep)
    (run_folder / "peer.json").write_text(json.dumps(about) + "\n")
    return about


@torch.inference_mode()
def sample(options: argparse.Namespace) -> Facts:
    """A folder of PNG files with metadata.jsonl, classes in turn, from the weights of one time."""
    about = json.loads((options.run / "peer.json").read_text())
    how = How.named(list(about["marks"][options.at].values())[-1]["how"])
    peer = built(about["peer"], tuple(about["shape"]), about["classes"], how, options.steps).eval()
    peer.load_state_dict(load_file(options.run / f"{options.at}.safetensors"))
    torch.manual_seed(options.seed)
    labels, parts = torch.arange(options.n) % about["classes"], list[Tensor]()
    start = time.perf_counter()
    for some in labels.split(AT_ONCE):
        with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
            parts.append(peer.draw(some).float())
    seconds = time.perf_counter() - start
    rows, columns = about["margins"]
    images = pad(torch.cat(parts), [-margin for margin in (*columns, *rows)])
    write(options.out, images, labels if peer.labelled else None)
    return {"seconds": round(seconds, 2), "items": options.n}


def write(out: Path, x: Tensor, labels: Tensor | None) -> None:
    """Images in [-1, 1] as 000000.png ... and metadata.jsonl; whole, or not at all."""
    pixels = x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    lines: list[str] = []
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial / f"{i:06d}.png")
        known = {} if labels is None else {"label": int(labels[i])}
        lines.append(json.dumps({"file_name": f"{i:06d}.png", **known}) + "\n")
    (partial / "metadata.jsonl").write_text("".join(lines))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def plot(options: argparse.Namespace) -> Facts:
    """Distance against minutes: a panel for each data set, a line for each entrant, dashed what real images score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets: dict[str, Facts] = json.loads(options.points.read_text())
    figure, panels = pyplot.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False, layout="constrained")
    for panel, (name, drawn) in zip(panels[0], sets.items(), strict=True):
        for entrant, points in drawn["entrants"].items():
            panel.plot(*zip(*points, strict=True), marker="o", label=entrant)
        panel.axhline(drawn["floor"], color="grey", linestyle="--", label="real images")
        panel.set(title=name, xlabel="minutes of training", ylabel="Fréchet distance", xscale="log", yscale="log")
        ticks = sorted({minutes for points in drawn["entrants"].values() for minutes, _ in points})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    panels[0][-1].legend()
    partial = options.out.with_name(f".{options.out.name}")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(options.out)
    return {}


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("peer", choices=PEERS)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--run", type=Path, required=True)
    training.add_argument("--seconds", type=lambda text: [float(part) for part in text.split(",")], required=True)
    training.set_defaults(work=train)
    sampling = commands.add_parser("sample")
    sampling.add_argument("run", type=Path)
    sampling.add_argument("--at", required=True, help="one of the --seconds of the training")
    sampling.add_argument("-n", type=int, default=1000)
    sampling.add_argument("--steps", type=int, default=50, help="of DDIM")
    sampling.add_argument("--out", type=Path, required=True)
    sampling.set_defaults(work=sample)
    for command in (training, sampling):
        command.add_argument("--seed", type=int, default=0)
    plotting = commands.add_parser("plot")
    plotting.add_argument("points", type=Path)
    plotting.add_argument("out", type=Path)
    plotting.set_defaults(work=plot)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Do what is asked and print its facts as JSON."""
    options = read_options(words)
    print(json.dumps(options.work(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
