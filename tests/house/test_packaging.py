"""The dependency ranges are honest, the constraints lie in them, and a wheel has all that the package needs."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = SETTINGS["project"]
PACKAGE = ROOT / "mergekit_lfm"
OPTIONAL = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
REQUIREMENTS: dict[str, Requirement] = {
    canonicalize_name(r.name): r for r in map(Requirement, [*PROJECT["dependencies"], *OPTIONAL])
}
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_constraints_are_exact_and_within_the_declared_range(pin: Requirement) -> None:
    (version,) = pin.specifier
    assert version.operator == "=="
    assert version.version in REQUIREMENTS[canonicalize_name(pin.name)].specifier


def test_torch_has_no_upper_limit() -> None:
    assert [part.operator for part in REQUIREMENTS["torch"].specifier] == [">="]


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_scripts_lead_to_commands(target: str) -> None:
    module, _, name = target.partition(":")
    assert isinstance(getattr(import_module(module), name), click.Command)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The packages that a module imports, and whether it can be imported without them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    spared = [node for node in ast.walk(tree) if isinstance(node, ast.Try | ast.If)]
    later = {id(inner) for node in (*functions, *spared) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((name.partition(".")[0], id(node) in later) for name in names)


def test_every_import_is_declared() -> None:
    """A module needs dependencies only; in a function, an `if` or a `try` it may import the packages of extras."""
    distributions = {name: {canonicalize_name(d) for d in of} for name, of in packages_distributions().items()}
    needed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    at_once = {*needed, "triton"}  # only a GPU loads the kernels that are written for triton
    on_use = {*REQUIREMENTS, "hf-xet"}  # the Hub's client brings it where it can
    undeclared = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name, later in imports(path)
        if name not in sys.stdlib_module_names and name != PACKAGE.name
        if not distributions.get(name, set()) & (on_use if later else at_once)
    }
    assert undeclared == set()


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_every_other_file_of_the_package_is_in_the_wheel() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = {path for path in files if path.suffix != ".py"}
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["mergekit_lfm"]
    assert others == {path for pattern in patterns for path in PACKAGE.glob(pattern)}


def test_the_versions_of_python_are_those_that_pip_accepts() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    accepted = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert classified == ["3.11", "3.12", "3.13"]
    assert [version for version in classified if version not in accepted] == []
    assert SETTINGS["tool"]["mypy"]["python_version"] == classified[0]
    assert SETTINGS["tool"]["ruff"]["target-version"] == f"py{classified[0].replace('.', '')}"


def test_the_readme_and_the_license_are_there() -> None:
    assert [name for name in (PROJECT["readme"], *PROJECT["license-files"]) if not (ROOT / name).is_file()] == []
