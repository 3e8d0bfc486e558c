"""Loading a model: every damage is reported in one line, and no code is executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import UserError
from sfumato.model import load
from sfumato.storage import CONFIGURED_PARTS as PARTS
from sfumato.training import stages
from sfumato.training.trainer import Trainer
from sfumato.types import Raw
from tests.training.common import pictures, small_fit

PLAIN = ("codec.perceptual=none",)


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    small_fit(source, run, *PLAIN)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def assert_refused(run: Path, code: int, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(run, "cpu")
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_a_model_comes_back_as_it_was_saved(source: Path, tmp_path: Path):
    fitted = small_fit(source, tmp_path, *PLAIN)
    loaded = load(tmp_path, "cpu")
    raw = Raw({"label": torch.tensor([0, 1, 2])})
    assert torch.equal(loaded.sample(range(3), raw).z, fitted.sample(range(3), raw).z)
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(loaded.autoencode(x).stack(), fitted.autoencode(x).stack())
    assert loaded.sampling == fitted.sampling and loaded.config.label_names == fitted.config.label_names
    loaded.save(tmp_path / "copy")
    again = load(tmp_path / "copy", "cpu")
    assert torch.equal(again.sample(range(3), raw).z, fitted.sample(range(3), raw).z)


def test_no_model_in_the_folder(tmp_path: Path):
    assert_refused(tmp_path / "nowhere", 2, "no model in .*nowhere")
    assert_refused(tmp_path, 2, "there is no model.json")


def test_an_unfinished_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        small_fit(source, tmp_path, *PLAIN)
    assert_refused(tmp_path, 2, "has not finished: continue it with --resume")


@pytest.mark.parametrize("part", PARTS)
def test_damaged_weights(run: Path, part: str):
    path = run / part / "model.safetensors"
    original = path.read_bytes()
    for damaged in (original[: len(original) // 2], b"", b"\xff" * 100, original[:8] + b"}" + original[9:]):
        path.write_bytes(damaged)
        assert_refused(run, 1, f"{part}/model.safetensors: damaged or from another model")
    path.unlink()
    assert_refused(run, 1, f"{part}/model.safetensors: missing")


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_model(run: Path, part: str):
    path = run / part / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    for other in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, "extra": torch.ones(1)},
        {**tensors, name: torch.ones(3, 5, 7)},
    ):
        save_file(other, path)
        assert_refused(run, 1, f"damaged or from another model.*({name}|extra)")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("key", ["modality", "shape", "spec", "sample"])
def test_a_key_is_missing(run: Path, key: str):
    edit(run / "model.json", lambda config: config.pop(key))
    assert_refused(run, 1, f"{run}.*{key}")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("codec", "shape"),
        ("denoiser", "net"),
        ("denoiser", "schedule"),
        ("denoiser", "predict"),
        ("conditioner", "kind"),
        ("conditioner", "names"),
    ],
)
def test_a_key_of_a_part_is_missing(run: Path, part: str, key: str):
    edit(run / part / "config.json", lambda config: (config["label"] if part == "conditioner" else config).pop(key))
    assert_refused(run, 1, key)


def test_an_unknown_setting(run: Path):
    edit(run / "codec" / "config.json", lambda config: config.update(colour="red"))
    assert_refused(run, 1, "colour")


def test_an_unknown_network(run: Path):
    edit(run / "denoiser" / "config.json", lambda config: config["net"].update(name="os.system"))
    with pytest.raises(UserError, match=r"unknown network 'os\.system'"):
        load(run, "cpu")


@pytest.mark.parametrize("number", [None, 0, 4, "3"])
def test_an_unknown_format(run: Path, number: object):
    edit(run / "model.json", lambda metadata: metadata.update(format=number))
    assert_refused(run, 2, f"format {number} is unknown; update sfumato")


def as_format_2(run: Path) -> None:
    """Rewrite a run as format 2: one condition without a name or none, and other names of the guide's tensors."""
    old = {"conditions.label.table.weight": "table.weight", "denoiser.net.": "net."}
    for part in ("conditioner", "guide"):
        tensors = load_file(run / part / "model.safetensors")
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        save_file(tensors, run / part / "model.safetensors")
    path = run / "conditioner" / "config.json"
    names = json.loads(path.read_text()).get("label", {}).get("names", [])
    path.write_text(json.dumps({"name": "label", "classes": len(names), "dropout": 0.1} if names else {"name": "none"}))
    edit(run / "model.json", lambda metadata: metadata.update(format=2, label_names=names))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_of_format_2_is_read(labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "MIN_GUIDE_STEP", 1)
    x, label = pictures(24, (1, 8, 8))
    np.savez(tmp_path / "x.npz", images=x[..., 0], **({"labels": label} if labelled else {}))
    run, raw = tmp_path / "run", Raw({"label": torch.tensor([0, 1, 2])}) if labelled else Raw()
    expected = small_fit(tmp_path / "x.npz", run, *PLAIN, "sample.autoguidance=2").sample(range(3), raw).z
    as_format_2(run)
    model = load(run, "cpu")
    assert model.guide is not None and torch.equal(model.sample(range(3), raw).z, expected)
    assert model.config.label_names == (["0", "1", "2"] if labelled else [])
    model.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "model.json").read_text())["format"] == 3
    assert torch.equal(load(tmp_path / "new", "cpu").sample(range(3), raw).z, expected)


def test_a_damaged_model_of_format_2(run: Path, tmp_path: Path):
    (run / "guide").mkdir()
    save_file({}, run / "guide" / "model.safetensors")
    as_format_2(run)
    path = run / "conditioner" / "config.json"
    config = path.read_text()
    for text, match in (("{}", "do not describe a model.*name"), ('{"name": "none"}', "another model")):
        path.write_text(text)
        assert_refused(run, 1, match)
    path.write_text(config)
    edit(run / "model.json", lambda metadata: metadata.pop("label_names"))
    assert_refused(run, 1, "label_names")


def test_a_model_of_an_older_version(run: Path):
    """Its `model.json` has "mode" in place of "spec"."""
    edit(run / "model.json", lambda metadata: metadata.update(format=1, mode=metadata.pop("spec")))
    assert_refused(run, 2, f"^{run}: this model was written by an older sfumato and must be trained again$")


@pytest.mark.parametrize("name", ["model.json", "codec/config.json", "denoiser/config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_damaged_json(run: Path, name: str, text: str):
    (run / name).write_text(text)
    assert_refused(run, 1, f"{name}: damaged")


def test_a_config_is_missing(run: Path):
    (run / "codec" / "config.json").unlink()
    assert_refused(run, 2, "codec/config.json: no such file")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_is_never_loaded(run: Path, source: Path, tmp_path: Path):
    target = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(target))
    for name in ("codec/model.safetensors", "denoiser/model.safetensors"):
        original = (run / name).read_bytes()
        (run / name).write_bytes(bomb)
        assert_refused(run, 1, "damaged")
        (run / name).write_bytes(original)
    for name in ("model.pt", "codec/pytorch_model.bin", "checkpoint/random_states_0.pkl"):
        (run / name).write_bytes(bomb)
    load(run, "cpu")
    edit(run / "run.json", lambda record: record.update(done=["codec"]))
    (run / "checkpoint" / "state.safetensors").write_bytes(bomb)
    with pytest.raises(UserError, match="checkpoint is damaged"):
        small_fit(source, run, resume=True)
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists()  # unpickling would have worked
