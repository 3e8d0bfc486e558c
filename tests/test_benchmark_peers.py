"""The benchmark of peers: fairly timed, judged alike, nothing done twice. None of it needs the peers' environment."""

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

from sfumato.data import read_images

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
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
    """Answers the commands without running any; `broken` words make one fail."""

    def __init__(self, peers: ModuleType):
        self.peers, self.calls, self.broken = peers, list[tuple[str, list[str]]](), list[str]()

    def __call__(self, words: Sequence[str], python: str = sys.executable) -> object:
        text = " ".join(words)
        if any(word in text for word in self.broken):
            raise self.peers.Failed(f"exit code 1: {text}")
        self.calls.append((python, list(words)))
        return self.peers.call.done(self._answer(list(words)), 12.5, 1.2)

    def _answer(self, words: list[str]) -> str:
        if "fit" in words:
            self._fit(Path(words[words.index("--out") + 1]))
        if "train" in words:
            times = words[words.index("--seconds") + 1].split(",")
            marks = {t: {"denoiser": {"steps": 10, "images": 640, "seconds": float(t)}} for t in times}
            return json.dumps({"parameters": 5_000, "marks": marks})
        labelled = {} if "ddpm-pytorch" in " ".join(words) else {"accuracy": 0.99}
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
    fake_call: Any = lambda words, python=sys.executable: fake(words, python)
    fake_call.done = peers.call.__globals__["Done"]
    monkeypatch.setattr(peers, "call", fake_call)
    return fake


