"""Rules about the source as text: rooms, sizes, docstrings, plain English, `__all__`. Each names all the offenders."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("mergekit_lfm", "tests", "scripts", "benchmarks", "recipes")
MODULES = sorted([ROOT / "cli.py", *(path for place in PLACES for path in (ROOT / place).rglob("*.py"))])
PACKAGE = [path for path in MODULES if path.is_relative_to(ROOT / "mergekit_lfm")]

MODULE_LINES = 500
DOCSTRING_LINES = 10
FUNCTION_LINES = 60
LINE_LENGTH = 120

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """The public classes and functions of a module's top level."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_there_is_source_to_look_at() -> None:
    assert len(PACKAGE) > 100 and len(MODULES) > len(PACKAGE) + 50


def test_every_module_is_in_a_room() -> None:
    outside = {path.stem for path in (ROOT / "mergekit_lfm").glob("*.py")}
    assert outside == {"__init__", "__main__", "errors", "version"}


def test_every_room_is_described_and_in_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    rows = next(contract["layers"] for contract in settings["contracts"] if contract["id"] == "rooms")
    rooms = {path.parent.name: path for path in (ROOT / "mergekit_lfm").glob("*/__init__.py")}
    assert {room for row in rows for room in row.split(" | ")} == {*rooms, "errors", "version"}
    assert [r for r, path in rooms.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_the_prose_is_plain_english() -> None:
    prose = import_module("scripts.prose")
    found = prose.findings([ROOT / place for place in prose.PLACES])
    assert found == [], "\n".join(found)


def test_a_test_is_named_with_its_subject_first() -> None:
    tests = [node for path in MODULES if path.is_relative_to(ROOT / "tests") for node in functions(parsed(path))]
    names = [node.name for node in tests if node.name.startswith("test_")]
    assert len(names) > 1000 and [name for name in names if "what" in name.split("_")] == []


def test_modules_have_a_docstring() -> None:
    assert [name(path) for path in MODULES if not ast.get_docstring(parsed(path))] == []


def test_modules_fit_their_budget() -> None:
    lines = {name(path): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {where: count for where, count in lines.items() if count > MODULE_LINES} == {}


def test_functions_fit_a_screen() -> None:
    lengths = {
        f"{name(path)}:{f.lineno} {f.name}": (f.end_lineno or 0) - f.lineno + 1
        for path in MODULES
        for f in functions(parsed(path))
    }
    assert {where: length for where, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_docstrings_of_the_packages_modules_are_short() -> None:
    texts = {name(path): (ast.get_docstring(parsed(path)) or "").splitlines() for path in PACKAGE}
    assert {where: len(lines) for where, lines in texts.items() if not 1 <= len(lines) <= DOCSTRING_LINES} == {}
    assert [f"{where}: {line}" for where, lines in texts.items() for line in lines if len(line) > LINE_LENGTH] == []


def test_public_names_of_the_package_have_docstrings() -> None:
    public = [(path, node) for path in PACKAGE for node in public_definitions(parsed(path))]
    assert [f"{name(path)}: {node.name}" for path, node in public if not ast.get_docstring(node)] == []


def offered(tree: ast.Module) -> set[str]:
    """The public names a package's `__init__` binds: by definition, or by import from itself, for types or for use."""
    inside = [*tree.body, *(node for part in tree.body if isinstance(part, ast.If) for node in part.body)]
    imports = (
        node for node in inside if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit")
    )
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {n for n in names | {node.name for node in public_definitions(tree)} if not n.startswith("_")}


def test_all_lists_the_public_names() -> None:
    wrong = []
    for path in PACKAGE:
        if path.name == "__init__.py":
            module = import_module(".".join(path.parent.relative_to(ROOT).parts))
            declared = getattr(module, "__all__", [])
            undeclared = offered(parsed(path)) ^ (set(declared) - {"__version__"})
            wrong += [f"{name(path)}: {n} is public, or in `__all__`, but not both" for n in sorted(undeclared)]
            wrong += [f"{name(path)}: `__all__` names {n} twice" for n in declared if declared.count(n) > 1]
            wrong += [
                f"{name(path)}: `__all__` names {n}, which is not there" for n in declared if not hasattr(module, n)
            ]
    assert wrong == []
