"""A checkpoint under other names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import Source, View


@final
class Renamed(View):
    """The checkpoint with its tensors renamed: by the first rule that matches, the others as they are.

    Raises PlanError with all rules that match no tensor, and all names that two tensors would have.
    """

    def __init__(self, inner: Checkpoint, rules: Sequence[RenameRule]) -> None:
        self.rules = tuple(rules)
        self._old = old_names(rules, inner)
        specs = {name: TensorSpec(name, inner[old].shape, inner[old].dtype) for name, old in self._old.items()}
        super().__init__(specs, (inner,), {"rename": [[rule.old, rule.new] for rule in rules]})

    def maker(self, name: str) -> None:  # noqa: ARG002
        return None

    def source(self, name: str) -> Source:
        return 0, self._old[name]


def found_rules(checkpoint: Checkpoint) -> tuple[RenameRule, ...]:
    """The rules by which a checkpoint, or the first below it, was renamed; () if it was not."""
    while isinstance(checkpoint, View):
        if isinstance(checkpoint, Renamed):
            return checkpoint.rules
        checkpoint = checkpoint.inners[0]
    return ()


def old_names(rules: Sequence[RenameRule], names: Iterable[str]) -> dict[str, str]:
    """The old name of every tensor, by the new one. Raises PlanError as `Renamed` does."""
    old: dict[str, str] = {}
    used = set[RenameRule | None]()
    problems = []
    for name in names:
        rule, new = next(((rule, new) for rule in rules if (new := rule.apply(name)) is not None), (None, name))
        used.add(rule)
        if new in old:
            problems.append(f"{old[new]} and {name} would both be {new!r}; give them different names")
        elif not new:
            problems.append(f"{name} would have no name; give it one")
        old.setdefault(new, name)
    first = next(iter(old.values()), "none")
    problems += [
        f"{rule.old!r} matches no tensor that an earlier rule leaves; the first tensor is {first}. Correct or remove it"
        for rule in rules
        if rule not in used
    ]
    if problems:
        raise PlanError(several("the rules do not fit", problems))
    return old
