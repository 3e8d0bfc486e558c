"""The items of each training step."""

import pytest
import torch

from sfumato.config import StageSettings
from sfumato.training.batches import DataBatches, EpochSampler, LatentBatches, StoredLatents
from sfumato.types import Raw


def test_each_epoch_is_a_permutation():
    order = EpochSampler(10, 4, seed=0, stage="codec")
    seen = torch.cat([order[step] for step in range(5)])  # two epochs
    for epoch in seen.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_batches_larger_than_the_data():
    order = EpochSampler(3, 8, seed=0, stage="codec")
    seen = torch.cat([order[step] for step in range(3)])
    assert len(seen) == 24
    assert all(sorted(epoch.tolist()) == [0, 1, 2] for epoch in seen.split(3))


def test_order_depends_on_its_address_alone():
    order = EpochSampler(50, 7, seed=3, stage="codec")
    forward = [order[step] for step in range(20)]
    fresh = [EpochSampler(50, 7, seed=3, stage="codec")[step] for step in reversed(range(20))][::-1]
    jumping = EpochSampler(50, 7, seed=3, stage="codec")
    assert all(torch.equal(a, b) for a, b in zip(forward, fresh, strict=True))
    assert all(torch.equal(forward[step], jumping[step]) for step in (13, 2, 19, 2, 0))


def test_seeds_and_stages_are_independent():
    orders = [EpochSampler(1000, 1000, seed, stage)[0] for seed in (0, 1) for stage in ("codec", "denoiser")]
    pairs = [(a, b) for i, a in enumerate(orders) for b in orders[:i]]
    assert all(int((a == b).sum()) < 10 for a, b in pairs)  # one in a thousand is expected to agree


def test_only_the_current_epochs_are_kept():
    order = EpochSampler(10, 4, seed=0, stage="codec")
    for step in range(100):
        _ = order[step]
    assert len(order.epochs) <= 2


def test_the_cost_of_a_step_does_not_depend_on_the_number_of_items(monkeypatch: pytest.MonkeyPatch):
    joined: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: joined.append(sum(map(len, parts))) or cat(parts))
    order = EpochSampler(100, 8, seed=0, stage="codec")
    assert all(len(order[step]) == 8 for step in range(30))
    assert joined == [8] * 30


def test_data_index_and_conditions_of_a_batch_match():
    settings = StageSettings(batch=4)
    latents, raw = (
        StoredLatents(torch.arange(12.0)[:, None]),
        Raw({"label": torch.arange(12), "text": list("abcdefghijkl")}),
    )
    batch = LatentBatches(latents, raw, settings, 0, "cpu").batch(5)
    assert torch.equal(batch.data[:, 0].long(), batch.index) and torch.equal(batch.raw.values["label"], batch.index)
    assert batch.raw.values["text"] == ["abcdefghijkl"[i] for i in batch.index]
    assert not LatentBatches(latents, Raw(), settings, 0, "cpu").batch(0).raw


@pytest.mark.parametrize("segmented", [False, True])
def test_tokens_are_stored_without_padding_and_padded_to_the_longest_of_a_batch(segmented: bool):
    lengths = torch.tensor([3, 1, 5, 2, 4])
    mask = torch.arange(6) < lengths[:, None]
    z = torch.randn(5, 6, 2)
    stored = StoredLatents(z[mask], mask, segmented)
    assert len(stored) == 5 and stored.z.shape == (15, 2)
    for index in (torch.tensor([4, 1, 1]), torch.tensor([2]), torch.arange(5)):
        latent = stored.select(index)
        longest = 6 if segmented else int(lengths[index].max())
        assert latent.mask is not None and torch.equal(latent.mask, mask[index, :longest])
        assert torch.equal(latent.z, torch.where(latent.mask[..., None], z[index, :longest], 0))


def test_data_batches_follow_the_epoch_sampler(source):
    from sfumato.modalities.image.read import read_source

    train, _ = read_source(str(source))
    batches = DataBatches(train, StageSettings(batch=8), 0, "codec", "cpu")
    batch = batches.batch(3)
    assert torch.equal(batch.index, EpochSampler(len(train), 8, 0, "codec")[3])
    assert torch.equal(batch.data, train.batch(batch.index).data)
