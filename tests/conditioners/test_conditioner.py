"""The conditioner of a model: nulls, dropout, order, names, and saved weights."""

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sfumato.conditioners import (
    CONDITIONS,
    Conditioner,
    LabelCondition,
    NumberCondition,
    TextCondition,
    make_conditioner,
)
from sfumato.conditioners.conditioner import module_key
from sfumato.errors import UserError
from sfumato.types import UNKNOWN, Cond, Raw

LABEL = {"kind": "label", "names": ["cat", "dog", "owl"], "dim": 8}
NUMBER = {"kind": "number", "mean": 10.0, "std": 2.0, "dim": 6}
TEXT = {"kind": "text", "token_dim": 10, "dim": 4, "width": 16, "layers": 1, "heads": 2, "max_bytes": 12}
ALL = {"label": LABEL, "price": NUMBER, "caption": TEXT}
RAW = Raw(
    {
        "label": torch.tensor([0, UNKNOWN, 2, 1]),
        "price": torch.tensor([9.0, 12.0, float("nan"), 1e30]),
        "caption": ["a cat", "", "über", None],
    }
)


def make(conditions: dict[str, dict[str, Any]], seed: int = 0) -> Conditioner:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_conditioner(conditions)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
    assert cond.vector is not None and cond.tokens is not None and cond.mask is not None
    return cond.vector, cond.tokens, cond.mask


def vector(cond: Cond) -> Tensor:
    assert cond.vector is not None
    return cond.vector


def test_vectors_are_concatenated_in_the_order_of_the_mapping() -> None:
    conditioner = make(ALL)
    v, tokens, mask = parts(conditioner(RAW, 4))
    assert v.shape == (4, 18) and conditioner.dim == 18 and conditioner.names == ("label", "price", "caption")
    assert tokens.shape == (4, 7, 10) and mask.shape == (4, 7) and conditioner.token_dim == 10
    assert torch.equal(v[0, :8], vector(conditioner["label"].embed(torch.tensor([0])))[0])
    assert torch.allclose(v[0, 8:14], vector(conditioner["price"].embed(torch.tensor([9.0])))[0], atol=1e-6)
    assert torch.allclose(v[0, 14:], vector(conditioner["caption"].embed(["a cat"]))[0], atol=1e-6)
    swapped = make({"price": NUMBER, "label": LABEL})
    swapped["label"].load_state_dict(conditioner["label"].state_dict())
    label_last = vector(swapped(Raw({"label": torch.tensor([2])}), 1))
    assert torch.equal(label_last[0, 6:], vector(conditioner["label"].embed(torch.tensor([2])))[0])


def test_the_order_of_the_raw_conditions_does_not_matter() -> None:
    conditioner = make(ALL)
    turned = Raw(dict(reversed(list(RAW.values.items()))))
    for a, b in zip(parts(conditioner(RAW, 4)), parts(conditioner(turned, 4)), strict=True):
        assert torch.equal(a, b)


def test_unknown_rows_and_absent_names_are_null() -> None:
    conditioner = make(ALL)
    v, tokens, mask = parts(conditioner(RAW, 4))
    null_v, null_tokens, null_mask = parts(conditioner(Raw(), 4))
    assert null_tokens.shape == (4, 1, 10) and null_mask.all()
    assert torch.equal(v[1, :8], null_v[1, :8]) and not torch.equal(v[0, :8], null_v[0, :8])
    assert torch.equal(v[2, 8:14], null_v[2, 8:14]) and not torch.equal(v[3, 8:14], null_v[3, 8:14])
    assert torch.equal(v[3, 14:], null_v[3, 14:]) and not torch.equal(v[1, 14:], null_v[1, 14:])
    assert torch.equal(tokens[3, :1], null_tokens[3]) and not tokens[3, 1:].any()
    assert mask.sum(1).tolist() == [7, 2, 7, 1] and mask[3, 0]


