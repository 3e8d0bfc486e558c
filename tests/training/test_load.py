"""Loading a model: every damage is reported in one line, and no code is executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import UserError
from sfumato.model import PARTS, load
from sfumato.training.trainer import Trainer
from tests.training.common import small_fit

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
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(loaded.sample(range(3), labels), fitted.sample(range(3), labels))
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(loaded.autoencode(x), fitted.autoencode(x))
    assert loaded.sampling == fitted.sampling and loaded.config.label_names == fitted.config.label_names
    loaded.save(tmp_path / "copy")
    again = load(tmp_path / "copy", "cpu")
    assert torch.equal(again.sample(range(3), labels), fitted.sample(range(3), labels))


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


@pytest.mark.parametrize("key", ["modality", "shape", "spec", "label_names", "sample"])
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
        ("conditioner", "name"),
    ],
)
def test_a_key_of_a_part_is_missing(run: Path, part: str, key: str):
    edit(run / part / "config.json", lambda config: config.pop(key))
    assert_refused(run, 1, key)


def test_an_unknown_setting(run: Path):
    edit(run / "codec" / "config.json", lambda config: config.update(colour="red"))
    assert_refused(run, 1, "colour")


def test_an_unknown_network(run: Path):
    edit(run / "denoiser" / "config.json", lambda config: config["net"].update(name="os.system"))
    with pytest.raises(UserError, match=r"unknown network 'os\.system'"):
        load(run, "cpu")


@pytest.mark.parametrize("number", [None, 0, 3, "2"])
def test_an_unknown_format(run: Path, number: object):
    edit(run / "model.json", lambda metadata: metadata.update(format=number))
    assert_refused(run, 2, f"format {number} is unknown; update sfumato")


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
