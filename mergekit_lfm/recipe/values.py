"""Read a recipe's setting of one parameter: a value, a gradient over the layers, or rules by tensor name.

Every form becomes a `Setting`, a tuple of rules; the first rule that matches a tensor's name holds. A filter is a plain
substring; no filter, or "*", matches everything. A rule's values are spread over the layers: a single value holds
everywhere, several floats are interpolated, several values of another kind take turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import Refusal, did_you_mean
from mergekit_lfm.methods.method import Parameter, Value
from mergekit_lfm.recipe.problems import InnerError, UnknownKey

FOUND = "found {found}, expected {expected}"
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
        raise InnerError(
            at,
            "found {found} beside filters, expected {expected}",
            found=repr(raw),
            expected="a mapping of `filter` and `value`",
        )
    for key in raw:
        if key not in ("filter", "value"):
            cure = did_you_mean(key, ("filter", "value"))
            raise UnknownKey(at, key, "unknown key {found}, {cure}", found=repr(key), cure=cure)
    if "value" not in raw:
        raise InnerError(at, FOUND, found="a filter without `value`", expected="both")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise InnerError(f"{at}.filter", FOUND, found=repr(pattern), expected="text that is part of a tensor's name")
    return Rule(None if pattern in ("*", "") else pattern, _read_values(raw["value"], parameter, f"{at}.value"))


def _read_values(raw: object, parameter: Parameter, at: str) -> tuple[Value, ...]:
    if raw is None and parameter.default is None:
        return (None,)
    if not isinstance(raw, list | tuple):
        return (_read_value_at(raw, parameter, at),)
    if not raw:
        points = "one value or one per point from first to last layer"
        raise InnerError(at, FOUND, found="an empty list", expected=points)
    return tuple(_read_value_at(value, parameter, f"{at}[{i}]") for i, value in enumerate(raw))


def _read_value_at(raw: object, parameter: Parameter, at: str) -> Value:
    try:
        return read_value(raw, parameter)
    except Refusal as wrong:
        raise InnerError(at, "{text}", text=wrong, **wrong.parts) from None


def read_value(raw: object, parameter: Parameter) -> Value:
    """`raw` as the parameter's kind, within its bounds. Raises Refusal with the value and the expectation."""
    try:
        return _typed_value(raw, parameter)
    except Refusal as wrong:
        raise Refusal("found {found}, expected {rest}", found=repr(raw), rest=wrong, **wrong.parts) from None


def _typed_value(value: object, parameter: Parameter) -> Value:
    """`value` as the parameter's kind; Refusal names the expectation.

    Numbers may be text, as YAML reads 1e-1; switches may be 0 and 1, as searches for recipes write them.
    """
    kind, choices = parameter.kind, parameter.choices
    if kind in ("bool", "switch") and isinstance(value, Real) and value in (0, 1):
        return bool(value)
    if kind in ("float", "int") and isinstance(value, str | Real) and not isinstance(value, bool):
        return _number(value, parameter)
    if kind in ("str", "switch") and isinstance(value, str) and (value in choices or not choices):
        return value
    expected = f"one of {', '.join(choices)}" if choices and kind == "str" else ", ".join((_KINDS[kind], *choices))
    if choices and isinstance(value, str):
        raise Refusal("{expected}; {cure}", expected=expected, cure=did_you_mean(value, choices))
    raise _expect(expected)


def _number(value: str | Real, parameter: Parameter) -> int | float:
    expected = _KINDS[parameter.kind]
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _expect(expected) from None
    if not math.isfinite(number) or (parameter.kind == "int" and not number.is_integer()):
        raise _expect(expected if parameter.kind == "int" else "a finite number")
    low, above, high = parameter.minimum, parameter.above, parameter.maximum
    exact = value if isinstance(value, int) else number  # float64 has 53 bits, seeds have 64
    if low is not None and exact < low:
        raise _expect(f"{expected} of at least {bound_text(low)}")
    if above is not None and exact <= above:
        raise _expect(f"{expected} above {bound_text(above)}")
    if high is not None and exact > high:
        raise _expect(f"{expected} of at most {bound_text(high)}")
    return int(exact) if parameter.kind == "int" else number


def _expect(expected: str) -> Refusal:
    return Refusal("{expected}", expected=expected)


def bound_text(bound: float) -> str:
    """A bound in messages: a whole number in full, since seeds have 64 bits."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def find_rule(setting: Setting, tensor: str) -> Rule | None:
    """The first rule that applies to `tensor`, None without one."""
    return next((rule for rule in setting if rule.matches(tensor)), None)


def value_of(rule: Rule, parameter: Parameter, layer: tuple[int, int] | None) -> Value:
    """The value for a tensor in layer (index, count).

    The position runs from 0 in the first layer to 1 in the last; a single layer is at 1, and tensors outside the layers
    (layer None: embeddings, final norm, head) are at 0.
    """
    index, count = layer or (0, 2)
    last = len(rule.values) - 1
    left, rest = divmod(index * last, count - 1) if count > 1 else (last, 0)
    if parameter.kind != "float" or rest == 0:
        return rule.values[left]
    low, high = (float(value) for value in rule.values[left : left + 2] if value is not None)
    share = rest / (count - 1)
    return (1 - share) * low + share * high


def as_data(setting: Setting) -> Any:
    """`setting` in its shortest form that reads back the same: a value, a list, or a list of mappings. JSON-able."""
    plain = [rule.values[0] if len(rule.values) == 1 else list(rule.values) for rule in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return plain[0]
    return [{"filter": rule.filter or "*", "value": value} for rule, value in zip(setting, plain, strict=True)]
