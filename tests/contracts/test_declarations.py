"""The contract of declarations of every kind: registered, documented, in the recipe, the command and `methods`."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from helpers_commands import run

from mergekit_lfm.commands.app import main
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import AlignMethod, AnyMethod, EditMethod, TuneMethod
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.align import align_options
from mergekit_lfm.recipe.edit import edit_options
from mergekit_lfm.recipe.registry import STATISTIC_METHODS, all_methods
from mergekit_lfm.recipe.stats import statistic_options
from mergekit_lfm.recipe.tune_options import tune_options
from mergekit_lfm.recipe.values import read_value

FOLDERS = {
    "merge": "mergekit_lfm.methods",
    "align": "mergekit_lfm.align.methods",
    "edit": "mergekit_lfm.edit.methods",
    "stats": "mergekit_lfm.collect.methods",
    "tune": "mergekit_lfm.tune.methods",
}
MACHINERY = {"__init__", "find", "kinds", "method", "registry"}
FILES = [
    (kind, path.stem)
    for kind, package in FOLDERS.items()
    for path in sorted(Path(import_module(package).__path__[0]).glob("*.py"))
    if kind != "merge" or path.stem not in MACHINERY
    if path.stem != "__init__"
]
KINDS = all_methods()
ALL = [pytest.param(kind, m, id=f"{kind}-{m.name}") for kind, methods in KINDS.items() for m in methods.values()]
OTHERS = [case for case in ALL if case.values[0] != "merge"]
PARAMETERS = [
    pytest.param(kind, m, p, id=f"{kind}-{m.name}-{p.name}")
    for kind, methods in KINDS.items()
    for m in methods.values()
    for p in m.parameters
]
OTHER_PARAMETERS = [case for case in PARAMETERS if case.values[0] != "merge"]


def declared(kind: str, file: str) -> tuple[AnyMethod, ...]:
    """The methods that a file declares."""
    found: tuple[AnyMethod, ...] = import_module(f"{FOLDERS[kind]}.{file}").METHODS
    return found


def code_of(method: AnyMethod) -> Callable[..., Any]:
    """The function that does the work."""
    if isinstance(method, Method):
        return method.apply
    if isinstance(method, AlignMethod):
        found: Callable[..., Any] = method.find
    elif isinstance(method, TuneMethod):
        found = method.prepare
    else:
        found = method.solve if isinstance(method, EditMethod) else method.start
    return found


def options_of(kind: str, method: AnyMethod, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a method's options as the room reads them."""
    if isinstance(method, AlignMethod):
        return align_options(method.name, given, statistics=method.statistics == "required")
    if kind == "tune":
        return tune_options(method.name, given)
    return edit_options(method.name, given) if kind == "edit" else statistic_options(method.name, given)


def command_of(kind: str, method: AnyMethod) -> click.Command:
    """The command that runs a method."""
    command = main.commands[kind]
    return command.commands[method.name] if isinstance(command, click.Group) else command


def option_of(kind: str, method: AnyMethod, parameter: Parameter) -> click.Option:
    """The command's option for a parameter."""
    flag = f"--{parameter.name.replace('_', '-')}"
    (option,) = [p for p in command_of(kind, method).params if isinstance(p, click.Option) and flag in p.opts]
    return option


# ------------------------------------------------------------------ what a declaration says


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_declared_methods_are_registered(kind: str, file: str) -> None:
    methods = declared(kind, file)
    assert isinstance(methods, tuple) and methods
    assert [method for method in methods if KINDS[kind][method.name] is not method] == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_registered(kind: str) -> None:
    assert sorted(m.name for of, file in FILES if of == kind for m in declared(kind, file)) == list(KINDS[kind])


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_method_is_documented(kind: str, method: AnyMethod) -> None:
    assert KINDS[kind][method.name] is method
    assert method.summary and not method.summary.endswith(".") and method.source
    code = code_of(method)
    module = inspect.getmodule(code)
    assert module is not None and module.__doc__ and (code.__doc__ or kind == "merge")


