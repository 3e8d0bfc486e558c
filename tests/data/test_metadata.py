"""Which conditions the user asks for, and the values that file names and metadata give them."""

import numpy as np
import pytest

from sfumato.data.conditions import Labels, Numbers, Texts
from sfumato.data.metadata import ConditionOptions, group_names, values_from_names
from sfumato.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"\d", ["label"]),
        (r"(\d)_(\w)", ["label"]),
        (r"(?P<digit>\d)", ["digit"]),
        (r"(?P<digit>\d)_(?P<speaker>\w+)", ["digit", "speaker"]),
        (r"(?P<digit>\d)_(\w+)", ["digit"]),
        (r"(\d)_(?P<speaker>\w+)", ["label"]),
        (r"(?P<label>\d)", ["label"]),
        (r"(?:\d)_(?P<speaker>\w+)", ["speaker"]),
    ],
)
def test_groups_of_a_pattern_are_conditions(pattern: str, names: list[str]) -> None:
    assert group_names(pattern) == names


def test_values_of_file_names() -> None:
    files, notes = ["a/3_ann.wav", "a/4_bob.wav", "b/3_.wav"], list[str]()
    pattern = r"(?P<digit>\d)_(?P<speaker>[a-z]*)"
    assert values_from_names(files, pattern, notes) == {"digit": ["3", "4", "3"], "speaker": ["ann", "bob", ""]}
    assert notes == ["1 of 3 images have no speaker: b/3_.wav"]
    assert values_from_names(files, r"(\d)_([a-z]*)", notes) == {"label": ["3", "4", "3"]}
    assert values_from_names(files, r"\d_", notes) == {"label": ["3_", "4_", "3_"]}
    assert values_from_names(files, r"x?(?P<label>\d)", notes) == {"label": ["3", "4", "3"]}
    optional = values_from_names(["1_a", "2"], r"(?P<digit>\d)(_(?P<speaker>\w))?", notes)
    assert optional == {"digit": ["1", "2"], "speaker": ["a", None]}
    for wrong in (r"_([a-z]*)\.", r"_(?P<speaker>[a-z]*)\.", r"(?P<a>ann)|(?P<b>bob)"):
        with pytest.raises(UserError, match=r"finds nothing in 1 file names: b/3_\.wav"):
            values_from_names(files, wrong, notes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_column": ["a", "b", "a"]}, "condition 'a' is named twice"),
        ({"label_from": r"(?P<a>\d)", "label_column": ["a"]}, "condition 'a' is named twice"),
        ({"label_from": r"\d", "label_column": ["label"]}, "condition 'label' is named twice"),
        ({"label_column": ["a=b"]}, "'a=b'.*cannot have '='"),
        ({"label_column": ["text"]}, "'text' is the name of the captions"),
        ({"label_column": ["digit", "age"], "numeric": ["agee"]}, "no condition 'agee'; did you mean 'age'"),
        ({"label_from": r"(?P<digit>\d)", "categorical": ["digits"]}, "no condition 'digits'; did you mean 'digit'"),
        ({"label_column": ["a"], "numeric": ["a"], "categorical": ["a"]}, "'a' cannot be both"),
        ({"label_from": "("}, "not a regular expression"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        ConditionOptions(**options)  # type: ignore[arg-type]
    assert error.value.code == 2 and "\n" not in str(error.value)


def test_columns_of_tables_are_no_concern_of_images() -> None:
    assert ConditionOptions(numeric=["age"]).names == ()


@pytest.mark.parametrize(
    ("name", "values", "numeric", "categorical", "kind"),
    [
        ("age", ["1", "2"], [], [], Labels),
        ("age", ["1", "2.5"], [], [], Numbers),
        ("age", range(21), [], [], Numbers),
        ("age", range(21), [], ["age"], Labels),
        ("age", ["1", "2.5"], [], ["age"], Labels),
        ("age", ["1", "2"], ["age"], [], Numbers),
        ("label", ["1", "2.5"], [], [], Labels),
        ("label", range(50), [], [], Labels),
        ("label", ["1", "2.5"], ["label"], [], Numbers),
        ("digit", ["1.5", "2.5"], [], [], Labels),  # a group of a pattern
        ("digit", ["1.5", "2.5"], ["digit"], [], Numbers),
    ],
)
def test_kinds_of_conditions(
    name: str, values: list[object], numeric: list[str], categorical: list[str], kind: type
) -> None:
    options = ConditionOptions(r"(?P<digit>\d)", ["age", "label"], numeric, categorical)
    assert type(options.condition(name, values, [], "here")) is kind


def test_blank_values_are_unknown_and_texts_among_numbers_refused() -> None:
    options = ConditionOptions(label_column=["age"], numeric=["age"])
    known = options.condition("age", ["1", "", None], ["a", "b", "c"], "here")
    assert isinstance(known, Numbers) and np.array_equal(known.values, [1, np.nan, np.nan], equal_nan=True)
    with pytest.raises(UserError, match=r"here: age of b\.png is 'old', not a number") as error:
        options.condition("age", ["1", "old"], ["a.png", "b.png"], "here")
    assert error.value.code == 1
    with pytest.raises(UserError, match="here: age has no values"):
        options.condition("age", ["", None], ["a", "b"], "here")
    assert ConditionOptions().condition("label", [None], ["a"], "here").describe() == "0 classes"


def test_a_held_out_part_has_the_kinds_of_the_training_part() -> None:
    numbers, labels = Numbers(np.zeros(1, np.float32)), Labels(np.zeros(1, np.int64), ["a"])
    options = ConditionOptions(label_column=["age", "year"])
    like = options.like({"label": labels, "year": labels, "age": numbers, "text": Texts(["a"])})
    assert type(like.condition("age", ["1", "2"], [], "")) is Numbers
    assert type(like.condition("year", ["1.5"], [], "")) is Labels
