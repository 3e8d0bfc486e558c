"""A run interrupted at any moment and resumed ends with the weights of an uninterrupted one, bit for bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import UserError
from sfumato.training import launch, stages
from sfumato.training.checkpoint import save_state
from sfumato.training.run import Run
from sfumato.training.trainer import Trainer
from tests.training.common import (
    Killed,
    assert_same_run,
    at_step,
    checkpoint,
    die,
    pictures,
    record,
    reported_every_step,
    rows,
    small_fit,
    weights,
)

VARIANTS = {
    "kl and a discriminator": ("codec.adversarial_weight=0.5",),
    "vq, muon, adaptive time sampling, bf16": (
        *("codec.bottleneck=vq", "codec.codebook_size=16", "codec.perceptual=none", "train.precision=bf16"),
        *("train.denoiser.optimizer=muon", "denoiser.time_sampling=adaptive"),
    ),
}
MORE_VARIANTS = {
    "vq and a discriminator": ("codec.bottleneck=vq", "codec.codebook_size=16", "codec.adversarial_weight=0.5"),
    "fsq vector, muon": (
        *("codec.bottleneck=fsq", "codec.latent=vector", "codec.latent_dim=32"),
        *("train.codec.optimizer=muon", "train.denoiser.optimizer=muon"),
    ),
    "learned weight, dit": ("denoiser.weight=learned", "denoiser.net=dit", "denoiser.heads=1"),
    "guidance search": ("sample.guidance=null", "codec.bottleneck=none"),
    "autoguidance": ("sample.autoguidance=2", "codec.bottleneck=none"),
}


def within_step(stage: str, step: int, action: Callable[[], None] = die) -> Callable[[pytest.MonkeyPatch], None]:
    """After the optimizer step of the first phase, before the training step is done."""

    def install(patch: pytest.MonkeyPatch, advance: Any = Trainer._optimizer_step) -> None:
        def dying(self: Trainer, phase: Any, lr: float) -> None:
            advance(self, phase, lr)
            if self.stage == stage and self.done == step:
                action()

        patch.setattr(Trainer, "_optimizer_step", dying)

    return install


def at_call(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, die)


def at_finish(stage: str) -> Callable[[pytest.MonkeyPatch], None]:
    """When all files of a stage are written and `run.json` does not list it as done yet."""

    def install(patch: pytest.MonkeyPatch, finish: Any = Run.finish) -> None:
        patch.setattr(Run, "finish", lambda self, name, **kw: die() if name == stage else finish(self, name, **kw))

    return install


MOMENTS = {
    "before the plan": at_call(launch, "complete_plan"),
    "in the feature network": at_call(stages, "train_feature_network"),
    "feature network saved": at_call(stages, "train_codec"),
    "before any checkpoint": at_step("codec", 2),
    "within a codec step": within_step("codec", 6),
    "mid-codec": at_step("codec", 8),
    "codec trained": at_call(stages, "encode_all"),
    "codec saved": at_finish("codec"),
    "before the denoiser": at_step("denoiser", 0),
    "before the denoiser has a checkpoint": at_step("denoiser", 2),
    "mid-denoiser": at_step("denoiser", 7),
    "within a denoiser step": within_step("denoiser", 8),
    "model saved": at_finish("denoiser"),
}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is logged and every third one saved, so that some are lost."""
    monkeypatch.setattr(stages, "MIN_GUIDE_STEP", 1)
    save, calls = stages.save_state, [0]

    def seldom(folder: Path, state: Any) -> None:
        calls[0] += 1
        if calls[0] % 3 == 0 or state[1]["done"] == 10:
            save(folder, state)

    monkeypatch.setattr(stages, "save_state", seldom)
    monkeypatch.setattr(Trainer, "run", reported_every_step())


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The uninterrupted run with the same settings."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in runs:
            runs[overrides] = tmp_path_factory.mktemp("reference")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "run", ORIGINAL_RUN)  # without reports and saves before the end
                small_fit(source, runs[overrides], *overrides)
        return runs[overrides]

    return run


ORIGINAL_RUN = Trainer.run


