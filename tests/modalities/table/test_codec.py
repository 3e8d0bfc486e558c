"""Rows to features and back; spikes, tails and missing cells; latents of zero mean and unit variance."""

import pytest
import torch
from torch import Tensor

from sfumato.modalities.table.codec import TableCodec
from sfumato.modalities.table.quantile import QuantileTransform, cdf_knots
from sfumato.training.steps import CodecStep
from sfumato.types import Batch, Latent
from tests.training.common import names_reached, stirred

ROWS = 3_000
COLUMNS = [
    {"name": "height", "levels": 0, "missing": False},
    {"name": "kind", "levels": 5, "missing": True},
    {"name": "age", "levels": 0, "missing": False},
    {"name": "gain", "levels": 0, "missing": True, "spikes": [0.0], "other": True},
    {"name": "married", "levels": 2, "missing": False},
]
BOTTLENECKS = ("identity", "kl", "vq", "fsq", "none")


def rows(count: int = ROWS, seed: int = 0) -> Tensor:
    """A normal number, five uneven levels, an integer, a spike with a heavy tail, a rare boolean; missing cells."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.rand(count, generator=g, dtype=torch.float64)
    kind = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01]), count, True, generator=g).double()
    age = 17 + (rand() * 73).floor()
    gain = torch.where(rand() < 0.9, 0.0, 1e4 * torch.randn(count, generator=g).double().exp())
    holes = lambda x: torch.where(rand() < 0.05, torch.nan, x)
    height = 170 + 8 * torch.randn(count, generator=g).double() + 3 * (kind == 0)
    return torch.stack([height, holes(kind), age, holes(gain), (rand() < 0.05).double()], 1)


def make_codec(bottleneck: str) -> TableCodec:
    torch.manual_seed(0)
    codec = TableCodec(COLUMNS, bottleneck=bottleneck, latent_dim=8, width=64, depth=1, codebook_size=32, groups=2)
    codec.prepare(rows())
    return codec


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def test_scores_of_a_sample_have_the_range_of_all_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TableCodec, "prepare_items", 1_000)
    x = rows(1_000)
    wide = [{**column, "low": -500.0, "high": 900.0} if column["name"] == "height" else column for column in COLUMNS]
    for columns, ends in ((COLUMNS, (float(x[:, 0].min()), float(x[:, 0].max()))), (wide, (-500.0, 900.0))):
        codec = TableCodec(columns)
        codec.prepare(x)
        back = codec.features.scores.inverse(torch.tensor([[-9.0] * 3, [9.0] * 3]))[:, 0]
        assert back.tolist() == pytest.approx(ends, rel=1e-3)


@pytest.mark.parametrize("random", [False, True])
def test_rows_come_back_from_their_features(random: bool):
    x, features = rows(), make_codec("identity").features
    back = features.inverse(features(x, torch.Generator().manual_seed(1) if random else None))
    assert same(x, back)[:, [1, 2, 4]].all()
    spike = x[:, 3] == 0
    assert (back[spike, 3] == 0).all() and (back[:, 3].isnan() == x[:, 3].isnan()).all()
    for column in (0, 3):  # float32 scores, and the tails are cut at half a row
        inner = (x[:, column] > x[:, column].nanquantile(0.001)) & (x[:, column] < x[:, column].nanquantile(0.999))
        torch.testing.assert_close(back[inner, column], x[inner, column], rtol=1e-4, atol=0)


def test_random_scores_are_standard_normal():
    f = QuantileTransform(3)
    x = rows(20_000)[:, [0, 2, 3]]
    f.fit(x)
    z = f(x, torch.Generator().manual_seed(0)).double()
    at = torch.linspace(-2, 2, 9, dtype=torch.float64)
    present = ~x.isnan()
    share = ((z[..., None] < at) & present[..., None]).double().sum(0) / present.sum(0)[:, None]
    assert (share - torch.special.ndtr(at)).abs().max() < 4 * 0.5 / 19_000**0.5  # 4 standard errors
    assert (z[~present] == 0).all()


def test_random_latents_of_a_mostly_missing_column_are_not_noise():
    """The score is 0 if the level determines the cell, also in training; so only the other cells have variance."""
    codec, x = make_codec("identity"), rows()
    codec.learn_statistics(codec.encode_raw(x))
    z = codec.sample_latent(x, torch.Generator().manual_seed(0)).z[:, 2]  # the gain
    scored = (x[:, 3] != 0) & ~x[:, 3].isnan()
    assert 0.05 < scored.double().mean() < 0.15
    assert float(z[~scored].std()) < 1e-6
    assert float(z.std()) == pytest.approx(1, abs=0.1)


def test_normal_scores_reproduce_the_column():
    f, x = QuantileTransform(3), rows(20_000)[:, [0, 2, 3]]
    f.fit(x)
    samples = f.inverse(torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    for column in range(3):
        real = x[:, column][~x[:, column].isnan()].sort().values
        sampled = samples[:, column].sort().values
        at = torch.cat([real, sampled])
        cdf, cdf_hat = (torch.searchsorted(values, at, right=True) / len(values) for values in (real, sampled))
        assert (cdf - cdf_hat).abs().max() < 0.02  # the Kolmogorov-Smirnov distance of samples of this size
        assert sampled[0] >= real[0] and sampled[-1] <= real[-1]


@pytest.mark.parametrize("values", [[], [3.0], [3.0] * 50, [1.0, 2.0], list(range(5_000)), [0.0] * 999 + [1.0]])
def test_knots_are_monotone(values: list[float]):
    x, u = cdf_knots(torch.tensor(values, dtype=torch.float64), 256)
    assert x.shape == u.shape == (256,) and (x.diff() >= 0).all() and (u.diff() >= 0).all()
    assert u[0] == 0 and u[-1] == 1


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_latents_have_zero_mean_and_unit_variance(bottleneck: str):
    codec, x = make_codec(bottleneck), rows()
    stirred(codec.encoder)
    with torch.no_grad():
        codec.learn_statistics(codec.encode_raw(x))
        z = codec.encode(x).z
    assert z.shape == (ROWS, codec.latent_size) and z.mean(0).abs().max() < 1e-3
    scores, groups = codec.features.split(z) if bottleneck == "identity" else (z[:, :0], [z])
    assert (scores[:, :2].var(0) - 1).abs().max() < 0.02 if bottleneck == "identity" else True
    for group in groups:  # the levels of a group have a total variance of 4
        variance = group.var(0).sum() if bottleneck == "identity" else group.var(0).mean()
        torch.testing.assert_close(variance, torch.tensor(4.0 if bottleneck == "identity" else 1.0), rtol=0.02, atol=0)


def test_identity_has_no_weights_and_returns_the_rows():
    codec, x = make_codec("identity"), rows(seed=1)
    assert not codec.trainable and codec.stochastic
    codec.learn_statistics(codec.encode_raw(x))
    back = codec.decode(codec.sample_latent(x, torch.Generator().manual_seed(0)))
    assert same(x, back)[:, [1, 2, 4]].all() and back.dtype == torch.float64


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq", "none"])
def test_a_learned_codec_overfits_few_rows(bottleneck: str):
    x = rows(64)
    codec = make_codec(bottleneck).train()
    step = CodecStep(codec, None, None, bottleneck_weight=1e-4 if bottleneck == "kl" else 1.0)
    optimizer = torch.optim.AdamW(codec.parameters(), 3e-3)
    for i in range(200):
        loss = step(Batch(x, torch.arange(64)), "codec", i, torch.Generator().manual_seed(i))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codec.eval()
    codec.learn_statistics(codec.encode_raw(x))
    right = same(x, codec.decode(codec.encode(x)))[:, [1, 4]].float().mean()
    assert right > (0.9 if bottleneck in ("kl", "none") else 0.75), right


def test_the_loss_has_gradients_in_encoder_and_decoder():
    codec = make_codec("kl")
    stirred(codec.encoder), stirred(codec.decoder)
    loss = CodecStep(codec, None, None)(Batch(rows(32), torch.arange(32)), "codec", 0, torch.Generator())["loss"]
    assert names_reached(loss, {"encoder": codec.encoder, "decoder": codec.decoder}) == {"encoder", "decoder"}


def test_discrete_numbers_are_levels_and_decode_to_the_nearest():
    column = {"name": "size", "levels": 0, "missing": True, "spikes": [1.0, 2.0, 4.0], "other": False}
    codec = TableCodec([column, COLUMNS[4]])
    x = torch.tensor([[1.0, 0], [2, 1], [4, 0], [torch.nan, 1]], dtype=torch.float64)
    codec.prepare(x)
    codec.learn_statistics(codec.encode_raw(x))
    assert codec.latent_shape == (4 + 2,) and codec.features.numbers == []
    assert same(x, codec.decode(codec.encode(x))).all()
    others = torch.tensor([[-3.0, 0], [2.9, 0], [3.1, 0], [99, 0]], dtype=torch.float64)
    assert codec.decode(codec.encode(others))[:, 0].tolist() == [1, 2, 4, 4]


def test_spikes_ignore_the_score_and_other_values_depend_on_it():
    codec = make_codec("identity")
    codec.learn_statistics(codec.encode_raw(rows()))
    x = torch.tensor([[170.0, 0, 30, 0, 1], [170, 0, 30, 5e3, 1], [170, 0, 30, torch.nan, 1]], dtype=torch.float64)
    z = codec.encode(x).z
    score = codec.features.numbers.index(3)
    moved = z.clone()
    moved[:, score] += 1
    back, other = codec.decode(Latent(z))[:, 3], codec.decode(Latent(moved))[:, 3]
    assert back[0] == other[0] == 0 and back[2].isnan() and other[2].isnan()
    assert back[1] == pytest.approx(5e3, rel=1e-3) and other[1] > back[1]


def test_the_categorical_layout_has_the_positions_of_levels():
    codec, x = make_codec("identity"), rows(200)
    codec.learn_statistics(codec.encode_raw(rows()))
    layout, z = codec.categorical_layout(), codec.sample_latent(x, torch.Generator().manual_seed(0)).z
    assert layout is not None and layout.start == 3 and layout.widths == (6, 3, 2)
    levels = z[:, layout.start :] * layout.std + layout.mean
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert all((part.round().sum(1) == 1).all() for part in levels.split(layout.widths, 1))
    assert make_codec("kl").categorical_layout() is None and TableCodec(COLUMNS[:1]).categorical_layout() is None


def test_a_table_of_categories_only():
    codec = TableCodec(COLUMNS[1:2] + COLUMNS[4:])
    x = rows()[:, [1, 4]]
    codec.prepare(x)
    codec.learn_statistics(codec.encode_raw(x))
    assert same(x, codec.decode(codec.sample_latent(x, torch.Generator().manual_seed(0)))).all()


@pytest.mark.parametrize("bottleneck", ["kl", "identity"])
def test_numbers_keep_their_digits_under_autocast(bottleneck: str):
    """In bfloat16 a decoder would return a few hundred distinct numbers."""
    codec = make_codec(bottleneck).eval()
    codec.learn_statistics(codec.encode_raw(rows()))
    latent = Latent(torch.randn(500, *codec.latent_shape, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        plain = codec.decode(latent)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(codec.decode(latent).nan_to_num(), plain.nan_to_num())
