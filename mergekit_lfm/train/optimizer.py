"""The optimizer of a training, AdamW or plain descent, with groups of parameters that have settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.training import Group, Options
from mergekit_lfm.train.hooks import Parameters


def make_optimizer(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """AdamW or plain descent, with weight decay for matrices alone. share: of the learning rate, for a group."""
    groups = []
    for group, names in _members(parameters, options.groups):
        rate = group.learning_rate or options.learning_rate
        decay = options.weight_decay if group.weight_decay is None else group.weight_decay
        for decays in (True, False):
            members = [parameters[name] for name in names if (parameters[name].ndim > 1) == decays]
            settings = {"weight_decay": decay * decays, "share": rate / options.learning_rate}
            groups += [{"params": members, **settings}] if members else []
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def _members(parameters: Parameters, groups: Sequence[Group]) -> list[tuple[Group, list[str]]]:
    """The names of each group's parameters: those that match it and none before it; last, all the rest.

    Raises PlanError for a pattern that matches no parameter that is left.
    """
    found, rest = list[tuple[Group, list[str]]](), [*parameters]
    for group in groups:
        names = [name for name in rest if fnmatchcase(name, group.match)]
        if not names:
            taken = any(fnmatchcase(name, group.match) for name in parameters)
            why = "is left for it by the groups before" if taken else "has such a name"
            raise PlanError(
                f"groups: found {group.match!r}, and no trained parameter {why}; "
                f"expected a pattern of some, such as {rest[0] if rest else '*'}. Correct or remove it"
            )
        found.append((group, names))
        rest = [name for name in rest if name not in {*names}]
    return [*found, (Group("*"), rest)]
