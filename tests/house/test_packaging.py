"""The dependency ranges are honest, and the constraints lie in them."""

import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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
