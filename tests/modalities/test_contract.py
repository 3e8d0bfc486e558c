"""The contract of modalities: the same tests for each in the table, and for two registered from outside."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
import sfumato.modalities
from sfumato.config import DataSettings
from sfumato.modalities import MODALITIES, find_modality, recognise
from sfumato.modalities.base import Animatable, Conditional, FeatureLearner, Labelable, Maskable
from sfumato.model import Model
from sfumato.training.build import denoiser_step
from sfumato.training.trainer import Trainer
from sfumato.types import UNKNOWN, Batch, Items, Latent
from tests.modalities.common import (
    OVERRIDES,
    TASKS,
    Run,
    assert_equal,
    conditions,
    equal,
    equal_values,
    finite,
    have_shape,
    refused,
    rolled,
    values,
)
from tests.modalities.strokes import Strokes
from tests.modalities.toy import Waves
from tests.training.common import weights

OUTSIDE = (Waves(), Strokes())  # the last is asked first, for a folder of strokes looks like waves too
QUICK = (  # optimizer steps of classifiers, which need not be good here
    "sfumato.modalities.image.evaluator.EVALUATOR_STEPS",
    "sfumato.modalities.image.labeler.LABELER_STEPS",
)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for these tests, a machine that is not measured, and the modalities from outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SFUMATO_INCEPTION", raising=False)
        patch.setattr("sfumato.training.profile.measure_peak", lambda *_: 1e11)
        for name in QUICK:
            patch.setattr(name, 20)
        for modality in OUTSIDE:
            sfumato.register(modality)
        yield
        for modality in OUTSIDE:
            del MODALITIES[modality.name]


@pytest.fixture(scope="module", params=[*MODALITIES, *(modality.name for modality in OUTSIDE)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, surroundings: None) -> Run:
    return Run(find_modality(request.param), tmp_path_factory.mktemp(request.param))


# reading


def test_a_source_is_recognised_and_read(run: Run):
    assert recognise(run.source) is run.modality
    for data in (run.train, run.held_out):
        x = values(data)
        assert data.shape == run.model.config.shape and len(x) == len(data) and have_shape(x, data.shape)
        assert data.spec == run.spec == json.loads(json.dumps(data.spec))
        assert len(data) >= run.modality.min_items and data.min_held_out >= 1
        assert all(isinstance(line, str) for line in [*data.describe(), *data.notes])
        for attribute in (data.labels, data.captions, data.names, *data.conditions.values()):
            assert attribute is None or len(attribute) == len(data)
    assert data.classes == len(run.model.config.label_names)


def test_a_batch_holds_the_items_of_its_index(run: Run):
    x, index = values(run.train), [5, 0, 5, 2]
    for form in (index, np.array(index), torch.tensor(index)):
        batch = run.train.batch(form)
        assert equal(Items.unpad(batch.data, batch.mask), x.select(index)) and batch.index.tolist() == index
        assert batch.raw.values.keys() == run.train.conditions.keys()
        for name, known in run.train.conditions.items():
            assert_equal(batch.raw.values[name], known.raw(index))
        if run.train.labels is not None:
            assert any(value.tolist() == run.train.labels[index].tolist() for value in batch.raw.values.values())


def test_the_split_is_deterministic_and_covers_the_source(run: Run):
    data, held_out = run.modality.read(run.source, DataSettings(), run.spec)
    again = run.modality.read_split(run.source, DataSettings())
    for part, other in zip((run.train, run.held_out), again, strict=True):
        assert equal(values(part), values(other)) and part.fingerprint == other.fingerprint
    if held_out is None:
        assert len(data) == len(run.train) + len(run.held_out)
        parts = Items.concat([values(run.train), values(run.held_out)])
        assert sorted(str(item.tolist()) for item in parts) == sorted(str(item.tolist()) for item in values(data))


def test_a_subset_is_a_data_set_and_a_fingerprint_tells_content(run: Run, tmp_path: Path):
    index = [7, 1, 3]
    part = run.train.subset(index)
    assert len(part) == 3 and part.shape == run.train.shape and part.spec == run.train.spec
    assert equal(values(part), values(run.train).select(index))
    assert equal(values(part.subset([2, 0])), values(run.train).select([3, 7]))
    names = [run.train, run.held_out, part, run.train.subset([1, 7, 3]), run.train.subset([7, 1])]
    assert len({data.fingerprint for data in names}) == len(names)
    assert run.train.subset(index).fingerprint == part.fingerprint
    assert all(int(data.split_key[:16], 16) >= 0 for data in (run.train, part))


def test_items_of_another_kind_are_refused(run: Run, tmp_path: Path):
    for other in MODALITIES.values():
        if other is not run.modality:
            (tmp_path / other.name).mkdir()
            with refused():
                run.model.reconstruct(other.contract_source(tmp_path / other.name))
    run.modality.check_compatible("a", run.train.shape, run.spec, run.source, run.held_out)


# the codec


def test_a_reconstruction_is_nearer_than_another_item(run: Run):
    x = values(run.held_out)
    ideal, error, other = (
        run.modality.reconstruction_metrics(x, y, run.spec) for y in (x, run.model.autoencode(x), rolled(x))
    )
    assert error.keys() == ideal.keys() and len(error) > 0
    assert all(np.isfinite(value) for value in error.values())
    assert all(abs(error[name] - ideal[name]) < abs(other[name] - ideal[name]) for name in ideal), (error, other)


def test_training_latents_have_mean_0_and_variance_1(run: Run):
    """Of a category's levels it is the variance of all together that is fixed."""
    codec, latent = run.model.codec, run.model.encode(values(run.train))
    assert len(latent) == len(run.train) and latent.z.dtype == torch.float32
    assert have_shape(Items.unpad(latent.z, latent.mask), codec.latent_shape)
    z = latent.z if latent.mask is None else latent.z[latent.mask]  # of tokens, those that items have
    assert not codec.tokens or z.ndim == 2
    var, mean = torch.var_mean(z.double(), (0, *range(2, z.ndim)), correction=0)
    assert float(mean.abs().max()) < 1e-3
    layout = codec.categorical_layout()
    start = len(var) if layout is None else layout.start
    torch.testing.assert_close(var[:start], torch.ones_like(var[:start]), rtol=0, atol=1e-3)
    if layout is not None:
        groups = torch.stack([group.sum() for group in var[start:].split(layout.widths)])
        torch.testing.assert_close(groups, groups[0].expand_as(groups), rtol=1e-3, atol=0)
        assert all(bool((group == group[0]).all()) for group in layout.std.split(layout.widths))


