"""A run that is cut off at any moment and resumed ends with the same weights, bit for bit, as one that was not."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.errors import UserError
from sfumato.training import run as run_module
from sfumato.training import stages
from sfumato.training.job import Job
from sfumato.training.loop import Trainer
from sfumato.training.state import save_state
from tests.training.common import (
    assert_same_run,
    checkpoint,
    pictures,
    record,
    reported_every_step,
    rows,
    small_fit,
    weights,
)

VARIANTS = {
    "kl and a discriminator": ("codec.adversarial_weight=0.5",),
    "vq, muon, adaptive times, bf16": (
        *("codec.bottleneck=vq", "codec.codebook_size=16", "codec.perceptual=none", "train.precision=bf16"),
        *("train.denoiser.optimizer=muon", "denoiser.times=adaptive"),
    ),
}
MORE = {
    "vq and a discriminator": ("codec.bottleneck=vq", "codec.codebook_size=16", "codec.adversarial_weight=0.5"),
    "fsq vector, muon": (
        *("codec.bottleneck=fsq", "codec.latent=vector", "codec.latent_dim=32"),
        *("train.codec.optimizer=muon", "train.denoiser.optimizer=muon"),
    ),
    "learned weight, dit": ("denoiser.weight=learned", "denoiser.net=dit", "denoiser.heads=1"),
    "guidance chosen": ("sample.guidance=null", "codec.bottleneck=none"),
    "autoguidance": ("sample.autoguidance=2", "codec.bottleneck=none"),
}


class Killed(BaseException):
    """In place of a SIGKILL: nothing in the package may catch it, nor do anything more than close files."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


def at_step(stage: str, step: int, how: Callable[[], None] = die) -> Callable[[pytest.MonkeyPatch], None]:
    """Right before a step."""

    def install(patch: pytest.MonkeyPatch, advance: Any = Trainer.advance) -> None:
        def dying(self: Trainer, batch: Any) -> Any:
            if self.stage == stage and self.done == step:
                how()
            return advance(self, batch)

        patch.setattr(Trainer, "advance", dying)

    return install


def within_step(stage: str, step: int, how: Callable[[], None] = die) -> Callable[[pytest.MonkeyPatch], None]:
    """When the first phase's weights have moved and the step is not done."""

    def install(patch: pytest.MonkeyPatch, advance: Any = Trainer._advance) -> None:
        def dying(self: Trainer, phase: Any, lr: float) -> None:
            advance(self, phase, lr)
            if self.stage == stage and self.done == step:
                how()

        patch.setattr(Trainer, "_advance", dying)

    return install


def at_call(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, die)


def at_finish(stage: str) -> Callable[[pytest.MonkeyPatch], None]:
    """When all of a stage's files are there and `run.json` does not say so yet."""

    def install(patch: pytest.MonkeyPatch, finish: Any = Job.finish) -> None:
        patch.setattr(Job, "finish", lambda self, name, **kw: die() if name == stage else finish(self, name, **kw))

    return install


