"""Invalid input: one clear line, the right exit code, and no partial output."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sfumato import storage
from sfumato.errors import UserError
from sfumato.training import fit, launch
from sfumato.training.trainer import Trainer
from sfumato.types import Raw
from tests.training.common import SMALL, checkpoint, pictures, record, reported_every_step, small_fit, weights

PLAIN = ("codec.perceptual=none",)


def assert_refused(code: int, match: str, source: Path | str, out: Path, **options: Any) -> None:
    """`fit` fails with a message of one line and does not touch the output folder."""
    before = sorted(out.parent.rglob("*")) if out.parent.is_dir() else None
    with pytest.raises(UserError, match=match) as caught:
        fit(str(source), **{"out": out, "steps": 20, "device": "cpu"} | options)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert before == (sorted(out.parent.rglob("*")) if out.parent.is_dir() else None)


# arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": "5s", "steps": None}, "'5s' is too small: the minimum is 20 s"),
        ({"budget": "soon", "steps": None}, "'soon' cannot be read"),
        ({"budget": "10m"}, "--budget or --steps, not both"),
        ({"steps": 1}, "--steps must be at least 2"),
        ({"steps": -5}, "--steps must be at least 2"),
        ({"seed": -1}, "seed=-1"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"resume": True}, "no run to resume"),
        ({"modality": "imagery"}, "unknown modality 'imagery'.*image"),
        ({"overrides": ["train.denoiser.lrr=1"]}, r"did you mean 'train\.denoiser\.lr'"),
        ({"overrides": ["codec.bottelneck=vq"]}, r"did you mean 'codec\.bottleneck'"),
        ({"overrides": ["codec.bottleneck=vae"]}, r"codec\.bottleneck=vae.*'kl', 'vq', 'fsq', 'none' or 'identity'"),
        ({"overrides": ["train.codec.lr=fast"]}, r"train\.codec\.lr=fast"),
        ({"overrides": ["train.codec.lr"]}, "write key=value"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"label_from": "("}, "not a regular expression"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], match: str, source: Path, folder: Path, tmp_path: Path):
    assert_refused(2, match, folder if "label_from" in options else source, tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("codec.downsample=3", "must be a power of two"),
        ("codec.perceptual=lpips", "needs the weights of VGG"),
        ("denoiser.time_sampling_settings.men=3", "did you mean 'mean'"),
        ("denoiser.weight_settings.gamma=3", "unknown setting 'gamma'"),
        ("denoiser.schedule_settings.beta_max=3", "unknown setting 'beta_max'"),
        ("codec.levels=8,5", "does not divide"),
    ],
)
def test_a_plan_that_cannot_be_trained_is_refused_before_training(
    override: str, match: str, source: Path, tmp_path: Path
):
    choices = ("codec.bottleneck=fsq", "codec.channels=3", "denoiser.time_sampling=logit_normal")
    assert_refused(2, match, source, tmp_path / "run", overrides=[*SMALL, *choices, override])


@pytest.mark.parametrize("override", ["codec.perceptual=features", "codec.adversarial_weight=1"])
def test_images_too_small_for_a_term(override: str, tmp_path: Path):
    root = save_images(tmp_path / "images", 12, (1, 6, 6))
    assert_refused(2, "8", root, tmp_path / "run", overrides=[*SMALL, override])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is available")
def test_an_unavailable_device(source: Path, tmp_path: Path):
    assert_refused(2, "device 'cuda' cannot be used here", source, tmp_path / "run", device="cuda")


# data


def save_images(root: Path, count: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Path:
    root.mkdir(parents=True)
    for i, image in enumerate(pictures(count, shape)[0]):
        Image.fromarray(image[..., 0] if shape[0] == 1 else image).save(root / f"{i:02d}.png")
    return root


@pytest.mark.parametrize("count", [1, 2, 7])
def test_too_few_images(count: int, tmp_path: Path):
    assert_refused(1, f"only {count} images?; at least 8", save_images(tmp_path / "few", count), tmp_path / "run")


def test_no_images(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_refused(1, "no images", tmp_path / "empty", tmp_path / "run")


def test_no_such_source(tmp_path: Path):
    assert_refused(2, "mnst: no such file.*mnist", "mnst", tmp_path / "run")


def test_a_text_file_named_png(tmp_path: Path):
    root = save_images(tmp_path / "images", 20)
    (root / "99.png").write_text("hello")
    assert_refused(1, r"99\.png", root, tmp_path / "run")
    model = small_fit(root, tmp_path / "run", *PLAIN, skip_bad=True)
    assert record(tmp_path / "run")["data"]["items"] == 18 and model.config.label_names == []


def test_a_single_class_gives_a_model_without_classes(tmp_path: Path):
    save_images(tmp_path / "images" / "only", 20)
    model = small_fit(tmp_path / "images", tmp_path / "run")
    assert model.conditioner.classes == 0 and model.config.label_names == []
    assert record(tmp_path / "run")["data"]["classes"] == 0
    assert model.decode(model.sample(range(3))).stack().shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match="trained without labels"):
        model.generate(1, label="only")


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 9, 20)], ids=str)
def test_images_of_odd_sizes(shape: tuple[int, int, int], tmp_path: Path):
    x, label = pictures(24, shape)
    np.savez(tmp_path / "x.npz", images=x, labels=label)
    model = small_fit(tmp_path / "x.npz", tmp_path / "run", "codec.width=16")
    raw = Raw({"label": torch.tensor([0, 1])})
    assert model.decode(model.sample(range(2), raw)).stack().shape == (2, *shape)


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_every_colour_mode_can_be_trained_on(mode: str, tmp_path: Path):
    x, _ = pictures(24, (4 if mode == "RGBA" else 1, 8, 8))
    np.savez(tmp_path / "x.npz", images=x if mode == "RGBA" else x.astype(np.uint16) * 257)
    model = small_fit(tmp_path / "x.npz", tmp_path / "run", *PLAIN)
    assert (model.config.spec, tuple(model.config.shape)) == (mode, (4 if mode == "RGBA" else 1, 8, 8))


def test_nine_images_are_enough(tmp_path: Path):
    """The batch is larger than the data, and one image is held out."""
    small_fit(save_images(tmp_path / "images", 9), tmp_path / "run", "train.denoiser.batch=64")
    assert record(tmp_path / "run")["done"] == ["codec", "denoiser"]


def test_a_held_out_part_without_labels(tmp_path: Path):
    """The guidance search needs held-out labels."""
    x, label = pictures(40, (1, 8, 8))
    np.savez(tmp_path / "x.npz", x_train=x[:24, ..., 0], y_train=label[:24], x_test=x[24:, ..., 0])
    model = small_fit(tmp_path / "x.npz", tmp_path / "run", "sample.guidance=null")
    assert model.conditioner.classes == 3 and model.sampling.guidance >= 1


def test_a_latent_vector(source: Path, tmp_path: Path):
    model = small_fit(source, tmp_path, *PLAIN, "codec.latent=vector", "codec.latent_dim=10")
    assert model.codec.latent_shape == (10,)


@pytest.mark.parametrize("net", ["dit", "unet"])
def test_other_networks(net: str, source: Path, tmp_path: Path):
    small_fit(source, tmp_path, *PLAIN, f"denoiser.net={net}")
    assert record(tmp_path)["plan"]["denoiser"]["net"] == net


# the folder


def test_a_folder_that_cannot_be_created(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert_refused(1, "cannot be written", source, tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_read_only_folder(source: Path):
    with pytest.raises(UserError, match=r"/proc/run: cannot be written") as caught:
        small_fit(source, Path("/proc/run"))
    assert caught.value.code == 1


def test_a_file_in_place_of_the_folder(source: Path, tmp_path: Path):
    (tmp_path / "run").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        assert_refused(2, "not a run of sfumato", source, tmp_path / "run", **options)
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("run_json", [None, "{}", "[]", '{"experiment": 3, "source": "x"}', "not JSON"])
def test_a_folder_of_another_program_is_never_touched(run_json: str | None, source: Path, tmp_path: Path):
    (tmp_path / "run" / "codec").mkdir(parents=True)
    (tmp_path / "run" / "codec" / "thesis.txt").write_text("precious")
    if run_json is not None:
        (tmp_path / "run" / "run.json").write_text(run_json)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        assert_refused(2, "not a run of sfumato", source, tmp_path / "run", **options)
    assert (tmp_path / "run" / "codec" / "thesis.txt").read_text() == "precious"


def test_an_empty_folder_is_used(source: Path, tmp_path: Path):
    small_fit(source, tmp_path, *PLAIN)
    assert record(tmp_path)["done"] == ["codec", "denoiser"]


def test_an_existing_run(source: Path, tmp_path: Path):
    run = tmp_path / "run"
    small_fit(source, run, *PLAIN)
    assert_refused(2, "--resume.*--overwrite", source, run)
    before = weights(run)
    (run / "notes.txt").write_text("precious")
    stale = [
        run / "samples" / "stale.png",
        run / "cache" / "stale.safetensors",
        run / "checkpoint-features" / "model.safetensors",
    ]
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text("stale")
    small_fit(source, run, *PLAIN, seed=1, overwrite=True)
    after = weights(run)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert record(run)["seed"] == 1 and len(list(run.glob("events.*"))) == 1
    assert not any(path.exists() for path in stale)
    assert (run / "notes.txt").read_text() == "precious"  # not a file of sfumato


def test_interrupted_planning_keeps_the_existing_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_fit(source, tmp_path, *PLAIN)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "complete_plan", stop)
    with pytest.raises(KeyboardInterrupt, match="the existing run was kept"):
        small_fit(source, tmp_path, *PLAIN, overwrite=True)
    assert record(tmp_path)["done"] == ["codec", "denoiser"]
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        small_fit(source, tmp_path / "new", *PLAIN)


def test_several_processes_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(2, "fit runs in one process", source, tmp_path / "run")


def test_invalid_data_keep_the_existing_run(source: Path, tmp_path: Path):
    run = tmp_path / "run"
    small_fit(source, run, *PLAIN)
    assert_refused(1, "only 2 images", save_images(tmp_path / "few", 2), run, overwrite=True)
    assert_refused(2, "no such file", "mnst", run, overwrite=True)
    assert record(run)["done"] == ["codec", "denoiser"]


# the disk


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Simulate a full disk after `after` writes of tensor files named `name`."""
    save, calls = storage.save_file, [0]

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        calls[0] += path.name.startswith(name)
        if calls[0] > after:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata)

    monkeypatch.setattr(storage, "save_file", full)