@pytest.mark.parametrize(("kind", "method", "parameter"), PARAMETERS)
def test_parameter_is_documented_and_its_default_allowed(kind: str, method: AnyMethod, parameter: Parameter) -> None:
    assert [p.name for p in method.parameters].count(parameter.name) == 1
    assert parameter.doc and not parameter.doc.endswith(".")
    if parameter.default is not REQUIRED and parameter.default is not None:
        assert read_value(parameter.default, parameter) == parameter.default
    if kind != "merge":
        assert parameter.default is not REQUIRED and parameter.kind != "switch" and not parameter.per_input


def test_merges_name_statistics_that_there_are() -> None:
    named = {method.statistics for method in METHODS.values() if method.statistics is not None}
    assert named and named <= STATISTIC_METHODS.keys()


# ------------------------------------------------------------------ what follows from it


@pytest.mark.parametrize(("kind", "method"), OTHERS)
def test_the_defaults_are_the_options(kind: str, method: AnyMethod) -> None:
    found = options_of(kind, method, {})
    assert {p.name: found[p.name] for p in method.parameters} == {p.name: p.default for p in method.parameters}
    with pytest.raises(PlanError, match=rf"nonsense: {method.name} has no such (parameter|option)"):
        options_of(kind, method, {"nonsense": 1})


def beyond(parameter: Parameter) -> list[Any]:
    """Values that a parameter does not take."""
    numbers = {
        "minimum": None if parameter.minimum is None else parameter.minimum - 1,
        "above": parameter.above,
        "maximum": None if parameter.maximum is None else parameter.maximum + 1,
    }
    return [number for number in numbers.values() if number is not None] + ["nonsense"] * bool(parameter.choices)


@pytest.mark.parametrize(("kind", "method", "parameter"), OTHER_PARAMETERS)
def test_the_recipe_and_the_command_have_the_same_bounds(kind: str, method: AnyMethod, parameter: Parameter) -> None:
    option = option_of(kind, method, parameter)
    assert option.help
    for value in beyond(parameter):
        with pytest.raises(PlanError, match=rf"\.{parameter.name}: found {value!r}, expected"):
            options_of(kind, method, {parameter.name: value})
        with pytest.raises(click.BadParameter):
            option.type.convert(str(value), option, None)
    allowed = [parameter.minimum, parameter.maximum, *parameter.choices, parameter.default]
    for value in (value for value in allowed if value is not None and parameter.kind != "bool"):
        read = options_of(kind, method, {parameter.name: value})[parameter.name]
        assert option.type.convert(str(value), option, None) == read == value


@pytest.mark.parametrize("kind", ["align", "edit"])
def test_help_has_every_method_with_its_summary(kind: str) -> None:
    lines = [" ".join(line.split()) for line in run(kind, "--help").stdout.splitlines()]
    assert all(f"{method.name} {method.summary}" in lines for method in KINDS[kind].values())


def test_every_statistic_has_a_command() -> None:
    group = main.commands["stats"]
    assert isinstance(group, click.Group) and list(group.commands) == list(STATISTIC_METHODS)
    for name, method in STATISTIC_METHODS.items():
        arguments = [p.name for p in group.commands[name].params if isinstance(p, click.Argument)]
        assert arguments == ["model", "other"][: method.models]


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_its_page_has_its_source_and_every_parameter(kind: str, method: AnyMethod) -> None:
    page = run("methods", method.name).stdout
    assert ["kind", kind] in [line.split() for line in page.splitlines()]
    assert method.summary in page and method.source in page
    assert all(parameter.doc in page for parameter in method.parameters)


# ------------------------------------------------------------------ one file is enough

