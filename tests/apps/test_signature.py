"""The fields of a task, read from its signature and docstring."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from sfumato.apps.signature import REQUIRED, Field, argument_helps, read_fields, summary


def paint(
    model: "Nowhere | Path | str",  # noqa: F821
    *,
    n: int = 64,
    out: Path | None = None,
    label: str | int | None = None,
    kind: Literal["a", "b"] = "a",
    where: Sequence[str] = (),
    tone: str | Sequence[str] | None = None,
    shade: "str | Sequence[str] | Nowhere" = "dark",  # noqa: F821
    strong: bool = False,
    progress: Callable[[str, int], None] | None = None,
    listener: "Nowhere | None" = None,  # noqa: F821
) -> None:
    """Paint a picture.

    It takes a while.

    Args:
        model: Folder of the model
            (made by fit).
        n: How many: at least one.

    Returns:
        Nothing: really.
    """


def test_fields_of_a_task():
    assert read_fields(paint) == [
        Field("model", str, REQUIRED, "Folder of the model (made by fit).", True, False, True),
        Field("n", int, 64, "How many: at least one.", False, False, False),
        Field("out", Path, None, "", False, False, True),
        Field("label", str, None, "", False, False, False),
        Field("kind", Literal["a", "b"], "a", "", False, False, False),
        Field("where", str, (), "", False, True, False),
        Field("tone", str, None, "", False, True, False),
        Field("shade", str, "dark", "", False, True, False),
        Field("strong", bool, False, "", False, False, False),
    ]


def test_untypeable_parameters_are_no_fields():
    assert {"progress", "listener"}.isdisjoint(field.name for field in read_fields(paint))


def test_summary_stops_at_the_first_section():
    assert summary(paint) == "Paint a picture.\n\nIt takes a while."


def test_descriptions_end_with_their_section():
    assert set(argument_helps("Do.\n\nArgs:\n    a: One.\n    b: Two.\n\nRaises:\n    ValueError: Never.\n")) == {
        "a",
        "b",
    }
    assert argument_helps("Do.") == {}


def test_a_path_or_name_stays_a_string():
    """As a Path, `hf://owner/name` would lose a slash."""

    def read(source: Path | str) -> None:
        """Read."""

    assert read_fields(read)[0].type is str
