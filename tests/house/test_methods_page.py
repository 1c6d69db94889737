"""docs/methods.md: its sections name the parameters of the methods, and their defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergekit_lfm.methods.method import REQUIRED, Parameter
from mergekit_lfm.methods.registry import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
SECTIONS = re.findall(r"^### (`.*)\n((?:(?!##).*\n)*)", PAGE, re.M)


def entry(parameter: Parameter) -> str:
    """A parameter as the page has it."""
    default = "" if parameter.default is REQUIRED else f" {json.dumps(parameter.default)}".replace('"', "")
    return f"`{parameter.name}`{default.removesuffix('.0')}"


@pytest.mark.parametrize(("heading", "text"), SECTIONS, ids=[heading for heading, _ in SECTIONS])
def test_a_section_names_the_parameters(heading: str, text: str) -> None:
    methods = [METHODS[name] for name in re.findall(r"`(\w+)`", heading)]
    paragraph = next((part for part in text.split("\n\n") if "arameters" in part), "")
    named = set(re.findall(r"`(\w+)`", paragraph)) - METHODS.keys()
    assert named == {parameter.name for method in methods for parameter in method.parameters}
    assert [p.name for p in methods[0].parameters if entry(p) not in paragraph] == []


def test_the_methods_after_breadcrumbs_have_a_section() -> None:
    described = {name for heading, _ in SECTIONS for name in re.findall(r"`(\w+)`", heading)}
    rows = (Path(__file__).parents[2] / "docs" / "merging.md").read_text("utf-8")
    between = rows[rows.index("| `della`") : rows.index("| `fisher`")]
    assert described == {name for row in between.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