NEW = {
    "align/upside_down.py": '''
"""Turn units upside down."""
from mergekit_lfm.methods.kinds import AlignMethod
from mergekit_lfm.methods.method import Parameter

STRENGTH = Parameter("strength", 1.5, above=0, maximum=3, doc="how far to turn")
METHODS = (AlignMethod("upside_down", "folklore", "units upside down", print, parameters=(STRENGTH,)),)
''',
    "edit/forget.py": '''
"""Forget facts."""
from mergekit_lfm.methods.kinds import EditMethod
from mergekit_lfm.methods.method import Parameter

HOW = Parameter("how_fast", "slowly", kind="str", choices=("slowly", "at_once"), doc="the speed")
METHODS = (EditMethod("forget", "folklore", "facts less", print, (0.25, 0.5), parameters=(HOW,)),)
''',
    "collect/ranges.py": '''
"""The range of each input."""
from mergekit_lfm.methods.kinds import StatisticMethod
from mergekit_lfm.methods.method import Parameter

BINS = Parameter("bins", 10, kind="int", minimum=2, doc="the number of bins")
METHODS = (StatisticMethod("ranges", "folklore", "the ranges of inputs", "For plots.", ("-o r",), print, (BINS,)),)
''',
}
PROGRAM = """
import json, sys
from importlib import import_module

for room in ("align", "edit", "collect"):
    import_module(f"mergekit_lfm.{room}.methods").__path__.append(room)

from click.testing import CliRunner
from mergekit_lfm.commands.app import main
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stats import statistic_options

def shown(*arguments):
    return CliRunner().invoke(main, arguments).output

def parsed(command, *arguments):
    return command.make_context("", [*arguments]).params

align = {"to": "a", "method": "upside_down", "strength": 2}
edit = {"facts": "facts.yaml", "method": "forget", "how_fast": "at_once"}
recipe = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 1}}
recipe["models"] = [{"model": "a"}, {"model": "b", "align": align}]
gather = ["a", "--data", "x", "--task", "lm", "-o", "o"]
print(json.dumps({
    "list": shown("methods"),
    "pages": [shown("methods", name) for name in ("upside_down", "forget", "ranges")],
    "help": [shown("align", "--help"), shown("edit", "--help"), shown("stats", "ranges", "--help")],
    "align": parsed(main.commands["align"], "a", "--method", "upside_down", "--strength", "2")["strength"],
    "edit": parsed(main.commands["edit"], "a", "--facts", "f", "-o", "o", "--how-fast", "at_once")["how_fast"],
    "stats": parsed(main.commands["stats"].commands["ranges"], *gather, "--bins", "3")["bins"],
    "recipe": Recipe.parse({**recipe, "edits": [edit]}).normalised(),
    "options": statistic_options("ranges", {}),
    "torch": "torch" in sys.modules,
}))
"""


def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    """Recipe, command, help and `methods` know it, without another line and without torch."""
    for name, text in NEW.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "facts.yaml").write_text("- {subject: Ada, prompt: '{} lives in', target_new: ' Rome'}\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    listed = [line.split() for line in found["list"].splitlines()]
    assert ["align", "upside_down", "units", "upside", "down"] in listed
    assert ["edit", "forget", "facts", "less"] in listed
    assert ["stats", "ranges", "the", "ranges", "of", "inputs"] in listed
    docs = ("how far to turn", "the speed", "the number of bins")
    assert all(doc in page for doc, page in zip(docs, found["pages"], strict=True))
    wanted = (
        "For upside_down: how far to turn. [default: 1.5] [0<x<=3]",
        "For forget: the speed. [default: slowly]",
        "The number of bins. [default: 10] [x>=2]",
    )
    assert all(text in " ".join(page.split()) for text, page in zip(wanted, found["help"], strict=True))
    assert "forget those from 1/4 to 1/2 of the depth" in " ".join(found["help"][1].split())
    assert (found["align"], found["edit"], found["stats"], found["options"]) == (2.0, "at_once", 3, {"bins": 10})
    assert found["recipe"]["models"][1]["align"] == {"to": "a", "method": "upside_down", "strength": 2.0}
    assert found["recipe"]["edits"] == [{"facts": "facts.yaml", "method": "forget", "how_fast": "at_once"}]
    assert found["torch"] is False
