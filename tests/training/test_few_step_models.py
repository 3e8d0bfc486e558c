"""What a few-step model does: jumps, and the other tasks on it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato
from sfumato.core import Denoiser
from sfumato.errors import UserError
from sfumato.modalities.image.write import write_images
from sfumato.model import Model, load
from tests.training.common import pictures, small_fit
from tests.training.teachers import TEACHER_SAMPLING, new_model

# ---- tasks on a few-step model


def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the batch size of each network evaluation."""
    calls: list[int] = []
    output = Denoiser._network_output
    monkeypatch.setattr(
        Denoiser, "_network_output", lambda self, z, *rest: (calls.append(len(z)), output(self, z, *rest))[1]
    )
    return calls


def test_a_jump_takes_one_network_evaluation(teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(student, "cpu")
    calls = counted(model, monkeypatch)
    for jumps, options in ((2, {}), (1, {"steps": 1}), (4, {"steps": 4})):
        calls.clear()
        generated = sfumato.generate(model, n=5, **options)
        assert calls == [5] * jumps
        assert (generated.statistics["sampler"], generated.statistics["steps"], generated.statistics["guidance"]) == (
            "jump",
            jumps,
            1.0,
        )
    calls.clear()
    assert sfumato.generate(model, n=5, sampler="heun").statistics["steps"] == 4  # as many as the teacher
    assert calls == [5] * 7
    assert model.choose_sampling(None, None, "heun").grid == "uniform"  # and at the same times
    calls.clear()
    sfumato.generate(load(teacher, "cpu"), n=5)
    assert calls == [5] * 14


def test_what_a_few_step_model_refuses(teacher: Path, student: Path):
    with pytest.raises(UserError, match=r"--guidance 2: the weight 1\.5 is built into this few-step model"):
        sfumato.generate(student, n=2, guidance=2)
    assert len(sfumato.generate(student, n=2, guidance=1).items) == 2
    with pytest.raises(UserError, match=r"jump needs a few-step model; make one with: sfumato distill"):
        sfumato.generate(teacher, n=2, sampler="jump")
    with pytest.raises(UserError, match=r"did you mean 'heun'"):
        sfumato.generate(student, n=2, sampler="hein")


def test_other_tasks_work_on_it(student: Path, tmp_path: Path):
    x = torch.from_numpy(pictures(6, (1, 8, 8))[0]).permute(0, 3, 1, 2) / 127.5 - 1
    write_images(tmp_path / "in", x.float(), [{"label": i % 3} for i in range(6)], mode="L")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    from PIL import Image

    Image.fromarray(mask).save(tmp_path / "mask.png")
    source = tmp_path / "in"
    assert sfumato.edit(student, source, label="1", strength=0.5).statistics["steps"] == 2
    assert sfumato.edit(student, source, strength=0.5, sampler="ddim").statistics["steps"] == 4
    back = sfumato.edit(student, source, method="invert", steps=5)
    assert back.statistics["inversion_error"] < 1e-3
    assert len(sfumato.inpaint(student, source, mask=tmp_path / "mask.png", steps=2).items) == 6
    assert sfumato.interpolate(student, n=3).statistics["steps"] == 4
    assert len(sfumato.reconstruct(student, source, n=3).items) == 3
    assert sfumato.generate(student, n=3, label="2").metadata[0]["label"] == 2


def test_without_classes(tmp_path: Path):
    model = new_model(classes=0)
    model.save(tmp_path / "teacher")
    sfumato.distill(tmp_path / "teacher", out=tmp_path / "student", steps=3)
    student = load(tmp_path / "student")
    assert student.config.distilled == TEACHER_SAMPLING
    assert len(sfumato.generate(student, n=3).items) == 3


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfumato.training.stages.MIN_GUIDE_STEP", 1)
    lines = ["size,kind", *(f"{1.5 + i % 7},{'ab'[i % 2]}" for i in range(400))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    small_fit(tmp_path / "t.csv", tmp_path / "teacher", "denoiser.width=32", "train.denoiser.batch=16")
    sfumato.distill(tmp_path / "teacher", out=tmp_path / "student", steps=3, device="cpu")
    assert sfumato.load(tmp_path / "student").config.distilled["autoguidance"] == 1.5  # built in
    with pytest.raises(UserError, match="--autoguidance 2: the teacher's weight is built into this few-step model"):
        sfumato.generate(tmp_path / "student", n=2, autoguidance=2)
    generated = sfumato.generate(tmp_path / "student", n=20, out=tmp_path / "generated.csv")
    assert sfumato.load(tmp_path / "student").sampling.grid == "noise"
    assert generated.statistics["sampler"] == "jump" and (tmp_path / "generated.csv").read_text().startswith(
        "size,kind\n"
    )
    assert "c2st" in sfumato.evaluate(tmp_path / "student", tmp_path / "t.csv", n=50)