def test_a_full_disk_leaves_the_previous_checkpoint(source: Path, tmp_path: Path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fill_the_disk(patch, "state", after=4)
        patch.setattr(Trainer, "run", reported_every_step())
        small_fit(source, run, *PLAIN)
    assert checkpoint(run)["done"] == 4
    assert load_file(run / "checkpoint" / "state.safetensors")
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint"]
    small_fit(source, run, *PLAIN, resume=True)
    small_fit(source, whole, *PLAIN)
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(run).items())


def test_a_loss_that_is_not_finite_leaves_the_previous_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trainer, "run", reported_every_step())
    with pytest.raises(UserError, match="loss is not finite at step") as caught:
        small_fit(source, tmp_path, *PLAIN, "train.codec.lr=1e30")
    assert caught.value.code == 1
    saved = load_file(tmp_path / "checkpoint" / "state.safetensors")
    assert checkpoint(tmp_path)["done"] >= 1
    assert all(bool(v.isfinite().all()) for k, v in saved.items() if k.startswith("weights/"))


# one process, several runs


def test_the_next_run_may_have_another_precision(source: Path, tmp_path: Path):
    for precision in ("fp32", "bf16", "fp32"):
        run = tmp_path / precision
        small_fit(source, run, *PLAIN, f"train.precision={precision}", overwrite=run.exists())
        assert record(run)["plan"]["train"]["precision"] == precision


