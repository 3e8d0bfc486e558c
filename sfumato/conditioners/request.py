"""Conditions as a person writes them: `7`, `digit=7`, `age=30`, `caption=a red house`."""

import math
from collections.abc import Mapping, Sequence

import torch

from sfumato.conditioners.conditioner import Conditioner, LabelCondition
from sfumato.conditioners.numbers import NumberCondition
from sfumato.errors import UserError
from sfumato.types import Raw, RawValue

ConditionValue = int | float | str  # a class number, a number or a text
SHOWN_CLASSES = 20  # classes that an error message lists, at most


def find_class(names: Sequence[str], label: str) -> int | None:
    """The number of the class named `label`, or numbered `label` if no class name is a number; None if unknown."""
    if label in names:
        return list(names).index(label)
    by_number = label.isdecimal() and int(label) < len(names) and not any(name.isdecimal() for name in names)
    return int(label) if by_number else None


def class_number(conditioner: Conditioner, label: str, name: str | None = None) -> int:
    """The number of a class of a label condition, by default of the primary one.

    Raises:
        UserError: The model has no labels, or does not know this one.
    """
    name = name or conditioner.primary_label
    if name is None:
        known = f"; it has the conditions {', '.join(conditioner.names)}" if conditioner.names else ""
        raise UserError(f"label '{label}': this model was trained without labels{known}")
    names = conditioner.labels[name].names
    number = find_class(names, label)
    if number is not None:
        return number
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", …" if len(names) > SHOWN_CLASSES else "")
    if len(conditioner.names) == 1:
        raise UserError(f"label '{label}' is unknown to the model: it knows {shown}")
    others = f"; its conditions are {', '.join(conditioner.names)}" if "=" in label else ""
    raise UserError(f"{name} '{label}' is unknown to the model: it knows {shown}{others}")


def parse_conditions(conditioner: Conditioner, given: str | Sequence[str] | None) -> dict[str, ConditionValue]:
    """The values of the conditions that a person gave, each as `name=value`, or as a class of the primary label.

    Raises:
        UserError: A condition, a class or a number is unknown, or one is given twice.
    """
    values = dict[str, ConditionValue]()
    for text in [given] if isinstance(given, str) else given or ():
        name, value = _split(conditioner, text)
        if name is None:
            value = class_number(conditioner, text)
            name = conditioner.primary_label or ""
        if name in values:
            raise UserError(f"condition '{name}' is given twice")
        values[name] = value
    return values


def _split(conditioner: Conditioner, text: str) -> tuple[str | None, ConditionValue]:
    """Name and value of `name=value`; no name if the model has no condition of that name."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in conditioner.names:
        return None, text
    condition = conditioner[name]
    if isinstance(condition, LabelCondition):
        return name, class_number(conditioner, value, name)
    return name, _number(name, value) if isinstance(condition, NumberCondition) else value


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"condition '{name}' takes a number, not '{text}'")
    return number


def constant_conditions(conditioner: Conditioner, values: Mapping[str, ConditionValue], count: int) -> Raw:
    """The conditions of `count` items that all have the same values."""

    def repeat(value: ConditionValue) -> RawValue:
        if isinstance(value, str):
            return [value] * count
        return torch.full((count,), value, dtype=torch.int64 if isinstance(value, int) else torch.float32)

    return Raw({name: repeat(value) for name, value in values.items() if name in conditioner.names})
