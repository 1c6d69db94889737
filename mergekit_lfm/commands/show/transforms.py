"""Show transforms, alignments, and checks of a model's symmetries."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.arch.table import Units
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import count_noun, table

if TYPE_CHECKING:
    from mergekit_lfm.align.check import Report
    from mergekit_lfm.api.align import Aligned
    from mergekit_lfm.arch.table import Group, Symmetries
    from mergekit_lfm.artifacts.transform import Element, Transform


def transform_data(transform: Transform) -> dict[str, Any]:
    """A transform's metadata, and how much it moves each group, for JSON."""
    facts = transform.info
    groups = transform.symmetries.groups
    return {
        "method": facts.method,
        "exact": facts.exact,
        "models": list(facts.models),
        "options": facts.options,
        "scores": facts.scores,
        "outputs": facts.outputs,
        "groups": {
            name: {
                "kind": "units" if isinstance(group, Units) else "heads",
                "size": group.count if isinstance(group, Units) else group.size("query"),
                **_movement(group, transform.elements.get(name)),
            }
            for name, group in groups.items()
        },
        "mixed": _mixed(transform),
        "versions": facts.versions,
    }


def _movement(group: Group, element: Element | None) -> dict[str, Any]:
    """How many of the group's units or query heads move, and which parts of the element act on it."""
    acts = [] if element is None else [name for name, value in vars(element).items() if value is not None]
    order = [] if element is None else _order(group, element)
    return {"moved": sum(new != old for new, old in enumerate(order)), "acts": acts}


def _order(group: Group, element: Element) -> list[int]:
    """The old unit or query head in each place; [] if all stay or a matrix acts on the units."""
    if isinstance(group, Units):
        order = getattr(element, "order", None)
        return [] if order is None else list(order.tolist())
    groups, queries = getattr(element, "groups", None), getattr(element, "queries", None)
    heads = range(group.groups) if groups is None else groups.tolist()
    inside = [range(group.per_group)] * group.groups if queries is None else queries.tolist()
    return [head * group.per_group + query for head, row in zip(heads, inside, strict=True) for query in row]


def _mixed(transform: Transform) -> int:
    """The number of groups on which matrices of real numbers act, not only orders and signs of units."""
    from mergekit_lfm.views.maps import only_moves

    matrices = ("matrix", "query_key", "value_output")
    return sum(
        any(getattr(element, matrix, None) is not None for matrix in matrices) and not only_moves(transform, name)
        for name, element in transform.elements.items()
    )


def transform_text(data: dict[str, Any]) -> str:
    """`transform_data` as tables: the metadata, then the groups, with one row for the same group of all layers."""
    scores = ", ".join(f"{name} {value:.6g}" for name, value in data["scores"].items())
    options = ", ".join(f"{name} {value}" for name, value in data["options"].items())
    rows = [
        ("method", data["method"] + ("" if data["exact"] else "; the outputs change")),
        ("options", options or "none"),
        ("scores", scores or "none"),
        ("outputs", data["outputs"]),
        ("models", " to ".join(data["models"]) or "given as tensors"),
    ]
    kinds: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for name, group in data["groups"].items():
        kinds.setdefault((name.rstrip("0123456789."), group["kind"], group["size"]), []).append(group)
    body = [
        (name, f"{len(layers):,}", f"{size:,}", f"{sum(g['moved'] for g in layers):,}", _acts(layers))
        for (name, _, size), layers in kinds.items()
    ]
    return "\n".join([table(rows), "", table([("group", "layers", "size", "moved", "by"), *body], "layers size moved")])


def _acts(groups: list[dict[str, Any]]) -> str:
    acts = dict.fromkeys(act for group in groups for act in group["acts"])
    return ", ".join(act.replace("_", " ") for act in acts) or "left as it is"


def report_data(report: Report, symmetries: Symmetries) -> dict[str, Any]:
    """The findings of a check of a model's table, for JSON."""
    return {
        "good": report.ok,
        "tensors": len(symmetries.tensors),
        "groups": len(symmetries.groups),
        "tolerance": report.unchanged,
        "findings": [asdict(row) for row in report.rows],
    }


def report_text(data: dict[str, Any]) -> str:
    """`report_data` as a table, and a line with the verdict."""
    parts = {
        "kept": "a random element of",
        "needed": "the same, left out of",
        "enough": "an element of what is larger:",
    }
    rows = [("what acts", "outputs differ by", "expected", "")]
    for row in data["findings"]:
        verdict = "" if row["ok"] else "WRONG"
        what = f"{parts[row['part']]} {row['what']}" + (f" ({row['reason']})" if row["reason"] else "")
        rows.append((what, f"{row['difference']:.2g}", row["expected"], verdict))
    wrong = sum(not row["ok"] for row in data["findings"])
    named = f"{count_noun(data['tensors'], 'tensor')} in {count_noun(data['groups'], 'group')}, every one named"
    verdict = f"{count_noun(wrong, 'finding')} not as expected" if wrong else "as expected"
    return "\n".join([table(rows, "differ"), "", f"{data['model']}: {named}; {verdict}"])


def alignment_data(outcome: Aligned) -> dict[str, Any]:
    """The result of an alignment for JSON."""
    data = {**outcome_data(outcome), **transform_data(outcome.result)}
    if outcome.saved is not None:
        saved = outcome.saved
        data["saved"] = {
            "path": str(saved.path),
            "difference": saved.difference,
            "tolerance": saved.tolerance,
            "same": saved.same,
        }
    return data


def saved_text(saved: dict[str, Any]) -> str:
    """Whether a saved rewritten model gives the same outputs, in one line."""
    if saved["difference"] is None:
        return "written"
    verdict = "the outputs are the same" if saved["same"] else "THE OUTPUTS DIFFER"
    return f"{verdict}: by {saved['difference']:.2g} of their range, {saved['tolerance']:.2g} is rounding"


def alignment_text(data: dict[str, Any], out: object) -> str:
    """The result of an alignment, in one line."""
    moved = sum(group["moved"] for group in data["groups"].values())
    mixed = [f"{count_noun(data['mixed'], 'group')} mixed"] if data["mixed"] else []
    changes = [f"{moved:,} units and heads stand elsewhere", *mixed]
    return f"{out}: {data['method']}, " + ", ".join(changes)
