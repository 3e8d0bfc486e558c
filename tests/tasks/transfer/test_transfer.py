"""Transfer of items to another class."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import sfumato
import sfumato.core
from sfumato.errors import UserError
from sfumato.modalities.image.write import write_images
from sfumato.tasks.outputs import Result
from sfumato.tasks.transfer import search
from sfumato.types import Raw
from tests.training.common import pictures, small_fit

QUICK = {"samples": 8, "align": 4, "rounds": 1, "steps": 3}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few training steps of the residual, and an empty cache."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("sfumato.tasks.transfer.residual"), "RESIDUAL_STEPS", 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes."""
    folder = tmp_path_factory.mktemp("styles")
    write_source(folder / "in", 30)
    small_fit(folder / "in", folder / "run")
    return folder / "run"


def write_source(path: Path, count: int, labels: bool = True) -> Path:
    x, label = pictures(count, (1, 8, 8))
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    write_images(path, images.float(), [{"label": "abc"[int(k)]} if labels else {} for k in label], mode="L")
    return path


def test_items_get_the_new_label_and_keep_the_old_one_as_source_label(run: Path, tmp_path: Path):
    source = write_source(tmp_path / "in", 6)
    result = sfumato.transfer(run, source, label="b", out=tmp_path / "out", **QUICK)
    assert result.items.stack().shape == (6, 1, 8, 8)
    assert {row["label"] for row in result.metadata} == {"b"} and {row["source_label"] for row in result.metadata} == {
        *"abc"
    }
    assert (tmp_path / "out" / "metadata.jsonl").is_file() and (tmp_path / "out-sheet.png").is_file()
    again = sfumato.transfer(run, tmp_path / "out", label="a", source_label="b", **QUICK)  # what is written can be read
    assert len(again.items) == 6


def test_the_residual_network_is_used_unless_rounds_is_0(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, settings = write_source(tmp_path / "in", 6), QUICK | {"strength": 0.0}
    reports: list[tuple[str, int, int]] = []
    fit = lambda residual_map, *_: residual_map.net[-1].bias.data.add_(1.0)
    monkeypatch.setattr(import_module("sfumato.tasks.transfer.residual"), "_fit", fit)
    linear = sfumato.transfer(run, source, label="b", **settings | {"rounds": 0})
    residual = sfumato.transfer(
        run, source, label="b", **settings | {"rounds": 2}, progress=lambda *report: reports.append(report)
    )
    changed = torch.tensor([row["source_label"] != "b" for row in linear.metadata])
    gap = (linear.items.stack() - residual.items.stack()).abs().flatten(1).amax(1)
    assert (gap[changed] > 1e-3).any() and gap[~changed].max() == 0
    assert [report[1:] for report in reports if report[0] == "residual"] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ] * 2  # from a, and from c
    assert residual.metadata[0]["rounds"] == 2


def test_the_search_is_cached(run: Path, tmp_path: Path):
    """For the same model and budget."""
    source, settings = write_source(tmp_path / "in", 4), {"label": "b", "source_label": "a", "guidance": 1.0} | QUICK
    stages: list[str] = []
    progress = lambda stage, done, total: stages.append(stage)
    first = sfumato.transfer(run, source, **settings, progress=progress)
    assert {"samples", "align", "residual"} < set(stages)
    stages.clear()
    again = sfumato.transfer(run, source, **settings, progress=progress)
    assert set(stages) == {"transfer"} and torch.equal(first.items.stack(), again.items.stack())
    stages.clear()
    sfumato.transfer(run, source, **settings | {"rounds": 2}, progress=progress)
    assert "residual" in stages and "align" not in stages
    stages.clear()
    other = sfumato.model.load(run)
    with torch.no_grad():
        next(other.denoiser.net.parameters()).add_(0.1)
    sfumato.transfer(other, source, **settings, progress=progress)
    assert {"align", "residual"} < set(stages)


def test_a_cache_that_cannot_be_written_is_no_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    assert len(sfumato.transfer(run, write_source(tmp_path / "in", 4), label="b", source_label="a", **QUICK).items) == 4


