"""The page for users of mergekit: its tables name all programs, options and keys, as the code declares them."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from mergekit_lfm.commands.extract_lora import extract_lora
from mergekit_lfm.commands.merge import merge
from mergekit_lfm.commands.mergekit import DEFAULTS, EXTRACTING, OPTIONS, PROGRAMS, MergekitOption
from mergekit_lfm.recipe.dialect import DEAD, UNUSED
from mergekit_lfm.recipe.foreign import METHODS_ELSEWHERE
from mergekit_lfm.recipe.form import ModelEntry, ModuleEntry, SliceEntry
from mergekit_lfm.recipe.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs/from-mergekit.md").read_text("utf-8")
# The keys of mergekit 0.1.5 at the top of a recipe, in a slice, its sources, a module, and a reference to a model.
MERGEKIT = {
    *("merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "chat_template", "parameters"),
    *("tokenizer_source", "tokenizer", "sources", "residual_weight", "model", "layer_range", "lora", "revision"),
    "override_architecture",
}


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = [line.strip("|\n").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def row_of(option: MergekitOption) -> list[str]:
    """The row of an option of mergekit."""
    flags = ", ".join(f"`{flag}`" for flag in (option.short, option.flag) if flag)
    if option.sets:
        return [flags, f"`{option.here}`", ""]
    return [flags, "no effect" if option.ignored else "nothing needed", option.why]


def test_the_options_are_those_of_the_declaration() -> None:
    same = [["`-v`, `--quiet`, `--device`", "the same", ""]]
    defaults = [[", ".join(f"`{flag}`" for flag in DEFAULTS), "the default here, too", ""]]
    expected = [*map(row_of, OPTIONS), *same, *defaults]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    assert table("Options of mergekit-yaml") == expected, f"write these rows:\n{lines}"


def test_the_options_for_adapters_are_those_of_the_declaration() -> None:
    same = [["`--embed-lora`, `--no-embed-lora`, `--quiet`, `--device`", "the same", ""]]
    assert table("Options of mergekit-extract-lora") == [*map(row_of, EXTRACTING), *same]


@pytest.mark.parametrize(
    ("heading", "command"),
    [("Options of mergekit-yaml", merge), ("Options of mergekit-extract-lora", extract_lora)],
)
def test_options_of_ours_in_the_table_are_the_command_s(heading: str, command: click.Command) -> None:
    named = {flag for row in table(heading) for flag in re.findall(r"(--[a-z-]+)", f"{row[1]} {row[2]}")}
    assert named and named <= {
        name for parameter in command.params if not getattr(parameter, "hidden", False) for name in parameter.opts
    }


def test_the_programs_are_those_of_the_declaration() -> None:
    assert table("Programs") == [[f"`{name}`", here] for name, here in PROGRAMS.items()]


def test_every_key_is_in_the_table_and_no_other() -> None:
    named = {key for row in table("Keys of a recipe") for key in re.findall(r"`([^`]+)`", row[0])}
    forms = (Recipe, ModelEntry, SliceEntry, ModuleEntry)
    assert named == {key for form in forms for key in form.model_fields} | {*UNUSED, DEAD} | MERGEKIT


@pytest.mark.parametrize("name", [name for name, (tool, _) in METHODS_ELSEWHERE.items() if tool == "mergekit"])
def test_methods_that_are_not_here_are_named(name: str) -> None:
    assert f"`{name}`" in PAGE
