"""`info` describes a model's folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.apps.format import result_lines
from sfumato.errors import UserError
from sfumato.tasks.info import count_parameters, info


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {"modality": "image", "latent_shape": [4, 4, 4], "label_names": ["a", "b"], "shape": [1, 28, 28]}
    record = {"seed": 3, "plan": {"steps": 10}, "metrics": {"psnr": {"value": 25.0}}, "command": "sfumato fit"}
    (tmp_path / "model.json").write_text(json.dumps(config))
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "codec").mkdir()
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "codec" / "model.safetensors", {"note": "x"})
    return tmp_path


def test_info_reports_what_the_files_contain(run: Path):
    report = info(run)
    assert report["parameters"] == {"codec": 12 + 5 + 1}
    assert report["bytes"]["codec"] == (run / "codec" / "model.safetensors").stat().st_size
    assert (report["latent_shape"], report["modality"], report["seed"]) == ([4, 4, 4], "image", 3)
    assert report["plan"] == {"steps": 10}
    assert json.loads(json.dumps(report)) == report


def test_labels_and_conditions(run: Path):
    assert info(run)["labels"] == ["a", "b"] and "conditions" not in info(run)  # as written before version 3
    metadata = {"format": 3, "modality": "image", "latent_shape": [4, 4, 4], "shape": [1, 28, 28]}
    (run / "model.json").write_text(json.dumps(metadata))
    (run / "conditioner").mkdir()
    label = {"kind": "label", "names": ["x", "y"], "dropout": None}
    style = {"kind": "label", "names": ["plain", "bold"], "dim": 16}
    age = {"kind": "number", "mean": 30.0, "std": 9.5}
    for settings, names, described in (
        ({}, None, None),
        ({"label": label}, ["x", "y"], None),
        ({"age": age}, None, [{"name": "age", "kind": "number", "mean": 30.0, "std": 9.5}]),
        (
            {"style": style, "text": {"kind": "text"}, "label": label},
            ["x", "y"],
            [
                {"name": "style", "kind": "label", "classes": ["plain", "bold"]},
                {"name": "text", "kind": "text"},
                {"name": "label", "kind": "label", "classes": ["x", "y"]},
            ],
        ),
        (
            {"style": style, "age": age},
            ["plain", "bold"],
            [
                {"name": "style", "kind": "label", "classes": ["plain", "bold"]},
                {"name": "age", "kind": "number", "mean": 30.0, "std": 9.5},
            ],
        ),
    ):
        (run / "conditioner" / "config.json").write_text(json.dumps(settings))
        report = info(run)
        assert (report.get("labels"), report.get("conditions")) == (names, described)
    lines = [line.split() for line in "\n".join(result_lines(report)).splitlines()]
    assert ["name", "style", "kind", "label", "classes", "plain,", "bold"] in lines
    assert ["name", "age", "kind", "number", "mean", "30", "std", "9.5"] in lines


def test_info_loads_no_torch(run: Path):
    code = "import sys; from sfumato.tasks.info import info; info(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == 0


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(UserError, match="no model in") as caught:
        info(tmp_path / "nowhere")
    assert caught.value.code == 2


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x04\0\0\0\0\0\0\0{{{{", b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_weights_are_named(tmp_path: Path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        count_parameters(path)
    assert caught.value.code == 1


def test_damaged_json_is_named(run: Path):
    (run / "run.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"run\.json' is damaged"):
        info(run)
