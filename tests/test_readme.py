"""The README's examples run and print what it says; its tables name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lfm.commands import main, merge
from mergekit_lfm.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes, as in a clone."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("minilm"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_prints_what_its_comments_say(here: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    ran = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert len(expected) == 2 and ran.stdout.splitlines() == expected


def test_the_recipe_shown_is_the_quick_start(here: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (here / "recipes" / "shown.yaml").write_text(shown)
    plans = [CliRunner().invoke(main, ["plan", f"recipes/{name}.yaml", "--json"]) for name in ("shown", "quickstart")]
    digests = [re.findall(r'"digest": "(\w+)"', plan.output) for plan in plans]
    assert digests[0] and digests[0] == digests[1]


def test_the_plan_shown_is_the_plan(here: Path) -> None:
    (shown,) = re.findall(r"\$ (merge recipes/quickstart.yaml --dry-run)\n((?:    .*\n)+)", README)
    printed = CliRunner().invoke(merge, shown[0].split()[1:]).output
    for line in shown[1].splitlines():
        if "disk" not in line and "memory" not in line:  # these are the machine's
            assert line.strip() in printed
    assert here.exists()


def test_every_method_and_no_other_is_in_the_table() -> None:
    table = README[README.index("## Methods") : README.index("Each is tested against")]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(METHODS)


def test_commands_and_options_are_the_programs() -> None:
    assert set(re.findall(r"`mergekit-lfm (\w+)", README)) | {"merge"} == set(main.commands)
    table = README[README.index("| option |") : README.index("| command |")]
    options = {name for parameter in merge.params for name in parameter.opts if name.startswith("-")}
    documented = set(re.findall(r"`?(--?[a-z][a-z-]*)", table))
    assert documented <= options | {"--help"}
    assert {name for name in options if name.startswith("--")} - documented <= {"--quiet", "--verbose", "--help"}
