"""Show edits: patches and the sizes of their changes, applied patches, and models' scores on facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.changes import changes_data
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import count_noun, table
from mergekit_lfm.machine.sizes import format_size

if TYPE_CHECKING:
    from mergekit_lfm.api.edit import Edited
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.patches import Applied
    from mergekit_lfm.artifacts.patch import Patch

WIDTH = 90  # of a line of options
SHOWN = 10  # most facts of a patch to list, and most failed ones
# The headings of the scores. The help of `edit` and docs/editing.md explain them.
METRIC_NAMES = {name: name.upper() for name in ("es", "ps", "ns", "ea", "pa", "na", "ga", "qa", "sa")}
METRIC_NAMES |= {"unedited": "unedited"}
STATE_NAMES = {
    "hidden": "the whole layer",
    "mlp": "the MLP",
    "attention": "attention",
}  # the states that a trace puts back
ONE_WORD = {"add": "added", "replace": "replaced"}


def patch_data(patch: Patch) -> dict[str, Any]:
    """A patch's metadata and the sizes of its changes, for JSON."""
    facts = patch.info
    return {
        "method": facts.method,
        "base": facts.base,
        "options": dict(facts.options),
        "facts": list(facts.facts.get("facts", ())),
        "tensors": changes_data(patch),
        "bytes": sum(x.nbytes for x in patch.tensors.values()),
        "notes": list(facts.notes),
        "versions": dict(facts.versions),
    }


def changes_text(changes: Sequence[Mapping[str, Any]]) -> str:
    """The changes as a table with a row for each tensor and the known columns."""
    measured = any("relative" in row for row in changes)
    rows = [("tensor", "change", "shape", "dtype", "|dW|", *(("|dW|/|W|", "|W'|/|W|") if measured else ("size",)))]
    for row in changes:
        kind = f"rank {row['rank']}" if row["rank"] is not None else ONE_WORD[row["kind"]]
        end = (_number(row.get("relative")), _number(row.get("growth"))) if measured else (format_size(row["bytes"]),)
        rows.append((row["name"], kind, str(row["shape"]), row["dtype"], _number(row.get("norm")), *end))
    return table(rows, right="|dW| |dW|/|W| |W'|/|W| size")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def patch_text(data: Mapping[str, Any]) -> str:
    """`patch_data` as tables: the patch's metadata with its first facts, and the tensors that it changes."""
    tensors = count_noun(len(data["tensors"]), "tensor")
    taught = f", {count_noun(len(data['facts']), 'fact')}" if data["facts"] else ""
    options = [f"{name} {_option(value)}" for name, value in data["options"].items() if value is not None]
    rows = [
        ("patch", f"{data['path']}: {data['method']}{taught}, {tensors}, {format_size(data['bytes'])}"),
        ("base", f"a model of content {data['base']}" if data["base"] else "unknown"),
        *zip(["options", *[""] * len(options)], wrap(", ".join(options), WIDTH) or ["none"], strict=False),
        *(("note", note) for note in data["notes"]),
        *zip(["facts", *[""] * SHOWN], _facts_lines(data["facts"]), strict=False),
    ]
    return "\n".join([table(rows), "", changes_text(data["tensors"])])


