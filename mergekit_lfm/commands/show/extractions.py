"""Show adapters that were extracted: how much of the change they keep, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import ALREADY_THERE, outcome_data
from mergekit_lfm.commands.show.terminal import count_noun, table
from mergekit_lfm.machine.sizes import format_size

if TYPE_CHECKING:
    from mergekit_lfm.api.export import ExportedTensor
    from mergekit_lfm.api.extract import Extracted, Whole
    from mergekit_lfm.api.extraction_plans import PlannedExtraction
    from mergekit_lfm.api.outcome import Outcome

SHOWN = 10  # dropped tensors to list


def plan_data(planned: PlannedExtraction) -> dict[str, Any]:
    """A planned extraction for JSON. saved: tensors that are saved whole if they differ; lost: those in no adapter."""
    plan = planned.plan
    return {
        "out": str(planned.out),
        "recipe": planned.recipe.normalised(),
        "matrices": [
            {
                "name": group.name,
                "shape": [group.out, group.columns],
                "count": len(group.members),
                "rank": planned.rank(group),
            }
            for group in plan.groups
        ],
        "saved": [*plan.biases, *(name for own in plan.modules.values() for name in own)],
        "lost": [{"name": name, "why": why} for name, why in plan.lost.items()],
        "warnings": list(planned.notices),
    }


def plan_text(planned: PlannedExtraction) -> str:
    """A planned extraction as a table, with a row for all products of layers of one name and shape."""
    data, recipe = plan_data(planned), planned.recipe
    size = f"{recipe.normalised().get('rank')}, or the smaller side of a matrix"
    if recipe.energy is not None:
        size = f"as small as it keeps {recipe.energy:.4g} of each matrix's change"
    elif recipe.size is not None:
        size = f"as {format_size(recipe.size)} for all allow"
    rows = [
        ("extract", f"the change from {recipe.base_model} to {recipe.model}"),
        ("write", f"an adapter at {planned.out}"),
        ("rank", size),
    ]
    if data["saved"]:
        rows.append(("saved whole", f"if they differ: {_names_text(data['saved'])}"))
    reasons = dict.fromkeys(each["why"] for each in data["lost"])
    rows += [
        ("left out", f"{why}: {_names_text([each['name'] for each in data['lost'] if each['why'] == why])}")
        for why in reasons
    ]
    rows += [("note", text) for text in planned.notices]
    groups: dict[tuple[str, str, str], int] = {}
    for each in data["matrices"]:
        key = layer_of(each["name"]), " x ".join(map(str, each["shape"])), str(each["rank"])
        groups[key] = groups.get(key, 0) + each["count"]
    lines = [(leaf, str(count), shape, most) for (leaf, shape, most), count in groups.items()]
    head = ("product", "number", "shape", "rank at most")
    return f"{table(rows)}\n\n{table([head, *lines])}" if lines else table(rows)


def _names_text(names: Sequence[str]) -> str:
    return f"{count_noun(len(names), 'tensor')}, such as {names[0]}" if len(names) > 1 else names[0]


def done_data(outcome: Outcome[Extracted]) -> dict[str, Any]:
    """An extracted adapter for JSON: every product with its rank and the share of its change that it keeps."""
    extracted = outcome.result
    return {
        **outcome_data(outcome),
        "kept": extracted.kept,
        "bytes": extracted.nbytes,
        "unchanged": extracted.unchanged,
        "matrices": [
            {
                "name": each.name,
                "shape": list(each.shape),
                "count": each.count,
                "rank": each.rank,
                "kept": each.kept / each.energy,
                "share": each.energy / extracted.energy,
            }
            for each in extracted.reduced
        ],
        "saved": _whole(extracted.saved, extracted.energy),
        "dropped": _whole(extracted.dropped, extracted.energy),
    }


def _whole(tensors: Iterable[Whole], energy: float) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "share": each.energy / energy if energy else 0.0, **({"why": each.why} if each.why else {})}
        for each in tensors
    ]


def done_text(outcome: Outcome[Extracted]) -> str:
    """A row for all products of layers of one name, for what is saved and for what is dropped; and the sum."""
    if outcome.already_there:
        return ALREADY_THERE
    data = done_data(outcome)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["matrices"]:
        groups.setdefault(layer_of(row["name"]), []).append(row)
    rows = [("tensors", "number", "rank", "of the change", "kept")]
    for leaf, own in groups.items():
        share = sum(row["share"] for row in own)
        kept = sum(row["share"] * row["kept"] for row in own) / share
        ranks = sorted({row["rank"] for row in own})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} - {ranks[-1]}"
        rows.append((leaf, str(len(own)), rank, f"{share:.2%}", f"{kept:.2%}"))
    for words, key, kept in (("saved whole", "saved", "100.00%"), ("dropped", "dropped", "0.00%")):
        if own := data[key]:
            rows.append((words, str(len(own)), "", f"{sum(row['share'] for row in own):.2%}", kept))
    changed = sum(len(data[key]) for key in ("matrices", "saved", "dropped"))
    rows.append(("all", str(changed), "", "100.00%", f"{data['kept']:.2%}"))
    lines = [table(rows, right="number rank kept"), ""]
    lines += [
        f"dropped: {row['name']}, {row['share']:.2%} of the change: {row['why']}" for row in data["dropped"][:SHOWN]
    ]
    if len(data["dropped"]) > SHOWN:
        lines.append(f"and {count_noun(len(data['dropped']) - SHOWN, 'more dropped tensor')}")
    return "\n".join(
        [*lines, f"{format_size(data['bytes'])}; {count_noun(data['unchanged'], 'tensor')} did not change"]
    )


def export_data(outcome: Outcome[tuple[ExportedTensor, ...]]) -> dict[str, Any]:
    """An adapter made from patches for JSON. rank: None for a tensor that is whole in it."""
    tensors = [{"name": each.name, "rank": each.rank, "kept": each.kept} for each in outcome.result]
    return {**outcome_data(outcome), "tensors": tensors}


def export_text(data: Mapping[str, Any]) -> str:
    """The tensors of an adapter made from patches, as a table."""
    if data["already_there"]:
        return ALREADY_THERE
    rows = [("tensor", "rank", "kept")]
    rows += [
        (row["name"], "whole" if row["rank"] is None else str(row["rank"]), f"{row['kept']:.2%}")
        for row in data["tensors"]
    ]
    return table(rows, right="rank kept")


def layer_of(name: str) -> str:
    """The name of the layer in its block."""
    return re.split(r"(?:^|\.)\d+\.", name.removesuffix(".weight"))[-1]
