"""Few-step models: what they are taught, what is left of a run, and what other tasks make of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sfumato
from sfumato.config import SMALLEST_BUDGET
from sfumato.core import Denoiser, sample, time_grid
from sfumato.data import write_images
from sfumato.errors import UserError
from sfumato.model import Card, Model, Sampling, load
from sfumato.tasks.generate import sampling
from sfumato.training import distilling
from sfumato.training.distilling import KNOTS, REUSE, Flown, Lesson, Wish, budget, few_step
from sfumato.training.feeds import FROM_NOISE, STILL, JumpFeed
from sfumato.training.measure import Speed
from sfumato.training.run import make_accelerator
from tests.core.exact import GAUSSIAN
from tests.training.common import pictures, record, rows, small_fit, stirred, weights

LEARNED = ("denoiser", "conditioner")
TAUGHT = {"sampler": "heun", "steps": 4, "grid": "uniform", "guidance": 1.0, "autoguidance": 1.0}


def new_model(classes: int = 3, predict: str = "flow", **net: Any) -> Model:
    """A model of random weights whose samples depend on noise, time and label."""
    card = Card(
        modality="image",
        shape=(1, 8, 8),
        mode="L",
        label_names=[str(k) for k in range(classes)],
        codec={"shape": [1, 8, 8], "downsample": 4, "channels": 2, "width": 16},
        conditioner={"name": "label", "classes": classes, "dim": 8} if classes else {"name": "none"},
        denoiser={
            "net": {"name": "mlp", "width": 32, "depth": 1, **net},
            "schedule": {"name": "flow"},
            "predict": predict,
        },
        sample={"sampler": "heun", "steps": 4, "guidance": 1.5 if classes else 1.0},
    )
    model = Model(card)
    for part in model.parts.values():
        stirred(part)
    return model.eval()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "BATCH", 32)
    monkeypatch.setattr(distilling, "CHECKED", 20)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a record of how it was trained."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    new_model().save(folder)
    data = {"resolution": 8, "mode": "L", "held_out": 0.1}
    plan = {"data": data, "train": {"precision": "fp32"}}
    said = {"source": "digits", "sfumato": "0", "plan": plan, "done": ["codec", "denoiser"], "seconds_taken": 100.0}
    (folder / "run.json").write_text(json.dumps(said | {"metrics": {"codec": {"psnr": 20.0}}}))
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four steps made of it."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "BATCH", 32)
        patch.setattr(distilling, "CHECKED", 20)
        sfumato.distill(teacher, out=folder, steps=4, device="cpu")
    return folder


def lesson(model: Model, tmp_path: Path, said: dict[str, Any] | None = None, **wish: Any) -> Lesson:
    asked = {"seconds": None, "steps": 4, "guidance": None, "overwrite": False, "seed": 0, "device": "cpu"} | wish
    log: Any = type("Silent", (), {"show": lambda *_: None, "report": lambda *_: None, "picture": lambda *_: None})()
    return Lesson(model, Wish(out=tmp_path, **asked), said or {}, make_accelerator("cpu", "fp32"), log, math.inf)


# ---- what is taught


def gaussian_teacher(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose latents are independent, N(0.4, 0.7²) each; its flow takes noise ε to 0.4 + 0.7 ε."""
    model = new_model(classes=0, width=64, depth=2)
    exact = GAUSSIAN.denoise(model.denoiser.schedule)
    monkeypatch.setattr(model, "denoise", lambda label, count, how=None: exact)
    return model


