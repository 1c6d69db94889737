"""Read a recipe's setting of one parameter: a value, a gradient over the layers, or rules by tensor name.

Every form becomes a `Setting`, a tuple of rules; the first rule that matches a tensor's name holds. A filter is a plain
substring; no filter, or "*", matches everything. A rule's values are spread over the layers: a single value holds
everywhere, several floats are interpolated, several values of another kind take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.methods.method import Parameter, Required, Value

_KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "switch": "true or false",
}


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that a recipe names: `ref` as written, `path` (absolute)."""

    ref: str
    path: Path


@dataclass(frozen=True, slots=True)
class Rule:
    """`values` for the tensors whose name contains `filter`; None matches all."""

    filter: str | None
    values: tuple[Value, ...]

    def matches(self, tensor: str) -> bool:
        """True if the rule applies to `tensor`."""
        return self.filter is None or self.filter in tensor


Setting = tuple[Rule, ...]


def read_setting(raw: object, parameter: Parameter) -> Setting:
    """The rules for `raw`, a value as YAML gives it.

    Raises ValueError if some value has none of the four forms, is not of the parameter's kind or is out of bounds.
    """
    if isinstance(raw, dict):
        return (_read_rule(raw, parameter, ""),)
    if isinstance(raw, list | tuple) and any(isinstance(item, dict) for item in raw):
        return tuple(_read_rule(item, parameter, f"[{i}]") for i, item in enumerate(raw))
    return (Rule(None, _read_values(raw, parameter, "")),)


def _read_rule(raw: object, parameter: Parameter, at: str) -> Rule:
    if not isinstance(raw, dict):
        raise ValueError(f"{at}: found {raw!r} beside filters, expected a mapping of `filter` and `value`")
    for key in raw:
        if key not in ("filter", "value"):
            raise ValueError(f"{at}: unknown key {key!r}, {did_you_mean(key, ('filter', 'value'))}")
    if "value" not in raw:
        raise ValueError(f"{at}: found a filter without `value`, expected both")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise ValueError(f"{at}.filter: found {pattern!r}, expected text that is part of a tensor's name")
    return Rule(None if pattern in ("*", "") else pattern, _read_values(raw["value"], parameter, f"{at}.value"))


def _read_values(raw: object, parameter: Parameter, at: str) -> tuple[Value, ...]:
    if raw is None and parameter.default is None:
        return (None,)
    if not isinstance(raw, list | tuple):
        return (read_value(raw, parameter, at),)
    if not raw:
        raise ValueError(f"{at}: found an empty list, expected one value or one per point from first to last layer")
    return tuple(read_value(value, parameter, f"{at}[{i}]") for i, value in enumerate(raw))


Reader = Callable[[Any, str], Any]  # the value in what YAML gives; ValueError with the place, the second argument
M = TypeVar("M")


def find_method(name: str, methods: Mapping[str, M], place: str) -> M:
    """The method of this name. Raises PlanError for an unknown one."""
    if name not in methods:
        raise PlanError(f"{place}.method: unknown method {name!r}, {did_you_mean(name, methods)}")
    return methods[name]


def defaults_of(parameters: Iterable[Parameter]) -> dict[str, Value]:
    """The default of every parameter of a method that requires none."""
    return {p.name: p.default for p in parameters if not isinstance(p.default, Required)}


def readers_of(parameters: Iterable[Parameter]) -> dict[str, Reader]:
    """For each parameter, the function that reads its single value; None stands for a default of None."""

    def reader(parameter: Parameter) -> Reader:
        none = parameter.default is None
        return lambda raw, at: None if none and raw is None else read_value(raw, parameter, at)

    return {parameter.name: reader(parameter) for parameter in parameters}


def read_options(
    given: Mapping[str, Any], readers: Mapping[str, Reader], method: str, place: str, *, noun: str = "parameter"
) -> tuple[dict[str, Any], list[str]]:
    """The values given, each read by the reader of its name, and a line for every problem."""
    values, problems = dict[str, Any](), list[str]()
    for name, raw in given.items():
        if name not in readers:
            problems.append(f"{place}.{name}: {method} has no such {noun}, {did_you_mean(name, readers)}")
            continue
        try:
            values[name] = readers[name](raw, f"{place}.{name}")
        except ValueError as wrong:
            problems.append(str(wrong))
    return values, problems


def read_value(raw: object, parameter: Parameter, at: str) -> Value:
    """`raw` as the parameter's kind, within its bounds. Raises ValueError with `at`, value and expectation."""
    try:
        return _typed_value(raw, parameter)
    except ValueError as expected:
        raise ValueError(f"{at}: found {raw!r}, expected {expected}") from None


def _typed_value(value: object, parameter: Parameter) -> Value:
    """`value` as the parameter's kind; ValueError names the expectation. Numbers may be text, as YAML reads 1e-1."""
    kind, choices = parameter.kind, parameter.choices
    if kind in ("bool", "switch") and isinstance(value, bool):
        return value
    if kind in ("float", "int") and isinstance(value, str | Real) and not isinstance(value, bool):
        return _number(value, parameter)
    if kind in ("str", "switch") and isinstance(value, str) and (value in choices or not choices):
        return value
    expected = f"one of {', '.join(choices)}" if choices and kind == "str" else ", ".join((_KINDS[kind], *choices))
    raise ValueError(f"{expected}; {did_you_mean(value, choices)}" if choices and isinstance(value, str) else expected)


def _number(value: str | Real, parameter: Parameter) -> int | float:
    expected = _KINDS[parameter.kind]
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
    if not math.isfinite(number) or (parameter.kind == "int" and not number.is_integer()):
        raise ValueError(expected if parameter.kind == "int" else "a finite number")
    low, above, high = parameter.minimum, parameter.above, parameter.maximum
    exact = value if isinstance(value, int) else number  # float64 has 53 bits, seeds have 64
    if low is not None and exact < low:
        raise ValueError(f"{expected} of at least {bound_text(low)}")
    if above is not None and exact <= above:
        raise ValueError(f"{expected} above {bound_text(above)}")
    if high is not None and exact > high:
        raise ValueError(f"{expected} of at most {bound_text(high)}")
    return int(exact) if parameter.kind == "int" else number


def bound_text(bound: float) -> str:
    """A bound in messages: a whole number in full, since seeds have 64 bits."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def value_at(setting: Setting, parameter: Parameter, tensor: str, layer: tuple[int, int] | None) -> tuple[Value] | None:
    """The value for `tensor` in layer (index, count), as a tuple of one; None if no rule matches.

    The position runs from 0 in the first layer to 1 in the last; a single layer is at 1, and tensors outside the layers
    (layer None: embeddings, final norm, head) are at 0.
    """
    rule = next((rule for rule in setting if rule.matches(tensor)), None)
    if rule is None:
        return None
    index, count = layer or (0, 2)
    last = len(rule.values) - 1
    left, rest = divmod(index * last, count - 1) if count > 1 else (last, 0)
    if parameter.kind != "float" or rest == 0:
        return (rule.values[left],)
    low, high = (float(value) for value in rule.values[left : left + 2] if value is not None)
    share = rest / (count - 1)
    return ((1 - share) * low + share * high,)


def as_data(setting: Setting) -> Any:
    """`setting` in its shortest form that reads back the same: a value, a list, or a list of mappings. JSON-able."""
    plain = [rule.values[0] if len(rule.values) == 1 else list(rule.values) for rule in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return plain[0]
    return [{"filter": rule.filter or "*", "value": value} for rule, value in zip(setting, plain, strict=True)]
