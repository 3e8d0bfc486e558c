"""What the README says can be typed can be typed, and the tree it draws is the package."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sfumato
from sfumato.apps import cli
from sfumato.config import Settings, apply_overrides

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREE_LINE = re.compile(r"^( *)([\w.]+/?) {2,}(\S.*)$")


def code_blocks(text: str, language: str) -> list[str]:
    return [block for name, block in FENCED.findall(text) if name == language]


def command_lines(text: str, program: str) -> list[list[str]]:
    """Words of each line of a code block, and of each stretch of inline code, that calls `program` with something."""
    lines = [line for block in code_blocks(text, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [line for line in words if len(line) > 1]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of a line and the values of its parameters, without running it; raises what click would."""
    command = cli.app.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    return words[1], context.params


def tree_files(block: str) -> Iterator[str]:
    """Paths of the files in a drawn tree; a folder's line says what its `__init__.py` does."""
    folders: list[str] = []
    for line in block.splitlines():
        match = TREE_LINE.match(line)
        assert match is not None, f"no description: {line!r}"
        folders = folders[: len(match[1]) // 2]
        if match[2].endswith("/"):
            folders.append(match[2])
            yield "".join(folders) + "__init__.py"
        else:
            yield "".join(folders) + match[2]


LINES = [words for page in PAGES for words in command_lines(page, "sfumato")]
COMPLETE = [words for words in LINES if len(words) > 2 or words[1] == "doctor"]  # `sfumato fit` in a sentence is a name


def test_there_is_something_to_parse():
    assert {"fit", "generate", "reconstruct", "evaluate", "info", "doctor"} <= {words[1] for words in COMPLETE}


@pytest.mark.parametrize("words", LINES, ids=shlex.join)
def test_commands_exist(words: list[str]):
    assert words[1].startswith("--") or words[1] in cli.app.commands


@pytest.mark.parametrize("words", [w for w in COMPLETE if "--help" not in w], ids=shlex.join)
def test_command_lines_parse(words: list[str]):
    name, values = parsed(words)
    if name == "fit":
        apply_overrides(Settings(), values["overrides"])


def test_wrong_command_lines_do_not_parse():
    """The test above can fail: an unknown flag, one left out, an unknown command."""
    for line in (
        "fit mnist --out runs/x --bugdet 5m",
        "fit mnist",
        "generate --out x",
        "fit mnist --out x --size huge",
    ):
        with pytest.raises(Exception, match=r"(?i)no such option|missing|invalid|not one of"):
            parsed(["sfumato", *line.split()])
    with pytest.raises(KeyError):
        parsed(["sfumato", "paint"])


@pytest.mark.parametrize("block", code_blocks(README, "python"))
def test_python_names_exist(block: str):
    names = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sfumato"
    }
    methods = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "model"
    }
    assert names and names <= set(sfumato.__all__)
    assert methods and all(hasattr(sfumato.Model, name) for name in methods)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = {words[1] for words in command_lines(README, "make")}
    assert said and said <= targets


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_tree_is_the_package():
    trees = [block for block in code_blocks(README, "") if block.startswith("sfumato/")]
    assert len(trees) == 1
    drawn = list(tree_files(trees[0]))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "sfumato").rglob("*.py")}
    assert sorted(drawn) == sorted(there)