def test_a_time_limit_reduces_the_search(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps and samples by the same share, from the time of a batch of 256."""
    model = sfumato.model.load(run)
    monkeypatch.setattr(search, "_denoiser_seconds", lambda *_: (1.0, 2.0))
    calls = 4 * model.sampling.steps + 3 * 6 * 4  # 2 classes, 2 calls per step; 3 fits of 6 steps, 2 calls of 2 each
    full = (10 * calls + 200) / 0.7  # seconds, of which 30 % are for other work
    whole = search.SearchBudget(align=100, rounds=2, samples=2560, seconds=full / 2)
    raw = Raw({"label": torch.ones(256, dtype=torch.int64)})
    half = whole.limited_to_time(model, raw)
    assert (half.align, half.samples, half.rounds) == (50, 1280, 2) and half.share == pytest.approx(0.5)
    assert replace(whole, seconds=1e9).limited_to_time(model, raw).align == 100
    assert replace(whole, seconds=None).limited_to_time(model, raw).samples == 2560
    with pytest.raises(UserError, match=f"a search of 1 s is too short .* needs {0.05 * full:.0f} s"):
        replace(whole, seconds=1.0).limited_to_time(model, raw)


def test_a_time_limit_applies_to_the_whole_search(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, reports = write_source(tmp_path / "in", 4), list[tuple[str, int]]()
    monkeypatch.setattr(search, "_denoiser_seconds", lambda *_: (1.0, 1.0))
    progress = lambda stage, done, total: reports.append((stage, total))
    settings = {"label": "b", "source_label": "a", "align": 40, "samples": 80, "rounds": 0, "guidance": 1.0}
    model = sfumato.model.load(run)
    seconds = (80 / 256 * 4 * model.sampling.steps + 40) / 0.7 / 4
    sfumato.transfer(run, source, **settings, budget=f"{seconds}s", progress=progress)
    assert set(reports) == {("samples", 20), ("align", 10), ("transfer", 4)}


def test_the_same_seed_gives_the_same_items(run: Path, tmp_path: Path):
    source = write_source(tmp_path / "in", 4)
    results = [sfumato.transfer(run, source, label="b", seed=seed, **QUICK) for seed in (0, 0, 1)]
    first, second, other = (result.items.stack() for result in results)
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_items_of_the_target_class_stay(run: Path, tmp_path: Path, strength: float):
    source = write_source(tmp_path / "in", 6)
    result = sfumato.transfer(run, source, label="b", strength=strength, **QUICK)
    unchanged = torch.tensor([row["source_label"] == "b" for row in result.metadata])
    x, x_hat = result.items.stack(), sfumato.reconstruct(run, source, n=6).items.stack()
    torch.testing.assert_close(x[unchanged], x_hat[unchanged], rtol=0, atol=1e-4)
    assert (x[~unchanged] - x_hat[~unchanged]).abs().max() > 1e-3
    assert {
        weight for weight, unguided in zip(weights(result), unchanged | (strength == 0), strict=True) if unguided
    } == {None}


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of shapes in two styles, each with a size; and a model of all three conditions."""
    folder = tmp_path_factory.mktemp("styles")
    x, shape = pictures(12, (1, 8, 8))
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    rows = [{"shape": "abc"[k], "style": ["thin", "bold"][i % 2], "size": i / 4} for i, k in enumerate(shape.tolist())]
    source = write_images(folder / "in", images.float(), rows, mode="L")
    small_fit(source, folder / "run", label_column="shape,style,size")
    return source, folder / "run"


@pytest.mark.parametrize(("label", "name"), [("style=bold", "style"), ("b", "shape")])
def test_other_conditions_are_kept(styles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, label: str, name: str):
    (source, run), seen = styles, list[Raw]()
    denoise = sfumato.model.Model.denoise
    record = lambda self, raw, *rest: seen.append(raw) or denoise(self, raw, *rest)
    settings = QUICK | {"align": 0, "rounds": 0, "guidance": 1.5, "label": label}
    sfumato.transfer(run, source, **settings)  # its maps are cached
    monkeypatch.setattr(sfumato.model.Model, "denoise", record)
    result = sfumato.transfer(run, source, **settings)
    value, i = label.split("=")[-1], torch.arange(12)
    for k, row in enumerate(result.metadata):
        before = {"shape": "abc"[k % 3], "style": ["thin", "bold"][k % 2], "size": k / 4}
        assert row.get(f"source_{name}", value) == before[name]
        assert row.items() >= (before | {name: value}).items()
    changed = i[torch.tensor([row.get(f"source_{name}", value) != value for row in result.metadata])]
    now, then = seen
    expected = {
        "shape": changed % 3,
        "style": 1 - changed % 2,
        "size": changed / 4,
    }  # classes are in alphabetical order
    target = torch.full_like(changed, {"style": 0, "shape": 1}[name])
    for raw, values in ((now, expected), (then, expected | {name: target})):
        assert all(torch.equal(raw.values[key], value) for key, value in values.items())


def test_only_classes_are_changed_and_only_those_of_items_of_one_length(
    styles: tuple[Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch
):
    source, of_styles = styles
    with pytest.raises(UserError, match="label 'size=1': transfer changes a class; size has no classes"):
        sfumato.transfer(of_styles, source, label="size=1")
    model = sfumato.model.load(run)
    monkeypatch.setattr(model.codec, "tokens", True)
    with pytest.raises(UserError, match="not supported for models of modality image, whose items have several lengths"):
        sfumato.transfer(model, source, label="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "z"}, "z"),
        ({"label": "b", "strength": 1.5}, "strength"),
        ({"label": "b", "align": -1}, "align"),
        ({"label": "b", "samples": 1}, "samples"),
        ({"label": "b", "budget": "soon"}, "budget 'soon'"),
    ],
)
def test_mistakes_are_named(run: Path, tmp_path: Path, options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        sfumato.transfer(run, write_source(tmp_path / "in", 4), **{**QUICK, **options})


def test_unlabelled_sources_need_a_source_label(run: Path, tmp_path: Path):
    source = write_source(tmp_path / "in", 4, labels=False)
    with pytest.raises(UserError, match="--source-label"):
        sfumato.transfer(run, source, label="b", **QUICK)
    assert len(sfumato.transfer(run, source, label="b", source_label="a", **QUICK).items) == 4


def test_items_without_a_label_are_counted_and_refused(run: Path, tmp_path: Path):
    x, label = pictures(4, (1, 8, 8))
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    rows = [{"label": "abc"[int(k)]} if k else {} for k in label]
    source = write_images(tmp_path / "in", images.float(), rows, mode="L")
    with pytest.raises(UserError, match=r"2 items have no label; .*--source-label"):
        sfumato.transfer(run, source, label="b", **QUICK)


def check_weights(run: Path, source: Path, result: Result, expected: tuple[float | None, ...]) -> None:
    """Whether each item is the result of its recorded weight alone, or of the map alone."""
    assert weights(result) == [*expected]
    for item, weight in enumerate(expected):
        settings = QUICK | ({"strength": 0.0} if weight is None else {"guidance": weight})
        fixed = sfumato.transfer(run, source, label="b", source_label="a", **settings)
        torch.testing.assert_close(result.items[item], fixed.items[item], rtol=0, atol=1e-3)
        assert set(weights(fixed)) == {weight}


def fake_evidence(monkeypatch: pytest.MonkeyPatch, *values: list[float]) -> Iterator[torch.Tensor]:
    """Replace the evidence of successive calls: for generated items, for mapped ones, and for each weight."""
    remaining = iter([torch.tensor(value) for value in values])
    monkeypatch.setattr(sfumato.core.likelihood, "class_log_likelihood_ratio", lambda *_: next(remaining))
    return remaining


def weights(result: Result) -> list[float | None]:
    """The recorded guidance weight of each item."""
    return [row["guidance"] for row in result.metadata]


def test_each_item_is_guided_until_it_shows_its_class(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the smallest sufficient weight: item 2 by the map alone, item 1 with 1, item 0 with 1.5, item 3 with 2."""
    generated = [-5.0] * 110 + [2.0] * 390  # the quantile 0.2 is -5
    source = write_source(tmp_path / "in", 4)
    remaining = fake_evidence(monkeypatch, generated, [-6.0, -6.0, -5.0, -9.0], [-6.0, 3.0, -9.0], [-4.0, -6.0], [-5.0])
    result = sfumato.transfer(run, source, label="b", source_label="a", **QUICK)
    assert next(remaining, None) is None
    check_weights(run, source, result, (1.5, 1.0, None, 2.0))


def test_a_given_weight_is_recorded(run: Path, tmp_path: Path):
    result = sfumato.transfer(run, write_source(tmp_path / "in", 2), label="b", source_label="a", guidance=1.3, **QUICK)
    assert weights(result) == [1.3, 1.3]


def test_evidence_compares_with_the_source_classes_first(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Then with the others, and never with the target itself."""
    compared: list[list[int]] = []
    original = sfumato.model.Model.denoise

    def denoise(self: sfumato.model.Model, raw: Raw, *rest: object):
        denoiser = original(self, raw, *rest)
        labelled = lambda z, level: denoiser(z, level)
        labelled.label = int(raw.values["label"][0]) if raw else None  # type: ignore[attr-defined]
        return labelled

    def evidence(target: object, alternatives: list[object], *_: object) -> torch.Tensor:
        compared.append([denoiser.label for denoiser in (target, *alternatives)])  # type: ignore[attr-defined]
        return torch.ones(500 if len(compared) == 1 else 4)  # the map alone suffices

    monkeypatch.setattr(sfumato.model.Model, "denoise", denoise)
    monkeypatch.setattr(sfumato.core.likelihood, "class_log_likelihood_ratio", evidence)
    sfumato.transfer(run, write_source(tmp_path / "in", 4), label="b", source_label="c", **QUICK)
    assert compared == [[1, 2, 0], [1, 2, 0]]


def test_the_required_evidence_is_bounded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However high that of generated items is."""
    source = write_source(tmp_path / "in", 4)
    remaining = fake_evidence(monkeypatch, [99.0] * 500, [20.0, 13.0, 13.0, 50.0], [14.0, 13.0], [13.9])
    result = sfumato.transfer(run, source, label="b", source_label="a", **QUICK)
    assert next(remaining, None) is None
    check_weights(run, source, result, (None, 1.0, 1.5, None))


def test_guidance_stops_at_the_last_weight(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_evidence(monkeypatch, [1.0] * 500, *[[0.0] * 4] * (1 + 7))
    source = write_source(tmp_path / "in", 4)
    result = sfumato.transfer(run, source, label="b", source_label="a", **QUICK)
    fixed = sfumato.transfer(run, source, label="b", source_label="a", guidance=8.0, **QUICK)
    torch.testing.assert_close(result.items.stack(), fixed.items.stack())
    assert weights(result) == weights(fixed) == [8.0] * 4
