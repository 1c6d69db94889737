"""Every merge method is registered, and states its purpose, its source, and the meaning of each parameter."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

import mergekit_lfm.methods
from mergekit_lfm.methods import METHODS, REQUIRED, Method, Parameter

PARAMETERS = [pytest.param(m, p, id=f"{m.name}-{p.name}") for m in METHODS.values() for p in m.parameters]

MACHINERY = {"__init__", "method", "registry"}
FILES = sorted(path.stem for path in Path(mergekit_lfm.methods.__file__).parent.glob("*.py"))


def declared(file: str) -> tuple[Method, ...]:
    """The methods that a file of the package declares."""
    found: tuple[Method, ...] = import_module(f"mergekit_lfm.methods.{file}").METHODS
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file not in MACHINERY])
def test_declared_methods_are_registered(file: str) -> None:
    methods = declared(file)
    assert isinstance(methods, tuple) and methods
    assert [method for method in methods if METHODS[method.name] is not method] == []


def test_nothing_else_is_registered() -> None:
    assert set(FILES) > MACHINERY
    assert sorted(m.name for file in set(FILES) - MACHINERY for m in declared(file)) == list(METHODS)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_method_is_documented(method: Method) -> None:
    assert METHODS[method.name] is method
    assert method.summary and not method.summary.endswith(".")
    assert method.source
    module = inspect.getmodule(method.apply)
    assert module is not None and module.__doc__


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS)
def test_parameter_is_documented_and_its_default_allowed(method: Method, parameter: Parameter) -> None:
    assert [p.name for p in method.parameters].count(parameter.name) == 1
    assert parameter.doc
    default = parameter.default
    if default is None or default is REQUIRED:
        return
    if parameter.kind in ("float", "int"):
        assert isinstance(default, int | float) and not isinstance(default, bool)
        assert parameter.minimum is None or default >= parameter.minimum
        assert parameter.above is None or default > parameter.above
        assert parameter.maximum is None or default <= parameter.maximum
    elif isinstance(default, str):
        assert default in parameter.choices or (parameter.kind == "str" and not parameter.choices)
    else:
        assert parameter.kind in ("bool", "switch")
