"""docs/architecture.md shows the code as it is, no import goes up, and nothing forms a circle."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import architecture  # noqa: E402

PAGE = architecture.PAGE.read_text(encoding="utf-8")
modules_of = cache(architecture.modules_of)  # which takes seconds, and no worker but one needs it
FLOORS = {"low": 0, "middle": 1, "high": 2}


def faults(**modules: str) -> list[str]:
    """The faults of a package with these modules; `__` stands for the dot of a name."""
    trees = {name.replace("__", "."): ast.parse(text) for name, text in modules.items()}
    return architecture.faults_of(architecture.graph_of(trees), FLOORS)


def test_no_import_goes_up_and_nothing_forms_a_circle() -> None:
    assert architecture.faults_of(architecture.graph_of(modules_of(ROOT)), architecture.floors_of(ROOT)) == []


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    assert architecture.page_of(ROOT, PAGE) == PAGE, "run python scripts/architecture.py --write"


def test_every_long_module_has_its_idea_and_no_other_module_has_one() -> None:
    long = {name for name in modules_of(ROOT) if architecture.lines_of(ROOT, name) > architecture.LONG}
    assert {name for name, idea in architecture.ideas_in(PAGE).items() if idea.strip()} == long


def test_the_page_names_every_room_and_every_room_says_its_purpose() -> None:
    rooms = architecture.rooms_of(architecture.graph_of(modules_of(ROOT)))
    assert set(rooms) == set(architecture.floors_of(ROOT))
    assert [room for room in rooms if not architecture.first_sentence(modules_of(ROOT)[room])] == []


@pytest.mark.parametrize(
    "text",
    [
        "from mergekit_lfm.high import x",
        "import mergekit_lfm.high",
        "from mergekit_lfm import high",
        "def f():\n    from mergekit_lfm.high.a import x",
        "if TYPE_CHECKING:\n    from mergekit_lfm.high.a import x",
        "import mergekit_lfm",
    ],
)
def test_an_import_of_a_higher_room_or_of_the_face_is_a_fault(text: str) -> None:
    found = faults(low="", low__a=text, high="", high__a="")
    assert len(found) == 1 and found[0].startswith("low.a imports ")


def test_an_import_of_a_room_on_the_same_floor_is_a_fault() -> None:
    graph = architecture.graph_of({"one": ast.parse("from mergekit_lfm import two"), "two": ast.parse("")})
    assert architecture.faults_of(graph, {"one": 0, "two": 0}) == ["one imports two, which is not on a lower floor"]


def test_a_circle_within_a_room_is_a_fault_and_a_chain_is_not() -> None:
    a, b = "from mergekit_lfm.low.b import x", "def f():\n    from mergekit_lfm.low.a import x"
    assert faults(low="", low__a=a, low__b="") == []
    assert faults(low="", low__a=a, low__b=b) == ["the modules of low form a circle: low.a -> low.b -> low.a"]


def test_a_room_without_a_floor_is_a_fault() -> None:
    assert faults(attic="") == ["attic: no floor in pyproject.toml"]


def test_writing_keeps_the_ideas_that_were_written_by_hand() -> None:
    (module, idea), *_ = architecture.ideas_in(PAGE).items()
    stale = PAGE.replace("| lines |", "| rows |")
    again = architecture.page_of(ROOT, stale)
    assert again == PAGE and f"| {idea} |" in again and module in again
