"""Few-step models: training, budget, the output folder, and other tasks on them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sfumato
from sfumato.config import MIN_BUDGET
from sfumato.core import TrajectoryDenoiser, sample, time_grid
from sfumato.errors import UserError
from sfumato.model import Model, load
from sfumato.sampling import Sampling
from sfumato.training import distillation
from sfumato.training.distillation import (
    REUSE,
    TRAJECTORY_STEPS,
    DistillConfig,
    Distiller,
    TimedTrajectories,
    distill_seconds,
    new_student,
)
from sfumato.training.launch import make_accelerator
from sfumato.training.profile import StepCost
from sfumato.training.trajectories import ANCHOR_SHARE, NOISE_SHARE, TrajectoryBatches
from sfumato.types import UNKNOWN, Raw
from tests.core.exact import GAUSSIAN
from tests.training.common import record, rows, weights
from tests.training.teachers import TEACHER_SAMPLING, new_model


def distiller(model: Model, tmp_path: Path, record: dict[str, Any] | None = None, **options: Any) -> Distiller:
    defaults = {"seconds": None, "steps": 4, "guidance": None, "overwrite": False, "seed": 0, "device": "cpu"}
    log: Any = type("Silent", (), {"show": lambda *_: None, "report": lambda *_: None, "image": lambda *_: None})()
    config = DistillConfig(out=tmp_path, **(defaults | options))
    return Distiller(model, config, record or {}, make_accelerator("cpu", "fp32"), log, math.inf)


# ---- training


def gaussian_teacher(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model with independent latents N(0.4, 0.7²); its flow maps noise ε to 0.4 + 0.7 ε."""
    model = new_model(classes=0, width=64, depth=2)
    monkeypatch.setattr(model, "denoise", lambda raw, count, sampling=None: GAUSSIAN.denoise)
    return model