def interrupt(moment: str, source: Path, run: Path, *overrides: str, resume: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        MOMENTS[moment](patch)
        small_fit(source, run, *overrides, resume=resume)


def assert_every_step_is_logged(run: Path) -> None:
    for stage in ("codec", "denoiser"):
        assert [row["step"] for row in rows(run) if row["stage"] == stage] == list(range(1, 11))
    assert len(rows(run)) == 21 and "psnr" in rows(run)[10]


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_at_every_moment_in_turn(
    variant: str, source: Path, tmp_path: Path, reference: Callable[..., Path]
):
    overrides, started = VARIANTS[variant], False
    for moment in MOMENTS:
        if "codec.perceptual=none" not in overrides or moment != "in the feature network":
            interrupt(moment, source, tmp_path, *overrides, resume=started)
            started = True
    small_fit(source, tmp_path, *overrides, resume=True)
    assert_same_run(tmp_path, reference(*overrides))
    assert_every_step_is_logged(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("variant", VARIANTS | MORE_VARIANTS)
def test_interrupted_once(variant: str, moment: str, source: Path, tmp_path: Path, reference: Callable[..., Path]):
    overrides = (VARIANTS | MORE_VARIANTS)[variant]
    if "codec.perceptual=none" in overrides and moment == "in the feature network":
        pytest.skip("no feature network")
    interrupt(moment, source, tmp_path, *overrides, resume=False)
    small_fit(source, tmp_path, *overrides, resume=True)
    assert_same_run(tmp_path, reference(*overrides))
    assert_every_step_is_logged(tmp_path)


PLAIN = ("codec.perceptual=none",)


@pytest.mark.parametrize("moment", [at_step, within_step])
def test_ctrl_c_saves_whole_steps(moment: Any, source: Path, tmp_path: Path, reference: Callable[..., Path]):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run", ORIGINAL_RUN)
        patch.setattr(stages, "save_state", save_state)
        moment("codec", 4, lambda: signal.raise_signal(signal.SIGINT))(patch)
        small_fit(source, tmp_path, *PLAIN)
    assert checkpoint(tmp_path)["done"] == 5
    small_fit(source, tmp_path, *PLAIN, resume=True)
    assert_same_run(tmp_path, reference(*PLAIN))


def test_an_interrupted_checkpoint(source: Path, tmp_path: Path, reference: Callable[..., Path]):
    interrupt("mid-denoiser", source, tmp_path, *PLAIN, resume=False)
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
        ((), {"steps": 30}, r"was started with --steps 20; leave --steps out"),
        ((), {"size": "l"}, r"was started without --size; leave --size out"),
    ],
)
def test_settings_that_contradict_the_plan_are_refused_on_resume(
    overrides: tuple[str, ...], options: dict[str, Any], match: str, source: Path, tmp_path: Path
):
    interrupt("mid-codec", source, tmp_path, *PLAIN, resume=False)
    before = checkpoint(tmp_path)
    with pytest.raises(UserError, match=match):
        small_fit(source, tmp_path, *PLAIN, *overrides, resume=True, **options)
    assert checkpoint(tmp_path) == before


def test_the_seconds_of_all_sessions_are_added(source: Path, tmp_path: Path):
    interrupt("mid-denoiser", source, tmp_path, *PLAIN, resume=False)
    run_json = record(tmp_path)
    run_json["stages"]["codec"]["seconds"] = 1_000.0  # in the previous session
    (tmp_path / "run.json").write_text(json.dumps(run_json))
    small_fit(source, tmp_path, *PLAIN, resume=True)
    assert 1_000 <= record(tmp_path)["seconds_taken"] < 1_100


def test_the_seed_determines_the_run(source: Path, tmp_path: Path, reference: Callable[..., Path]):
    small_fit(source, tmp_path / "again", *PLAIN)
    assert_same_run(tmp_path / "again", reference(*PLAIN))
    small_fit(source, tmp_path / "other", *PLAIN, seed=1)
    other, first = weights(tmp_path / "other"), weights(reference(*PLAIN))
    varying = [name for name, value in other.items() if value.float().var(correction=0) > 0]
    assert varying and not any(torch.equal(other[name], first[name]) for name in varying)


def test_a_complete_run_is_returned_at_once(
    source: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    run = reference(*PLAIN)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(launch, "train_stages", die)
    model = small_fit(source, run, resume=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert all(torch.equal(v, weights(run)[f"codec/{k}"]) for k, v in model.codec.state_dict().items())
    assert not any(p.requires_grad for part in model.parts.values() for p in part.parameters())


def test_other_data_are_refused(source: Path, tmp_path: Path):
    interrupt("mid-codec", source, tmp_path / "run", *PLAIN, resume=False)
    x, label = pictures(96, (1, 16, 16), seed=1)
    np.savez(tmp_path / "other.npz", images=x[..., 0], labels=label)
    before = record(tmp_path / "run")
    with pytest.raises(UserError, match="the data differ"):
        small_fit(tmp_path / "other.npz", tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == before and checkpoint(tmp_path / "run")["done"] > 0


@pytest.mark.parametrize("change", ["renamed", "missing"])
def test_a_checkpoint_of_another_version_is_refused(change: str, source: Path, tmp_path: Path):
    interrupt("mid-denoiser", source, tmp_path, *PLAIN, resume=False)
    path, name = tmp_path / "checkpoint" / "state.safetensors", "weights/model.denoiser.net.z_in.weight"
    tensors = load_file(path)
    renamed = {"weights/model.net.z_in.weight": tensors[name]} if change == "renamed" else {}
    save_file({key: value for key, value in tensors.items() if key != name} | renamed, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"^denoiser: the checkpoint was written by another version of sfumato"):
        small_fit(source, tmp_path, *PLAIN, resume=True)
    assert path.read_bytes() == before


def test_the_second_stage_does_not_change_the_codec(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It writes the same weights again."""
    written: list[bytes] = []
    file, finish = tmp_path / "codec" / "model.safetensors", Run.finish
    monkeypatch.setattr(Run, "finish", lambda *a, **kw: written.append(file.read_bytes()) or finish(*a, **kw))
    model = small_fit(source, tmp_path, *PLAIN)
    assert len(written) == 2 and written[0] == written[1]
    assert not any(p.requires_grad for p in model.codec.parameters())
