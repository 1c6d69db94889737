"""Find out by which rules a model's names become those of another: other prefixes, wrappers, other versions.

A search by steps: the rule that makes most tensors equal in name and shape, until none makes more. It counts only if
everything then matches but what the recipe, ties or loaders allow to differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from mergekit_lfm.arch.renamings import RENAMINGS
from mergekit_lfm.recipe.rename import PATTERN, RenameRule
from mergekit_lfm.store.tensors import TensorSpec

Specs = Mapping[str, TensorSpec]
STEPS = 8  # rules; real models differ by one to three
DEEPEST = 4  # parts of a prefix
BEGINNINGS = 6  # prefixes to try on either side


def find_renaming(
    model: Specs, template: Specs, excused: Callable[[str], bool] = lambda _: False, *, wrappers: bool = False
) -> tuple[RenameRule, ...]:
    """The rules that give a model the template's names, () where its own match or no rules are found.

    excused: whether a tensor that only one of them has may stay alone. wrappers: True for known rules only, and for
    beginnings that are put before names or taken away; not for others in their place.
    """
    names, rules = {name: name for name in model}, list[RenameRule]()
    best = _count(names, model, template)
    for _ in range(STEPS):
        there = set(names.values())
        alone = [name for name in there if name not in template]
        lacking = [name for name in template if name not in there]
        if not (alone and lacking):
            break
        tried = [(rule, _apply(rule, names)) for rule in _candidates(alone, lacking, names, template, wrappers)]
        counts = [(_count(new, model, template), rule, new) for rule, new in tried if new is not None]
        count, rule, new = max(counts, key=lambda each: each[0], default=(0, RenameRule("", ""), names))
        if count <= best:
            break
        best, names = count, new
        rules.append(rule)
    rest = [name for name in {*names.values()} ^ template.keys() if not excused(name)]
    most = 2 * best >= min(len(model), len(template))  # else the rules are an accident
    return _replayed(rules, names) if most and not rest else ()


def _replayed(rules: list[RenameRule], names: Mapping[str, str]) -> tuple[RenameRule, ...]:
    """The rules, if the first that matches each name does all that they do in turn; else a rule for each name."""
    if all(_first(rules, old) == new for old, new in names.items()):
        return tuple(rules)
    changed = ((old, new) for old, new in names.items() if old != new)
    return tuple(RenameRule(f"{PATTERN}^{re.escape(old)}$", new) for old, new in changed)


def _first(rules: list[RenameRule], name: str) -> str:
    """The name after the first rule that matches it."""
    return next((renamed for rule in rules if (renamed := rule.apply(name)) is not None), name)


def _candidates(
    alone: list[str], lacking: list[str], names: Mapping[str, str], template: Specs, wrappers: bool
) -> Iterator[RenameRule]:
    """Rules to try: the known ones, and changes of the beginnings of those that fit nowhere."""
    yield from (RenameRule(PATTERN + old, new) for old, new in RENAMINGS)
    matched = sorted({re.escape(name.split(".")[0]) for name in names.values() if name in template})
    others = rf"{PATTERN}^(?!(?:{'|'.join(matched)})\.)" if matched else ""
    for old in _beginnings(alone):
        for new in _beginnings(lacking):
            if old != new and not (wrappers and ((old and new) or any(map(str.isdigit, old + new)))):
                yield RenameRule(old or others, new)


def _beginnings(names: list[str]) -> list[str]:
    """The empty beginning and the most frequent ones, each with its dot."""
    counts = Counter[str]()
    for parts in (name.split(".") for name in sorted(names)):
        counts.update(".".join(parts[:count]) + "." for count in range(1, min(len(parts), DEEPEST + 1)))
    return ["", *(beginning for beginning, _ in counts.most_common(BEGINNINGS))]


def _apply(rule: RenameRule, names: Mapping[str, str]) -> dict[str, str] | None:
    """The names after a rule, by the old ones; None if two would be equal or one empty."""
    new = {old: name if (renamed := rule.apply(name)) is None else renamed for old, name in names.items()}
    return new if len(set(new.values())) == len(new) and all(new.values()) else None


def _count(names: Mapping[str, str], model: Specs, template: Specs) -> int:
    """The number of tensors that the template has under their new names in the same shape."""
    return sum(new in template and template[new].shape == model[old].shape for old, new in names.items())