def _option(value: Any) -> str:
    """An option's value in one line; for a list of texts only their number."""
    if isinstance(value, list) and any(isinstance(entry, str | list) for entry in value):
        return f"({len(value)} given)"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts_lines(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first facts, one line each, and the number of further ones."""
    lines = []
    for fact in facts[:SHOWN]:
        was = f" (was {fact['target_true']})" if fact.get("target_true") else ""
        lines.append(f"{fact['prompt'].replace('{}', fact['subject'])} -> {fact['target_new']}{was}")
    return [*lines, *([f"and {len(facts) - SHOWN} more"] if len(facts) > SHOWN else [])]


def apply_data(outcome: Outcome[Applied]) -> dict[str, Any]:
    """The result of applying or undoing patches for JSON."""
    applied = outcome.result
    return {
        **outcome_data(outcome),
        "undo": None if applied.undo is None else str(applied.undo),
        "tensors": applied.tensors,
        "bytes_changed": applied.bytes_changed,
        "bytes_copied": applied.bytes_copied,
    }


def edit_data(outcome: Outcome[Edited]) -> dict[str, Any]:
    """The result of an edit for JSON."""
    edited = outcome.result
    scores = {"before": edited.before, "after": edited.after}
    return {
        **outcome_data(outcome),
        "facts": len(edited.patch.info.facts["facts"]),
        **{name: None if value is None else value.as_data() for name, value in scores.items()},
        **({} if edited.saved is None else {"saved": apply_data(edited.saved)}),
        "tensors": list(edited.changes),
    }


def apply_text(data: Mapping[str, Any]) -> str:
    """The result of applying patches, after the new model's scores on the facts if it was judged."""
    changed = f"{count_noun(data['tensors'], 'tensor')} changed, {format_size(data['bytes_changed'])}"
    there = "already there: " if data["already_there"] else ""
    lines = [f"{there}{changed}; {format_size(data['bytes_copied'])} copied as they were"]
    if data["undo"]:
        lines.append(f"{data['undo']} undoes it")
    if data.get("after"):
        after = data["after"]
        lines = [scores_text({"edited": after}), counts_text(after), *failed_lines(after), "", *lines]
    return "\n".join(lines)


def scores_text(scores: Mapping[str, Mapping[str, Any]], of: str = "model") -> str:
    """A table with a row of shares in percent for each model."""
    rows = [(of, *METRIC_NAMES.values())]
    rows += [(name, *(_share(shares[metric]) for metric in METRIC_NAMES)) for name, shares in scores.items()]
    return table(rows, right=" ".join(METRIC_NAMES.values()))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def counts_text(scores: Mapping[str, Any]) -> str:
    """One line with the number of prompts of each kind behind the shares."""
    kinds = {"ea": "prompt", "pa": "paraphrase", "na": "neighbour", "sa": "other fact of the same subjects"}
    kinds["unedited"] = "unedited fact"
    counts = {noun: scores["counts"].get(metric) or 0 for metric, noun in kinds.items()}
    return "over " + ", ".join(_many(n, noun) for noun, n in counts.items() if n)


def _many(n: int, noun: str) -> str:
    head, of, tail = noun.partition(" of ")
    return f"{count_noun(n, head)}{of}{tail}"


def failed_lines(scores: Mapping[str, Any]) -> list[str]:
    """One line with the facts that the model does not say, by subject; [] if it says all."""
    failed = [row for row in scores["rows"] if not row["right"]]
    if not failed:
        return []
    shown = ", ".join(f"{row['subject']} ({row['target_new']})" for row in failed[:SHOWN])
    more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    return [f"not said: {count_noun(len(failed), 'fact')}: {shown}{more}"]


def edit_text(data: Mapping[str, Any]) -> str:
    """An edit's result: the scores before and after, the failed facts, and the sizes of the changes."""
    lines = []
    if data["after"] is not None:
        both = {"before": data["before"], "after": data["after"]}
        lines += [scores_text(both), counts_text(data["after"]), *failed_lines(data["after"]), ""]
    if data["already_there"]:
        lines.append("already there: this very patch; it was not made again")
    lines.append(changes_text(data["tensors"]))
    if "saved" in data:
        lines += ["", apply_text(data["saved"])]
    return "\n".join(lines)


def trace_text(data: Mapping[str, Any]) -> str:
    """A table of mean indirect effects for each kind of state: tokens by layers, in percent; and the layers to edit."""
    layers = [str(layer) for layer in range(len(next(iter(data["effects"]["hidden"].values()))))]
    rows = [("points gained at layer", *layers)]
    for kind, effects in data["effects"].items():
        rows += [(f"by {STATE_NAMES[kind]}", *[""] * len(layers))]
        rows += [(f"  {role}", *("" if x is None else f"{100 * x:z.1f}" for x in row)) for role, row in effects.items()]
    suggested = (
        f"the MLPs that matter at the last subject token: {layers_option(data['layers'])}"
        if data["layers"]
        else "no MLP at the last subject token brings the fact back: no layer to suggest"
    )
    return "\n".join([trace_title(data), "", table(rows, right=" ".join(layers)), "", suggested])


def trace_title(data: Mapping[str, Any]) -> str:
    """The number of facts in a trace, and their probability with and without the noise."""
    return (
        f"{count_noun(data['facts'], 'fact')}: p(target) is {data['clean']:.1%}, with noise on the subject "
        f"{data['corrupted']:.1%}"
    )


def layers_option(layers: Sequence[int]) -> str:
    """Layers as an option of `edit` on the command line."""
    return f"--layers {','.join(map(str, layers))}"
