"""`evaluate` on samples of known quality: real ones, copies, noise, a repeated image."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import UserError
from sfumato.modalities.image import evaluator as evaluators
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.read import read_source
from sfumato.modalities.image.write import write_images
from sfumato.model import Model
from sfumato.sampling import balanced_labels
from sfumato.tasks import evaluation
from sfumato.tasks.evaluate import evaluate
from sfumato.tasks.generate import generate

FLOORED = ("fd", "kd", "precision", "recall", "density", "coverage", "novelty", "copies", "accuracy")


@pytest.fixture(scope="module")
def parts() -> tuple[ImageDataset, ImageDataset]:
    return read_source("digits")


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes images (N, C, H, W) and optional labels as a folder of samples."""

    def write_samples(x: torch.Tensor, labels: object = None, name: str = "samples") -> Path:
        rows = None if labels is None else [{"label": int(k)} for k in labels]
        return write_images(tmp_path / name, x, rows)

    return write_samples


def all_items(data: ImageDataset) -> torch.Tensor:
    return data.batch(range(len(data))).data


def test_real_images_reach_the_floors(parts: tuple[ImageDataset, ImageDataset], write: Write):
    _, held = parts
    report = evaluate(write(all_items(held), held.labels), "digits")
    assert report["n"] == report["n_floor"] == report["n_held"] == len(held) and report["n_train"] == len(parts[0])
    assert abs(report["fd"] - report["fd_floor"]) < 1e-3 * report["fd_floor"]
    assert report["accuracy"] == report["accuracy_floor"] > 0.8
    assert abs(report["novelty"] - 1) < 1e-6 and report["copies"] < 0.05 and report["memorised"] is False
    assert report["extractor"].startswith("classifier-")
    assert all(f"{name}_floor" in report for name in FLOORED)
    assert not any(name.startswith(("cas", "codec")) for name in report)
    assert json.loads(json.dumps(report)) == report


def test_copies_of_training_images_are_flagged(parts: tuple[ImageDataset, ImageDataset], write: Write):
    train, held = parts
    copies = train.subset(np.arange(0, len(train), 10))
    report = evaluate(write(all_items(copies), copies.labels), "digits")
    assert report["novelty"] < 0.01 and report["copies"] == 1 and report["memorised"] is True
    mixed = torch.cat([all_items(copies)[:60], all_items(held)[:120]])
    assert evaluate(write(mixed, name="mixed"), "digits")["memorised"] is True


