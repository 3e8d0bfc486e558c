"""transfer: items carried over into another class."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import sfumato
import sfumato.core
from sfumato.data.write import write_images
from sfumato.errors import UserError
from sfumato.tasks import crossing
from sfumato.tasks.generate import Result
from tests.training.common import pictures, small_fit

QUICK = {"samples": 8, "align": 4, "rounds": 1, "steps": 3}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few steps of the network that is put upon the map, and nothing found before."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("sfumato.core.bend"), "STEPS", 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes."""
    place = tmp_path_factory.mktemp("styles")
    source(place / "in", 30)
    small_fit(place / "in", place / "run")
    return place / "run"


def source(place: Path, count: int, labels: bool = True) -> Path:
    x, label = pictures(count, (1, 8, 8))
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    write_images(place, images.float(), [{"label": "abc"[int(k)]} if labels else {} for k in label], mode="L")
    return place


def test_items_get_the_new_class_and_keep_their_own_on_record(run: Path, tmp_path: Path):
    given = source(tmp_path / "in", 6)
    result = sfumato.transfer(run, given, label="b", out=tmp_path / "out", **QUICK)
    assert result.items.shape == (6, 1, 8, 8)
    assert {row["label"] for row in result.rows} == {"b"} and {row["source_label"] for row in result.rows} == {*"abc"}
    assert (tmp_path / "out" / "metadata.jsonl").is_file() and (tmp_path / "out-sheet.png").is_file()
    again = sfumato.transfer(run, tmp_path / "out", label="a", own_label="b", **QUICK)  # what is written can be read
    assert len(again.items) == 6


