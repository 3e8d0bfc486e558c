"""The benchmark of samplers: steps per evaluations, errors, and the table."""

from types import ModuleType

import pytest
import torch

from sfumato.core import SAMPLERS, denoiser_evaluations
from tests.benchmarks.loading import load_benchmark
from tests.tasks.conftest import new_model


@pytest.fixture
def samplers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("samplers", monkeypatch)


def test_steps_use_up_the_evaluations(samplers: ModuleType):
    assert [samplers.steps_for("heun", n) for n in (1, 2, 3, 4, 29)] == [1, 1, 2, 2, 15]
    for name in SAMPLERS:
        for evaluations in (1, 6, 15):
            steps = samplers.steps_for(name, evaluations)
            assert denoiser_evaluations(name, steps) <= evaluations < denoiser_evaluations(name, steps + 1)


def test_one_row_per_sampler(samplers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model = new_model()
    monkeypatch.setattr(samplers, "load", lambda folder: model)
    monkeypatch.setattr(samplers, "make_distance", lambda model, source: lambda x: float(x.mean()))
    monkeypatch.setitem(samplers.CONVERGED, "steps", 30)
    argv = [
        "runs/x",
        "--source",
        "digits",
        "--items",
        "6",
        "--batch",
        "4",
        "--guidance",
        "1,2",
        "--evaluations",
        "2,30",
    ]
    assert samplers.main([*argv, "--samplers", "euler:uniform,abm2:both_ends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| sampler | grid | w | 2 | 30 | \u221e |" and len(lines) == 6
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        ["euler", "uniform", "1"], ["abm2", "both_ends", "1"], ["euler", "uniform", "2"], ["abm2", "both_ends", "2"]
    ]  # fmt: skip
    errors = [[float(cell.split("/")[0]) for cell in row[3:5]] for row in rows]
    assert all(few > many for few, many in errors)
    assert errors[1][1] == 0 < errors[0][1]  # 30 steps of abm2 are the reference here
    assert rows[1][4].split(" / ")[1] == rows[1][5] != rows[3][5]
    (few, _), (many, _) = (samplers.sample(model, model.sampling, 6, batch) for batch in (4, 6))
    assert torch.allclose(few, many, atol=1e-4)
