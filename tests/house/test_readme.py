"""The README's examples run and print what it says; its tables name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lfm.commands import align, main, merge
from mergekit_lfm.methods import METHODS
from mergekit_lfm.recipe.align import ALIGN_METHODS

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/statistics.md", "docs/alignment.md")
README, STATISTICS, ALIGNMENT = ((ROOT / name).read_text("utf-8") for name in DOCUMENTS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes, as in a clone."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("minilm", "digits", "llamas"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("document", "prints"), [(README, 2), (STATISTICS, 1), (ALIGNMENT, 1)], ids=DOCUMENTS)
def test_the_python_example_prints_what_its_comments_say(document: str, prints: int, here: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    ran = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert len(expected) == prints and ran.stdout.splitlines() == expected


def test_the_recipe_shown_is_the_quick_start(here: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0]
    (here / "recipes" / "shown.yaml").write_text(shown)
    plans = [CliRunner().invoke(main, ["plan", f"recipes/{name}.yaml", "--json"]) for name in ("shown", "quickstart")]
    digests = [re.findall(r'"digest": "(\w+)"', plan.output) for plan in plans]
    assert digests[0] and digests[0] == digests[1]


def test_the_recipe_with_statistics_is_the_one_in_recipes() -> None:
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[2])
    there = yaml.safe_load((ROOT / "recipes" / "minilm_regmean.yaml").read_text("utf-8"))
    assert shown == {key: there[key] for key in ("merge_method", "models")}


def test_the_recipe_that_aligns_is_the_one_in_recipes() -> None:
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[3])
    there = yaml.safe_load((ROOT / "recipes" / "digits_aligned.yaml").read_text("utf-8"))
    assert there["models"][1]["align"].pop("restarts") == 10  # the default
    assert shown == there


def test_the_table_of_aligners_and_the_option_name_what_there_is() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", section(ALIGNMENT, "Methods"), re.MULTILINE)
    assert shown == list(ALIGN_METHODS) == list(align.METHODS)
    options = {option.name for option in main.commands["align"].params}
    assert {p.name for method in ALIGN_METHODS.values() for p in method.parameters} <= options


def section(document: str, heading: str) -> str:
    return document[document.index(f"## {heading}") :].partition("\n## ")[0]


def test_the_table_of_the_digits_is_that_of_the_docs() -> None:
    names = {"the base": "base", "`task_arithmetic`, best of eleven lambdas": "task arithmetic, best lambda"}
    names |= {"average": "average", "`fisher`": "Fisher", "`regmean`, alpha 1": "RegMean, alpha 1"}
    names |= {"trained on all views together": "trained on all tasks"}
    row = re.compile(r"^\| (.+?) \| (.*\d.*) \|$", re.MULTILINE)
    shown = dict(row.findall(section(README, "Merges that look at data")))
    full = dict(row.findall(section(STATISTICS, "What it is worth: digits")))
    means = {name: re.sub(r" \(.*?\)", "", numbers) for name, numbers in full.items()}
    assert {name: numbers.replace("*", "") for name, numbers in shown.items() if name in names} == {
        name: means[there] for name, there in names.items()
    }


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
