"""The benchmarks of speed: exclusive times, operator costs, exponents, reports."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.training import profile as planning
from tests.benchmarks.loading import load_benchmark
from tests.training.common import SMALL, pictures


@pytest.fixture
def profile_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("profile_step", monkeypatch)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("scaling", monkeypatch)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_times_of_parts_are_exclusive(profile_step: ModuleType):
    time = [0.0]
    clock = profile_step.PartTimer(lambda: None, lambda: time[0])

    def spend(seconds: float) -> None:
        time[0] += seconds

    def outer() -> None:
        spend(1)
        clock.timed("inner", spend)(10)
        spend(2)
        clock.timed("inner", spend)(20)

    spend(100)  # outside
    clock.timed("outer", outer)()
    assert dict(clock.seconds) == {"outer": 3, "inner": 30}
    with pytest.raises(ZeroDivisionError):
        clock.timed("broken", lambda: 1 / 0)()
    assert clock.stack == []


def test_profile_of_both_stages(
    profile_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    x, label = pictures(96, (1, 16, 16))
    np.savez(tmp_path / "pictures.npz", images=x[..., 0], labels=label)
    monkeypatch.setattr(planning, "measure_peak", lambda *_: 1e11)
    monkeypatch.setattr(planning, "measure_step", partial(planning.measure_step, seconds=0.0, min_steps=1))
    settings = [word for setting in SMALL for word in ("--set", setting)]
    argv = ["--data", str(tmp_path / "pictures.npz"), "--budget", "1000m", "--steps", "3", "--top", "99"]
    argv += ["--trace", str(tmp_path / "trace.json"), "--device", "cpu", *settings]
    assert profile_step.main([*argv, "--set", "codec.adversarial_weight=0.1"]) == 0
    codec, denoiser = capsys.readouterr().out.split("## ")[1:]
    common = {"batch", "backward", "clipping", "optimizer", "weight average", "bookkeeping", "loss"}
    for text, parts in (
        (codec, {"encoder", "bottleneck", "decoder", "perceptual network", "discriminator"}),
        (denoiser, {"denoiser", "conditioner"}),
    ):
        tables = [[cells(line) for line in part.splitlines()] for part in text.split("\n\n") if part.startswith("|")]
        rows = {row[0]: float(row[1]) for row in tables[0][2:]}
        assert rows.keys() == common | parts | {"all"}
        assert sum(rows.values()) == pytest.approx(2 * rows["all"], abs=0.01 * len(rows))
        counted = [float(row[4]) for row in tables[1][2:] if row[4]]
        total = float(text.split(" GFLOP per step")[0].rsplit(" ", 1)[1])
        assert total > 0 and sum(counted) == pytest.approx(total, abs=0.01 + 0.0005 * len(counted))
        least = [float(row[7]) for row in tables[1][2:] if row[7]]
        best = float(text.split("at best ")[1].split(" ")[0])
        assert best > 0 and sum(least) == pytest.approx(best, abs=0.05 + 0.005 * len(least))
    assert "`aten::convolution_backward`" in codec and "`aten::addmm`" in denoiser
    for stage in ("codec", "denoiser"):
        assert json.loads((tmp_path / f"trace-{stage}.json").read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pictures.npz", "trace-codec.json", "trace-denoiser.json",
    ]  # fmt: skip


def test_costs_of_operators(profile_step: ModuleType):
    """Operations of products and bytes of all tensors; views move nothing; the lower bound is the slower of the two."""
    x, y = torch.randn(64, 32), torch.randn(32, 16)
    with profile_step.CostCounter(peak=1e3, bandwidth=lambda _: 1e2) as counter:
        (x @ y).t().exp()
    product, result = 2 * 64 * 32 * 16, 4 * 64 * 16
    assert counter.flops["aten::mm"] == product and counter.flops["aten::exp"] == 0
    assert counter.bytes["aten::mm"] == x.nbytes + y.nbytes + result and counter.bytes["aten::exp"] == 2 * result
    assert counter.bytes["aten::t"] == counter.best["aten::t"] == 0
    assert counter.best["aten::mm"] == max(product / 1e3, counter.bytes["aten::mm"] / 1e2)
    assert counter.best["aten::exp"] == 2 * result / 1e2


def test_profile_reports_a_wrong_setting(profile_step: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert profile_step.main(["--data", "digits", "--set", "codec.widht=3"]) == 2
    assert "codec.width" in capsys.readouterr().err


def test_exponents(scaling: ModuleType):
    x = [1, 10, 100, 1000]
    assert scaling.exponent(x, [5, 20, 200, 2000]) == pytest.approx(1)  # the first point is overhead
    assert scaling.exponent(x, [n**2 for n in x]) == pytest.approx(2)
    assert "grows" not in scaling.verdict("seconds", 1.14) and "grows" in scaling.verdict("seconds", 1.16)
    assert "grows" in scaling.verdict("seconds a batch", 0.16, 0.0)


def test_report_of_children(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Costs scale linearly, except for memory, which grows with the square of the work."""
    requests: list[dict[str, Any]] = []

    def call(argv: Sequence[str]) -> Any:
        spec = json.loads(argv[2])
        requests.append(spec)
        size = sum(int(number) for number in re.findall(r"\d+", " ".join(spec["settings"]))) or 32
        work = spec["side"] ** 2 * spec["batch"] * size / 32 * 1e5
        cost = {"seconds": work / 1e10 / spec["threads"], "flops": work}
        if spec["probe"] == "images":
            n = spec["count"]
            cost = {"encode": n / 1e5, "measure": n**2 / 1e9, "a batch of images": 1e-3}
        gib = 0.25 + (0 if spec["probe"] == "import" else spec["side"] ** 4 / 2**20)
        return SimpleNamespace(output=json.dumps(cost), gib=gib)

    monkeypatch.setattr(scaling, "call", call)
    assert scaling.main(["--quick", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    sections = {part.splitlines()[0]: part for part in text.split("## ")[1:]}
    sides = sections["Image size (a codec's step)"]
    assert "seconds over work: exponent 1.00\n" in sides
    assert "memory over work: exponent 2.00 **grows" in sides
    assert cells(sides.splitlines()[4])[:2] == ["16", "2.560"]
    counted = sections["Number of images (16x16, gray)"]
    assert "encode, seconds over images: exponent 1.00\n" in counted
    assert "measure, seconds over images: exponent 2.00 **grows" in counted
    assert "a batch of images, seconds over images: exponent 0.00\n" in counted
    assert "| codec | 10.240 | 5.120 | 2.00 |" in sections["Cores"]
    assert len(requests) == len({json.dumps(spec) for spec in requests})  # results are cached


@pytest.mark.parametrize("stage", ["codec", "denoiser"])
def test_a_step_is_measured(scaling: ModuleType, stage: str):
    spec = scaling.BASE | {"stage": stage, "side": 16, "batch": 4, "precision": "fp32", "seconds": 0.0}
    spec["settings"] = ["codec.width=16", "denoiser.width=32", "denoiser.depth=1"]
    cost = json.loads(scaling.run_probe(spec | {"threads": torch.get_num_threads()}))
    assert cost["seconds"] > 0 and cost["flops"] > 1e5
    twice = json.loads(scaling.run_probe(spec | {"threads": torch.get_num_threads(), "batch": 8}))
    assert twice["flops"] == pytest.approx(2 * cost["flops"], rel=0.1)


def test_work_on_all_images_is_measured(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "TIMED_BATCHES", 2)
    spec = scaling.BASE | {"probe": "images", "count": 100, "precision": "fp32", "settings": ["codec.width=16"]}
    seconds_by_name = scaling.probe_images(spec)
    assert (
        all(seconds > 0 for seconds in seconds_by_name.values())
        and {"encode", "a batch of latents"} <= seconds_by_name.keys()
    )
