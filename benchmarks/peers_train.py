"""Trains a peer of `peers.py` for given times, samples from it, and plots; imports nothing of sfumato.

    PEER_PYTHON peers_train.py train ddpm-pytorch --data FOLDER --run RUN --seconds 300,600,1800
    PEER_PYTHON peers_train.py sample RUN --at 300 -n 1000 --steps 50 --out SAMPLES
    PEER_PYTHON peers_train.py plot POINTS.json fd.png

FOLDER holds images.npy, (N, H, W, C) of uint8, and labels.npy. The same for every peer: images in memory, in a new
order each epoch, never flipped; a constant learning rate; gradients clipped to norm 1; float32 or bf16, channels last
or not, whichever was fastest in a few steps beforehand. The clock counts training steps only: importing, building,
timing and saving are free. Images are padded in black to a size that the peer can downsample, and cropped again.
Everything runs on the CPU.
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

Record = dict[str, Any]
TIMED_STEPS = 2  # steps that each precision and layout is timed on, after one of warm-up
SAMPLE_BATCH = 100  # images sampled at once


class Compute(NamedTuple):
    """Precision (bf16 autocast or float32) and memory layout."""

    bf16: bool
    channels_last: bool

    @property
    def name(self) -> str:
        """Its name in records."""
        return f"{'bf16' if self.bf16 else 'fp32'}{', channels last' if self.channels_last else ''}"

    @classmethod
    def named(cls, name: str) -> "Compute":
        """The value of this name."""
        return cls("bf16" in name, "channels last" in name)


class Batches:
    """Endless batches x (B, C, H, W) in [-1, 1] and y (B,), in a new order each epoch."""

    def __init__(self, folder: Path, multiple: int, seed: int = 0):
        self.pixels = np.load(folder / "images.npy")
        self.labels = torch.from_numpy(np.load(folder / "labels.npy")).long()
        height, width, channels = self.pixels.shape[1:]
        self.margins = margins(height, multiple), margins(width, multiple)  # above and below; left and right
        self.shape = (channels, height + sum(self.margins[0]), width + sum(self.margins[1]))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next images and their labels."""
        while len(self.order) < count:
            self.order = torch.cat([self.order, torch.randperm(len(self.pixels), generator=self.generator)])
        rows, self.order = self.order[:count], self.order[count:]
        x = torch.from_numpy(self.pixels[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pad(x, [*self.margins[1], *self.margins[0]], value=-1.0), self.labels[rows]


def margins(side: int, multiple: int) -> tuple[int, int]:
    """Padding before and after, so that the side becomes a multiple."""
    missing = -side % multiple
    return missing // 2, missing - missing // 2


def step(stage: Stage, batches: Batches, compute: Compute) -> None:
    """One optimizer step."""
    for _ in range(stage.accumulation):
        x, y = batches.next(stage.batch)
        if compute.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute.bf16):
            loss = stage.loss(x, y) / stage.accumulation
        loss.backward()
    nn.utils.clip_grad_norm_(stage.net.parameters(), 1.0)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    stage.average()


def run(
    stage: Stage,
    batches: Batches,
    compute: Compute,
    seconds: Sequence[float],
    save: Callable[[int, Weights, Record], object],
) -> None:
    """Train; `save(number, weights, figures)` is called at each time, in seconds of this stage."""
    spent, steps = 0.0, 0
    for number, mark in enumerate(seconds):
        start = time.perf_counter()
        while spent + time.perf_counter() - start < mark:
            step(stage, batches, compute)
            steps += 1
        spent += time.perf_counter() - start
        weights = {name: value.detach().clone().contiguous() for name, value in stage.weights().items()}
        images = steps * stage.batch * stage.accumulation
        save(number, weights, {"seconds": round(spent, 2), "steps": steps, "images": images, "compute": compute.name})


def fastest(make: Callable[[Compute], Stage], batches: Batches) -> Compute:
    """The fastest precision and layout, timed on a few steps of a discarded stage."""
    times: dict[Compute, float] = {}
    for compute in (Compute(*choice) for choice in product((False, True), repeat=2)):
        stage = make(compute)
        step(stage, batches, compute)  # warm-up: the first step allocates
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            step(stage, batches, compute)
        times[compute] = (time.perf_counter() - start) / TIMED_STEPS
    best = min(times, key=lambda compute: times[compute])
    timings = "; ".join(f"{compute.name} {elapsed:.2f} s" for compute, elapsed in times.items())
    print(f"seconds per step: {timings}; chosen: {best.name}", file=sys.stderr, flush=True)
    return best


def new_peer(name: str, shape: Shape, classes: int, compute: Compute, steps: int = 50) -> Peer:
    """A new peer in the given memory layout."""
    layout: Any = {"memory_format": torch.channels_last} if compute.channels_last else {}
    return PEERS[name](shape, classes, steps).to(**layout)


def train_marks(
    make: Callable[[Compute], Peer],
    batches: Batches,
    seconds: Sequence[float],
    save: Callable[[int, Weights, Record], object],
) -> None:
    """Train a peer; at each time save the weights for sampling and the figures of each stage.

    Two stages get half of each time: the first trains continuously, the second anew from each of its checkpoints.
    """
    names = list(make(Compute(False, False)).stages())
    chosen = {name: fastest(lambda compute, name=name: make(compute).stages()[name](), batches) for name in names}
    ends = [mark / len(names) for mark in seconds]
    checkpoints: list[tuple[Weights, Record]] = []
    first, *later = names
    run(
        make(chosen[first]).stages()[first](), batches, chosen[first], ends, lambda _, *saved: checkpoints.append(saved)
    )
    for number, (weights, codec_figures) in enumerate(checkpoints):
        figures = {first: codec_figures}
        for second in later:
            peer = make(chosen[second])
            peer.begin(weights, batches.next(SAMPLE_BATCH)[0])
            run(
                peer.stages()[second](),
                batches,
                chosen[second],
                [ends[number]],
                lambda _, *saved: checkpoints.append(saved),
            )
            more, figures[second] = checkpoints.pop()
            weights = {**weights, **more}
        save(number, weights, figures)


def train(options: argparse.Namespace) -> Record:
    """Train one peer: writes RUN/SECONDS.safetensors at each time, and RUN/peer.json, which is returned."""
    torch.manual_seed(options.seed)
    batches, run_folder = Batches(options.data, PEERS[options.peer].multiple, options.seed), options.run
    run_folder.mkdir(parents=True, exist_ok=True)
    classes = int(batches.labels.max()) + 1
    make = lambda compute: new_peer(options.peer, batches.shape, classes, compute)
    parameters = sum(p.numel() for p in make(Compute(False, False)).parameters())
    config: Record = {"peer": options.peer, "shape": batches.shape, "margins": batches.margins, "classes": classes}
    config |= {"parameters": parameters, "marks": {}}

    def save(number: int, weights: Weights, figures: Record) -> None:
        mark = f"{options.seconds[number]:g}"
        save_file(weights, run_folder / f"{mark}.safetensors")
        config["marks"][mark] = figures
        print(f"{options.peer}, {mark} s: {figures}", file=sys.stderr, flush=True)

    train_marks(make, batches, options.seconds, save)
    (run_folder / "peer.json").write_text(json.dumps(config) + "\n")
    return config


@torch.inference_mode()
def sample(options: argparse.Namespace) -> Record:
    """Samples from the weights of one time, classes in turn: a folder of PNG files with metadata.jsonl."""
    config = json.loads((options.run / "peer.json").read_text())
    compute = Compute.named(list(config["marks"][options.at].values())[-1]["compute"])
    peer = new_peer(config["peer"], tuple(config["shape"]), config["classes"], compute, options.steps).eval()
    peer.load_state_dict(load_file(options.run / f"{options.at}.safetensors"))
    torch.manual_seed(options.seed)
    labels, parts = torch.arange(options.n) % config["classes"], list[Tensor]()
    start = time.perf_counter()
    for chunk in labels.split(SAMPLE_BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=compute.bf16):
            parts.append(peer.sample(chunk).float())
    seconds = time.perf_counter() - start
    rows, columns = config["margins"]
    images = pad(torch.cat(parts), [-margin for margin in (*columns, *rows)])
    write(options.out, images, labels if peer.labelled else None)
    return {"seconds": round(seconds, 2), "items": options.n}


def write(out: Path, x: Tensor, labels: Tensor | None) -> None:
    """Write images in [-1, 1] as 000000.png ... and metadata.jsonl, atomically."""
    pixels = x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    lines: list[str] = []
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial / f"{i:06d}.png")
        metadata = {} if labels is None else {"label": int(labels[i])}
        lines.append(json.dumps({"file_name": f"{i:06d}.png", **metadata}) + "\n")
    (partial / "metadata.jsonl").write_text("".join(lines))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def plot(options: argparse.Namespace) -> Record:
    """Distance against minutes: a panel per data set, a line per entrant, a dashed line for real images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets: dict[str, Record] = json.loads(options.points.read_text())
    figure, panels = pyplot.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False, layout="constrained")
    for panel, (name, curves) in zip(panels[0], sets.items(), strict=True):
        for entrant, points in curves["entrants"].items():
            panel.plot(*zip(*points, strict=True), marker="o", label=entrant)
        panel.axhline(curves["floor"], color="grey", linestyle="--", label="real images")
        panel.set(title=name, xlabel="minutes of training", ylabel="Fréchet distance", xscale="log", yscale="log")
        ticks = sorted({minutes for points in curves["entrants"].values() for minutes, _ in points})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    panels[0][-1].legend()
    partial = options.out.with_name(f".{options.out.name}")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(options.out)
    return {}


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("peer", choices=PEERS)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--run", type=Path, required=True)
    training.add_argument("--seconds", type=lambda text: [float(part) for part in text.split(",")], required=True)
    training.set_defaults(command=train)
    sampling = commands.add_parser("sample")
    sampling.add_argument("run", type=Path)
    sampling.add_argument("--at", required=True, help="one of the training's --seconds")
    sampling.add_argument("-n", type=int, default=1000)
    sampling.add_argument("--steps", type=int, default=50, help="DDIM steps")
    sampling.add_argument("--out", type=Path, required=True)
    sampling.set_defaults(command=sample)
    for subparser in (training, sampling):
        subparser.add_argument("--seed", type=int, default=0)
    plotting = commands.add_parser("plot")
    plotting.add_argument("points", type=Path)
    plotting.add_argument("out", type=Path)
    plotting.set_defaults(command=plot)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and print its record as JSON."""
    options = read_options(argv)
    print(json.dumps(options.command(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
