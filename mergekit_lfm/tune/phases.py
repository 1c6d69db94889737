"""Parts of a model that alone are trained, by patterns for the names of parameters, in one phase or several.

A phase trains what its patterns match of that which the method trains: `full` with `*projector*` trains the projector,
`lora` with `*layers.0.*` the adapter of one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.train.hooks import Masks, Phases
from mergekit_lfm.tune.work import Prepared

Phase = tuple[int, Sequence[str]]  # steps, and patterns for names of parameters


def select_parts(prepared: Prepared, phases: Sequence[Phase], method: str) -> Prepared:
    """The same training of these parts alone, one phase after the other. Without phases, the training as it is.

    Raises PlanError for patterns that match no parameter, for phases that train nothing, and for a method that has
    phases of its own.
    """
    if not phases:
        return prepared
    if any(isinstance(hook, Phases) for hook in prepared.hooks):
        raise PlanError(f"{method} has phases of its own, beside which none are given; choose full")
    parameters = dict(prepared.model.named_parameters())
    trained = {name for name, x in parameters.items() if x.requires_grad}
    starts, steps = list[tuple[int, frozenset[str]]](), 0
    for number, (count, patterns) in enumerate(phases, 1):
        _refuse_idle(patterns, parameters)
        names = frozenset(name for name in trained if _matches(name, patterns))
        if not names:
            found = f"phase {number} trains nothing: {method} trains no parameter that matches {shorten(patterns, 3)}"
            raise PlanError(f"{found}; expected one or more, such as {min(trained)}. Correct the patterns")
        starts.append((steps, names))
        steps += count
    every = frozenset[str]().union(*(names for _, names in starts))
    for name, x in parameters.items():
        x.requires_grad_(name in every)
    hooks = (*prepared.hooks, Phases(starts)) if len(starts) > 1 else prepared.hooks
    return replace(prepared, hooks=hooks, count=_count(prepared, every))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle(patterns: Sequence[str], names: Collection[str]) -> None:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        names = [*names]
        found = f"train: found {shorten([repr(pattern) for pattern in idle], 3)}, which no parameter's name matches"
        raise PlanError(f"{found}; expected patterns such as *{names[len(names) // 2]}. Correct or remove them")


def _count(prepared: Prepared, names: Collection[str]) -> int | None:
    """How many numbers are trained, if not all of those parameters."""
    if prepared.count is None:
        return None
    masks = {name: mask for hook in prepared.hooks if isinstance(hook, Masks) for name, mask in hook.masks.items()}
    return sum(int(masks[name].sum()) for name in names)
