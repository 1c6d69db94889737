"""Options of a command that the declarations of methods make: `--method`, and one for each of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import click

from mergekit_lfm.commands.options import F, together
from mergekit_lfm.methods.kinds import AnyMethod
from mergekit_lfm.methods.method import Parameter, Required, Value


def method_option(methods: Iterable[str], default: str, sentence: str) -> Callable[[F], F]:
    """The option `--method`."""
    return click.option(
        "--method", type=click.Choice([*methods]), default=default, help=f"{sentence} [default: {default}]"
    )


def method_rows(methods: Mapping[str, AnyMethod]) -> str:
    """The methods with their summaries, for a paragraph of --help that keeps its lines."""
    width = max(map(len, methods))
    return "\n".join(f"{method.name:{width}}  {method.summary}" for method in methods.values())


class HasParameters(Protocol):
    """A method, or an algorithm, with parameters of its own."""

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...
    @property
    def name(self) -> str: ...


def parameter_options(methods: Mapping[str, HasParameters]) -> Callable[[F], F]:
    """One option for each parameter that some of the methods have, in the order of the methods; None if it is unset."""
    owners: dict[str, dict[str, Parameter]] = {}
    for method in methods.values():
        for parameter in method.parameters:
            owners.setdefault(parameter.name, {})[method.name] = parameter
    return together(*(_option(of, len(methods)) for of in owners.values()))


def _option(owners: Mapping[str, Parameter], methods: int) -> Callable[[F], F]:
    """The option for a parameter that these methods have."""
    parameter = next(iter(owners.values()))
    name, flag = parameter.name, f"--{parameter.name.replace('_', '-')}"
    text = _help(owners, methods)
    if parameter.kind == "bool":
        off = f"/--no-{flag.removeprefix('--')}" if any(p.default for p in owners.values()) else ""
        return click.option(f"{flag}{off}", name, is_flag=True, default=None, help=text)
    return click.option(flag, name, type=_type(parameter), help=text)


def _type(parameter: Parameter) -> click.ParamType[Any]:
    if parameter.choices:
        return click.Choice(parameter.choices)
    if parameter.kind == "str":
        return click.STRING
    if parameter.kind == "int":
        least, most = (None if bound is None else int(bound) for bound in (parameter.minimum, parameter.maximum))
        return click.IntRange(least, most)
    low = parameter.minimum if parameter.above is None else parameter.above
    return click.FloatRange(low, parameter.maximum, min_open=parameter.above is not None)


def _help(owners: Mapping[str, Parameter], methods: int) -> str:
    """The parameter's sentence, the method if it is of one alone, and the default."""
    parameter = next(iter(owners.values()))
    sentence = f"for {next(iter(owners))}: {parameter.doc}" if len(owners) == 1 < methods else parameter.doc
    default = _default(owners)
    return f"{sentence[0].upper()}{sentence[1:]}." + (f" [default: {default}]" if default else "")


def _default(owners: Mapping[str, Parameter]) -> str:
    """The default in words: that of all methods, or of each; for a switch the methods that turn it on."""
    defaults = {method: parameter.default for method, parameter in owners.items()}
    parameter = next(iter(owners.values()))
    if parameter.kind == "bool":
        on = [method for method, default in defaults.items() if default]
        return f"for {', '.join(on)}" if on else ""
    if None in defaults.values():
        return parameter.unset
    if len({*defaults.values()}) == 1:
        return _in_words(parameter.default)
    return ", ".join(f"{method} {_in_words(default)}" for method, default in defaults.items())


def _in_words(default: Value | Required) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)