MOMENTS = {
    "before the plan": at_call(run_module, "decide"),
    "in the features": at_call(stages, "feature_network"),
    "the features kept": at_call(stages, "train_codec"),
    "before any checkpoint": at_step("codec", 2),
    "within a step": within_step("codec", 6),
    "mid-codec": at_step("codec", 8),
    "the codec trained": at_call(stages, "encode_all"),
    "the codec saved": at_finish("codec"),
    "before the denoiser": at_step("denoiser", 0),
    "before its checkpoint": at_step("denoiser", 2),
    "mid-denoiser": at_step("denoiser", 7),
    "within its step": within_step("denoiser", 8),
    "the model saved": at_finish("denoiser"),
}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is recorded and every third one saved, so that some are lost."""
    monkeypatch.setattr(stages, "GUIDE_STEPS", 1)
    save, calls = stages.save_state, [0]

    def seldom(folder: Path, state: Any) -> None:
        calls[0] += 1
        if calls[0] % 3 == 0 or state[1]["done"] == 10:
            save(folder, state)

    monkeypatch.setattr(stages, "save_state", seldom)
    monkeypatch.setattr(Trainer, "run", reported_every_step())


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of these settings that nothing disturbed."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("reference")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "run", UNDISTURBED)  # it neither reports nor saves before the end
                small_fit(source, made[overrides], *overrides)
        return made[overrides]

    return run


UNDISTURBED = Trainer.run


def cut_off(moment: str, source: Path, run: Path, *overrides: str, resume: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        MOMENTS[moment](patch)
        small_fit(source, run, *overrides, resume=resume)


def assert_every_step_is_recorded(run: Path) -> None:
    for stage in ("codec", "denoiser"):
        assert [row["step"] for row in rows(run) if row["stage"] == stage] == list(range(1, 11))
    assert len(rows(run)) == 21 and "psnr" in rows(run)[10]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_off_at_every_moment_in_turn(variant: str, source: Path, tmp_path: Path, reference: Callable[..., Path]):
    overrides, begun = VARIANTS[variant], False
    for moment in MOMENTS:
        if "codec.perceptual=none" not in overrides or moment != "in the features":
            cut_off(moment, source, tmp_path, *overrides, resume=begun)
            begun = True
    small_fit(source, tmp_path, *overrides, resume=True)
    assert_same_run(tmp_path, reference(*overrides))
    assert_every_step_is_recorded(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("variant", VARIANTS | MORE)
def test_cut_off_once(variant: str, moment: str, source: Path, tmp_path: Path, reference: Callable[..., Path]):
    overrides = (VARIANTS | MORE)[variant]
    if "codec.perceptual=none" in overrides and moment == "in the features":
        pytest.skip("there are none")
    cut_off(moment, source, tmp_path, *overrides, resume=False)
    small_fit(source, tmp_path, *overrides, resume=True)
    assert_same_run(tmp_path, reference(*overrides))
    assert_every_step_is_recorded(tmp_path)


PLAIN = ("codec.perceptual=none",)


@pytest.mark.parametrize("moment", [at_step, within_step])
def test_ctrl_c_saves_whole_steps(moment: Any, source: Path, tmp_path: Path, reference: Callable[..., Path]):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run", UNDISTURBED)
        patch.setattr(stages, "save_state", save_state)
        moment("codec", 4, lambda: signal.raise_signal(signal.SIGINT))(patch)
        small_fit(source, tmp_path, *PLAIN)
    assert checkpoint(tmp_path)["done"] == 5
    small_fit(source, tmp_path, *PLAIN, resume=True)
    assert_same_run(tmp_path, reference(*PLAIN))


def test_a_checkpoint_cut_short_is_survived(source: Path, tmp_path: Path, reference: Callable[..., Path]):
    cut_off("mid-denoiser", source, tmp_path, *PLAIN, resume=False)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "state.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "denoiser", "st')
    small_fit(source, tmp_path, *PLAIN, resume=True)
    assert_same_run(tmp_path, reference(*PLAIN))
    assert not list(tmp_path.glob("checkpoint.*"))


@pytest.mark.parametrize(
    ("overrides", "options", "match"),
    [
        (("train.codec.lr=0.5",), {}, r"its plan has train\.codec\.lr=0\.002, not 0\.5"),
        ((), {"seed": 4}, r"its plan has seed=0, not 4"),
        ((), {"steps": 30}, r"was begun with --steps 20; leave --steps out"),
        ((), {"size": "l"}, r"was begun without --size; leave --size out"),
    ],
)
def test_settings_that_contradict_the_plan_are_refused_on_resume(
    overrides: tuple[str, ...], options: dict[str, Any], match: str, source: Path, tmp_path: Path
):
    cut_off("mid-codec", source, tmp_path, *PLAIN, resume=False)
    before = checkpoint(tmp_path)
    with pytest.raises(UserError, match=match):
        small_fit(source, tmp_path, *PLAIN, *overrides, resume=True, **options)
    assert checkpoint(tmp_path) == before


def test_the_seconds_of_all_sessions_count(source: Path, tmp_path: Path):
    cut_off("mid-denoiser", source, tmp_path, *PLAIN, resume=False)
    known = record(tmp_path)
    known["stages"]["codec"]["seconds"] = 1_000.0  # of the session before
    (tmp_path / "run.json").write_text(json.dumps(known))
    small_fit(source, tmp_path, *PLAIN, resume=True)
    assert 1_000 <= record(tmp_path)["seconds_taken"] < 1_100


def test_a_seed_makes_the_run(source: Path, tmp_path: Path, reference: Callable[..., Path]):
    small_fit(source, tmp_path / "again", *PLAIN)
    assert_same_run(tmp_path / "again", reference(*PLAIN))
    small_fit(source, tmp_path / "other", *PLAIN, seed=1)
    ours, theirs = weights(tmp_path / "other"), weights(reference(*PLAIN))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if ours[name].float().var(correction=0) > 0)


def test_a_complete_run_is_returned_at_once(
    source: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    run = reference(*PLAIN)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(run_module, "train_stages", die)
    model = small_fit(source, run, resume=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert all(torch.equal(v, weights(run)[f"codec/{k}"]) for k, v in model.codec.state_dict().items())
    assert not any(p.requires_grad for part in model.parts.values() for p in part.parameters())


def test_other_data_are_refused(source: Path, tmp_path: Path):
    cut_off("mid-codec", source, tmp_path / "run", *PLAIN, resume=False)
    x, label = pictures(96, (1, 16, 16), seed=1)
    np.savez(tmp_path / "other.npz", images=x[..., 0], labels=label)
    before = record(tmp_path / "run")
    with pytest.raises(UserError, match="the data differ"):
        small_fit(tmp_path / "other.npz", tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == before and checkpoint(tmp_path / "run")["done"] > 0


def test_the_codec_stays_as_it_was_after_its_stage(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Frozen: the second stage writes the same weights again."""
    kept: list[bytes] = []
    file, finish = tmp_path / "codec" / "model.safetensors", Job.finish
    monkeypatch.setattr(Job, "finish", lambda *a, **kw: kept.append(file.read_bytes()) or finish(*a, **kw))
    model = small_fit(source, tmp_path, *PLAIN)
    assert len(kept) == 2 and kept[0] == kept[1]
    assert not any(p.requires_grad for p in model.codec.parameters())