def test_encoding_is_deterministic_and_decoding_gives_items(run: Run):
    x = values(run.held_out)
    latent = run.model.encode(x)
    assert_equal(run.model.encode(x), latent)
    decoded = run.model.decode(latent)
    assert [item.shape for item in decoded] == [item.shape for item in x]
    assert all(y[~item.isnan()].isfinite().all() for item, y in zip(x, decoded, strict=True))


# the denoiser


def test_one_batch_is_overfitted(run: Run):
    torch.manual_seed(0)
    model = Model(run.model.config)
    model.codec.load_state_dict(run.model.codec.state_dict())
    step, batch = denoiser_step(model, run.settings), run.train.batch(range(16))
    batch.raw = batch.raw.only(model.conditioner.names)
    if not model.codec.stochastic:
        latent = model.encode(Items.unpad(batch.data, batch.mask))
        batch = Batch(latent.z, batch.index, batch.raw, latent.mask)
    optimizer, losses = torch.optim.AdamW(step.parameters(), 3e-3), list[float]()
    for i in range(60):
        loss = step(batch, "denoiser", i, torch.Generator().manual_seed(0))["loss"]  # always the same noise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], losses[:: len(losses) - 1]


# samples


def test_what_is_generated_and_written_is_read_back(run: Run, tmp_path: Path):
    out, config = tmp_path / run.modality.example_output, run.model.config
    items = run.model.generate(12, out=out).items
    labels = conditions(run, range(12)).values.get("label")
    expected = run.modality.from_samples(items, labels, config.spec, config.label_names)
    data, held_out = run.modality.read(str(out), DataSettings(), config.spec)
    assert held_out is None and len(data) == len(expected) == 12
    for other in (data, expected):
        run.modality.check_compatible("samples", config.shape, config.spec, out, other)
        assert other.shape == config.shape
    assert equal(values(data), values(expected))
    rounding, error = (
        run.modality.reconstruction_metrics(items, y, config.spec) for y in (values(data), rolled(items))
    )
    ideal = run.modality.reconstruction_metrics(items, items, config.spec)
    assert all(abs(rounding[name] - ideal[name]) < 0.6 * abs(error[name] - ideal[name]) for name in ideal)
    if labels is not None:
        assert data.labels is not None and data.labels.tolist() == labels.tolist()
        assert list(data.label_names) == config.label_names


def test_existing_output_is_kept_unless_it_is_to_be_overwritten(run: Run, tmp_path: Path):
    out = tmp_path / run.modality.example_output
    first = run.model.generate(3, out=out)
    with refused():
        run.model.generate(2, seed=1, out=out)
    assert len(run.modality.read(str(out), DataSettings(), run.spec)[0]) == len(first.items)
    run.model.generate(2, seed=1, out=out, overwrite=True)
    assert len(run.modality.read(str(out), DataSettings(), run.spec)[0]) == 2


