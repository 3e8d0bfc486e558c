"""Generation: independent of the batch, n and the number of processes; balanced classes; conditions; output."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato import distributed
from sfumato.conditioners import find_class
from sfumato.data import cache
from sfumato.errors import UserError
from sfumato.modalities.image.builtin import BUILTINS
from sfumato.modalities.image.read import read_images
from sfumato.modalities.image.write import to_pixels
from sfumato.model import Model
from sfumato.sampling import balanced_labels, new_conditions
from sfumato.tasks.generate import generate
from sfumato.tasks.inputs import ItemBuffer
from sfumato.types import Items, Raw

CLOSE = {"atol": 1e-4, "rtol": 0.0}


def conditions(model: Model, items: Sequence[int], seed: int = 0) -> Raw:
    """The conditions that new items have."""
    return new_conditions(model.conditioner, items, seed)


def first_noise(model: Model, items: list[int]) -> torch.Tensor:
    """The input of the denoiser at t = 1."""
    seen: list[torch.Tensor] = []
    hook = model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model.sample(items, conditions(model, items), seed=0)
    hook.remove()
    return seen[0]


def test_the_noise_is_the_same_bit_for_bit(model: Model):
    whole = first_noise(model, list(range(10)))
    assert len(whole.flatten().unique()) == whole.numel()
    for items in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [7], [9, 3, 0]):
        assert torch.equal(first_noise(model, items), whole[items])


@pytest.mark.parametrize("sampler", ["heun", "ddpm", "sde", "dpmpp_2m"])
def test_an_item_does_not_depend_on_its_batch(model: Model, sampler: str):
    sampling = replace(model.sampling, sampler=sampler)
    generated = lambda items, seed=3: model.decode(
        model.sample(items, conditions(model, items, 3), seed=seed, sampling=sampling)
    ).stack()
    whole = generated(range(10))
    halves = torch.cat([generated(range(5)), generated(range(5, 10))])
    backwards = generated(range(9, -1, -1)).flip(0)
    assert torch.allclose(halves, whole, **CLOSE) and torch.allclose(backwards, whole, **CLOSE)
    assert not torch.allclose(whole[:5], whole[5:], **CLOSE)
    assert not torch.allclose(generated(range(10), seed=4), whole, atol=1e-2)


def test_items_beyond_memory_are_mapped_from_disk(model: Model, monkeypatch: pytest.MonkeyPatch):
    whole = generate(model, n=10, batch=4).items.stack()
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(cache, "IN_MEMORY", 10)
    allocate = cache.allocate
    monkeypatch.setattr(cache, "allocate", lambda shape, dtype: sizes.append(shape) or allocate(shape, dtype))
    assert torch.equal(generate(model, n=10, batch=4).items.stack(), whole)
    assert sizes == [(whole.nbytes,)]


def test_batches_are_buffered():
    buffer = ItemBuffer(5, (2,))
    assert buffer.items.stack().shape == (0, 2)
    for part in torch.arange(10.0, dtype=torch.float64).view(5, 2).split(2):
        buffer.append(Items(part))
    items = buffer.items.stack()
    assert items.dtype == torch.float64 and items.flatten().tolist() == list(range(10))


def test_items_of_several_lengths_are_buffered_and_gathered(monkeypatch: pytest.MonkeyPatch):
    lengths = [3, 3, 2, 1, 3, 3]
    items = [torch.full((length, 2), float(i)) for i, length in enumerate(lengths)]
    batches = [Items(torch.stack(items[:2])), Items(items[2:4]), Items(torch.stack(items[4:]))]
    parts = [batches[:1], batches[1:2], batches[2:], []]  # one shape, several, one again, nothing
    buffers = [ItemBuffer(sum(map(len, part)), (3, 2)) for part in parts]
    for buffer, part in zip(buffers, parts, strict=True):
        for batch in part:
            buffer.append(batch)
    whole = ItemBuffer(6, (3, 2))
    for batch in batches:
        whole.append(batch)
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (1, 4))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: [buffer.items for buffer in buffers])
    for found in (whole.items, distributed.gather(buffers[1].items, 6)):
        assert [len(item) for item in found] == lengths
        assert all(torch.equal(a, b) for a, b in zip(found, items, strict=True))


@pytest.mark.parametrize("label", [None, "7"])
def test_items_do_not_depend_on_n_or_batch(model: Model, label: str | None):
    whole = generate(model, n=10, batch=64, label=label)
    for n, batch in ((10, 3), (5, 64), (5, 1)):
        part = generate(model, n=n, batch=batch, label=label)
        assert torch.allclose(part.items.stack(), whole.items.stack()[:n], **CLOSE)
        assert part.metadata == whole.metadata[:n]


def test_items_do_not_depend_on_the_number_of_processes(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = generate(model, n=10).items.stack()
    monkeypatch.setattr(distributed, "gather", lambda items, n: items)
    for n, count in ((10, 2), (10, 3), (2, 3)):
        parts: list[torch.Tensor] = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank_and_size", lambda device="", pair=(rank, count): pair)
            out = tmp_path / f"{n}-{rank}-of-{count}" if rank else None  # only the first process writes
            parts.append(generate(model, n=n, out=out, sheet=out and out.with_suffix(".png")).items.stack())
        assert torch.allclose(torch.cat(parts), whole[:n], **CLOSE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("n", "count"), [(10, 2), (1, 2)])
def test_two_real_processes(run: Path, tmp_path: Path, n: int, count: int):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    words = ["-m", "sfumato", "generate", str(run), "-n", str(n), "--device", "cpu", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for prefix, name in (([], "one"), (launch, "two")):
        command = [sys.executable, *prefix, *words, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("items") == 1
    (one, _), (two, _) = (read_images(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == n
    assert np.abs(one.pixels.astype(int) - two.pixels).max() <= 1  # a gap of 1e-4 may be rounded up or down
    assert (tmp_path / "one" / "metadata.jsonl").read_text() == (tmp_path / "two" / "metadata.jsonl").read_text()


def test_classes_are_balanced_and_shuffled_whatever_n(model: Model):
    labels = conditions(model, range(100)).values["label"]
    assert torch.bincount(labels).tolist() == [10] * 10
    assert torch.equal(torch.cat([balanced_labels(10, [i], 0) for i in range(100)]), labels)
    assert torch.equal(balanced_labels(10, range(37), 0), labels[:37])
    rounds = labels.view(10, 10)
    assert not torch.equal(rounds[0], torch.arange(10)) and not torch.equal(rounds[0], rounds[1])
    assert not torch.equal(balanced_labels(10, range(100), 1), labels)


def test_bf16_is_close_and_used_only_if_the_device_supports_it(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    plain = generate(model, n=20).items.stack()
    model.config.sample["precision"] = "bf16"
    for supported in (False, True):
        monkeypatch.setattr("sfumato.model.has_bf16", lambda device, supported=supported: supported)
        items = generate(model, n=20).items.stack()
        assert items.dtype == torch.float32 and torch.equal(items, plain) == (not supported)
    gap = (items - plain).abs()
    assert float(gap.mean()) < 0.01 and float(gap.max()) < 0.1
    latent = model.sample(range(20), conditions(model, range(20)))
    model.config.sample["precision"] = "fp32"
    assert not torch.equal(model.sample(range(20), conditions(model, range(20))).z, latent.z)  # the denoiser too
    assert not torch.equal(model.decode(latent).stack(), items)  # and the decoder


def test_label_and_guidance_matter(model: Model):
    three, seven = (generate(model, n=4, label=label) for label in ("3", "7"))
    assert [row["label"] for row in three.metadata] == [3] * 4
    items = three.items.stack()
    assert not torch.allclose(items, seven.items.stack(), atol=1e-2)
    assert not torch.allclose(items, generate(model, n=4, label="3", guidance=4.0).items.stack(), atol=1e-2)
    null = (generate(model, n=4, label=label, guidance=0.0).items.stack() for label in ("3", "7"))
    assert torch.allclose(*null, **CLOSE)  # weight 0 is the null condition


@pytest.mark.parametrize("label", ["digit=7", "7", ["7", "style=bold"], ["age=40.123456", "style=bold"], None])
def test_conditions_that_are_not_requested_fit_the_others(portraits: Model, label: str | list[str] | None):
    result = generate(portraits, n=40, label=label)
    given = dict(text.split("=") if "=" in text else ("digit", text) for text in np.atleast_1d(label or []))
    for row in result.metadata:
        assert all(str(row[name]) == value.replace("40.123456", "40.1235") for name, value in given.items())
        assert "style" in given or row["style"] == ("bold" if row["digit"] >= 5 else "plain")
        assert "age" in given or row["age"] == 20 + row["digit"]
        assert "digit" in given or "style" not in given or row["digit"] >= 5
    digits = [row["digit"] for row in result.metadata]
    assert len(set(digits)) > 3 or "digit" in given
    if label is None:
        assert sorted(digits) == sorted([*range(10)] * 4)
        assert torch.equal(balanced_labels(10, range(40), 0), torch.tensor(digits))
    part = generate(portraits, n=7, batch=3, label=label)
    assert part.metadata == result.metadata[:7]
    assert torch.allclose(part.items.stack(), result.items.stack()[:7], **CLOSE)


@pytest.mark.parametrize("change", ["digit=3", "style=plain", "age=20"])
def test_each_condition_matters(portraits: Model, change: str):
    given = dict(digit="7", style="bold", age="27")
    requests = [given, given | dict([change.split("=")])]
    a, b = (generate(portraits, n=4, label=[f"{k}={v}" for k, v in request.items()]) for request in requests)
    assert not torch.allclose(a.items.stack(), b.items.stack(), atol=1e-2)
    assert [row["age"] for row in a.metadata] == [27.0] * 4


def test_all_conditions_are_written(portraits: Model, tmp_path: Path):
    generate(portraits, n=2, label=["style=bold", "digit=3", "age=1e6"], out=tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    settings = {"seed": 0, "sampler": "heun", "steps": 4, "guidance": 1.5}
    expected = {"digit": 3, "style": "bold", "age": 1e6, **settings}
    assert rows == [expected | {"file_name": f"{i:06}.png", "item": i} for i in range(2)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["digit=7", "7"], "condition 'digit' is given twice"),
        ("digit=10", "digit '10' is unknown to the model: it knows 0, 1"),
        (["7", "style=italic"], "style 'italic' is unknown to the model: it knows plain, bold"),
        ("colour=red", "'colour=red' is unknown"),
        ("age=old", "condition 'age' takes a number, not 'old'"),
    ],
)
def test_wrong_conditions(portraits: Model, tmp_path: Path, label: str | list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        generate(portraits, label=label, out=tmp_path / "out")
    assert error.value.code == 2 and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_written_items_are_read_back(model: Model, tmp_path: Path):
    result = generate(model, n=12, out=tmp_path / "out", sheet=tmp_path / "sheets" / "s.png", seed=5)
    data, held = read_images(tmp_path / "out")
    assert held is None and (data.shape, data.spec) == ((1, 8, 8), "L")
    assert (data.pixels == to_pixels(result.items.stack(), "L")).all()
    assert [data.label_names[k] for k in data.labels] == [str(row["label"]) for row in result.metadata]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["item"] for row in rows] == list(range(12)) and {row["seed"] for row in rows} == {5}
    assert {(row["sampler"], row["steps"], row["guidance"]) for row in rows} == {("heun", 4, 1.5)}
    assert (tmp_path / "sheets" / "s.png").is_file()
    assert result.items.stack().abs().max() <= 1 and result.summary()["items"] == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "zebra"}, "zebra.*unknown to the model: it knows 0, 1"),
        ({"label": "10"}, "unknown to the model"),
        ({"sampler": "huen"}, "did you mean 'heun'"),
        ({"autoguidance": 2.0}, "--autoguidance 2: this model was trained without a guide"),
        ({"n": 0}, "-n must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
    ],
)
def test_wrong_settings(model: Model, tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        generate(model, out=tmp_path / "out", **settings)
    assert error.value.code == 2 and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_missing_model(tmp_path: Path):
    with pytest.raises(UserError, match="no model in"):
        generate(tmp_path / "nowhere")


def refused(model: Model, out: Path, overwrite: bool = False) -> UserError:
    """The error for an output folder, before anything is computed."""
    with pytest.raises(UserError) as error:
        generate(model, n=10**9, out=out, overwrite=overwrite)
    assert "\n" not in str(error.value)
    return error.value


def test_refused_output_folders(model: Model, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "is not empty" in str(refused(model, tmp_path / "full"))
    assert "is a file" in str(refused(model, tmp_path / "full" / "letter.txt", overwrite=True))
    below = refused(model, tmp_path / "full" / "letter.txt" / "out")
    assert "cannot be written" in str(below) and below.code == 1
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear" and len(list(tmp_path.rglob("*"))) == 2
    with pytest.raises(UserError, match="letter"):  # only samples are ever replaced
        generate(model, n=2, out=tmp_path / "full", overwrite=True)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder nobody can write to")
def test_a_read_only_output_folder(model: Model):
    error = refused(model, Path("/proc/sfumato"))
    assert "cannot be written" in str(error) and error.code == 1


def test_overwrite_replaces_samples(model: Model, tmp_path: Path):
    generate(model, n=4, out=tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        generate(model, n=2, out=tmp_path / "out")
    generate(model, n=2, out=tmp_path / "out", overwrite=True)
    assert len(read_images(tmp_path / "out")[0]) == 2


def test_labels_are_written_as_the_data_had_them(model: Model):
    label_values = model.modality.label_values
    assert label_values(["0", "10", "-1"]) == [0, 10, -1]
    assert label_values(["cat", "007", "0"]) == ["cat", "007", 0]
    assert label_values(BUILTINS["fashion-mnist"].classes) == list(range(10))


def test_a_class_by_name_or_number():
    assert find_class(["cat", "dog"], "dog") == find_class(["cat", "dog"], "1") == 1
    assert find_class(["1", "2"], "1") == 0 and find_class(["1", "2"], "0") is None  # no class is called 0
    assert find_class(["cat"], "1") is None and find_class([], "0") is None


def test_progress_is_reported(model: Model):
    reports: list[tuple] = []
    generate(model, n=10, batch=4, progress=lambda *report: reports.append(report))
    assert reports == [("generate", 4, 10), ("generate", 8, 10), ("generate", 10, 10)]
