"""The benchmark of peers: timing, evaluation, records. It does not need the peers' environment."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.modalities.image.read import read_images

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
PYTHON = "elsewhere/python"
REPORT = {"fd": 3.21, "fd_floor": 0.5, "coverage": 0.9, "novelty": 0.95}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers_train")


class Machine:
    """Answers commands without running them; those that contain a `broken` text fail."""

    def __init__(self, peers: ModuleType):
        self.peers, self.calls, self.broken = peers, list[tuple[str, list[str]]](), list[str]()

    def __call__(self, argv: Sequence[str], python: str = sys.executable) -> object:
        text = " ".join(argv)
        if any(word in text for word in self.broken):
            raise self.peers.Failed(f"exit code 1: {text}")
        self.calls.append((python, list(argv)))
        return self.peers.call.done(self._answer(list(argv)), 12.5, 1.2)

    def _answer(self, argv: list[str]) -> str:
        if "fit" in argv:
            self._fit(Path(argv[argv.index("--out") + 1]))
        if "train" in argv:
            times = argv[argv.index("--seconds") + 1].split(",")
            marks = {t: {"denoiser": {"steps": 10, "images": 640, "seconds": float(t)}} for t in times}
            return json.dumps({"parameters": 5_000, "marks": marks})
        labelled = {} if "ddpm-pytorch" in " ".join(argv) else {"accuracy": 0.99}
        return json.dumps({**REPORT, **labelled})

    @staticmethod
    def _fit(run: Path) -> None:
        run.mkdir(exist_ok=True)
        plan = {"train": {"codec": {"batch": 64}, "denoiser": {"batch": 512}, "precision": "bf16"}}
        metrics = {"parameters": {"codec": 1_000, "denoiser": 2_000}}
        (run / "run.json").write_text(json.dumps({"plan": plan, "metrics": metrics}))
        reports = [("codec", 10, 64.0), ("codec", 20, 32.0), ("denoiser", 5, 512.0)]
        lines = [json.dumps({"stage": s, "step": n, "items_per_second": r}) for s, n, r in reports]
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"stage": "codec", "psnr": 20.0})]))


@pytest.fixture
def machine(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine(peers)
    fake_call: Any = lambda argv, python=sys.executable: fake(argv, python)
    fake_call.done = peers.call.__globals__["Completed"]
    monkeypatch.setattr(peers, "call", fake_call)
    return fake


def command(out: Path, only: str = "sfumato,ddpm-pytorch", *more: str) -> list[str]:
    return ["--data", "digits", "--minutes", "10,5", "--only", only, "--out", str(out), "--peer-python", PYTHON, *more]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_one_row_per_time_and_relative_speeds(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = command(tmp_path, "sfumato,ddpm-pytorch", "--judge", "j.py", "--cas", "--set", "train.precision=fp32")
    assert peers.main(argv) == 0
    table, speeds, real = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert real == ["digits: 180 class-balanced real images have fd 3.210"]
    assert len(table) == 6 and len(speeds) == 5
    for part in (table, speeds):
        assert len({line.count("|") for line in part}) == 1
    # (20 · 64 + 5 · 512) images in 12.5 s
    assert cells(table[2])[:8] == ["digits", "sfumato", "5", "20 + 5", "307", "3,000", "1000", "12"]
    assert cells(table[2])[8:] == ["3.210 (0.500)", "0.990", "–", "0.900", "0.950", "j.py"]
    assert cells(table[5])[:5] == ["digits", "ddpm-pytorch", "10", "10", "1"]
    assert cells(table[5])[9] == "–"  # unconditional: no accuracy
    # the codec's first ten steps took 10 s, the next ten 20 s
    assert cells(speeds[2]) == ["digits", "sfumato", "codec", "42.7", "1", "0.0833"]
    assert cells(speeds[4]) == ["digits", "ddpm-pytorch", "denoiser", "1.1", "0.025", "0.00208"]

    fits = [argv for _, argv in machine.calls if "fit" in argv]
    assert [argv[argv.index("--budget") + 1] for argv in fits] == ["300s", "600s"]
    assert all("train.precision=fp32" in argv and "cpu" in argv for argv in fits)
    trained = [(python, argv) for python, argv in machine.calls if "train" in argv]
    assert len(trained) == 1 and trained[0][0] == PYTHON
    assert trained[0][1][trained[0][1].index("--seconds") + 1] == "300,600"
    sampled = [argv for _, argv in machine.calls if "-n" in argv]
    assert {argv[argv.index("-n") + 1] for argv in sampled} == {"1000"} and len(sampled) == 4
    evaluated = [argv for _, argv in machine.calls if argv[0] == "j.py"]
    assert [argv[1] for argv in evaluated] == ["images"] * 5
    assert ["--cas" in argv for argv in evaluated] == [True, True, False, False, False]
    points = json.loads((tmp_path / "fd.json").read_text())
    assert points["digits"]["entrants"]["sfumato"] == [[5, 3.21], [10, 3.21]] and points["digits"]["floor"] == 0.5
    with Image.open(tmp_path / "digits.png") as sheet:  # real images, and two times of two entrants
        assert sheet.size == (peers.LABEL_WIDTH + peers.SHEET_COLUMNS * 18, 5 * 18)

    count = len(machine.calls)
    peers.main(argv)
    assert [argv[1] for _, argv in machine.calls[count:]] == ["plot"]


def test_an_interrupted_benchmark_continues(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["sample " + str(tmp_path / "digits-ddpm-pytorch-0") + " -n"]
    assert peers.main(command(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert "exit code 1" in err and out.count("| sfumato |") == 4  # two times, two stages
    count, machine.broken = len(machine.calls), []
    assert peers.main(command(tmp_path)) == 0
    redone = [" ".join(argv) for _, argv in machine.calls[count:]]
    assert len(redone) == 5 and not any(" fit " in argv or " train " in argv for argv in redone)
    assert peers.main(command(tmp_path, "sfumato", "--items", "99")) == 1
    assert "name another --out" in capsys.readouterr().err


def test_data_exported_by_a_concurrent_run_is_used(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, save = tmp_path / "data" / "digits", np.save

    def concurrent_save(path: Path, array: Any) -> None:
        folder.mkdir(exist_ok=True)
        save(folder / path.name, array)  # of the other run
        save(path, array)

    monkeypatch.setattr(peers.np, "save", concurrent_save)
    assert peers.export("digits", argparse.Namespace(out=tmp_path)) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    assert len(np.load(folder / "images.npy")) == len(np.load(folder / "labels.npy")) > 0


def test_sfumato_evaluates_where_the_judge_fails(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["j.py images"]
    assert peers.main(command(tmp_path, "sfumato", "--judge", "j.py")) == 0
    out, err = capsys.readouterr()
    assert "using sfumato evaluate" in err and out.count("| sfumato evaluate |") == 2


def test_results_of_different_evaluators_are_not_plotted(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["j.py images " + str(tmp_path / "digits-ddpm")]
    assert peers.main(command(tmp_path, "sfumato,ddpm-pytorch", "--judge", "j.py")) == 1
    assert "digits: evaluated by different evaluators (j.py of digits-sfumato-0, sfumato" in capsys.readouterr().err
    assert not (tmp_path / "fd.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--only", "sfumato,nobody", "--peer-python", PYTHON], "nobody"), (["--only", "ddpm-pytorch"], "--peer-python")],
)
def test_wrong_usage(peers: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        peers.read_options(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images of 4x6; image k has gray value 20 k and class k % 2."""
    folder = tmp_path / "data"
    folder.mkdir()
    grey = (20 * np.arange(10, dtype=np.uint8))[:, None, None, None]
    np.save(folder / "images.npy", np.broadcast_to(grey, (10, 4, 6, 1)))
    np.save(folder / "labels.npy", np.arange(10) % 2)
    return folder


