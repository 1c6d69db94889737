"""The examples of the README and the guides run and print the lines shown; their tables name the methods there are."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.merge import merge
from mergekit_lfm.methods.kinds import AlignMethod, AnyMethod
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.registry import ALIGN_METHODS, EDIT_METHODS, STATISTIC_METHODS

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/statistics.md", "docs/alignment.md")
README, STATISTICS, ALIGNMENT = ((ROOT / name).read_text("utf-8") for name in DOCUMENTS)
MERGING, EDITING, INSTALLATION = (
    (ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("merging", "editing", "installation")
)
TEXTS = "--text recipes/quickstart/docs.txt --text recipes/quickstart/code.txt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes, as in a clone."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("minilm", "digits", "llamas"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipes_in(document: str) -> list[str]:
    """The recipes that a document shows."""
    return re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)


def shown(document: str, command: str) -> list[str]:
    """The lines that a document shows below a command."""
    (block,) = re.findall(rf"^    \$ {re.escape(command)}\n((?:    (?!\$).*\n)+)", document, re.MULTILINE)
    return [line.removeprefix("    ") for line in block.splitlines()]


def run(command: str) -> list[str]:
    """The lines that a command prints, in order of the streams: errors and notices first."""
    name, *arguments = shlex.split(command)
    result = CliRunner().invoke(merge if name == "merge" else main, arguments)
    assert result.exit_code == 0, result.output
    return [*result.stderr.splitlines(), *result.stdout.splitlines()]


def general(lines: list[str]) -> list[str]:
    """The lines without times."""
    return [re.sub(r"in \d+\.\d s", "in 0.0 s", line) for line in lines]


@pytest.mark.parametrize(("document", "prints"), [(README, 3), (STATISTICS, 1), (ALIGNMENT, 1)], ids=DOCUMENTS)
def test_the_python_example_prints_the_lines_in_its_comments(document: str, prints: int, here: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    ran = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert len(expected) == prints and ran.stdout.splitlines() == expected


def test_the_recipe_shown_is_the_quick_start(here: Path) -> None:
    (here / "recipes" / "shown.yaml").write_text(recipes_in(README)[0])
    plans = [CliRunner().invoke(main, ["plan", f"recipes/{name}.yaml", "--json"]) for name in ("shown", "quickstart")]
    digests = [re.findall(r'"digest": "(\w+)"', plan.output) for plan in plans]
    assert digests[0] and digests[0] == digests[1]


def test_the_recipe_that_aligns_is_the_one_in_recipes() -> None:
    there = yaml.safe_load((ROOT / "recipes" / "digits_aligned.yaml").read_text("utf-8"))
    assert there["models"][1]["align"].pop("restarts") == 10  # the default
    assert yaml.safe_load(recipes_in(README)[1]) == there


def test_the_plan_shown_is_the_plan(here: Path) -> None:
    command = "merge recipes/quickstart.yaml --dry-run"
    printed = run(command)
    for line in shown(README, command):
        if line and "disk" not in line and "memory" not in line:  # these are the machine's
            assert line in printed
    assert not (here / "merged").exists()


def test_the_quick_start_is_merged_and_evaluated_as_shown(here: Path) -> None:
    command = "merge recipes/quickstart.yaml"
    assert general(run(command)) == general([line for line in shown(README, command) if line])
    assert (here / "merged/quickstart/model.safetensors").exists()
    quickstart = " ".join(f"recipes/quickstart/{name}" for name in ("base", "docs", "code"))
    command = f"mergekit-lfm eval {quickstart} merged/quickstart {TEXTS}"
    assert_rows(run(command), shown(README, command))


def test_the_merge_with_statistics_runs_as_shown(here: Path) -> None:
    for name in ("docs", "code"):
        model = f"recipes/quickstart/{name}"
        command = f"mergekit-lfm stats gram {model} --data {model}.txt --task lm -o {name}.gram.safetensors -q"
        assert run(command) == [f"{name}.gram.safetensors"] and command in README
    (here / "regmean.yaml").write_text(recipes_in(README)[2])
    assert general(run("merge regmean.yaml")) == general([line for line in shown(README, "merge regmean.yaml") if line])
    command = f"mergekit-lfm eval merged/regmean {TEXTS}"
    assert_rows(run(command), shown(README, command))


@pytest.mark.usefixtures("here")
def test_the_adapter_is_extracted_and_applied_as_shown() -> None:
    for command in re.findall(r"^    \$ (mergekit-lfm (?:extract-lora|eval \S+\+).*)$", README, re.MULTILINE):
        expected = shown(README, command)
        assert_rows(run(command)[: len(expected)], expected)  # the table, up to an empty line


def assert_rows(printed: list[str], expected: list[str]) -> None:
    """The same tables, numbers within rounding: sums of floats differ between processors."""
    rows = [[line.split() for line in lines if line.strip()] for lines in (printed, expected)]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if re.fullmatch(r"[\d,]+\.\d+%?", one):
                number, there = (float(each.rstrip("%").replace(",", "")) for each in (one, other))
                assert number == pytest.approx(there, rel=2e-3)
            else:
                assert one == other


def test_the_edit_shown_is_that_of_the_guide() -> None:
    (command,) = re.findall(r"^    \$ (mergekit-lfm edit .*)$", README, re.MULTILINE)
    guide = EDITING.replace("\\\n", " ").replace("         --clamp", " --clamp")
    assert shown(README, command) == shown(re.sub(r" {2,}--", " --", guide), command)


def test_the_table_of_speed_is_that_of_the_guide() -> None:
    full = {row[0]: row for row in rows_of(section(MERGING, "Speed"))}
    table = rows_of(README[README.index("| `python benchmarks") : README.index("Not there yet")])
    assert len(table) == 5
    for method, inputs, merge_s, floor_s, memory in table:
        assert (inputs, merge_s, floor_s, memory) == (
            full[method][1],
            full[method][2],
            full[method][4],
            full[method][7],
        )


def rows_of(text: str) -> list[list[str]]:
    """The rows of a table that start with a word, less their heads."""
    return [re.split(r" \| ", row) for row in re.findall(r"^\| (\w+ \| .*\d.*?) \|$", text, re.MULTILINE)]


def test_every_method_and_no_other_is_in_the_table() -> None:
    table = section(MERGING, "Methods")
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(METHODS)


TABLES: list[tuple[str, str, Mapping[str, AnyMethod]]] = [
    (ALIGNMENT, "| `--method` | what it finds |", ALIGN_METHODS),
    (EDITING, "| `--method` | what it does |", EDIT_METHODS),
    (STATISTICS, "| kind | what it holds |", STATISTIC_METHODS),
]


@pytest.mark.parametrize(("document", "heads", "methods"), TABLES, ids=["align", "edit", "stats"])
def test_the_table_of_a_guide_is_that_of_the_declarations(
    document: str, heads: str, methods: Mapping[str, AnyMethod]
) -> None:
    table = document[document.index(heads) :].partition("\n\n")[0]
    rows = {row.split("`")[1]: row for row in table.splitlines()[2:]}
    assert sorted(rows) == list(methods)
    for name, method in methods.items():
        linked = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", rows[name]))
        assert linked <= set(re.findall(r"\d{4}\.\d{5}", method.source)) and (linked or methods is STATISTIC_METHODS)
        if isinstance(method, AlignMethod):
            assert ("`stats cross`" in rows[name]) == (method.statistics != "no")
            assert ("or `stats" in rows[name] or "with `stats" in rows[name]) == (method.statistics == "optional")


def test_the_table_of_options_has_the_defaults_of_the_declarations() -> None:
    table = section(EDITING, "Options").partition("\n\nPresets")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", table, re.MULTILINE))
    defaults: dict[str, dict[str, Any]] = {}
    for method in EDIT_METHODS.values():
        for parameter in method.parameters:
            defaults.setdefault(parameter.name, {})[method.name] = parameter.default
    texts = {name: {method: as_text(value) for method, value in of.items()} for name, of in defaults.items()}
    for name, of in texts.items():
        (_, first), *others = of.items()
        differing = [f"`{method}` {text}" for method, text in others if text != first]
        assert rows[name] == "; ".join([first, *differing])
    assert rows.keys() - texts.keys() == {"layers", "context_templates", "kl_template", "covariance"}


def as_text(default: Any) -> str:
    """A default as the table has it."""
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else f"`{default}`" if isinstance(default, str) else f"{default:g}"


def section(document: str, heading: str) -> str:
    """The part of a document under a heading of the second level."""
    return document[document.index(f"## {heading}\n") :].partition("\n## ")[0]


def test_the_completion_shown_is_the_one_that_the_programs_have() -> None:
    for variable, program in re.findall(r'eval "\$\((\w+)=bash_source ([\w-]+)\)"', INSTALLATION):
        assert variable == f"_{program.upper().replace('-', '_')}_COMPLETE"
    assert INSTALLATION.count("bash_source") == 2


def test_the_guides_name_no_program_that_is_not_there() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for path in documents:
        for program in re.findall(r"\b((?:scripts|recipes/make|benchmarks)/\w+\.py)\b", path.read_text("utf-8")):
            assert (ROOT / program).exists(), f"{path.name} names {program}"