# the command line


def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """Exit code and standard error of the command."""
    cli = pytest.importorskip("sfumato.apps.cli")
    monkeypatch.setattr(sys, "argv", ["sfumato", *(str(word) for word in words)])
    return cli.run(), capsys.readouterr().err


def test_exit_codes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    run, few = tmp_path / "run", save_images(tmp_path / "few", 2)
    (tmp_path / "file").write_text("")
    for code, words in (
        (1, [few, "--out", run]),
        (1, [source, "--out", tmp_path / "file" / "run", "--steps", 4]),
        (2, [source, "--out", run, "--budget", "1s"]),
        (2, [source, "--out", run, "--set", "train.codec.lrr=1"]),
        (2, [source, "--out", run, "--resume"]),
        (2, [source, "--out", tmp_path, "--steps", 4]),
        (2, [source, "--out", run, "--modality", "smell"]),
        (2, [source, "--out", run, "--stepz", 4]),
    ):
        exit_code, stderr = run_cli(capsys, monkeypatch, "fit", *words, "--quiet")
        assert (exit_code, stderr.count("\n")) == (code, 1), stderr
        assert stderr.startswith("sfumato: ") and not run.exists()


def test_exit_code_of_a_full_disk(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fill_the_disk(monkeypatch, "state", after=0)
    settings = [word for setting in (*SMALL, *PLAIN) for word in ("--set", setting)]
    code, stderr = run_cli(
        capsys, monkeypatch, "fit", source, "--out", tmp_path, "--steps", 20, "--device", "cpu", "-q", *settings
    )
    assert (code, stderr.count("\n")) == (1, 1) and "No space left on device" in stderr
    assert not list(tmp_path.glob("checkpoint*"))
