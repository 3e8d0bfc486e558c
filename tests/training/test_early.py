"""The early average: kept at its step, through a checkpoint, into the model's folder and out of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.errors import UserError
from sfumato.model import Sampling, load
from sfumato.tasks.info import info
from sfumato.training import stages
from sfumato.training.early import Early
from sfumato.training.loop import Trainer
from tests.training.common import PLAIN, pictures, record, small_fit
from tests.training.test_loop import Feed, Line, batch, make_trainer

MANY = ("train.codec.steps=1", *PLAIN)  # steps of the denoiser


def line(early: Early | None) -> Trainer:
    """The same line each time."""
    torch.manual_seed(0)
    return make_trainer(Line(), steps=12, early=early)


def finished(trainer: Trainer) -> Trainer:
    for _ in trainer.run(Feed(), lambda: None):
        pass
    return trainer


def test_it_is_of_its_step():
    early = Early(0.25)
    trainer = line(early)
    for _ in range(3):
        assert not early.step
        trainer.advance(batch(trainer.done))
    wanted = trainer.ema.copy()
    finished(trainer)
    assert early.step == 3
    assert all(torch.equal(early.weights[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(trainer.ema.weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("cut", [2, 8])
def test_it_goes_through_a_checkpoint(cut: int):
    whole, first, second = Early(0.25), Early(0.25), Early(0.25)
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
    """So few steps as these tests take count as enough."""
    monkeypatch.setattr(stages, "GUIDE_STEPS", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    x, label = pictures(40, (1, 8, 8))
    np.savez(tmp_path / "x.npz", images=x, labels=label)
    return tmp_path / "x.npz"


def test_a_weaker_self_is_written_and_read_again(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=2", steps=40)
    assert model.card.guide == 5  # an eighth of the denoiser's 39 steps
    kept, final = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("guide", "denoiser"))
    assert any(not torch.equal(kept[f"net.{name}"], value) for name, value in final.items())
    again = load(tmp_path / "run", device="cpu")
    assert again.sampling.autoguidance == 2 and again.card.guide == 5
    ours, theirs, plain = (m.generate(4, autoguidance=w).items for m, w in ((model, None), (again, 2.0), (again, 1.0)))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)


def test_one_of_hardly_any_steps_is_not_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "GUIDE_STEPS", 6)
    model = small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=2", steps=40)
    assert model.guide is None and model.sampling.autoguidance == 1.0
    assert load(tmp_path / "run", device="cpu").sampling.autoguidance == 1.0


def test_none_is_kept_unless_it_is_used(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=1", steps=40)
    assert model.guide is None and not (tmp_path / "run" / "guide").exists()


def test_a_run_without_one_replaces_a_run_with_one(source: Path, tmp_path: Path):
    small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=2", steps=20)
    small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=1", steps=20, overwrite=True)
    assert not (tmp_path / "run" / "guide").exists()


def test_both_sides_of_guidance_are_led_away_from_their_weaker_self(source: Path, tmp_path: Path):
    """Under a label and without, the weaker network is told the same as the stronger one, by its own conditioner."""
    model = small_fit(source, tmp_path / "run", *MANY, "sample.autoguidance=2", steps=40)
    guide, label = model.guide, torch.tensor([0, 1, 2])
    assert guide is not None
    z, t = torch.randn(3, *model.codec.latent_shape), torch.full((3,), 0.4, dtype=torch.float64)
    parts = {}
    for name, told in (("label", label), ("null", None)):
        strong = model.denoiser(z, t, model.conditioner(told, 3))
        model.denoiser.net, net = guide["net"], model.denoiser.net
        weak = model.denoiser(z, t, guide["conditioner"](told, 3))
        model.denoiser.net = net
        parts[name] = torch.lerp(weak, strong, 2.0)
    guided = model.denoise(label, 3, Sampling(guidance=3.0, autoguidance=2.0))(z, t)
    assert torch.allclose(guided, torch.lerp(parts["null"], parts["label"], 3.0), atol=1e-5)
    plain = model.denoise(label, 3, Sampling(guidance=3.0, autoguidance=2.0).unguided)(z, t)
    assert torch.equal(plain, model.denoiser(z, t, model.conditioner(label, 3)))


def test_its_file_is_counted_and_missed(source: Path, tmp_path: Path):
    small_fit(source, tmp_path / "run", *MANY, steps=20)
    told = info(tmp_path / "run")["parameters"]
    assert told["guide"] == told["denoiser"] + told["conditioner"]
    (tmp_path / "run" / "guide" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"guide.*missing"):
        load(tmp_path / "run", device="cpu")


def test_few_rows_are_gone_through_so_often_at_most(tmp_path: Path):
    (tmp_path / "t.csv").write_text("size,kind\n" + "".join(f"{1.5 + i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    model = small_fit(tmp_path / "t.csv", tmp_path / "run", "train.denoiser.batch=16")
    assert model.guide is not None and model.sampling.autoguidance == 1.5
    assert record(tmp_path / "run")["plan"]["train"]["denoiser"]["passes"] == 75


def test_a_run_that_knew_nothing_of_it_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its plan does not say whether one is kept."""
    advance = Trainer.advance

    def stop(self: Trainer, batch: object) -> object:
        if self.stage == "denoiser" and self.done == 10:
            raise KeyboardInterrupt
        return advance(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        small_fit(source, tmp_path / "run", *MANY, steps=20)
    monkeypatch.setattr(Trainer, "advance", advance)
    path = tmp_path / "run" / "run.json"
    older = json.loads(path.read_text())
    del older["plan"]["sample"]["autoguidance"]
    path.write_text(json.dumps(older))
    assert small_fit(source, tmp_path / "run", *MANY, steps=20, resume=True).guide is None