def test_batches_show_every_image_once_per_epoch(training: ModuleType, data: Path):
    batches = training.Batches(data, 5)
    assert batches.shape == (1, 5, 10) and batches.margins == ((0, 1), (2, 2))
    x, y = (torch.cat(parts) for parts in zip(batches.next(7), batches.next(7), batches.next(6), strict=True))
    numbers = x[:, 0, 0, 2].add(1).mul(127.5 / 20).round().long()
    for epoch in numbers.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist() and numbers[:10].tolist() != list(range(10))
    assert torch.equal(y, numbers % 2)
    assert (x[:, :, 4] == -1).all() and (x[..., :2] == -1).all() and (x[..., 8:] == -1).all()
    assert torch.equal(x[0, 0, :4, 2:8], x[0, 0, 0, 2].expand(4, 6))


class Clock:
    """A clock that only moves when set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training, "time", argparse.Namespace(perf_counter=clock))
    return clock


def tiny(training: ModuleType, clock: Clock, base: type) -> type:
    """A peer of two stages with steps of 1 s and 2 s, which counts its steps in its weights."""

    class Tiny(base):
        labelled, multiple = True, 5

        def __init__(self, shape: Any, classes: int, steps: int):
            super().__init__(shape, classes, steps)
            self.codec, self.denoiser = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
            torch.nn.init.zeros_(self.codec.weight)
            torch.nn.init.zeros_(self.denoiser.weight)

        def stages(self) -> Any:
            return {"codec": lambda: self._stage("codec", 1), "denoiser": lambda: self._stage("denoiser", 2)}

        def _stage(self, name: str, seconds: float) -> Any:
            net = getattr(self, name)

            def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                clock.now += seconds / 2  # two micro-batches per step
                return -net.weight.sum() * (1 if x.shape == (3, 1, 5, 10) and y.shape == (3,) else torch.nan)

            optimizer = torch.optim.SGD(net.parameters(), 1.0)  # two micro-batches of half the loss: +1 per step
            weights = lambda: {f"{name}.{key}": value for key, value in net.state_dict().items()}
            return training.Stage(net, loss, optimizer, lambda: None, weights, 3, 2)

        def begin(self, weights: Any, x: torch.Tensor) -> None:
            super().begin(weights, x)
            self.codec_steps = self.codec.weight.item()

        def sample(self, labels: torch.Tensor) -> torch.Tensor:
            image = torch.zeros(len(labels), *self.shape)
            image[:, :, :4, 2:8] = self.codec.weight / 8 + labels[:, None, None, None] / 4 - 1
            return image

    return Tiny


def test_stages_share_each_time_and_the_second_starts_anew(training: ModuleType, data: Path, clock: Clock):
    peers_made, saved = list[Any](), list[tuple[int, float, float, Any]]()
    peer_class = tiny(training, clock, training.Peer)

    def make(compute: Any) -> Any:
        peers_made.append(peer_class((1, 5, 10), 2, 1))
        return peers_made[-1]

    def save(number: int, weights: Any, figures: Any) -> None:
        clock.now += 1000  # saving is free
        saved.append((number, *(round(weights[f"{name}.weight"].item(), 3) for name in figures), figures))

    training.train_marks(make, training.Batches(data, 5), [7.0, 20.0], save)
    assert [entry[:3] for entry in saved] == [
        (0, 4, 2),
        (1, 10, 5),
    ]  # steps in half of each time; the last one overruns
    figures = saved[1][3]
    assert list(figures) == ["codec", "denoiser"]
    assert figures["codec"] == {"seconds": 10.0, "steps": 10, "images": 60, "compute": "fp32"}
    assert [figures["denoiser"][key] for key in ("seconds", "steps", "images")] == [10.0, 5, 30]
    assert [round(peer.codec_steps, 3) for peer in peers_made[-2:]] == [4, 10]


def test_the_fastest_precision_and_layout_is_chosen(
    training: ModuleType, data: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    seconds = {(False, False): 4, (False, True): 3, (True, False): 2, (True, True): 5}

    def step(stage: Any, batches: Any, compute: Any) -> None:
        assert stage == tuple(compute)
        clock.now += seconds[tuple(compute)]

    monkeypatch.setattr(training, "step", step)
    best = training.fastest(tuple, training.Batches(data, 1))
    assert best == (True, False) and training.Compute.named(best.name) == best


def test_train_and_sample_by_command(
    training: ModuleType,
    data: Path,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    peer_class = tiny(training, clock, training.Peer)
    monkeypatch.setitem(training.PEERS, "ddpm-pytorch", peer_class)
    run, out = tmp_path / "run", tmp_path / "samples"
    training.main(["train", "ddpm-pytorch", "--data", str(data), "--run", str(run), "--seconds", "4,9.5"])
    config = json.loads(capsys.readouterr().out)
    assert list(config["marks"]) == ["4", "9.5"] and config["classes"] == 2 and config["parameters"] == 2
    training.main(["sample", str(run), "--at", "9.5", "-n", "5", "--out", str(out)])
    assert json.loads(capsys.readouterr().out)["items"] == 5
    read, _ = read_images(out)
    assert read.shape == (1, 4, 6) and read.labels is not None  # the padding is cropped
    assert read.labels.tolist() == [0, 1, 0, 1, 0]
    assert [int(image[0, 0, 0]) for image in read.pixels] == [80, 112, 80, 112, 80]  # five steps of the codec
    peer_class.labelled = False
    training.main(["sample", str(run), "--at", "4", "-n", "2", "--out", str(out)])  # replaces the old samples
    read, _ = read_images(out)
    assert len(read) == 2 and read.labels is None and int(read.pixels[0, 0, 0, 0]) == 32  # two steps


def test_the_torchvision_stub_is_removed(training: ModuleType):
    nets = importlib.import_module("peers_nets")
    with nets.torchvision_absent():
        assert importlib.import_module("torchvision").transforms
    assert "torchvision" not in sys.modules


def test_a_diffusers_network_is_averaged_and_sampled(training: ModuleType):
    pytest.importorskip("diffusers")
    peer = training.PEERS["diffusers-small"]((1, 12, 12), 3, 2)
    stage = peer.stages()["denoiser"]()
    before = {name: value.clone() for name, value in stage.weights().items()}
    x, y = torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        loss = stage.loss(x, y)
        loss.backward()
        stage.optimizer.step()
        stage.average()
    assert 0 < loss.item() < 10
    assert any(not torch.equal(before[name], value) for name, value in stage.weights().items())
    other = training.PEERS["diffusers-small"]((1, 12, 12), 3, 2)
    other.load_state_dict(stage.weights())  # complete, and nothing else
    with torch.no_grad():
        assert other.sample(torch.tensor([0, 2])).shape == (2, 1, 12, 12)
