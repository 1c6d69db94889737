"""Merge methods of other packages: the example of docs/methods.md, and packages that are broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.find import with_others
from mergekit_lfm.methods.method import Method
from mergekit_lfm.methods.registry import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
FILES = {match[1]: match[0] for match in re.finditer(r"(?<=```python\n)# (\S+)\n.*?(?=```)", PAGE, re.S)}
ENTRY = re.search(r'"(mergekit_lfm\.methods)"\]\n(\w+) = "(.*)"\n', PAGE)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package of the page, as an installation leaves it."""
    assert ENTRY is not None
    metadata = {"METADATA": "Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n"}
    metadata["entry_points.txt"] = "[{}]\n{} = {}\n".format(*ENTRY.groups())
    for name, text in {**FILES, **{f"my_merges-1.0.dist-info/{key}": text for key, text in metadata.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_example_is_a_method_and_keeps_the_contract(installed: Path) -> None:
    tests = run(installed, "pytest", "-q", "-p", "no:cacheprovider")
    assert tests.returncode == 0 and "12 passed" in tests.stdout, tests.stdout + tests.stderr
    page = run(installed, "mergekit_lfm", "methods", "dampen")
    assert "how much disagreement counts" in page.stdout, page.stderr


def test_a_broken_package_is_named_in_one_message(installed: Path) -> None:
    (installed / "my_merges" / "dampen.py").write_text("import no_such_module\n")
    result = run(installed, "mergekit_lfm", "methods")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "my_merges.dampen of the package my-merges cannot be read for methods" in result.stderr
    assert "no_such_module" in result.stderr and "uninstall" in result.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("mergekit_lfm.methods.linear", "has a method 'linear', and there is one of this name"),
        ("mergekit_lfm.edit.methods.rome", "among its METHODS, expected only a Method"),
        ("mergekit_lfm.errors", "cannot be read for methods"),
    ],
)
def test_a_name_that_is_taken_or_another_kind_is_refused(module: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        with_others(METHODS, Method, [EntryPoint("mine", module, "mergekit_lfm.methods")])


@pytest.mark.parametrize(
    "code",
    ["raise RuntimeError('no')", "not python", "METHODS = 5", "METHODS = None", "1 / 0", "assert False", "{}[1]"],
)
def test_a_module_that_fails_in_any_way_is_named(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_methods.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_methods", raising=False)
    with pytest.raises(PlanError, match=r"failing_methods of the package .* cannot be read for methods: .*; repair or"):
        with_others(METHODS, Method, [EntryPoint("mine", "failing_methods", "mergekit_lfm.methods")])