def test_gradients_are_finite_and_reach_all_weights() -> None:
    conditioner = make(ALL)
    v, tokens, _ = parts(conditioner(RAW, 4))
    (v.sin().sum() + tokens.sin().sum()).backward()
    for name, p in conditioner.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_values_of_null_rows_have_no_gradient() -> None:
    conditioner = make({"label": LABEL, "price": NUMBER})
    raw = Raw({"label": torch.tensor([UNKNOWN] * 2), "price": torch.tensor([float("nan"), float("inf")])})
    vector(conditioner(raw, 2)).sum().backward()
    label, price = conditioner.labels["label"], conditioner.of_kind(NumberCondition)["price"]
    assert label.table.weight.grad is not None and not label.table.weight.grad[:3].any()
    assert torch.equal(label.table.weight.grad[3], torch.full((8,), 2.0))
    assert price.out.weight.grad is not None and not price.out.weight.grad.any()


def test_one_label_draws_and_learns_like_an_embedding_with_dropped_labels() -> None:
    """Bit for bit, forward and backward, what one lookup of labels replaced by the null label gives."""
    conditioner = make({"label": {**LABEL, "dropout": 0.3}})
    label = torch.randint(-1, 3, (257,), generator=gen(1))
    weight = torch.randn(257, 8, generator=gen(2))
    generator, expected_generator = gen(3), gen(3)
    out = vector(conditioner(Raw({"label": label}), 257, generator))
    table = nn.Embedding.from_pretrained(conditioner.labels["label"].table.weight.detach().clone(), freeze=False)
    dropped = torch.rand(257, generator=expected_generator) < 0.3
    expected = table(torch.where(dropped | (label < 0), 3, label))
    assert torch.equal(out, expected)
    assert torch.equal(generator.get_state(), expected_generator.get_state())
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    gradient, expected_gradient = conditioner.labels["label"].table.weight.grad, table.weight.grad
    assert gradient is not None and expected_gradient is not None and torch.equal(gradient, expected_gradient)


def test_several_conditions_draw_jointly_first_and_then_in_order() -> None:
    conditioner = make({"a": {**NUMBER, "dropout": 0.0}, "b": {**LABEL, "dropout": 0.4}})
    generator = gen(5)
    together = torch.rand(50, generator=generator) < 0.4
    a = together | (torch.rand(50, generator=generator) < 0.0)
    b = together | (torch.rand(50, generator=generator) < 0.4)
    drawn = conditioner.draw_dropout(50, gen(5))
    assert torch.equal(drawn["a"], a) and torch.equal(drawn["b"], b) and (a != b).any()
    v = vector(conditioner(Raw({"a": torch.full((50,), 9.0), "b": torch.zeros(50).long()}), 50, gen(5)))
    null = vector(conditioner(Raw(), 50))
    assert torch.equal((v == null)[:, :6].all(1), a) and torch.equal((v == null)[:, 6:].all(1), b)


def test_shares_of_dropped_items() -> None:
    n = 20_000
    drawn = make({"a": {**NUMBER, "dropout": 0.1}, "b": {**LABEL, "dropout": 0.2}}).draw_dropout(n, gen())
    shares = {name: rows.float().mean().item() for name, rows in drawn.items()}
    both = (drawn["a"] & drawn["b"]).float().mean().item()
    assert shares == pytest.approx({"a": 1 - 0.8 * 0.9, "b": 1 - 0.8 * 0.8}, abs=0.01)
    assert both == pytest.approx(0.2 + 0.8 * 0.1 * 0.2, abs=0.01)
    alone = make({"a": {**NUMBER, "dropout": 0.1}}).draw_dropout(n, gen())["a"]
    assert alone.float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_and_of_all(dropout: float) -> None:
    conditioner = make({name: {**settings, "dropout": dropout} for name, settings in ALL.items()})
    v, null = vector(conditioner(RAW, 4, gen())), vector(conditioner(Raw(), 4))
    assert torch.equal(v, null if dropout else vector(conditioner(RAW, 4)))


def test_without_a_generator_nothing_is_dropped_in_training_mode_either() -> None:
    conditioner = make({"label": {**LABEL, "dropout": 1.0}}).train()
    label = torch.tensor([0, 1, 2])
    assert torch.equal(vector(conditioner(Raw({"label": label}), 3)), conditioner.labels["label"].table(label))


def test_the_empty_conditioner_is_unconditional() -> None:
    conditioner = make_conditioner({})
    generator = gen()
    assert conditioner(Raw(), 3, generator) == Cond() == conditioner(Raw(), 3)
    assert torch.equal(generator.get_state(), gen().get_state())
    assert (conditioner.dim, conditioner.token_dim, conditioner.classes, conditioner.names) == (0, 0, 0, ())
    assert conditioner.primary_label is None and not conditioner.state_dict()


