"""The pages that are made from the code are up to date, and have every command and public name."""

from importlib import import_module
from pathlib import Path

import pytest

import mergekit_lfm

ROOT = Path(__file__).parents[2]
reference = import_module("scripts.reference")


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_page_equals_the_one_made_from_the_code(page: str) -> None:
    path = ROOT / page
    same = path.exists() and path.read_text(encoding="utf-8") == reference.PAGES[page]()
    assert same, f"{page} is not up to date; update it: {reference.UPDATE}"


def test_every_public_name_has_a_section_with_a_docstring() -> None:
    names = {name.name: name for name in reference.public_names(ROOT, "mergekit_lfm")}
    assert list(names) == mergekit_lfm.__all__
    assert [name for name, public in names.items() if public.kind != "value" and not public.doc] == []


def test_a_class_is_shown_with_its_fields_and_public_methods(tmp_path: Path) -> None:
    package = tmp_path / "box"
    package.mkdir()
    (package / "__init__.py").write_text('__all__ = ["Crate"]\nfrom box.crates import Crate\n')
    (package / "boxes.py").write_text("class Box:\n    side: float = 1.0\n    def open(self) -> None: ...\n")
    (package / "crates.py").write_text(
        "from box.boxes import Box\n"
        "class Crate(Box):\n"
        '    """A box of `wood`, side < 2. It floats."""\n'
        "    lid: str = 'oak'\n"
        "    _nails = 4\n"
        "    @property\n"
        "    def volume(self) -> float: ...\n"
        "    def fill(self, with_: str, *, level: float = 1.0, **more: int) -> 'Crate':\n"
        '        """Fill it."""\n'
        "    def _break(self) -> None: ...\n"
    )
    (crate,) = reference.public_names(tmp_path, "box")
    assert crate.summary == r"A box of `wood`, side \< 2."
    assert crate.code == 'class Crate(Box):\n    side: float = 1.0\n    lid: str = "oak"'
    assert crate.members == (
        ("volume", "volume: float", ""),
        ("fill", 'fill(with_: str, *, level: float = 1.0, **more: int) -> "Crate"', "Fill it."),
        ("open", "open() -> None", ""),
    )
    assert next(crate.texts()) == "### class `Crate`"
