"""The patterns of an adapter's config, `rank_pattern` and `alpha_pattern`: which is about a module, as PEFT decides.

A pattern is a regular expression for a name, or for its end after a dot. Most are names themselves, one for a module,
so these are looked up and not tried in turn. Source: peft 0.21, utils/other.py, get_pattern_key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAME = re.compile(r"(?:\w|\\?\.)+")  # in which a dot without a backslash stands for any character


class Patterns:
    """The patterns with their values. Raises re.error if one is not a regular expression."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns, self._values = [*patterns], [*patterns.values()]
        self._names: dict[int, dict[frozenset[int], dict[str, int]]] = {}  # by length and places of free characters
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(self._patterns):
            if _NAME.fullmatch(pattern):
                free, text = _parse(pattern)
                self._names.setdefault(len(text), {}).setdefault(free, {}).setdefault(text, number)
            else:
                self._others.append((number, re.compile(rf"(.*\.)?({pattern})$")))

    def value(self, module: str, default: Any) -> Any:
        """The value of the first pattern that is about the module."""
        number = min(self._all(module), default=None)
        return default if number is None else self._values[number]

    def idle(self, modules: Iterable[str]) -> list[str]:
        """The patterns that are about none of the modules."""
        used = {number for module in modules for number in self._all(module)}
        return [pattern for number, pattern in enumerate(self._patterns) if number not in used]

    def _all(self, module: str) -> Iterable[int]:
        """The numbers of the patterns that are about the module."""
        for start in (0, *(i + 1 for i, char in enumerate(module) if char == ".")):
            end = module[start:]
            for free, own in self._names.get(len(end), {}).items():
                number = own.get(_mask(end, free))
                if number is not None:
                    yield number
        yield from (number for number, other in self._others if other.match(module))


def _parse(pattern: str) -> tuple[frozenset[int], str]:
    """The places of the free characters in a name, and its text with dots there."""
    text = pattern.replace("\\.", "\0")
    return frozenset(i for i, char in enumerate(text) if char == "."), text.replace("\0", ".")


def _mask(text: str, free: frozenset[int]) -> str:
    return "".join("." if i in free else char for i, char in enumerate(text))