def test_noise_is_far_worse(parts: tuple[ImageDataset, ImageDataset], write: Write):
    noise = torch.rand(180, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = evaluate(write(noise, torch.arange(180) % 10), "digits")
    assert report["fd"] > 10 * report["fd_floor"] and report["kd"] > abs(report["kd_floor"])
    assert report["precision"] < report["precision_floor"] - 0.2 and report["coverage"] < report["coverage_floor"] / 2
    assert report["accuracy"] < 0.3 and report["memorised"] is False


def test_a_repeated_image_covers_nothing(parts: tuple[ImageDataset, ImageDataset], write: Write):
    report = evaluate(write(all_items(parts[1])[:1].expand(100, -1, -1, -1)), "digits")
    assert report["coverage"] < 0.1 and report["recall"] < 0.1 and report["fd"] > 5 * report["fd_floor"]
    assert "accuracy" not in report  # no labels


def test_wrong_labels_are_detected(parts: tuple[ImageDataset, ImageDataset], write: Write):
    held = parts[1]
    assert evaluate(write(all_items(held), (held.labels + 1) % 10), "digits")["accuracy"] < 0.1


def test_unknown_labels_are_left_out_and_reported(parts: tuple[ImageDataset, ImageDataset], write: Write):
    folder = write(all_items(parts[1]), parts[1].labels + 5)
    report = evaluate(folder, "digits")
    assert "accuracy" not in report and "no accuracy" in report["notes"][0]
    with pytest.raises(UserError, match=r"has labels that digits does not have; --cas needs labels"):
        evaluate(folder, "digits", cas=True)


def test_classes_are_matched_by_name(parts: tuple[ImageDataset, ImageDataset], write: Write):
    held = parts[1].subset(np.flatnonzero(parts[1].labels >= 5))  # in their folder, class 5 comes first
    assert evaluate(write(all_items(held), held.labels), "digits")["accuracy"] > 0.8


def test_training_on_the_samples(parts: tuple[ImageDataset, ImageDataset], write: Write):
    train = parts[0].subset(np.arange(400))
    good = evaluate(write(all_items(train), train.labels), "digits", cas=True)
    assert good["cas"] > 0.7 and abs(good["cas"] - good["cas_floor"]) < 0.1
    wrong = evaluate(write(all_items(train), (train.labels + 1) % 10, "wrong"), "digits", cas=True)
    assert wrong["cas"] < 0.1 and wrong["cas_floor"] == good["cas_floor"]


def test_a_file_is_evaluated_like_a_folder(parts: tuple[ImageDataset, ImageDataset], write: Write, tmp_path: Path):
    held = parts[1]
    folder = write(all_items(held), held.labels)
    np.savez(tmp_path / "samples.npz", images=held.pixels[..., 0], labels=held.labels)
    reports = [evaluate(samples, "digits") for samples in (folder, tmp_path / "samples.npz")]
    for report in reports:
        del report["model"], report["seconds"]
    assert reports[0] == reports[1]


def test_a_part_of_the_samples(parts: tuple[ImageDataset, ImageDataset], write: Write):
    folder = write(all_items(parts[1]))
    assert evaluate(folder, "digits", n=50)["n"] == 50
    assert evaluate(folder, "digits", n=10**6)["n"] == len(parts[1])


def test_a_model_is_evaluated_as_what_it_writes(model: Model, tmp_path: Path):
    reports: list[tuple] = []
    report = evaluate(model, "digits", n=60, batch=64, progress=lambda *report: reports.append(report))
    generate(model, n=60, out=tmp_path / "samples")
    written = evaluate(tmp_path / "samples", "digits")
    assert report["model"] == "the model" and report["n"] == 60
    assert report["fd"] == pytest.approx(written["fd"], rel=1e-3) and report["accuracy"] == written["accuracy"]
    assert set(report) - set(written) == {"codec_n", "codec_psnr", "codec_ssim", "codec_l1", "codec_rfd"}
    assert report["codec_n"] == 180 and 0 < report["codec_psnr"] < 40 and report["codec_rfd"] > 0
    assert ("generate", 60, 60) in reports and reports[-1] == ("measure", 1, 1)


def test_several_conditions_are_evaluated_by_the_primary_label(portraits: Model):
    samples = evaluation.draw_samples(portraits, 30, 3, 500, None)
    assert samples.labels.tolist() == balanced_labels(10, range(30), 3).tolist()
    assert {"cas", "accuracy"} <= set(evaluate(portraits, "digits", n=60, cas=True))


def test_how_many_items_are_generated(model: Model, monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []

    def stop(model: Model, n: int, *rest: object) -> None:
        counts.append(n)
        raise UserError("enough")

    monkeypatch.setattr(evaluation, "draw_samples", stop)
    for n in (None, 30):
        with pytest.raises(UserError, match="enough"):
            evaluate(model, "digits", n=n)
    assert counts == [1_000, 30]


def test_without_classes(make_model: Callable[..., Model], parts: tuple[ImageDataset, ImageDataset], tmp_path: Path):
    train, _ = parts
    items = all_items(train.subset(np.arange(200)))
    source = write_images(tmp_path / "source", items)
    report = evaluate(write_images(tmp_path / "samples", items[:50], [{"label": 1}] * 50), source)
    assert report["extractor"].startswith("orientation-classifier-") and "accuracy" not in report
    with pytest.raises(UserError, match="source: has no classes, which --cas needs"):
        evaluate(make_model(), source, cas=True)
    with pytest.raises(UserError, match="the model: has no labels; --cas needs labels"):
        evaluate(make_model(0), "digits", cas=True)


def test_unlabelled_items_are_left_out(parts: tuple[ImageDataset, ImageDataset], write: Write, tmp_path: Path):
    train, held = parts
    rows = [{"label": int(k)} if i % 3 else {} for i, k in enumerate(train.labels)]
    source = write_images(tmp_path / "source" / "train", all_items(train), rows).parent
    write_images(
        source / "test", all_items(held), [{"label": int(k)} if i % 2 else {} for i, k in enumerate(held.labels)]
    )
    report = evaluate(write(all_items(held), held.labels), source, cas=True)
    assert report["accuracy"] > 0.8 and report["accuracy_floor"] > 0.8 and report["cas_floor"] > 0.5


def test_held_out_items_without_labels_have_no_accuracy(
    parts: tuple[ImageDataset, ImageDataset], write: Write, tmp_path: Path
):
    train, held = parts
    arrays = {"x_train": train.pixels[..., 0], "y_train": train.labels, "x_test": held.pixels[..., 0]}
    np.savez(tmp_path / "source.npz", **arrays)
    report = evaluate(write(all_items(held), held.labels), tmp_path / "source.npz")
    assert report["fd"] >= 0 and not any(name.startswith("accuracy") for name in report)
    assert "has no labels" in message(write(all_items(held), held.labels, "b"), tmp_path / "source.npz", cas=True)


def test_the_evaluator_is_trained_once(
    parts: tuple[ImageDataset, ImageDataset], write: Write, monkeypatch: pytest.MonkeyPatch
):
    folder = write(all_items(parts[1]))
    first = evaluate(folder, "digits")
    monkeypatch.setattr(evaluators, "fit_classifier", lambda *a, **k: pytest.fail("trained again"))
    again = evaluate(folder, "digits")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    train, _ = read_source("digits")
    monkeypatch.setattr(evaluators, "EVALUATOR_STEPS", 2)
    evaluator = evaluators.ImageEvaluator(train, "cpu")
    assert evaluators.network_cache() is None and evaluator.extractor(all_items(train)[:3]).shape[0] == 3


def test_images_that_are_too_small(tmp_path: Path):
    x = torch.rand(20, 1, 4, 4) * 2 - 1
    with pytest.raises(UserError, match="4x4 pixels are too small to evaluate"):
        evaluate(write_images(tmp_path / "a", x), write_images(tmp_path / "b", x))


def message(model: Path, source: object = "digits", **settings: object) -> str:
    with pytest.raises(UserError) as error:
        evaluate(model, source, **settings)
    assert "\n" not in str(error.value) and error.value.code in (1, 2)
    return str(error.value)


def test_bad_samples(model: Model, parts: tuple[ImageDataset, ImageDataset], write: Write, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "no images here" in message(tmp_path / "empty")
    assert "no such file or folder" in message(tmp_path / "nowhere")
    assert "only 1 sample" in message(write(all_items(parts[1])[:1], name="one"))
    assert "its images are 6x10 RGB, but those of digits are 8x8 L" in message(write(torch.zeros(4, 3, 10, 6)))
    assert "has no labels; --cas needs labels" in message(write(all_items(parts[1]), name="plain"), cas=True)
    assert "-n must be at least 2" in message(model, n=1)


def test_a_model_of_other_images(make_model: Callable[..., Model]):
    assert "the model: its images are 8x8 RGB, but those of digits" in message(make_model(0, (3, 8, 8), "RGB"))


def test_an_unfinished_run(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    assert "not finished" in message(tmp_path)


def test_the_source_is_read_as_the_run_read_it(run: Path, tmp_path: Path):
    x = torch.rand(30, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = write_images(tmp_path / "source", x)
    assert "--label-from" in message(run, folder)  # recorded in run.json, and these names have no such label
    report = evaluate(run, folder, n=20, overrides=["data.label_from=null"])
    assert report["n_train"] == 27 and report["n_held"] == 3 and report["model"] == str(run)


def test_a_source_with_too_few_held_out(tmp_path: Path):
    x = torch.rand(9, 1, 8, 8) * 2 - 1
    folder = write_images(tmp_path / "source", x)
    assert "only 1 held-out item" in message(folder, folder)


TASKS = (
    "augment",
    "edit",
    "evaluate",
    "generate",
    "inpaint",
    "interpolate",
    "outpaint",
    "reconstruct",
    "transfer.task",
)


@pytest.mark.parametrize("task", TASKS)
def test_task_modules_load_nothing_heavy(task: str):
    heavy = "{'torch', 'numpy', 'PIL', 'pydantic', 'accelerate'}"
    code = f"import sys; import sfumato.tasks.{task}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
