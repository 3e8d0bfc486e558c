"""The rules of the house: sizes, names, duplicates, layers, and packages that are never imported."""

import ast
import shutil
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
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
MAX_ROOT_FILES, MAX_FOLDER_FILES = 10, 22  # modules at the package's root besides __init__ and __main__; in a folder

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
    """Lines of a function, from `def` to its end, without the docstring."""
    return node.end_lineno - node.lineno + 1 - docstring_lines(node)


def body(node: Function) -> str:
    """Arguments and statements of a function, without name, docstring and decorators."""
    statements = node.body[1:] if docstring_lines(node) else node.body
    return ast.dump(node.args) + "".join(ast.dump(statement) for statement in statements)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level packages that a module imports, and whether it does at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            yield name.split(".")[0], node in tree.body


def constants(path: Path) -> Iterator[str]:
    """Upper-case names that a module defines, except type variables."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "TypeVar(" not in ast.unparse(node.value or node.target):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            yield from (name for name in names if name.isupper())


def location(path: Path, node: ast.AST | None = None) -> str:
    """The path within the repository, and the line."""
    return str(path.relative_to(ROOT)) + (f":{node.lineno}" if node is not None else "")


def test_the_package_is_found():
    assert len(PACKAGE) > 10


def test_no_function_is_over_60_lines():
    long = [f"{location(p, f)} {f.name} has {length(f)}" for p in EVERYTHING for f in functions(p) if length(f) > 60]
    assert long == []


def test_most_functions_are_short():
    lengths = [length(f) for p in PACKAGE for f in functions(p)]
    assert statistics.median(lengths) < 10
    assert sum(n < 30 for n in lengths) / len(lengths) >= 0.9


def test_no_file_is_over_400_lines():
    sizes = {location(p): len(p.read_text(encoding="utf-8").splitlines()) for p in EVERYTHING}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_a_constant_has_one_home():
    homes: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE:
        for name in constants(path):
            homes[name].add(location(path))
    assert "CONFIGURED_PARTS" in homes
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_folder_is_crowded():
    counts = Counter(location(path.parent) for path in PACKAGE)
    root = [path.name for path in PACKAGE if path.parent == ROOT / "sfumato"]
    assert len(set(root) - {"__init__.py", "__main__.py"}) <= MAX_ROOT_FILES, root
    assert {folder: count for folder, count in counts.items() if count > MAX_FOLDER_FILES} == {}


def test_no_two_functions_are_the_same():
    places: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE:
        for node in functions(path):
            if length(node) >= 4:
                places[body(node)].append(f"{location(path, node)} {node.name}")
    assert [same for same in places.values() if len(same) > 1] == []


def test_nothing_forbidden_is_imported():
    assert [(location(p), name) for p in PACKAGE for name, _ in imports(p) if name in NEVER] == []


def test_optional_packages_are_imported_late_and_by_one_module_each():
    owners: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE:
        for name, at_top in imports(path):
            if name in OPTIONAL:
                owners[name].add(location(path))
                assert not at_top, f"{location(path)} imports {name} at its top"
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


def test_nothing_is_pickled():
    calls = [
        (location(path, node), ast.unparse(node.func))
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in PICKLING_CALLS
            or any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        )
    ]
    assert calls == []


def test_import_contracts():
    """The import contracts of `pyproject.toml` hold."""
    program = shutil.which("lint-imports", path=Path(sys.executable).parent) or shutil.which("lint-imports")
    if program is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