def test_the_ends_of_a_gaussian_are_learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its noise ε ends at m + s ε: one jump learns that, and one step of the teacher, which gives m, misses by s."""
    monkeypatch.setattr(distilling, "BATCH", 128)
    monkeypatch.setattr(distilling, "RATE", 5e-3)
    model = gaussian_teacher(monkeypatch)
    taught = lesson(model, tmp_path, steps=300)
    taught.give()
    student, schedule = taught.student, model.denoiser.schedule
    eps = torch.randn(500, *model.codec.latent_shape, generator=torch.Generator().manual_seed(5))
    wanted = 0.4 + 0.7 * eps
    miss = lambda z: float((z - wanted).square().mean().sqrt())
    denoise = model.denoise(None, 500)
    assert miss(sample(denoise, schedule, eps, time_grid(schedule, 1), "ddim")) == pytest.approx(0.7, abs=0.02)
    ask = (student.denoise(None, 500), schedule, eps)
    found = sample(*ask, time_grid(schedule, 1), student.rule(None, 500))
    assert miss(found) < 0.08, miss(found)
    assert taught.facts["miss"]["1.00"] == pytest.approx(miss(found), abs=0.03)
    assert taught.facts["miss"]["0.50"] < 0.08
    generator = torch.Generator().manual_seed(6)
    for jumps in (2, 4):
        draw = lambda: torch.randn(eps.shape, generator=generator)
        found = sample(*ask, time_grid(schedule, jumps, "late"), student.rule(None, 500), draw)
        assert float(found.mean()) == pytest.approx(0.4, abs=0.05)
        assert float(found.std()) == pytest.approx(0.7, abs=0.08)  # as much as a jump may miss by
    middle = torch.full((500,), 0.6, dtype=torch.float64)
    z_t = model.denoiser.noised(wanted, eps, middle)
    assert float((student.denoise(None, 500)(z_t, middle) - denoise(z_t, middle)).square().mean().sqrt()) < 0.12


@pytest.mark.parametrize("net", [{}, {"name": "dit", "heads": 2, "patch": 1}, {"name": "unet", "heads": 2}])
@pytest.mark.parametrize("classes", [0, 3])
def test_a_student_begins_as_its_teacher(net: dict[str, Any], classes: int):
    model = new_model(classes, **net)
    student = few_step(model, model.sampling)
    label = torch.tensor([0, 1, 2]) if classes else None
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, *model.codec.latent_shape, generator=generator)
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.3, 0.0, 0.1]).double()
    wanted = model.denoiser(z, t, model.conditioner(label, 3))
    told = student.conditioner(label, 3)
    assert torch.allclose(student.denoiser(z, t, told), wanted, atol=1e-5)
    assert torch.allclose(student.denoiser(z, t, told, s=s), wanted, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.codec.parameters(), student.codec.parameters(), strict=True))
    assert not any(p.requires_grad for p in student.codec.parameters())
    assert model.card.denoiser["net"].get("clocks") is None and model.card.distilled is None


def test_guidance_is_built_in(tmp_path: Path):
    """Trajectories are those of the guided teacher; those without a label are those of nobody's label."""
    model = new_model()
    for weight, asked, other in ((1.5, None, 9.0), (9.0, 9.0, 1.5)):
        taught = lesson(model, tmp_path, guidance=asked)
        flights, label = taught.flown(0, 200)
        assert label is not None and set(label.tolist()) == {0, 1, 2, 3}  # 3 is the null label
        how, t = Sampling(guidance=weight), flights.grid[3]
        wanted, wrong = (model.denoise(label, 200, Sampling(guidance=w))(flights.z[3], t) for w in (weight, other))
        assert float((flights.z_hat[3] - wanted).norm()) < 0.2 * float((wrong - wanted).norm())
        none = label == 3
        alone = model.denoise(None, int(none.sum()), how)(flights.z[3][none], t[none])
        assert torch.allclose(alone, wanted[none], atol=1e-5)


def test_states_that_are_trained_on(tmp_path: Path):
    taught = lesson(new_model(), tmp_path)
    flights, label = taught.flown(0, 64)
    feed = JumpFeed(flights, label, 20_000, 0, "cpu")
    jumps = feed.batch(3)
    still, begins = jumps.s == jumps.t, jumps.t == 1
    assert bool((jumps.s[~still] == 0).all()) and float(jumps.t.min()) > 0
    assert float(still.float().mean()) == pytest.approx(STILL, abs=0.01)
    assert float(begins.float().mean()) == pytest.approx(FROM_NOISE + (1 - FROM_NOISE) / flights.knots, abs=0.02)
    assert torch.equal(jumps.target[~still], flights.z[-1, jumps.index[~still]])
    again = JumpFeed(flights, label, 20_000, 0, "cpu").batch(3)
    assert torch.equal(again.target, jumps.target) and torch.equal(again.label, jumps.label)
    assert not torch.equal(feed.batch(4).index, jumps.index)


# ---- plan and budget


def test_the_budget_is_a_fifth_of_the_training():
    wish = Wish(Path("x"), None, None, None, False, 0, None)
    assert budget(wish, {"seconds_taken": 115.5}) == pytest.approx(23.1)
    assert budget(Wish(Path("x"), 30.0, None, None, False, 0, None), {}) == 30
    assert budget(Wish(Path("x"), None, 5, None, False, 0, None), {}) == math.inf
    with pytest.raises(UserError, match=r"not known how long .* give --budget or --steps"):
        budget(wish, {})
    with pytest.raises(UserError, match=r"a fifth of this model's training is 4 s; give at least --budget 10s"):
        budget(wish, {"seconds_taken": SMALLEST_BUDGET})


