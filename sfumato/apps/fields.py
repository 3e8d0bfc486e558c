"""What a task asks for, read from its signature: the one source of flags, forms and schemas.

A task is one typed function. Its parameters before the `*` are what it works on, those after it are options; the
`Args` section of its docstring says what each means. Parameters no person can type (callbacks, open models) are no
fields: a union keeps the members that can be typed, a parameter that has none is left to the app. Annotations that
name types imported only for checking are written as strings (`"Model | Path | str"`).
"""

import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

PLAIN: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path}
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Field:
    """One thing to fill in.

    Attributes:
        name: The parameter's name.
        kind: `str`, `int`, `float`, `bool`, `Path` or a `Literal` of the choices.
        default: What it is when not given; `REQUIRED` when it must be.
        help: What it means.
        positional: Whether it is what the task works on, not an option.
        many: Whether it may be given several times.
        path: Whether it names a file or folder (such as `Path | str`, whose kind is `str`).
    """

    name: str
    kind: Any
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
    """Name to text, from the `Args` section of a Google-style docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+):((?:.*\n?)(?:^ {5,}.*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _field(parameter: inspect.Parameter, helps: dict[str, str]) -> Field | None:
    members = _members(parameter.annotation)
    if not members:
        return None
    many = get_origin(members[0]) in (list, Sequence)
    kinds = get_args(members[0]) if many else members
    kind = str if str in kinds else kinds[0]
    positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    help = helps.get(parameter.name, "")
    return Field(parameter.name, kind, parameter.default, help, positional, many, Path in kinds)


def _members(annotation: Any) -> list[Any]:
    """The members of a union that a person can type."""
    if isinstance(annotation, str):
        names = [name.strip() for name in annotation.split("|")]
        return [PLAIN[name] for name in names if name in PLAIN]
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if member in PLAIN.values() or _is_listed(member)]


def _is_listed(member: Any) -> bool:
    """Whether it is a choice, or a list of what can be typed."""
    is_list = get_origin(member) in (list, Sequence) and get_args(member)[0] in PLAIN.values()
    return is_list or get_origin(member) is Literal
