"""The fields of a task, read from its signature: the one source of flags, forms and schemas.

A task is one typed function. Parameters before the `*` are positional arguments, those after it are options; the
`Args` section of its docstring describes each. Parameters that nobody can type (callbacks, loaded models) are no
fields: of a union only the members that can be typed count, and a parameter without any is left to the app.
Annotations with types that are imported for type checking only are strings (`"Model | Path | str"`).
"""

import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

TYPES_BY_NAME: dict[str, Any] = {
    **{"str": str, "int": int, "float": float, "bool": bool, "Path": Path},
    **{"Sequence[str]": Sequence[str]},
}
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Field:
    """A parameter of a task that a person can fill in.

    Attributes:
        name: The parameter's name.
        type: `str`, `int`, `float`, `bool`, `Path` or a `Literal` of the choices.
        default: The default value; `REQUIRED` without one.
        help: Its description.
        positional: Whether it is a positional argument.
        many: Whether it may be given several times, such as `str | Sequence[str]`.
        path: Whether it is a file or folder (such as `Path | str`, whose type is `str`).
    """

    name: str
    type: Any
    default: Any
    help: str
    positional: bool
    many: bool
    path: bool


def read_fields(task: Callable[..., Any]) -> list[Field]:
    """The fields of a task, in the order of its signature."""
    helps = argument_helps(inspect.getdoc(task) or "")
    fields = [_field(parameter, helps) for parameter in inspect.signature(task).parameters.values()]
    return [field for field in fields if field is not None]


def summary(task: Callable[..., Any]) -> str:
    """What a task does: its docstring up to the first section."""
    return re.split(r"\n\s*(?:Args|Returns|Raises|Example|References?):\n", inspect.getdoc(task) or "")[0].strip()


def argument_helps(docstring: str) -> dict[str, str]:
    """Name to description, from the `Args` section of a Google-style docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+):((?:.*\n?)(?:^ {5,}.*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _field(parameter: inspect.Parameter, helps: dict[str, str]) -> Field | None:
    """The field of a parameter; None if nobody can type it."""
    members = _members(parameter.annotation)
    if not members:
        return None
    many = any(_is_list(member) for member in members)
    choices = [part for member in members for part in (get_args(member) if _is_list(member) else (member,))]
    type_ = str if str in choices else choices[0]
    positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    help = helps.get(parameter.name, "")
    return Field(parameter.name, type_, parameter.default, help, positional, many, Path in choices)


def _members(annotation: Any) -> list[Any]:
    """The members of a union that a person can type."""
    if isinstance(annotation, str):
        names = [name.strip() for name in annotation.split("|")]
        return [TYPES_BY_NAME[name] for name in names if name in TYPES_BY_NAME]
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if member in TYPES_BY_NAME.values() or _is_composite(member)]


def _is_composite(member: Any) -> bool:
    """Whether it is a choice, or a list of types that can be typed."""
    is_list = _is_list(member) and get_args(member)[0] in TYPES_BY_NAME.values()
    return is_list or get_origin(member) is Literal


def _is_list(member: Any) -> bool:
    return get_origin(member) in (list, Sequence)