@pytest.mark.parametrize("first", [0.8, 4.0])
def test_steps_come_from_the_budget(first: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """However slow the first trajectories were, those that follow fill their share of the time, and steps the rest."""
    now = [1000.0]
    taught = lesson(new_model(), tmp_path, steps=None)
    flown = taught.flown

    def slow(number: int, count: int) -> Any:
        now[0] += 0.8 * count / 32 if number else first
        return flown(number, count)

    monkeypatch.setattr(taught, "flown", slow)
    monkeypatch.setattr(distilling.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distilling, "measure_step", lambda *_, **__: Speed(0.1, 7.0))
    begun = Flown(taught.flown(0, 32), first)
    taught.deadline = now[0] + first * 20 / 32 + 30
    speed = taught.plan(begun)
    assert speed == Speed(0.1, 7.0) and taught.left == pytest.approx(30)
    flights, label = taught.trajectories(begun, speed)
    sets = len(flights) // 32
    assert sets == 1 + int((30 - 0.1 * REUSE) / (0.8 + 0.1 * REUSE)) and len(label) == 32 * sets
    taught.train(flights, label, speed)
    assert taught.settings.steps == pytest.approx((30 - 0.8 * (sets - 1)) / 0.1, abs=1)
    assert REUSE <= taught.settings.steps / sets < REUSE + 0.1 + (0.8 / 0.1 + REUSE) / sets  # one more is too many
    taught.deadline = now[0] + 2.5
    with pytest.raises(UserError, match=r"too small for this model; give \d+ s more with --budget"):
        taught.plan(begun)


def test_batches_are_no_larger_than_the_teachers(tmp_path: Path):
    for theirs, ours in ((16, 16), (4096, 32), (None, 32)):
        assert lesson(new_model(), tmp_path, {"plan": {"train": {"denoiser": {"batch": theirs}}}}).batch == ours


def test_memory_holds_the_trajectories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    taught = lesson(new_model(), tmp_path, steps=400)
    monkeypatch.setattr(distilling, "MEMORY", 3 * 32 * 4 * (2 * KNOTS + 1) * taught.teacher.codec.latent_size + 1)
    assert len(taught.trajectories(Flown(taught.flown(0, 32), 1.0), None)[0]) == 3 * 32


# ---- the folder


def test_the_folder_is_a_model(teacher: Path, student: Path):
    names = {path.name for path in student.iterdir()}
    assert {"model.json", "run.json", "README.md", "metrics.jsonl", "samples"} <= names
    assert {"codec", "conditioner", "denoiser"} <= names
    assert not [path for path in student.parent.iterdir() if "partial" in path.name]
    assert [row["stage"] for row in rows(student)] == ["distill"] and rows(student)[-1]["step"] == 4
    said = record(student)
    assert said["distilled"]["teacher"] == str(teacher) and said["distilled"]["guidance"] == 1.5
    assert said["distilled"]["trajectories"] == 32 and said["distilled"]["miss"].keys() == {"1.00", "0.50"}
    assert said["plan"] == record(teacher)["plan"] and said["metrics"]["codec"] == {"psnr": 20.0}
    model = load(student, "cpu")
    assert model.sampling == Sampling("jump", 2, 1.0, grid="late")
    assert model.card.distilled == TAUGHT | {"guidance": 1.5}
    ours, theirs = weights(student), weights(teacher)
    same = {name for name in ours if ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name])}
    assert {name for name in ours if name.startswith("codec/")} <= same
    assert not {name for name in same if name.startswith("denoiser/") and name.endswith("weight")}
    assert str(student) in (student / "README.md").read_text()
    assert sfumato.info(student)["distilled"]["steps"] == 4


def test_what_is_returned_is_what_is_written(teacher: Path, tmp_path: Path):
    model = sfumato.distill(load(teacher, "cpu"), out=tmp_path / "x", steps=2)
    assert torch.equal(model.sample(range(3)), load(tmp_path / "x", "cpu").sample(range(3)))
    assert record(tmp_path / "x")["distilled"]["teacher"] == str(teacher) and model.folder == tmp_path / "x"


