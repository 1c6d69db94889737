"""Tensors that are one in a model under several names: a head tied to the embedding, two stacks with one embedding.

Configs say which; without a config, tensors that may be tied are if their bytes are equal. Such a tensor is merged
once, under the name that loaders read, and written under all names that the template has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.compare import have_same_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor: its names in the output, and its names in each model by the model's index, that to read first.

    The first of `names` is what filters, layers and random masks look at.
    """

    names: tuple[str, ...]
    held: dict[int, tuple[str, ...]]


def rows_of(models: Sequence[Checkpoint], template: int) -> tuple[list[Row], list[tuple[int, str]]]:
    """The tensors of all models, those of the template first, in its order.

    Beside them (model, name) of each tensor of a model's own that the template's config ties to another.
    """
    groups = tied_names(dict.fromkeys(name for model in models for name in model))
    groups = [group for group in groups if _alike(group, models) and _is_one(group, models, template)]
    group_of = {name: group for group in groups for name in group}
    first = models[template]
    rows, apart, used = list[Row](), list[tuple[int, str]](), set[tuple[int, str]]()
    for name in first:
        if (template, name) in used:
            continue
        if name not in group_of:
            rows.append(Row((name,), {i: (name,) for i, model in enumerate(models) if name in model}))
            continue
        group = group_of[name]
        whole = _holds(first, group)
        names = whole or (name,)
        held = {}
        for i, model in enumerate(models):
            here = _holds(model, group)
            if here is None and whole is not None and len(whole) > 1:
                own = [each for each in whole if each in model]
                apart += [(i, each) for each in own if each != names[0]]
                here = tuple(own[:1])
            elif here is None or (whole is None and name in here):
                here = tuple(each for each in names if each in model)[:1]
            if here:
                held[i] = here
                used.update((i, each) for each in here)
        rows.append(Row(names, held))
    others = [(i, name) for i, model in enumerate(models) for name in model if name in group_of or name not in first]
    for name in dict.fromkeys(name for i, name in others if (i, name) not in used):
        held = {i: (name,) for i, model in enumerate(models) if name in model and (i, name) not in used}
        rows.append(Row((name,), held))
    return rows, apart


def _alike(group: Sequence[str], models: Sequence[Checkpoint]) -> bool:
    """True if the names of a group have one shape and dtype in each model."""
    return all(len({(model[n].shape, model[n].dtype) for n in group if n in model}) <= 1 for model in models)


def _is_one(group: tuple[str, ...], models: Sequence[Checkpoint], template: int) -> bool:
    """False if no config says that the group is one tensor in the template, and in some model it is not."""
    stated = is_tied(models[template].config) is not None
    return stated or all(_holds(model, group) is not None for model in models)


def _holds(model: Checkpoint, group: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of a group in a model, in the group's order, if they are one tensor there; None if they are several.

    A model that holds only one of them may still have tensors of their own under all, as its config says.
    """
    here = tuple(name for name in group if name in model)
    tied = is_tied(model.config)
    if tied is True:
        return here
    if tied is None:
        return here if all(have_same_bytes(model, here[0], model, other) for other in here[1:]) else None
    return None


def twins_of(row: Row) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    """Pairs of tensors of one model that have to be equal since its config ties them."""
    for i, names in row.held.items():
        yield from (((i, names[0]), (i, other)) for other in names[1:])