def test_samples_are_finite_and_depend_on_seed_and_number_alone(run: Run):
    items, other = (run.model.generate(6, seed=seed).items for seed in (0, 1))
    assert finite(items) and have_shape(items, run.train.shape) and not equal(items, other)
    single = Latent.concat([run.model.sample([i], conditions(run, [i])) for i in range(6)])
    together = run.model.sample(range(6), conditions(run, range(6)))
    torch.testing.assert_close(single.z, together.z, rtol=0, atol=1e-4)
    assert equal_values(*(torch.ones(()) if latent.mask is None else latent.mask for latent in (single, together)))


def test_previews_are_pictures(run: Run, tmp_path: Path):
    x = values(run.held_out)
    for i, picture in enumerate((run.modality.preview(x, run.spec), run.modality.preview(x, run.spec, x, 2))):
        picture.save(tmp_path / f"{i}.png")
        assert min(Image.open(tmp_path / f"{i}.png").size) > 1
    run.model.generate(4, sheet=tmp_path / "sheet.png")
    run.model.reconstruct(run.source, n=2, sheet=tmp_path / "pairs.png")
    assert all(Image.open(path).size for path in tmp_path.glob("*.png"))
    assert len(list(run.folder.rglob("*.png"))) >= 1 + run.model.codec.trainable  # one of each stage


# evaluation


def test_evaluation_has_floors(run: Run, tmp_path: Path):
    out, n = tmp_path / run.modality.example_output, 2 * max(run.modality.min_items, 5)
    report = run.model.evaluate(run.source, n=n)
    assert json.loads(json.dumps(report)) == report
    floors = [name for name in report if name.endswith("_floor")]
    assert floors and all(np.isfinite([report[name], report[name.removesuffix("_floor")]]).all() for name in floors)
    assert isinstance(report["memorised"], bool)
    assert any(name.startswith("codec_") for name in report)
    run.model.generate(n, out=out)
    of_files = sfumato.evaluate(out, run.source)
    assert of_files.keys() >= set(floors)
    real = sfumato.evaluate(run.source, run.source)  # the training items as samples
    assert real.keys() >= set(floors)


# the run folder


def test_a_saved_model_is_loaded_bit_for_bit(run: Run, tmp_path: Path):
    run.model.save(tmp_path)
    expected = run.model.sample(range(4), conditions(run, range(4)))
    for folder in (tmp_path, run.folder):
        loaded = sfumato.load(folder, "cpu")
        assert loaded.modality is run.modality and loaded.config == run.model.config
        assert loaded.parts.keys() == run.model.parts.keys()
        for name, part in loaded.parts.items():
            state = run.model.parts[name].state_dict()
            assert part.state_dict().keys() == state.keys()
            assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert_equal(loaded.sample(range(4), conditions(run, range(4))), expected)
        assert equal(loaded.decode(expected), run.model.decode(expected))


def test_a_resumed_run_equals_one_that_was_not_interrupted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stages, interrupted = (["codec"] if run.model.codec.trainable else []) + ["denoiser"], list[str]()
    advance = Trainer.advance

    def interrupting(self: Trainer, batch: Batch) -> dict[str, Tensor]:
        if self.done == 7 and self.stage not in interrupted:
            interrupted.append(self.stage)
            signal.raise_signal(signal.SIGINT)
        return advance(self, batch)

    monkeypatch.setattr(Trainer, "advance", interrupting)
    for k in range(len(stages)):
        with pytest.raises(KeyboardInterrupt):
            run.fit(tmp_path, resume=k > 0)
    run.fit(tmp_path, resume=True)
    assert interrupted == stages
    resumed, expected = weights(tmp_path), weights(run.folder)
    assert resumed.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(resumed[name], value)] == []


def test_a_model_of_a_modality_that_is_not_there_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch):
    others = {name: modality for name, modality in MODALITIES.items() if name != run.modality.name}
    monkeypatch.setattr(sfumato.modalities, "MODALITIES", others)
    with refused("unknown modality"):
        sfumato.load(run.folder)


# mixins


