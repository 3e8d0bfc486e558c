"""Conditions of a source's items as a model knows them, and as metadata."""

# torch's own annotation of `tolist` is incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.conditioners import Conditioner, LabelCondition, NumberCondition, class_number, find_class
from sfumato.data.conditions import Known, Labels, Numbers, Texts, parse_number, primary_label
from sfumato.data.dataset import Dataset
from sfumato.data.metadata import renumber_labels
from sfumato.model import Model
from sfumato.types import UNKNOWN, Raw, RawValue


def matching_name(conditioner: Conditioner, data: Dataset, name: str) -> str:
    """The name that a data set has for a condition of a model.

    It is the same, except for the primary label: that may be the data set's primary label under a name of its own, if
    the model knows all its classes.
    """
    primary = primary_label(data.conditions)
    if primary is None or name != conditioner.primary_label or name in data.conditions or primary in conditioner.names:
        return name
    labels = data.conditions[primary]
    present = labels.without_empty_classes().names if isinstance(labels, Labels) else ()
    known = [find_class(conditioner.labels[name].names, label) is not None for label in present]
    return primary if all(known) else name


def known_values(conditioner: Conditioner, data: Dataset, name: str) -> RawValue:
    """What a data set knows of a condition of a model: a value per item (N), unknown if it is of another kind.

    Raises:
        UserError: The model does not know a class.
    """
    condition, known = conditioner[name], data.conditions.get(matching_name(conditioner, data, name))
    if isinstance(condition, LabelCondition):
        return torch.as_tensor(class_numbers(conditioner, name, known, len(data)))
    if isinstance(condition, NumberCondition):
        return torch.as_tensor(_numbers(known, len(data)))
    return known.raw(range(len(data))) if isinstance(known, Texts) else [None] * len(data)


def class_numbers(conditioner: Conditioner, name: str, known: Known | None, count: int) -> NDArray[np.int64]:
    """The model's class numbers (N,) of labels."""
    if not isinstance(known, Labels):
        return np.full(count, UNKNOWN)
    present = set(known.numbers.tolist())
    numbers = [
        class_number(conditioner, label, name) if k in present else UNKNOWN for k, label in enumerate(known.names)
    ]
    return renumber_labels(known.numbers, numbers)


def _numbers(known: Known | None, count: int) -> NDArray[np.float32]:
    """Numbers (N,); of labels too if all classes are numbers, for few integers look like classes."""
    if isinstance(known, Numbers):
        return known.values
    values = [parse_number(label) for label in known.names] if isinstance(known, Labels) else []
    numbers = [value for value in values if value is not None]
    if not isinstance(known, Labels) or len(numbers) < len(values):
        return np.full(count, np.nan, np.float32)
    return np.array([*numbers, np.nan], np.float32)[known.numbers]  # UNKNOWN is -1, the index of the last


def metadata_values(values: RawValue, label_values: Sequence[Any] = ()) -> list[Any]:
    """Values (N,) of a condition as metadata: classes by their values, numbers to 6 digits; None where unknown."""
    if not isinstance(values, Tensor):
        return list(values)
    if values.is_floating_point():
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
    return [None if k == UNKNOWN else label_values[k] for k in values.tolist()]


def condition_metadata(model: Model, raw: Raw, count: int) -> list[dict[str, Any]]:
    """A row per item (N = count) with the known values of its conditions under their names."""
    columns: dict[str, list[Any]] = {}
    for name in model.conditioner.names:
        if name in raw.values:
            condition = model.conditioner[name]
            names = condition.names if isinstance(condition, LabelCondition) else ()
            columns[name] = metadata_values(raw.values[name], model.modality.label_values(names))
    return table_rows(columns, count)


def table_rows(columns: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """The rows of columns, without their empty cells."""
    return [{name: column[i] for name, column in columns.items() if column[i] is not None} for i in range(count)]
