"""Labels, numbers and texts of items, and which of them a column of values holds."""

import math

import numpy as np
import pytest
import torch

from sfumato.data.conditions import (
    Known,
    Labels,
    Numbers,
    Texts,
    is_blank,
    look_numeric,
    parse_number,
    primary_label,
)
from sfumato.types import UNKNOWN

LABELS = Labels(np.array([1, UNKNOWN, 0, 1]), ["cat", "dog"])
NUMBERS = Numbers(np.array([0.5, np.nan, -2, 3.1], np.float32))
TEXTS = Texts(["a", None, "", "é"])


@pytest.mark.parametrize("index", [[3, 1], np.array([3, 1]), torch.tensor([3, 1])])
def test_items_are_selected_by_any_kind_of_index(index: list[int]) -> None:
    label, number = LABELS.raw(index), NUMBERS.raw(index)
    assert label.tolist() == [1, UNKNOWN] and label.dtype == torch.int64
    assert number[0] == torch.tensor(3.1) and number[1].isnan() and number.dtype == torch.float32
    assert TEXTS.raw(index) == ["é", None]
    for known in (LABELS, NUMBERS, TEXTS):
        part = known.select(index)
        assert type(part) is type(known) and len(part) == 2 and len(known) == 4
    assert LABELS.select(index).names == ["cat", "dog"]
    assert NUMBERS.select(range(4)).content() == NUMBERS.content()


def test_conditions_are_described() -> None:
    assert [known.describe() for known in (LABELS, NUMBERS, TEXTS)] == ["2 classes", "numbers from -2 to 3.1", "texts"]
    assert Labels(np.zeros(2, np.int64), ["a"]).describe() == "1 class"
    assert Numbers(np.full(2, np.nan, np.float32)).describe() == "numbers, all unknown"


def test_content_tells_data_apart_but_not_an_empty_text_from_an_unknown_one() -> None:
    assert Texts(["a", None]).content() == Texts(["a", ""]).content() != Texts(["a", "b"]).content()
    assert Labels(LABELS.numbers, ["cat", "emu"]).content() != LABELS.content()
    assert Labels(LABELS.numbers, ("cat", "dog")).content() == LABELS.content()


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),
        (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
        ([2.0, 1, True], ["1", "2", "True"], [1, 0, 2]),
        ([None, "", math.nan, "a"], ["a"], [UNKNOWN, UNKNOWN, UNKNOWN, 0]),
        ([None], [], [UNKNOWN]),
    ],
)
def test_labels_of_values(values: list[object], names: list[str], numbers: list[int]) -> None:
    labels = Labels.from_values(values)
    assert labels.names == names and labels.numbers.tolist() == numbers


def test_classes_without_items_are_left_out() -> None:
    labels = Labels(np.array([3, UNKNOWN, 1, 3]), ["a", "b", "c", "d"]).without_empty_classes()
    assert labels.names == ["b", "d"] and labels.numbers.tolist() == [1, UNKNOWN, 0, 1]
    assert LABELS.without_empty_classes().content() == LABELS.content()
    unknown = Labels(np.full(2, UNKNOWN), ["a"]).without_empty_classes()
    assert unknown.names == [] and unknown.numbers.tolist() == [UNKNOWN, UNKNOWN]


@pytest.mark.parametrize("value", [1, -2.5, "3", " 1e-3 ", "-.5", "+7", "007"])
def test_numbers_are_parsed(value: object) -> None:
    assert parse_number(value) == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a", "1_0", "1,5", "inf", math.inf, True, [1], 10**400, "1e39", b"1", "1 2", " "])
def test_other_values_are_no_numbers(value: object) -> None:
    assert parse_number(value) is None


@pytest.mark.parametrize("value", [None, "", math.nan, "nan"])
def test_blank_values_are_unknown_numbers(value: object) -> None:
    number = parse_number(value)
    assert number is not None and math.isnan(number) and is_blank(value) == (value != "nan")


@pytest.mark.parametrize(
    ("values", "numeric"),
    [
        (range(20), False),
        (range(21), True),
        ([*range(20), "", None], False),
        ([str(i % 21) for i in range(50)], True),
        (["3.0", 2, 1.0], False),
        (["3.5", 2, 1.0], True),
        (["3.5", "x"], False),
        ([*range(50), "x"], False),
        ([0.5, None, ""], True),
        ([0.5, "nan"], True),
        ([None, ""], False),
        ([True, False], False),
    ],
)
def test_columns_that_look_numeric(values: list[object], numeric: bool) -> None:
    assert look_numeric(values) == numeric


def test_the_primary_label_is_the_one_named_label_else_the_first() -> None:
    conditions: dict[str, Known] = {"age": NUMBERS, "digit": LABELS, "style": LABELS}
    assert primary_label(conditions) == "digit"
    assert primary_label({**conditions, "label": LABELS}) == "label"
    assert primary_label({**conditions, "label": NUMBERS}) == "digit"
    assert primary_label({"age": NUMBERS, "text": TEXTS}) is None and primary_label({}) is None