@pytest.mark.parametrize("mixin", TASKS, ids=lambda mixin: mixin.__name__)
def test_a_mixin_works_or_its_task_is_refused(run: Run, mixin: type, tmp_path: Path):
    if not isinstance(run.modality, mixin):
        with refused():
            TASKS[mixin](run, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    result = TASKS[mixin](run, tmp_path)
    assert len(result.items) == len(result.metadata) > 0 and have_shape(result.items, run.train.shape)
    assert finite(result.items)
    if mixin is Animatable:
        assert Image.open(tmp_path / "path.gif").n_frames == len(result.items)
    if mixin is Labelable:
        counts = Counter(str(row["label"]) for row in result.metadata)
        assert len(counts) == 2 and set(counts.values()) == {run.example.augment["n"]}


def test_masks_tell_what_is_regenerated(run: Run, tmp_path: Path):
    if not isinstance(run.modality, Maskable):
        pytest.skip("no masks")
    path, (data, _) = run.write_mask(tmp_path), run.modality.read(run.source, DataSettings(), run.spec)
    parts = [data.subset(range(9)), data.subset(range(9, 20))]
    masks = run.modality.read_masks(path, run.source, parts, DataSettings())
    assert masks.dtype == torch.bool and len(masks) == 20 and masks.any() and not masks.all()
    out = tmp_path / run.modality.example_output
    items = run.model.inpaint(run.source, mask=path, steps=2, resample=1, out=out).items.stack()
    masks = run.modality.read_masks(path, run.source, [data], DataSettings())
    masks = masks if masks.ndim == items.ndim else masks.unsqueeze(1).expand_as(items)
    written = values(run.modality.read(str(out), DataSettings(), run.spec)[0]).stack()
    originals = values(data).stack()
    assert equal_values(items[~masks], originals[~masks]) and equal_values(written[~masks], originals[~masks])
    assert not items[masks].isnan().any()


def test_conditions_are_strata(run: Run):
    if not isinstance(run.modality, Conditional):
        pytest.skip("no conditions")
    x, example = values(run.train), run.example
    matching = run.modality.strata(example.where, None, run.spec)
    chosen = matching.assign(x)
    assert set(chosen.tolist()) == {0, UNKNOWN} and len(matching.names) == 1
    balanced = run.modality.strata((), example.balance, run.spec)
    assert set(balanced.assign(x).tolist()) <= {UNKNOWN, *range(len(balanced.names))}
    assert balanced.fixed.shape == (len(balanced.names), *run.train.shape)
    assert (matching.assign(run.model.generate(4, where=example.where).items) == 0).all()
    items = run.model.generate(len(balanced.names) * 2, balance=example.balance).items
    assert balanced.assign(items).bincount().tolist() == [2] * len(balanced.names)


def test_a_labeler_predicts_classes_and_finds_duplicates(run: Run):
    if not isinstance(run.modality, Labelable) or not run.train.classes:
        pytest.skip("no labels in the data set itself")
    labeler = run.modality.labeler(run.train, [], run.train.label_names, None, "cpu", None)
    x, classes = values(run.train), {UNKNOWN, *range(run.train.classes)}
    for labels in (labeler.predict(x), labeler.pseudo_label(x)):
        assert labels.shape == (len(x),) and set(labels.tolist()) <= classes
    assert labeler.labels.tolist() == run.train.labels.tolist() and list(labeler.names) == list(run.train.label_names)
    points = labeler.embed(x)
    assert points.shape[0] == len(x) and points.ndim == 2
    assert labeler.duplicates.filter_generated(points[[0, 0]]).tolist() == [False, True]


def test_a_feature_network_is_trained_saved_and_used_in_losses(run: Run, tmp_path: Path):
    codec = run.settings.codec.model_copy(update={"perceptual": "features"})
    learner, shape = run.modality, run.train.shape
    if not isinstance(learner, FeatureLearner):
        with refused("perceptual or adversarial"):
            sfumato.fit(
                run.source,
                out=tmp_path / "run",
                steps=4,
                overrides=[*OVERRIDES, "codec.adversarial_weight=0.5", "codec.bottleneck=kl"],
                device="cpu",
            )
        return
    assert learner.supports_features(shape) and learner.uses_features(codec)
    learner.check_features(codec, shape)
    x, classes = values(run.train)[:6].stack(), run.train.classes
    network = learner.fit_features(run.train, classes, steps=2, seed=0, device="cpu", bf16=False)
    untrained = learner.build_features(shape, classes, 0, torch.device("cpu"))
    restored = learner.restore_features(shape, network.state_dict(), "cpu")
    assert network(x).shape == (6, network.head.out_features) and network.features(x).shape[0] == 6
    assert torch.equal(restored.features(x), network.features(x))
    assert not torch.equal(untrained.features(x), network.features(x))
    loss = learner.perceptual_loss(codec, network)
    assert loss is not None and loss(x, x).tolist() == [0.0] * 6 and bool((loss(x.roll(1, 0), x) > 0).all())
    logits = learner.discriminator(shape)(x)
    assert len(logits) == 6 and logits.requires_grad
