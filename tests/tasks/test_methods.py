"""Each task is a method of a model as well."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import sfumato
from sfumato.methods import Methods
from sfumato.model import Model
from sfumato.tasks.common import source_settings

NAMES = [name for name, _ in inspect.getmembers(Methods, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_hands_all_on(name: str, model: Model, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(sfumato, name, lambda *given, **settings: seen.append((given, settings)) or "done")
    method = getattr(model, name)
    wanted = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = {p.name: p.name for p in wanted}
    assert method(**given, seed=3) == "done"
    task = inspect.signature(_task(name))
    bound = task.bind(*seen[0][0], **seen[0][1])
    assert bound.arguments == {next(iter(task.parameters)): model, **given, "seed": 3}


def _task(name: str) -> Any:
    """The function itself, whatever stands in its place."""
    return getattr(__import__(f"sfumato.tasks.{name}", fromlist=[name]), name)


def test_a_model_reads_sources_as_its_run_did(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = {"data": {"resolution": 24, "label_from": "(a|b)"}}
    (tmp_path / "run.json").write_text(json.dumps({"plan": read}))
    monkeypatch.setattr(model, "folder", tmp_path)
    for known in (model, tmp_path, str(tmp_path)):
        settings = source_settings(known, ["data.held_out=0.3"], True, labels=True)
        assert (settings.resolution, settings.label_from, settings.held_out) == (24, "(a|b)", 0.3)
    monkeypatch.setattr(model, "folder", None)
    assert source_settings(model, (), False, labels=True).resolution is None


def test_every_task_of_given_items_is_one():
    tasks = {"generate", "interpolate", "reconstruct", "edit", "inpaint", "outpaint", "transfer", "augment", "evaluate"}
    assert set(NAMES) == tasks
