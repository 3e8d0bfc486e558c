"""The README's commands parse, its tree is the package, and names in README and architecture.md exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import sfumato
from sfumato.apps import cli
from sfumato.config import Settings, apply_overrides, setting_keys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREE_LINE = re.compile(r"^( *)([\w.]+/?) {2,}(\S.*)$")
PYTHON_FILE = re.compile(r"[\w/]+\.py")
DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
CLASS_OR_CONSTANT = re.compile(r"[A-Z]\w+")
FILE_ENDINGS = {"csv", "gz", "json", "jsonl", "md", "npz", "parquet", "py", "safetensors", "toml", "tsv", "zip"}
MODALITY_FILES = {
    "dataset.py",
    "read.py",
    "write.py",
    "codec.py",
    "metrics.py",
    "evaluator.py",
    "labeler.py",
    "modality.py",
}


def code_blocks(text: str, language: str) -> list[str]:
    return [block for name, block in FENCED.findall(text) if name == language]


def command_lines(text: str, program: str) -> list[list[str]]:
    """Words of each line in code blocks and of each inline code that calls `program` with arguments."""
    lines = [line for block in code_blocks(text, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [line for line in words if len(line) > 1]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of a line and the values of its parameters, without running it; raises click's errors."""
    command = cli.app.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    return words[1], context.params


def tree_files(block: str) -> Iterator[str]:
    """Paths of the files in a drawn tree; the line of a folder stands for its `__init__.py`."""
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
COMPLETE = [
    words for words in LINES if len(words) > 2 or words[1] == "doctor"
]  # `sfumato fit` within a sentence is a name


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
    """Unknown or missing flags and unknown commands fail."""
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
    named = {words[1] for words in command_lines(README, "make")}
    assert named and named <= targets


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_tree_is_the_package():
    trees = [block for block in code_blocks(README, "") if block.startswith("sfumato/")]
    assert len(trees) == 1
    drawn = list(tree_files(trees[0]))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "sfumato").rglob("*.py")}
    assert sorted(drawn) == sorted(there)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def fields(node: ast.ClassDef) -> set[str]:
    """Names of methods and attributes that a class defines."""
    names = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    names |= {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return names | {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self"
    }


@cache
def package_names() -> set[str]:
    """`module`, `module.name`, `Name` and `Name.field` of everything at the top level of the package's modules."""
    names = {"sfumato", *(f"sfumato.{name}" for name in sfumato.__all__)}
    for path in (ROOT / "sfumato").rglob("*.py"):
        parts = path.relative_to(ROOT / "sfumato").with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        names.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names |= {node.name, f"{module}.{node.name}"}
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{field}" for field in fields(node)}
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing_files(text: str) -> list[str]:
    """Python files in inline code that do not exist, relative to the repository or the package."""
    paths = {path for code in inline_code(text) for path in PYTHON_FILE.findall(code)} - MODALITY_FILES
    return sorted(path for path in paths if not any((base / path).is_file() for base in (ROOT, ROOT / "sfumato")))


def missing_names(text: str) -> list[str]:
    """Dotted names, classes and constants in inline code that are neither in the package nor settings.

    `model.` stands for a `Model`; `time_sampling_settings.mean` is a key of an open table.
    """
    keys = set(setting_keys())
    keys |= {".".join(key.split(".")[: n + 1]) for key in keys for n in range(key.count("."))}
    known = package_names() | keys
    dotted = {code.removesuffix("()") for code in inline_code(text) if DOTTED_NAME.fullmatch(code.removesuffix("()"))}
    dotted = {name for name in dotted if name.rsplit(".", 1)[1] not in FILE_ENDINGS}
    dotted = {
        name
        for name in dotted
        if not (name.rpartition(".")[0].endswith("_settings") and name.rpartition(".")[0] in keys)
    }
    names = {code for code in inline_code(text) if CLASS_OR_CONSTANT.fullmatch(code)}
    return sorted((dotted | names) - known)


@pytest.mark.parametrize("page", PAGES, ids=["README", "architecture"])
def test_named_files_exist(page: str):
    assert missing_files(page) == []


def test_names_in_the_text_exist():
    assert missing_names(PAGES[1]) == [] and missing_names(README.replace("`LICENSE`", "")) == []


def test_missing_names_are_found():
    assert missing_files("`core/nowhere.py` and `core/sampler.py`") == ["core/nowhere.py"]
    text = "`core.sampler.sample`, `core.sampler.nothing`, `Trainer.run`, `Trainer.walk`, `Nobody`, "
    text += "`train.early_stopping`, `train.watch`"
    assert missing_names(text) == ["Nobody", "Trainer.walk", "core.sampler.nothing", "train.watch"]


def test_files_of_a_modality_exist():
    """The table of files in a new modality's folder: image and table have all of them."""
    for name in ("image", "table"):
        there = {path.name for path in (ROOT / "sfumato" / "modalities" / name).glob("*.py")}
        assert there >= MODALITY_FILES
