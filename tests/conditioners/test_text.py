"""Texts: bytes as tokens, masks, independence of padding, cuts, nulls."""

import pytest
import torch
from torch import Tensor

from sfumato.conditioners import TextCondition
from sfumato.conditioners.text import BEGIN_TEXT, END_TEXT, text_tokens
from sfumato.errors import UserError
from sfumato.types import Cond


def make(**settings: int) -> TextCondition:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"token_dim": 10, "dim": 6, "width": 16, "heads": 2, "max_bytes": 12}
        return TextCondition(**(small | settings)).eval()


def parts(cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
    assert cond.vector is not None and cond.tokens is not None and cond.mask is not None
    return cond.vector, cond.tokens, cond.mask


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", b""),
        ("abc", b"abc"),
        ("abcdefgh", b"abcdef"),
        ("abcdeü", b"abcde"),
        ("ab€€", b"ab\xe2\x82\xac"),
        ("\ud800", b"?"),
    ],
)
def test_texts_are_cut_between_characters(text: str, kept: bytes) -> None:
    assert text_tokens(text, 6).tolist() == [BEGIN_TEXT, *kept, END_TEXT]


def test_shapes_and_masks() -> None:
    v, tokens, mask = parts(make().embed(["a", "", "abc"]))
    assert v.shape == (3, 6) and tokens.shape == (3, 5, 10)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert not tokens[~mask].any() and tokens[mask].any(1).all()


def test_a_text_does_not_depend_on_its_batch() -> None:
    condition = make()
    alone = parts(condition.embed(["owl"]))
    v, tokens, mask = parts(condition.embed(["a longer text", "owl", ""]))
    assert torch.allclose(v[1], alone[0][0], atol=1e-6) and torch.allclose(tokens[1, :5], alone[1][0], atol=1e-6)
    assert mask[1].sum() == 5


def test_texts_differ_by_their_bytes_and_by_their_order() -> None:
    v, tokens, _ = parts(make().embed(["ab", "ba", "ac", "aa"]))
    for i in range(4):
        for j in range(i):
            assert (tokens[i] - tokens[j]).abs().max() > 1e-3 and (v[i] - v[j]).abs().max() > 1e-4, (i, j)


def test_the_longest_text_uses_the_last_position() -> None:
    condition = make()
    _, tokens, _ = parts(condition.embed(["x" * 50]))
    assert tokens.shape[1] == 14 == len(condition.positions)
    tokens.sum().backward()
    assert condition.positions.grad is not None and condition.positions.grad[-1].any()


def test_an_empty_text_is_known_and_none_is_not() -> None:
    condition = make()
    assert condition.known(["", None, "a"]).tolist() == [True, False, True]
    v, tokens, mask = parts(condition(["", None, "a"], torch.tensor([False, False, True])))
    null_v, null_tokens, null_mask = parts(condition.null(1))
    assert null_tokens.shape == (1, 1, 10) and null_mask.all()
    assert mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    for row in (1, 2):
        assert torch.allclose(tokens[row, :1], null_tokens[0], atol=1e-6) and torch.allclose(
            v[row], null_v[0], atol=1e-6
        )
        assert not tokens[row, 1:].any()
    assert not torch.allclose(tokens[0, :1], null_tokens[0], atol=1e-2)


def test_gradients_with_unknown_texts_are_finite() -> None:
    condition = make()
    v, tokens, _ = parts(condition([None, "a", "abc", None], torch.tensor([False, True, False, True])))
    (v.sin().sum() + tokens.sin().sum()).backward()
    for name, p in condition.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_tokens_alone_and_a_vector_alone() -> None:
    tokens = make(dim=0)(["a", None], torch.zeros(2, dtype=torch.bool))
    assert tokens.vector is None and tokens.tokens.shape == (2, 3, 10) and tokens.mask is not None
    vector = make(token_dim=0)(["a", None], torch.zeros(2, dtype=torch.bool))
    assert vector.vector.shape == (2, 6) and vector.tokens is None and vector.mask is None
    assert TextCondition().token_dim == 128 and TextCondition().dim == 0 and len(TextCondition().blocks) == 2


@pytest.mark.parametrize(("settings", "message"), [({"token_dim": 0, "dim": 0}, "token_dim"), ({"heads": 3}, "heads")])
def test_settings_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)