def test_weights_can_be_saved_and_loaded() -> None:
    first, second = make(ALL), make(ALL, seed=1)
    assert not torch.equal(vector(first(RAW, 4)), vector(second(RAW, 4)))
    second.load_state_dict(load(save(first.state_dict())))
    for a, b in zip(parts(first(RAW, 4)), parts(second(RAW, 4)), strict=True):
        assert torch.equal(a, b)


NAMES = ["label", "price.usd", "price%2Eusd", "", "type", "%type", "items", "training", "a b/ü"]


def test_any_name_has_a_key_of_its_own() -> None:
    assert module_key("label") == "label"
    conditioner = make({name: {**LABEL, "dim": i + 1} for i, name in enumerate(NAMES)})
    assert list(conditioner.names) == NAMES == list(conditioner.labels)
    assert [conditioner[name].dim for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert len(set(map(module_key, NAMES))) == len(NAMES)
    assert {name for name, _ in conditioner.named_parameters()} == {
        f"conditions.{module_key(name)}.table.weight" for name in NAMES
    }
    assert vector(conditioner(Raw({"price.usd": torch.zeros(2).long()}), 2)).shape == (2, conditioner.dim)


def test_conditions_by_kind() -> None:
    conditioner = make(ALL)
    assert set(CONDITIONS) == {"label", "number", "text"}
    assert isinstance(conditioner.labels["label"], LabelCondition) and list(conditioner.labels) == ["label"]
    assert isinstance(conditioner.of_kind(NumberCondition)["price"], NumberCondition) and list(
        conditioner.of_kind(NumberCondition)
    ) == ["price"]
    assert isinstance(conditioner.of_kind(TextCondition)["caption"], TextCondition) and list(
        conditioner.of_kind(TextCondition)
    ) == ["caption"]
    assert conditioner.primary_label == "label" and conditioner.classes == 3


@pytest.mark.parametrize(("names", "primary"), [(("a", "label"), "label"), (("b", "a"), "b"), ((), None)])
def test_the_primary_label(names: tuple[str, ...], primary: str | None) -> None:
    conditioner = make({"price": NUMBER, **{name: {**LABEL, "names": [name]} for name in names}})
    assert conditioner.primary_label == primary
    assert conditioner.classes == (0 if primary is None else 1)


def test_a_label_draws_nothing_but_its_table_at_the_start() -> None:
    torch.manual_seed(7)
    table, following = nn.Embedding(4, 8), torch.rand(1)
    torch.manual_seed(7)
    conditioner = make_conditioner({"label": LABEL})
    assert torch.equal(conditioner.labels["label"].table.weight, table.weight)
    assert torch.equal(torch.rand(1), following)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**LABEL, "kind": "lable"}, "unknown condition 'lable': did you mean 'label'"),
        ({**LABEL, "width": 3}, "unknown setting 'width' of condition 'label'"),
    ],
)
def test_unknown_kinds_and_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_conditioner({"a": settings})


def test_tokens_have_one_length() -> None:
    with pytest.raises(UserError, match=r"'a': 10, 'b': 20"):
        make_conditioner({"a": TEXT, "b": {**TEXT, "token_dim": 20}})
    conditioner = make({"a": TEXT, "label": LABEL, "b": TEXT})
    _, tokens, mask = parts(conditioner(Raw({"a": ["abc", None], "b": ["", "ab"]}), 2))
    assert tokens.shape == (2, 5 + 4, 10)
    assert mask.int().tolist() == [[1] * 5 + [1, 1, 0, 0], [1, 0, 0, 0, 0] + [1] * 4]


def test_raw_conditions_that_do_not_fit() -> None:
    conditioner = make(ALL)
    with pytest.raises(ValueError, match="unknown condition 'labels': did you mean 'label'"):
        conditioner(Raw({"labels": torch.zeros(2).long()}), 2)
    with pytest.raises(ValueError, match="condition 'label' has 1 values for 2 items"):
        conditioner(Raw({"label": torch.zeros(1).long()}), 2)


def test_the_condition_is_on_the_device_of_the_weights() -> None:
    conditioner = make(ALL).to("meta")
    for raw in (RAW, Raw()):
        assert all(part.device.type == "meta" for part in parts(conditioner(raw, 4, gen())))
