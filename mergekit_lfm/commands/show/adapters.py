"""Show merges of adapters: the plan of one, and the ranks and shares in its result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import ALREADY_THERE, outcome_data
from mergekit_lfm.commands.show.terminal import count_noun, table

if TYPE_CHECKING:
    from mergekit_lfm.api.adapter_plans import PlannedAdapters
    from mergekit_lfm.api.adapters import MergedAdapter, MergedModule
    from mergekit_lfm.api.outcome import Outcome


def plan_data(planned: PlannedAdapters) -> dict[str, Any]:
    """A planned merge of adapters for JSON."""
    return {
        "out": str(planned.out),
        "recipe": planned.recipe.normalised(),
        "adapters": [{"adapter": a.label, "base": a.base} for a in planned.adapters],
        "modules": [
            {"name": name, "shape": planned.shape(name), "ranks": [pair.rank if pair else 0 for pair in pairs]}
            for name, pairs in planned.modules.items()
        ],
        "saved": [*planned.saved],
        "warnings": list(planned.notices),
    }


def plan_text(planned: PlannedAdapters) -> str:
    """A planned merge of adapters as a table, with a line for each kind of module."""
    recipe = planned.recipe
    size = "the sum of the ranks where it is exact, else the largest"
    if recipe.rank is not None or recipe.energy is not None:
        size = f"at most {recipe.rank}" if recipe.rank else f"as small as it keeps {recipe.energy:.4g} of each change"
    elif recipe.merge_method == "svd":
        size = "at most the largest of the adapters"
    rows = [
        ("merge", f"{recipe.merge_method} in the space {recipe.space}"),
        ("write", f"an adapter at {planned.out}"),
        ("modules", count_noun(len(planned.modules), "module")),
        ("rank", size),
    ]
    rows += [("saved whole", count_noun(len(planned.saved), "tensor"))] if planned.saved else []
    rows += [("note", text) for text in planned.notices]
    groups: dict[tuple[str, ...], int] = {}
    for name, pairs in planned.modules.items():
        shape = " x ".join(map(str, planned.shape(name)))
        key = (_leaf(name), shape, *(str(pair.rank) if pair else "-" for pair in pairs))
        groups[key] = groups.get(key, 0) + 1
    head = ("module", "number", "shape", *(f"rank in {adapter.label}" for adapter in planned.adapters))
    lines = [(leaf, str(count), *rest) for (leaf, *rest), count in groups.items()]
    return f"{table(rows)}\n\n{table([head, *lines])}"


def done_data(outcome: Outcome[MergedAdapter]) -> dict[str, Any]:
    """A merged adapter for JSON."""
    merged = outcome.result
    modules = [
        {
            "name": module.name,
            "shape": list(module.shape),
            "rank": module.rank,
            "energy": module.energy,
            "kept": module.kept,
        }
        for module in merged.modules
    ]
    return outcome_data(outcome) | {"modules": modules, "saved": list(merged.saved), "kept": merged.kept}


def done_text(outcome: Outcome[MergedAdapter]) -> str:
    """The ranks of a merged adapter, and what they keep of the merged changes, by kind of module."""
    if outcome.already_there:
        return ALREADY_THERE
    merged = outcome.result
    groups: dict[str, list[MergedModule]] = {}
    for module in merged.modules:
        groups.setdefault(_leaf(module.name), []).append(module)
    rows = [("module", "number", "rank", "kept")]
    for leaf, modules in groups.items():
        rows.append((leaf, str(len(modules)), _span(module.rank for module in modules), _share(modules)))
    saved = f", {count_noun(len(merged.saved), 'tensor')} saved whole" if merged.saved else ""
    kept = f"{merged.kept:.2%} of the merged changes" if merged.modules else "no changes"
    told = f"{count_noun(len(merged.modules), 'module')}{saved}; kept {kept}, in {outcome.seconds:.1f} s"
    return f"{table(rows, right='number')}\n{told}" if merged.modules else told


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _span(ranks: Iterable[int]) -> str:
    """ "8", "4 to 8"."""
    found = sorted({*ranks})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _share(modules: Iterable[MergedModule]) -> str:
    from mergekit_lfm.api.adapters import MergedAdapter

    return f"{MergedAdapter(tuple(modules), ()).kept:.2%}"
