"""The guide: an early average, kept through checkpoints and saved with the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.errors import UserError
from sfumato.model import load
from sfumato.sampling import Sampling
from sfumato.tasks.info import info
from sfumato.training import stages
from sfumato.training.callbacks import GuideSnapshot
from sfumato.training.trainer import Trainer
from sfumato.types import Raw
from tests.training.common import PLAIN, pictures, record, small_fit
from tests.training.test_trainer import Batches, Line, batch, make_trainer

SHORT_CODEC = ("train.codec.steps=1", *PLAIN)  # leaves nearly all steps to the denoiser


def line(snapshot: GuideSnapshot | None) -> Trainer:
    """A trainer of a line, always with the same initial weights."""
    torch.manual_seed(0)
    return make_trainer(Line(), steps=12, guide_snapshot=snapshot)


def finished(trainer: Trainer) -> Trainer:
    for _ in trainer.run(Batches(), lambda: None):
        pass
    return trainer


def test_it_is_taken_at_its_step():
    snapshot = GuideSnapshot(0.25)
    trainer = line(snapshot)
    for _ in range(3):
        assert not snapshot.step
        trainer.advance(batch(trainer.done))
    expected = trainer.ema.copy()
    finished(trainer)
    assert snapshot.step == 3
    assert all(torch.equal(snapshot.weights[name], expected[name]) for name in expected)
    assert any(not torch.equal(trainer.ema.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cut", [2, 8])
def test_it_survives_a_checkpoint(cut: int):
    whole, first, second = GuideSnapshot(0.25), GuideSnapshot(0.25), GuideSnapshot(0.25)
    finished(line(whole))
    trainer = line(first)
    for _ in range(cut):
        trainer.advance(batch(trainer.done))
    resumed = line(second)
    resumed.load(*trainer.state())
    finished(resumed)
    assert second.step == whole.step == 3 and second.weights.keys() == whole.weights.keys()
    assert all(torch.equal(second.weights[name], value) for name, value in whole.weights.items())


# in a run


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few steps of these tests suffice for a guide."""
    monkeypatch.setattr(stages, "MIN_GUIDE_STEP", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    x, label = pictures(40, (1, 8, 8))
    np.savez(tmp_path / "x.npz", images=x, labels=label)
    return tmp_path / "x.npz"


def test_a_guide_is_saved_and_loaded(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=2", steps=40)
    assert model.config.guide == 5  # an eighth of the denoiser's 39 steps
    guide, final = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("guide", "denoiser"))
    assert any(not torch.equal(guide[f"denoiser.net.{name}"], value) for name, value in final.items())
    again = load(tmp_path / "run", device="cpu")
    assert again.sampling.autoguidance == 2 and again.config.guide == 5
    calls = ((model, None), (again, 2.0), (again, 1.0))
    default, explicit, off = (m.generate(4, autoguidance=weight).items.stack() for m, weight in calls)
    assert torch.equal(default, explicit) and not torch.equal(default, off)


def test_an_average_of_too_few_steps_is_no_guide(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "MIN_GUIDE_STEP", 6)
    model = small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=2", steps=40)
    assert model.guide is None and model.sampling.autoguidance == 1.0
    assert load(tmp_path / "run", device="cpu").sampling.autoguidance == 1.0


def test_without_autoguidance_there_is_no_guide(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=1", steps=40)
    assert model.guide is None and not (tmp_path / "run" / "guide").exists()


def test_a_run_without_a_guide_replaces_a_run_with_one(source: Path, tmp_path: Path):
    small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=2", steps=20)
    small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=1", steps=20, overwrite=True)
    assert not (tmp_path / "run" / "guide").exists()


def test_both_terms_of_guidance_are_autoguided(source: Path, tmp_path: Path):
    """With a label and without, the guide gets the same condition as the model, from its own conditioner."""
    model = small_fit(source, tmp_path / "run", *SHORT_CODEC, "sample.autoguidance=2", steps=40)
    guide, label = model.guide, Raw({"label": torch.tensor([0, 1, 2])})
    assert guide is not None
    z, level = torch.randn(3, *model.codec.latent_shape), model.denoiser.schedule(torch.full((3,), 0.4))
    parts = {}
    for name, raw in (("label", label), ("null", Raw())):
        strong = model.denoiser(z, level, model.conditioner(raw, 3))
        weak = guide.denoiser(z, level, guide.conditioner(raw, 3))
        parts[name] = torch.lerp(weak, strong, 2.0)
    guided = model.denoise(label, 3, Sampling(guidance=3.0, autoguidance=2.0))(z, level)
    assert torch.allclose(guided, torch.lerp(parts["null"], parts["label"], 3.0), atol=1e-5)
    plain = model.denoise(label, 3, Sampling(guidance=3.0, autoguidance=2.0).unguided)(z, level)
    assert torch.equal(plain, model.denoiser(z, level, model.conditioner(label, 3)))


def test_the_guide_counts_as_parameters_and_must_be_there(source: Path, tmp_path: Path):
    small_fit(source, tmp_path / "run", *SHORT_CODEC, steps=20)
    parameters = info(tmp_path / "run")["parameters"]
    assert parameters["guide"] == parameters["denoiser"] + parameters["conditioner"]
    (tmp_path / "run" / "guide" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"guide.*missing"):
        load(tmp_path / "run", device="cpu")


def test_the_epochs_of_a_small_table_are_limited(tmp_path: Path):
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    model = small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16")
    assert model.guide is not None and model.sampling.autoguidance == 1.5
    assert record(tmp_path / "run")["plan"]["train"]["denoiser"]["max_epochs"] == 75


def test_a_run_planned_without_autoguidance_is_resumed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its plan has no such setting."""
    advance = Trainer.advance

    def stop(self: Trainer, batch: object) -> object:
        if self.stage == "denoiser" and self.done == 10:
            raise KeyboardInterrupt
        return advance(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        small_fit(source, tmp_path / "run", *SHORT_CODEC, steps=20)
    monkeypatch.setattr(Trainer, "advance", advance)
    path = tmp_path / "run" / "run.json"
    run_json = json.loads(path.read_text())
    del run_json["plan"]["sample"]["autoguidance"]
    path.write_text(json.dumps(run_json))
    assert small_fit(source, tmp_path / "run", *SHORT_CODEC, steps=20, resume=True).guide is None
