"""The house rules that a machine can hold: sizes, copies, layers, and what is never imported."""

import ast
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "sfumato").rglob("*.py"))
EVERYTHING = PACKAGE + sorted(p for part in ("tests", "benchmarks", "examples") for p in (ROOT / part).rglob("*.py"))
NEVER = {"torchvision", "torchaudio", "torch_fidelity", "lightning", "hydra", "k_diffusion", "pickle", "joblib", "dill"}
OPTIONAL = {"torchmetrics", "xgboost", "sdmetrics", "diffusers", "transformers", "peft", "lycoris"}
OPTIONAL |= {"fastapi", "uvicorn", "gradio", "datasets", "webdataset"}
PICKLING_CALLS = {"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def docstring_lines(node: Function) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def length(node: Function) -> int:
    """Lines of a function from its `def` on, without its docstring."""
    return node.end_lineno - node.lineno + 1 - docstring_lines(node)


def body(node: Function) -> str:
    """The arguments and statements, without name, docstring and decorators."""
    statements = node.body[1:] if docstring_lines(node) else node.body
    return ast.dump(node.args) + "".join(ast.dump(statement) for statement in statements)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level packages imported, and whether at the module's top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            yield name.split(".")[0], node in tree.body


def place(path: Path, node: ast.AST | None = None) -> str:
    return str(path.relative_to(ROOT)) + (f":{node.lineno}" if node is not None else "")


def test_there_is_something_to_measure():
    assert len(PACKAGE) > 10


def test_no_function_is_over_60_lines():
    long = [f"{place(p, f)} {f.name} has {length(f)}" for p in EVERYTHING for f in functions(p) if length(f) > 60]
    assert long == []


def test_most_functions_are_short():
    lengths = [length(f) for p in PACKAGE for f in functions(p)]
    assert statistics.median(lengths) < 10
    assert sum(n < 30 for n in lengths) / len(lengths) >= 0.9


def test_no_file_is_over_400_lines():
    sizes = {place(p): len(p.read_text(encoding="utf-8").splitlines()) for p in EVERYTHING}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_no_two_functions_are_the_same():
    places: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE:
        for node in functions(path):
            if length(node) >= 4:
                places[body(node)].append(f"{place(path, node)} {node.name}")
    assert [same for same in places.values() if len(same) > 1] == []


def test_nothing_forbidden_is_imported():
    assert [(place(p), name) for p in PACKAGE for name, _ in imports(p) if name in NEVER] == []


def test_optional_packages_are_imported_late_and_by_one_module_each():
    owners: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE:
        for name, at_top in imports(path):
            if name in OPTIONAL:
                owners[name].add(place(path))
                assert not at_top, f"{place(path)} imports {name} at its top"
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


def test_nothing_is_pickled():
    calls = [
        (place(path, node), ast.unparse(node.func))
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in PICKLING_CALLS
            or any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        )
    ]
    assert calls == []


def test_layers():
    """The contract of `pyproject.toml`: each layer imports only what is below it."""
    program = shutil.which("lint-imports", path=Path(sys.executable).parent) or shutil.which("lint-imports")
    if program is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
