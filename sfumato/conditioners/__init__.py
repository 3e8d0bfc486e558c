"""Conditioners: what is known of items to the condition `Cond` of the network.

Null conditions and dropout exist only here.
"""

from collections.abc import Mapping
from typing import Any

from sfumato.conditioners.conditioner import Condition, Conditioner, LabelCondition
from sfumato.conditioners.numbers import NumberCondition
from sfumato.conditioners.observed import ObservedConditions
from sfumato.conditioners.request import (
    ConditionValue,
    class_number,
    constant_conditions,
    find_class,
    parse_conditions,
)
from sfumato.conditioners.text import TextCondition
from sfumato.registry import build

__all__ = [
    "CONDITIONS",
    "Condition",
    "ConditionValue",
    "Conditioner",
    "LabelCondition",
    "NumberCondition",
    "ObservedConditions",
    "TextCondition",
    "class_number",
    "constant_conditions",
    "find_class",
    "make_conditioner",
    "parse_conditions",
]

CONDITIONS: dict[str, type[Condition[Any]]] = {
    kind.kind: kind for kind in (LabelCondition, NumberCondition, TextCondition)
}


def make_conditioner(conditions: Mapping[str, Mapping[str, Any]]) -> Conditioner:
    """Build a conditioner from the settings of its conditions, by name.

    Args:
        conditions: For each name the `kind`, a name in `CONDITIONS`, and the arguments of its constructor.

    Raises:
        UserError: A kind or a setting is unknown, or the tokens of two conditions differ in length.
    """
    return Conditioner({name: _make_condition(**settings) for name, settings in conditions.items()})


def _make_condition(kind: str, **settings: object) -> Condition[Any]:
    return build(CONDITIONS, "condition", kind, settings)