def test_the_flow_of_a_gaussian_is_learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Noise ε ends at m + s ε: one jump learns that, while one step of the teacher gives m, an error of s."""
    monkeypatch.setattr(distillation, "MAX_BATCH", 128)
    monkeypatch.setattr(distillation, "DISTILL_LR", 5e-3)
    model = gaussian_teacher(monkeypatch)
    distillation_run = distiller(model, tmp_path, steps=300)
    distillation_run.run()
    student, schedule = distillation_run.student, model.denoiser.schedule
    eps = torch.randn(500, *model.codec.latent_shape, generator=torch.Generator().manual_seed(5))
    expected = 0.4 + 0.7 * eps
    error = lambda z: float((z - expected).square().mean().sqrt())
    levels = lambda *grid: schedule.levels(time_grid(schedule, *grid))
    one_step = sample(model.denoise(Raw(), 500), levels(1), eps, "ddim")
    assert error(one_step) == pytest.approx(0.7, abs=0.02)
    denoise, jump = student.denoise(Raw(), 500), student.step_rule(Raw(), 500)
    z = sample(denoise, levels(1), eps, jump)
    assert error(z) < 0.08, error(z)
    assert distillation_run.results["miss"]["1.00"] == pytest.approx(error(z), abs=0.03)
    assert distillation_run.results["miss"]["0.50"] < 0.08
    generator = torch.Generator().manual_seed(6)
    for jumps in (2, 4):
        noise = lambda: torch.randn(eps.shape, generator=generator)
        z = sample(denoise, levels(jumps, "data"), eps, jump, noise)
        assert float(z.mean()) == pytest.approx(0.4, abs=0.05)
        assert float(z.std()) == pytest.approx(0.7, abs=0.08)  # the error of a jump
    middle = schedule(0.6)
    z_t = middle.add_noise(expected, eps)
    assert float((denoise(z_t, middle) - GAUSSIAN.denoise(z_t, middle)).square().mean().sqrt()) < 0.12


@pytest.mark.parametrize("net", [{}, {"name": "dit", "heads": 2, "patch": 1}, {"name": "unet", "heads": 2}])
@pytest.mark.parametrize("classes", [0, 3])
def test_a_new_student_equals_its_teacher(net: dict[str, Any], classes: int):
    model = new_model(classes, **net)
    student = new_student(model, model.sampling)
    raw = Raw({"label": torch.tensor([0, 1, 2])}) if classes else Raw()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, *model.codec.latent_shape, generator=generator)
    level, end = (model.denoiser.schedule(torch.tensor(t)) for t in ([0.9, 0.5, 0.2], [0.3, 0.0, 0.1]))
    expected = model.denoiser(z, level, model.conditioner(raw, 3))
    cond = student.conditioner(raw, 3)
    assert torch.allclose(student.denoiser(z, level, cond), expected, atol=1e-5)
    assert isinstance(student.denoiser, TrajectoryDenoiser)
    assert torch.allclose(student.denoiser(z, level, cond, end=end), expected, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.codec.parameters(), student.codec.parameters(), strict=True))
    assert not any(p.requires_grad for p in student.codec.parameters())
    assert model.config.denoiser["net"].get("clocks") is None and model.config.distilled is None


def test_guidance_is_built_in(tmp_path: Path):
    """Trajectories are those of the guided teacher; those without a label are unconditional."""
    model = new_model()
    for weight, option, other in ((1.5, None, 9.0), (9.0, 9.0, 1.5)):
        trajectories, raw = distiller(model, tmp_path, guidance=option).teacher_trajectories(0, 200)
        label = raw.values["label"]
        assert isinstance(label, torch.Tensor) and set(label.tolist()) == {0, 1, 2, UNKNOWN}
        sampling, level = Sampling(guidance=weight), model.denoiser.schedule(trajectories.grid[3])
        expected, wrong = (
            model.denoise(raw, 200, Sampling(guidance=w))(trajectories.z[3], level) for w in (weight, other)
        )
        assert float((trajectories.z_hat[3] - expected).norm()) < 0.2 * float((wrong - expected).norm())
        null = label == UNKNOWN
        null_level = level.map(lambda value: value[null])
        unconditional = model.denoise(Raw(), int(null.sum()), sampling)(trajectories.z[3][null], null_level)
        assert torch.allclose(unconditional, expected[null], atol=1e-5)


def test_training_states(tmp_path: Path):
    trajectories, raw = distiller(new_model(), tmp_path).teacher_trajectories(0, 64)
    batches = TrajectoryBatches(trajectories, raw, 20_000, 0, "cpu")
    batch = batches.batch(3)
    anchor, noise = batch.s == batch.t, batch.t == 1
    assert bool((batch.s[~anchor] == 0).all()) and float(batch.t.min()) > 0
    assert float(anchor.float().mean()) == pytest.approx(ANCHOR_SHARE, abs=0.01)
    assert float(noise.float().mean()) == pytest.approx(NOISE_SHARE + (1 - NOISE_SHARE) / trajectories.steps, abs=0.02)
    assert torch.equal(batch.target[~anchor], trajectories.z[-1, batch.index[~anchor]])
    again = TrajectoryBatches(trajectories, raw, 20_000, 0, "cpu").batch(3)
    assert torch.equal(again.target, batch.target)
    assert torch.equal(again.raw.values["label"], batch.raw.values["label"])
    assert not torch.equal(batches.batch(4).index, batch.index)


# ---- budget


def test_the_default_budget_is_a_fifth_of_the_training_time():
    config = DistillConfig(Path("x"), None, None, None, False, 0, None)
    assert distill_seconds(config, {"seconds_taken": 115.5}) == pytest.approx(23.1)
    assert distill_seconds(DistillConfig(Path("x"), 30.0, None, None, False, 0, None), {}) == 30
    assert distill_seconds(DistillConfig(Path("x"), None, 5, None, False, 0, None), {}) == math.inf
    with pytest.raises(UserError, match=r"training time of this model is unknown; give --budget or --steps"):
        distill_seconds(config, {})
    with pytest.raises(UserError, match=r"a fifth of this model's training time is 4 s; give at least --budget 10s"):
        distill_seconds(config, {"seconds_taken": MIN_BUDGET})


@pytest.mark.parametrize("first", [0.8, 4.0])
def test_steps_come_from_the_budget(first: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """However slow the first trajectories were, the others get their share of the time, and steps the rest."""
    now = [1000.0]
    distillation_run = distiller(new_model(), tmp_path, steps=None)
    teacher_trajectories = distillation_run.teacher_trajectories

    def slow(number: int, count: int) -> Any:
        now[0] += 0.8 * count / 32 if number else first
        return teacher_trajectories(number, count)

    monkeypatch.setattr(distillation_run, "teacher_trajectories", slow)
    monkeypatch.setattr(distillation.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distillation, "measure_step", lambda *_, **__: StepCost(0.1, 7.0))
    first_batch = TimedTrajectories(distillation_run.teacher_trajectories(0, 32), first)
    distillation_run.deadline = now[0] + first * 20 / 32 + 30
    cost = distillation_run.reserve_check_time(first_batch)
    assert cost == StepCost(0.1, 7.0) and distillation_run.left == pytest.approx(30)
    trajectories, raw = distillation_run.all_trajectories(first_batch, cost)
    batches = len(trajectories) // 32
    assert batches == 1 + int((30 - 0.1 * REUSE) / (0.8 + 0.1 * REUSE)) and len(raw.values["label"]) == 32 * batches
    distillation_run.train(trajectories, raw, cost)
    steps = distillation_run.settings.steps
    assert steps == pytest.approx((30 - 0.8 * (batches - 1)) / 0.1, abs=1)
    assert REUSE <= steps / batches < REUSE + 0.1 + (0.8 / 0.1 + REUSE) / batches  # one batch more would be too many
    distillation_run.deadline = now[0] + 2.5
    with pytest.raises(UserError, match=r"too small for this model; give \d+ s more with --budget"):
        distillation_run.reserve_check_time(first_batch)


def test_the_batch_is_not_larger_than_the_teachers(tmp_path: Path):
    for teacher_batch, expected in ((16, 16), (4096, 32), (None, 32)):
        record = {"plan": {"train": {"denoiser": {"batch": teacher_batch}}}}
        assert distiller(new_model(), tmp_path, record).batch == expected


def test_memory_limits_the_trajectories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    distillation_run = distiller(new_model(), tmp_path, steps=400)
    trajectory_bytes = 4 * (2 * TRAJECTORY_STEPS + 1) * distillation_run.teacher.codec.latent_size
    monkeypatch.setattr(distillation, "MAX_TRAJECTORY_BYTES", 3 * 32 * trajectory_bytes + 1)
    first = TimedTrajectories(distillation_run.teacher_trajectories(0, 32), 1.0)
    assert len(distillation_run.all_trajectories(first, None)[0]) == 3 * 32


# ---- the folder


def test_the_folder_is_a_model(teacher: Path, student: Path):
    names = {path.name for path in student.iterdir()}
    assert {"model.json", "run.json", "README.md", "metrics.jsonl", "samples"} <= names
    assert {"codec", "conditioner", "denoiser"} <= names
    assert not [path for path in student.parent.iterdir() if "partial" in path.name]
    assert [row["stage"] for row in rows(student)] == ["distill"] and rows(student)[-1]["step"] == 4
    run_json = record(student)
    assert run_json["distilled"]["teacher"] == str(teacher) and run_json["distilled"]["guidance"] == 1.5
    assert run_json["distilled"]["trajectories"] == 32 and run_json["distilled"]["miss"].keys() == {"1.00", "0.50"}
    assert run_json["plan"] == record(teacher)["plan"] and run_json["metrics"]["codec"] == {"psnr": 20.0}
    model = load(student, "cpu")
    assert model.sampling == Sampling("jump", 2, 1.0, grid="data")
    assert model.config.distilled == TEACHER_SAMPLING | {"guidance": 1.5}
    a, b = weights(student), weights(teacher)
    same = {name for name in a if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}
    assert {name for name in a if name.startswith("codec/")} <= same
    assert not {name for name in same if name.startswith("denoiser/") and name.endswith("weight")}
    assert str(student) in (student / "README.md").read_text()
    assert sfumato.info(student)["distilled"]["steps"] == 4


def test_the_returned_model_is_the_saved_one(teacher: Path, tmp_path: Path):
    model = sfumato.distill(load(teacher, "cpu"), out=tmp_path / "x", steps=2)
    assert torch.equal(model.sample(range(3)).z, load(tmp_path / "x", "cpu").sample(range(3)).z)
    assert record(tmp_path / "x")["distilled"]["teacher"] == str(teacher) and model.folder == tmp_path / "x"


def test_the_same_seed_gives_the_same_weights(teacher: Path, student: Path, tmp_path: Path):
    for seed in (0, 1):
        sfumato.distill(teacher, out=tmp_path / str(seed), steps=4, seed=seed, device="cpu")
    same, other, first = weights(tmp_path / "0"), weights(tmp_path / "1"), weights(student)
    assert all(torch.equal(same[name], first[name]) for name in first)
    assert not all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_changes_no_files(
    teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrajectoryBatches, "batch", stop)
    before = load_file(student / "denoiser" / "model.safetensors")
    for out in (student, student.with_name("new")):
        with pytest.raises(error):
            sfumato.distill(teacher, out=out, steps=4, overwrite=True, device="cpu")
    after = load_file(student / "denoiser" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in student.parent.iterdir()} == {"student"}


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        sfumato.distill(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_invalid_arguments_are_refused(teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    new = tmp_path / "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "give --budget or --steps, not both" in refusal(teacher, out=new, steps=4, budget="30s")
    assert "--steps must be at least 2, not 1" in refusal(teacher, out=new, steps=1)
    assert "--guidance must be at least 0" in refusal(teacher, out=new, steps=4, guidance=-1.0)
    assert "the minimum is 10 s" in refusal(teacher, out=new, budget="9s")
    assert "is a few-step model already" in refusal(student, out=new, steps=4)
    assert "name another folder with --out" in refusal(teacher, out=teacher, steps=4, overwrite=True)
    assert "replace it with --overwrite" in refusal(teacher, out=student, steps=4)
    assert "is not a run of sfumato" in refusal(teacher, out=tmp_path / "mine", steps=4, overwrite=True)
    assert "predicts eps" in refusal(new_model(predict="eps"), out=new, steps=4)
    assert "training time of this model is unknown" in refusal(new_model(), out=new)
    assert "no model in" in refusal(tmp_path / "mine", out=new, steps=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refusal(teacher, out=new, steps=4)
    assert not new.exists()
