"""The rules by which a recipe renames a model's tensors, so that they match those of the other models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PATTERN = "re:"  # before a regular expression; names of tensors do not begin with it


@dataclass(frozen=True, slots=True)
class RenameRule:
    """`old` as written: the beginning of a name, or PATTERN and a regular expression. `new` takes its place."""

    old: str
    new: str

    def apply(self, name: str) -> str | None:
        """The new name of a tensor; None if the rule does not match it. Every match of a pattern is replaced."""
        if self.old.startswith(PATTERN):
            renamed, count = re.subn(self.old.removeprefix(PATTERN), self.new, name)
            return renamed if count else None
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else None


def read_rename(raw: object) -> tuple[RenameRule, ...]:
    """The rules in a recipe's `rename`. Raises ValueError with all that is wrong, a line for each."""
    if not isinstance(raw, Mapping) or not all(isinstance(text, str) for pair in raw.items() for text in pair):
        raise ValueError(
            f"found {raw!r}, expected a mapping from the beginnings of names to new ones, such as "
            f'{{"bert.": ""}}, or from patterns, such as {{"{PATTERN}^h\\\\.": "model.h."}}'
        )
    problems = []
    for old, new in raw.items():
        try:
            RenameRule(old, new).apply("")
        except (re.error, IndexError) as error:
            problems.append(f"{old!r} to {new!r}: found no regular expression and its replacement ({error}); mend them")
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(RenameRule(old, new) for old, new in raw.items())


def rename_data(rules: tuple[RenameRule, ...]) -> dict[str, str]:
    """The rules as a recipe has them."""
    return {rule.old: rule.new for rule in rules}
