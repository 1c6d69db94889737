"""Rules about the source as text: sizes, docstrings, `__all__`."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("mergekit_lfm", "tests", "scripts", "benchmarks")
MODULES = sorted([ROOT / "cli.py", *(path for place in PLACES for path in (ROOT / place).rglob("*.py"))])
PACKAGE = [path for path in MODULES if path.is_relative_to(ROOT / "mergekit_lfm")]

MODULE_LINES = 500
DOCSTRING_LINES = 10
FUNCTION_LINES = 60
LINE_LENGTH = 120

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """The public classes and functions of a module's top level."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_has_a_docstring_and_fits_its_budget(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{name(path)} says nowhere what it is"
    assert text.count("\n") <= MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_functions_fit_a_screen(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lengths = {f"{f.name}, line {f.lineno}": (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree)}
    assert {where: length for where, length in lengths.items() if length > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_docstring_of_the_module_is_short(path: Path) -> None:
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    assert 1 <= len(lines) <= DOCSTRING_LINES
    assert [line for line in lines if len(line) > LINE_LENGTH] == []


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_public_names_of_the_package_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.name for node in public_definitions(tree) if not ast.get_docstring(node)] == []


def offered(tree: ast.Module) -> set[str]:
    """The public names a package's `__init__` binds: by definition, or by import from itself, for types or for use."""
    inside = [*tree.body, *(node for part in tree.body if isinstance(part, ast.If) for node in part.body)]
    imports = (
        node for node in inside if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit")
    )
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {n for n in names | {node.name for node in public_definitions(tree)} if not n.startswith("_")}


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.name == "__init__.py"], ids=name)
def test_all_equals_the_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = import_module(".".join(path.parent.relative_to(ROOT).parts))
    declared = getattr(module, "__all__", [])
    assert sorted(set(declared) - {"__version__"}) == sorted(offered(tree))
    assert [n for n in declared if not hasattr(module, n)] == []