def test_the_same_seed_gives_the_same_weights(teacher: Path, student: Path, tmp_path: Path):
    for seed in (0, 1):
        sfumato.distill(teacher, out=tmp_path / str(seed), steps=4, seed=seed, device="cpu")
    again, other, ours = weights(tmp_path / "0"), weights(tmp_path / "1"), weights(student)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert not all(torch.equal(other[name], ours[name]) for name in ours)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_leaves_everything_as_it_was(
    teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(JumpFeed, "batch", stop)
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


def test_what_is_refused(teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    new = tmp_path / "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "give --budget or --steps, not both" in refusal(teacher, out=new, steps=4, budget="30s")
    assert "--steps must be at least 2, not 1" in refusal(teacher, out=new, steps=1)
    assert "--guidance must be at least 0" in refusal(teacher, out=new, steps=4, guidance=-1.0)
    assert "10 s is the least" in refusal(teacher, out=new, budget="9s")
    assert "is a few-step model already" in refusal(student, out=new, steps=4)
    assert "name another folder with --out" in refusal(teacher, out=teacher, steps=4, overwrite=True)
    assert "replace it with --overwrite" in refusal(teacher, out=student, steps=4)
    assert "is not a run of sfumato" in refusal(teacher, out=tmp_path / "mine", steps=4, overwrite=True)
    assert "predicts eps" in refusal(new_model(predict="eps"), out=new, steps=4)
    assert "how long" in refusal(new_model(), out=new)
    assert "no model in" in refusal(tmp_path / "mine", out=new, steps=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refusal(teacher, out=new, steps=4)
    assert not new.exists()


# ---- what it can be used for


def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the batch at each call of the network."""
    calls: list[int] = []
    output = Denoiser.output
    monkeypatch.setattr(Denoiser, "output", lambda self, z, *rest: (calls.append(len(z)), output(self, z, *rest))[1])
    return calls


def test_one_call_a_jump(teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(student, "cpu")
    calls = counted(model, monkeypatch)
    for jumps, asked in ((2, {}), (1, {"steps": 1}), (4, {"steps": 4})):
        calls.clear()
        made = sfumato.generate(model, n=5, **asked)
        assert calls == [5] * jumps
        assert (made.facts["sampler"], made.facts["steps"], made.facts["guidance"]) == ("jump", jumps, 1.0)
    calls.clear()
    assert sfumato.generate(model, n=5, sampler="heun").facts["steps"] == 4  # as many as the teacher took
    assert calls == [5] * 7
    assert sampling(model, None, None, "heun").grid == "uniform"  # and at the same times
    calls.clear()
    sfumato.generate(load(teacher, "cpu"), n=5)
    assert calls == [5] * 14


def test_what_a_few_step_model_refuses(teacher: Path, student: Path):
    with pytest.raises(UserError, match=r"--guidance 2: the weight 1\.5 is built into this few-step model"):
        sfumato.generate(student, n=2, guidance=2)
    assert len(sfumato.generate(student, n=2, guidance=1).items) == 2
    with pytest.raises(UserError, match=r"jump is for few-step models; make one with: sfumato distill"):
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
    assert sfumato.edit(student, source, label="1", strength=0.5).facts["steps"] == 2
    assert sfumato.edit(student, source, strength=0.5, sampler="ddim").facts["steps"] == 4
    back = sfumato.edit(student, source, method="invert", steps=5)
    assert back.facts["inversion_error"] < 1e-3
    assert len(sfumato.inpaint(student, source, mask=tmp_path / "mask.png", steps=2).items) == 6
    assert sfumato.interpolate(student, n=3).facts["steps"] == 4
    assert len(sfumato.reconstruct(student, source, n=3).items) == 3
    assert sfumato.generate(student, n=3, label="2").rows[0]["label"] == 2


def test_without_classes(tmp_path: Path):
    model = new_model(classes=0)
    model.save(tmp_path / "teacher")
    sfumato.distill(tmp_path / "teacher", out=tmp_path / "student", steps=3)
    student = load(tmp_path / "student")
    assert student.card.distilled == TAUGHT
    assert len(sfumato.generate(student, n=3).items) == 3


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sfumato.training.stages.GUIDE_STEPS", 1)
    lines = ["size,kind", *(f"{1.5 + i % 7},{'ab'[i % 2]}" for i in range(400))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    small_fit(tmp_path / "t.csv", tmp_path / "teacher", "denoiser.width=32", "train.denoiser.batch=16")
    sfumato.distill(tmp_path / "teacher", out=tmp_path / "student", steps=3, device="cpu")
    assert sfumato.load(tmp_path / "student").card.distilled["autoguidance"] == 1.5  # built in
    with pytest.raises(UserError, match="--autoguidance 2: what the teacher had is built into this few-step model"):
        sfumato.generate(tmp_path / "student", n=2, autoguidance=2)
    made = sfumato.generate(tmp_path / "student", n=20, out=tmp_path / "made.csv")
    assert sfumato.load(tmp_path / "student").sampling.grid == "early"
    assert made.facts["sampler"] == "jump" and (tmp_path / "made.csv").read_text().startswith("size,kind\n")
    assert "c2st" in sfumato.evaluate(tmp_path / "student", tmp_path / "t.csv", n=50)