def command(out: Path, only: str = "sfumato,ddpm-pytorch", *more: str) -> list[str]:
    return ["--data", "digits", "--minutes", "10,5", "--only", only, "--out", str(out), "--peer-python", PYTHON, *more]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_for_each_time_and_speeds_beside_ours(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = command(tmp_path, "sfumato,ddpm-pytorch", "--judge", "j.py", "--cas", "--set", "train.precision=fp32")
    assert peers.main(words) == 0
    table, speeds, real = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert real == ["digits: 180 real images, as many of each class, have fd 3.210"]
    assert len(table) == 6 and len(speeds) == 5
    for part in (table, speeds):
        assert len({line.count("|") for line in part}) == 1
    # (20 · 64 + 5 · 512) images in 12.5 s
    assert cells(table[2])[:8] == ["digits", "sfumato", "5", "20 + 5", "307", "3,000", "1000", "12"]
    assert cells(table[2])[8:] == ["3.210 (0.500)", "0.990", "–", "0.900", "0.950", "j.py"]
    assert cells(table[5])[:5] == ["digits", "ddpm-pytorch", "10", "10", "1"]
    assert cells(table[5])[9] == "–"  # no accuracy without classes
    # the codec's first ten steps took 10 s, the others 20 s
    assert cells(speeds[2]) == ["digits", "sfumato", "codec", "42.7", "1", "0.0833"]
    assert cells(speeds[4]) == ["digits", "ddpm-pytorch", "denoiser", "1.1", "0.025", "0.00208"]

    fits = [words for _, words in machine.calls if "fit" in words]
    assert [words[words.index("--budget") + 1] for words in fits] == ["300s", "600s"]
    assert all("train.precision=fp32" in words and "cpu" in words for words in fits)
    trained = [(python, words) for python, words in machine.calls if "train" in words]
    assert len(trained) == 1 and trained[0][0] == PYTHON
    assert trained[0][1][trained[0][1].index("--seconds") + 1] == "300,600"
    drawn = [words for _, words in machine.calls if "-n" in words]
    assert {words[words.index("-n") + 1] for words in drawn} == {"1000"} and len(drawn) == 4
    judged = [words for _, words in machine.calls if words[0] == "j.py"]
    assert [words[1] for words in judged] == ["images"] * 5
    assert ["--cas" in words for words in judged] == [True, True, False, False, False]
    points = json.loads((tmp_path / "fd.json").read_text())
    assert points["digits"]["entrants"]["sfumato"] == [[5, 3.21], [10, 3.21]] and points["digits"]["floor"] == 0.5
    with Image.open(tmp_path / "digits.png") as sheet:  # real ones, and two times of two entrants
        assert sheet.size == (peers.NAMES + peers.SHOWN * 18, 5 * 18)

    count = len(machine.calls)
    peers.main(words)
    assert [words[1] for _, words in machine.calls[count:]] == ["plot"]


def test_a_cut_run_goes_on_where_it_stood(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["sample " + str(tmp_path / "digits-ddpm-pytorch-0") + " -n"]
    assert peers.main(command(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert "exit code 1" in err and out.count("| sfumato |") == 4  # two times, two stages
    count, machine.broken = len(machine.calls), []
    assert peers.main(command(tmp_path)) == 0
    redone = [" ".join(words) for _, words in machine.calls[count:]]
    assert len(redone) == 5 and not any(" fit " in words or " train " in words for words in redone)
    assert peers.main(command(tmp_path, "sfumato", "--items", "99")) == 1
    assert "name another --out" in capsys.readouterr().err


def test_data_that_a_run_beside_this_one_exports_first_are_taken(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, save = tmp_path / "data" / "digits", np.save

    def late(path: Path, array: Any) -> None:
        folder.mkdir(exist_ok=True)
        save(folder / path.name, array)  # theirs
        save(path, array)

    monkeypatch.setattr(peers.np, "save", late)
    assert peers.export("digits", argparse.Namespace(out=tmp_path)) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    assert len(np.load(folder / "images.npy")) == len(np.load(folder / "labels.npy")) > 0


def test_what_the_judge_does_not_know_sfumato_judges(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["j.py images"]
    assert peers.main(command(tmp_path, "sfumato", "--judge", "j.py")) == 0
    out, err = capsys.readouterr()
    assert "sfumato judges" in err and out.count("| sfumato evaluate |") == 2


def test_what_several_judges_said_is_not_drawn_together(
    peers: ModuleType, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine.broken = ["j.py images " + str(tmp_path / "digits-ddpm")]
    assert peers.main(command(tmp_path, "sfumato,ddpm-pytorch", "--judge", "j.py")) == 1
    assert "digits: judged by different judges (j.py of digits-sfumato-0, sfumato" in capsys.readouterr().err
    assert not (tmp_path / "fd.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "sfumato,nobody", "--peer-python", PYTHON], "nobody"), (["--only", "ddpm-pytorch"], "--peer-python")],
)
def test_wrong_usage(peers: ModuleType, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        peers.read_options(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images of 4x6, the k-th of grey 20 k and class k % 2."""
    folder = tmp_path / "data"
    folder.mkdir()
    grey = (20 * np.arange(10, dtype=np.uint8))[:, None, None, None]
    np.save(folder / "images.npy", np.broadcast_to(grey, (10, 4, 6, 1)))
    np.save(folder / "labels.npy", np.arange(10) % 2)
    return folder


def test_the_feed_shows_every_image_once_an_epoch(training: ModuleType, data: Path):
    feed = training.Feed(data, 5)
    assert feed.shape == (1, 5, 10) and feed.margins == ((0, 1), (2, 2))
    x, y = (torch.cat(parts) for parts in zip(feed.draw(7), feed.draw(7), feed.draw(6), strict=True))
    numbers = x[:, 0, 0, 2].add(1).mul(127.5 / 20).round().long()
    for epoch in numbers.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist() and numbers[:10].tolist() != list(range(10))
    assert torch.equal(y, numbers % 2)
    assert (x[:, :, 4] == -1).all() and (x[..., :2] == -1).all() and (x[..., 8:] == -1).all()
    assert torch.equal(x[0, 0, :4, 2:8], x[0, 0, 0, 2].expand(4, 6))


class Clock:
    """Time that passes only when something says so."""

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
    """A peer of two stages, whose steps take 1 s and 2 s, and which counts steps in its weights."""

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
                clock.now += seconds / 2  # two portions a step
                return -net.weight.sum() * (1 if x.shape == (3, 1, 5, 10) and y.shape == (3,) else torch.nan)

            optimizer = torch.optim.SGD(net.parameters(), 1.0)  # two portions of half the loss: one more a step
            weights = lambda: {f"{name}.{key}": value for key, value in net.state_dict().items()}
            return training.Stage(net, loss, optimizer, lambda: None, weights, 3, 2)

        def begin(self, weights: Any, x: torch.Tensor) -> None:
            super().begin(weights, x)
            self.known = self.codec.weight.item()

        def draw(self, labels: torch.Tensor) -> torch.Tensor:
            image = torch.zeros(len(labels), *self.shape)
            image[:, :, :4, 2:8] = self.codec.weight / 8 + labels[:, None, None, None] / 4 - 1
            return image

    return Tiny


def test_two_stages_share_each_time_and_the_second_starts_anew(training: ModuleType, data: Path, clock: Clock):
    made, kept = list[Any](), list[tuple[int, float, float, Any]]()
    kind = tiny(training, clock, training.Peer)

    def make(how: Any) -> Any:
        made.append(kind((1, 5, 10), 2, 1))
        return made[-1]

    def keep(number: int, weights: Any, figures: Any) -> None:
        clock.now += 1000  # saving is free
        kept.append((number, *(round(weights[f"{name}.weight"].item(), 3) for name in figures), figures))

    training.train_marks(make, training.Feed(data, 5), [7.0, 20.0], keep)
    assert [one[:3] for one in kept] == [(0, 4, 2), (1, 10, 5)]  # steps in half the time; the last one goes over
    figures = kept[1][3]
    assert list(figures) == ["codec", "denoiser"]
    assert figures["codec"] == {"seconds": 10.0, "steps": 10, "images": 60, "how": "fp32"}
    assert [figures["denoiser"][key] for key in ("seconds", "steps", "images")] == [10.0, 5, 30]
    assert [round(peer.known, 3) for peer in made[-2:]] == [4, 10]


def test_the_fastest_way_is_taken(training: ModuleType, data: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    taken = {(False, False): 4, (False, True): 3, (True, False): 2, (True, True): 5}

    def step(stage: Any, feed: Any, how: Any) -> None:
        assert stage == tuple(how)
        clock.now += taken[tuple(how)]

    monkeypatch.setattr(training, "step", step)
    best = training.fastest(tuple, training.Feed(data, 1))
    assert best == (True, False) and training.How.named(best.name) == best


def test_train_and_sample_by_command(
    training: ModuleType,
    data: Path,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    kind = tiny(training, clock, training.Peer)
    monkeypatch.setitem(training.PEERS, "ddpm-pytorch", kind)
    run, out = tmp_path / "run", tmp_path / "samples"
    training.main(["train", "ddpm-pytorch", "--data", str(data), "--run", str(run), "--seconds", "4,9.5"])
    about = json.loads(capsys.readouterr().out)
    assert list(about["marks"]) == ["4", "9.5"] and about["classes"] == 2 and about["parameters"] == 2
    training.main(["sample", str(run), "--at", "9.5", "-n", "5", "--out", str(out)])
    assert json.loads(capsys.readouterr().out)["items"] == 5
    read, _ = read_images(out)
    assert read.shape == (1, 4, 6) and read.labels is not None  # margins are gone
    assert read.labels.tolist() == [0, 1, 0, 1, 0]
    assert [int(image[0, 0, 0]) for image in read.pixels] == [80, 112, 80, 112, 80]  # five steps of the codec
    kind.labelled = False
    training.main(["sample", str(run), "--at", "4", "-n", "2", "--out", str(out)])  # over the old ones
    read, _ = read_images(out)
    assert len(read) == 2 and read.labels is None and int(read.pixels[0, 0, 0, 0]) == 32  # two steps


def test_torchvision_is_only_there_while_it_is_asked_for(training: ModuleType):
    nets = importlib.import_module("peers_nets")
    with nets.torchvision_absent():
        assert importlib.import_module("torchvision").transforms
    assert "torchvision" not in sys.modules


def test_a_network_of_diffusers_is_averaged_and_sampled(training: ModuleType):
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
    other.load_state_dict(stage.weights())  # all of it, and nothing else
    with torch.no_grad():
        assert other.draw(torch.tensor([0, 2])).shape == (2, 1, 12, 12)