def test_a_small_network_adds_to_the_map_unless_told_not_to(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given, how = source(tmp_path / "in", 6), QUICK | {"strength": 0.0}
    told: list[tuple[str, int, int]] = []
    learned = lambda way, *_: way.net[-1].bias.data.add_(1.0)
    monkeypatch.setattr(import_module("sfumato.core.bend"), "_fit", learned)
    plain = sfumato.transfer(run, given, label="b", **how | {"rounds": 0})
    bent = sfumato.transfer(run, given, label="b", **how | {"rounds": 2}, progress=lambda *part: told.append(part))
    moved = torch.tensor([row["source_label"] != "b" for row in plain.rows])
    gap = (plain.items - bent.items).abs().flatten(1).amax(1)
    assert (gap[moved] > 1e-3).any() and gap[~moved].max() == 0
    assert [part[1:] for part in told if part[0] == "bend"] == [(1, 3), (2, 3), (3, 3)] * 2  # from a, and from c
    assert bent.rows[0]["rounds"] == 2


def test_what_was_found_is_kept(run: Path, tmp_path: Path):
    """Until the model or the effort is another."""
    given, how = source(tmp_path / "in", 4), {"label": "b", "own_label": "a", "guidance": 1.0} | QUICK
    stages: list[str] = []
    tell = lambda stage, done, total: stages.append(stage)
    first = sfumato.transfer(run, given, **how, progress=tell)
    assert {"samples", "align", "bend"} < set(stages)
    stages.clear()
    again = sfumato.transfer(run, given, **how, progress=tell)
    assert set(stages) == {"transfer"} and torch.equal(first.items, again.items)
    stages.clear()
    sfumato.transfer(run, given, **how | {"rounds": 2}, progress=tell)
    assert "bend" in stages and "align" not in stages
    stages.clear()
    other = sfumato.model.load(run)
    with torch.no_grad():
        next(other.denoiser.net.parameters()).add_(0.1)
    sfumato.transfer(other, given, **how, progress=tell)
    assert {"align", "bend"} < set(stages)


def test_a_cache_that_cannot_be_written_is_no_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    assert len(sfumato.transfer(run, source(tmp_path / "in", 4), label="b", own_label="a", **QUICK).items) == 4


def test_a_budget_makes_the_search_shorter(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps and items by the same share, by what a call of 256 items takes."""
    model = sfumato.model.load(run)
    monkeypatch.setattr(crossing, "_pace", lambda *_: (1.0, 2.0))
    calls = 4 * model.sampling.steps + 3 * 6 * 4  # 2 classes, 2 calls a step; 3 fits of 6 steps, 2 calls of 2 each
    full = (10 * calls + 200) / 0.7  # seconds: of a budget three tenths are for other work
    whole = crossing.Effort(align=100, rounds=2, samples=2560, seconds=full / 2)
    half = whole.within(model, 1)
    assert (half.align, half.samples, half.rounds) == (50, 1280, 2) and half.share == pytest.approx(0.5)
    assert replace(whole, seconds=1e9).within(model, 1).align == 100
    assert replace(whole, seconds=None).within(model, 1).samples == 2560
    with pytest.raises(UserError, match=f"a search of 1 s is too short .* needs {0.05 * full:.0f} s"):
        replace(whole, seconds=1.0).within(model, 1)


def test_a_budget_counts_for_the_whole_search(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given, told = source(tmp_path / "in", 4), list[tuple[str, int]]()
    monkeypatch.setattr(crossing, "_pace", lambda *_: (1.0, 1.0))
    tell = lambda stage, done, total: told.append((stage, total))
    how = {"label": "b", "own_label": "a", "align": 40, "samples": 80, "rounds": 0, "guidance": 1.0}
    model = sfumato.model.load(run)
    seconds = (80 / 256 * 4 * model.sampling.steps + 40) / 0.7 / 4
    sfumato.transfer(run, given, **how, budget=f"{seconds}s", progress=tell)
    assert set(told) == {("samples", 20), ("align", 10), ("transfer", 4)}


def test_the_same_seed_gives_the_same_items(run: Path, tmp_path: Path):
    given = source(tmp_path / "in", 4)
    first, second, other = (sfumato.transfer(run, given, label="b", seed=seed, **QUICK).items for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_of_the_class_already_stays(run: Path, tmp_path: Path, strength: float):
    given = source(tmp_path / "in", 6)
    result = sfumato.transfer(run, given, label="b", strength=strength, **QUICK)
    mine = torch.tensor([row["source_label"] == "b" for row in result.rows])
    back = sfumato.reconstruct(run, given, n=6).items
    torch.testing.assert_close(result.items[mine], back[mine], rtol=0, atol=1e-4)
    assert (result.items[~mine] - back[~mine]).abs().max() > 1e-3
    assert {weight for weight, stays in zip(guided(result), mine | (strength == 0), strict=True) if stays} == {None}


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
        sfumato.transfer(run, source(tmp_path / "in", 4), **{**QUICK, **options})


def test_it_must_be_known_what_the_items_are(run: Path, tmp_path: Path):
    given = source(tmp_path / "in", 4, labels=False)
    with pytest.raises(UserError, match="--own-label"):
        sfumato.transfer(run, given, label="b", **QUICK)
    assert len(sfumato.transfer(run, given, label="b", own_label="a", **QUICK).items) == 4


def test_items_without_a_label_are_counted_and_refused(run: Path, tmp_path: Path):
    x, label = pictures(4, (1, 8, 8))
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    rows = [{"label": "abc"[int(k)]} if k else {} for k in label]
    given = write_images(tmp_path / "in", images.float(), rows, mode="L")
    with pytest.raises(UserError, match=r"2 items have no label; .*--own-label"):
        sfumato.transfer(run, given, label="b", **QUICK)


def check_weights(run: Path, given: Path, result: Result, weights: tuple[float | None, ...]) -> None:
    """Whether each item is what its weight alone, or the map alone, makes of it, and the record says so."""
    assert guided(result) == [*weights]
    for item, weight in enumerate(weights):
        how = QUICK | ({"strength": 0.0} if weight is None else {"guidance": weight})
        fixed = sfumato.transfer(run, given, label="b", own_label="a", **how)
        torch.testing.assert_close(result.items[item], fixed.items[item], rtol=0, atol=1e-3)
        assert set(guided(fixed)) == {weight}


def seen(monkeypatch: pytest.MonkeyPatch, *looks: list[float]) -> Iterator[torch.Tensor]:
    """How clear items are taken to be, look by look: new ones, what the map makes, with each weight."""
    shown = iter([torch.tensor(look) for look in looks])
    monkeypatch.setattr(sfumato.core, "class_evidence", lambda *_: next(shown))
    return shown


def guided(result: Result) -> list[float | None]:
    """The weight that each item has on record."""
    return [row["guidance"] for row in result.rows]


def test_each_item_is_guided_until_it_shows_its_class(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No more than it needs: item 2 by the map alone, item 1 with weight 1, item 0 with 1.5 and item 3 with 2."""
    new = [-5.0] * 110 + [2.0] * 390  # a fifth is no clearer
    given = source(tmp_path / "in", 4)
    shown = seen(monkeypatch, new, [-6.0, -6.0, -5.0, -9.0], [-6.0, 3.0, -9.0], [-4.0, -6.0], [-5.0])
    result = sfumato.transfer(run, given, label="b", own_label="a", **QUICK)
    assert next(shown, None) is None
    check_weights(run, given, result, (1.5, 1.0, None, 2.0))


def test_a_weight_is_recorded_as_it_was_given(run: Path, tmp_path: Path):
    result = sfumato.transfer(run, source(tmp_path / "in", 2), label="b", own_label="a", guidance=1.3, **QUICK)
    assert guided(result) == [1.3, 1.3]


def test_a_class_is_shown_against_those_it_may_be_taken_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that items come from first, and never the class itself."""
    asked: list[list[int]] = []
    real = sfumato.model.Model.denoise

    def denoise(self: sfumato.model.Model, label: torch.Tensor | None, *rest: object):
        way = real(self, label, *rest)
        way.label = None if label is None else int(label[0])  # type: ignore[attr-defined]
        return way

    def evidence(under: object, rivals: list[object], *_: object) -> torch.Tensor:
        asked.append([way.label for way in (under, *rivals)])  # type: ignore[attr-defined]
        return torch.ones(500 if len(asked) == 1 else 4)  # the map alone is enough

    monkeypatch.setattr(sfumato.model.Model, "denoise", denoise)
    monkeypatch.setattr(sfumato.core, "class_evidence", evidence)
    sfumato.transfer(run, source(tmp_path / "in", 4), label="b", own_label="c", **QUICK)
    assert asked == [[1, 2, 0], [1, 2, 0]]


def test_beyond_doubt_no_more_is_asked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However clear new items are."""
    given = source(tmp_path / "in", 4)
    shown = seen(monkeypatch, [99.0] * 500, [20.0, 13.0, 13.0, 50.0], [14.0, 13.0], [13.9])
    result = sfumato.transfer(run, given, label="b", own_label="a", **QUICK)
    assert next(shown, None) is None
    check_weights(run, given, result, (None, 1.0, 1.5, None))


def test_guidance_stops_at_the_last_weight(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen(monkeypatch, [1.0] * 500, *[[0.0] * 4] * (1 + 7))
    given = source(tmp_path / "in", 4)
    result = sfumato.transfer(run, given, label="b", own_label="a", **QUICK)
    fixed = sfumato.transfer(run, given, label="b", own_label="a", guidance=8.0, **QUICK)
    torch.testing.assert_close(result.items, fixed.items)
    assert guided(result) == guided(fixed) == [8.0] * 4
