"""Every task is a method of a model too."""

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sfumato
from sfumato.model import Model
from sfumato.tasks.inputs import source_settings

NAMES = [name for name in sfumato.__all__ if inspect.isfunction(getattr(Model, name, None))]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_passes_all_arguments_on(name: str, model: Model, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr(sfumato, name, lambda *args, **settings: calls.append((args, settings)) or "done")
    method = getattr(model, name)
    parameters = inspect.signature(method).parameters.values()
    arguments = {p.name: p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert method(**arguments, seed=3) == "done"
    task = inspect.signature(_task(name))
    bound = task.bind(*calls[0][0], **calls[0][1])
    assert bound.arguments == {next(iter(task.parameters)): model, **arguments, "seed": 3}


def _task(name: str) -> Any:
    """The original function."""
    return getattr(import_module(f"sfumato.{sfumato._MODULES[name]}"), name)


def test_a_model_reads_sources_as_its_run_did(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = {"data": {"resolution": 24, "label_from": "(a|b)"}}
    (tmp_path / "run.json").write_text(json.dumps({"plan": plan}))
    monkeypatch.setattr(model, "folder", tmp_path)
    for named in (model, tmp_path, str(tmp_path)):
        settings = source_settings(named, ["data.held_out=0.3"], True, labels=True)
        assert (settings.resolution, settings.label_from, settings.held_out) == (24, "(a|b)", 0.3)
    monkeypatch.setattr(model, "folder", None)
    assert source_settings(model, (), False, labels=True).resolution is None


def test_every_task_on_a_model_is_a_method():
    tasks = {"generate", "interpolate", "reconstruct", "edit", "inpaint", "outpaint", "transfer", "augment", "evaluate"}
    assert set(NAMES) == tasks
