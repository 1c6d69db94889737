"""Show plans, and the results of merges and pushes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import count_noun, table
from mergekit_lfm.errors import shorten
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.machine.text import printable_line
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.rename import PATTERN, rename_data
from mergekit_lfm.recipe.values import NamedFile

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.planned import Merged
    from mergekit_lfm.methods.method import Value
    from mergekit_lfm.output.outgoing import Pushed
    from mergekit_lfm.plan.job import Job
    from mergekit_lfm.plan.plan import AppliedAdapter, Plan
    from mergekit_lfm.recipe.parts import Edit
    from mergekit_lfm.recipe.rename import RenameRule
    from mergekit_lfm.store.checkpoint import Checkpoint
    from mergekit_lfm.store.snapshot import Snapshot

SHOWN_RULES = 4
TENSOR_COLUMNS = ("tensor", "shape", "dtype", "method", "layer", "parameters")
SHOWN_DROPPED = 100  # most tensors that are dropped alike from one model


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan for JSON."""
    recipe = plan.recipe
    return {
        "method": ", ".join(method.name for method in recipe.methods),
        "models": [
            {"model": label, "tensors": len(model), "bytes": model.nbytes, **_elsewhere_data(model)}
            for label, model in zip(plan.labels, plan.models, strict=True)
        ],
        "statistics": [
            {"statistics": file.ref, "kind": statistics.info.kind, "bytes": statistics.tensors.nbytes}
            for file, statistics in zip(recipe.statistics, plan.statistics, strict=True)
        ],
        "averaged": _count(plan.averaged),
        "matrices": _count(_matrices(plan)),
        "aligned": {
            model.label: model.align.ref if isinstance(model.align, NamedFile) else model.align.as_data()
            for model in recipe.all_models
            if model.align is not None
        },
        "edited": {
            **{model.label: _edits_data(model.edits) for model in recipe.all_models if model.edits},
            **({"the result": _edits_data(recipe.result_edits)} if recipe.result_edits else {}),
        },
        "adapters": [adapter._asdict() for adapter in plan.adapters],
        "renamed": {
            **{model.label: rename_data(model.rename) for model in recipe.all_models if model.rename},
            **{label: rename_data(rules) for label, rules in plan.renamed.items()},
        },
        "allowed": list(plan.allowed),
        "notices": [*plan.recipe.notices, *plan.notices, *plan.warnings],
        "template": plan.labels[plan.template],
        "dtypes": dict(Counter(job.dtype for job in plan.tensors)),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "shards": [{"file": shard.name, "tensors": len(shard.tensors), "bytes": shard.nbytes} for shard in plan.shards],
        "files": list(plan.contents),
        "held": [str(file) for file in plan.mapped_files],
        **tensors_data(plan),
        "digest": plan.digest,
    }


def _matrices(plan: Plan) -> list[Job]:
    """The tensors that the method merges as whole matrices."""
    return [plan.tensors[i] for group in plan.matrices for i in group.jobs]


def _count(jobs: Sequence[Job]) -> dict[str, int]:
    return {"tensors": len(jobs), "numbers": sum(job.spec.numel for job in jobs)}


def _count_text(jobs: Sequence[Job], plan: Plan) -> str:
    share = sum(job.spec.numel for job in jobs) / max(1, sum(job.spec.numel for job in plan.tensors))
    return f"{count_noun(len(jobs), 'tensor')}, {share:.0%} of the numbers"


def _elsewhere_data(model: Checkpoint) -> dict[str, Any]:
    """The place and the state of a model that is elsewhere, and the bytes still to be downloaded."""
    snapshot = model.snapshot
    if snapshot is None:
        return {}
    place = {"bucket": str(snapshot).rpartition("@")[0]} if snapshot.repo is None else {"repo": snapshot.repo}
    return {**place, "commit": snapshot.commit, "download": sum(model.absent.values())}


def _elsewhere_row(label: str, model: Checkpoint, snapshot: Snapshot) -> tuple[str, str]:
    """The row of a plan about a model that is elsewhere."""
    place, state = ("from a bucket", "state") if snapshot.repo is None else ("from the Hub", "commit")
    return place, f"{label}: {state} {snapshot.commit}, {_whereabouts(model)}"


def _edits_data(edits: Sequence[Edit]) -> list[str | dict[str, Any]]:
    return [edit.ref if isinstance(edit, NamedFile) else edit.as_data() for edit in edits]


def plan_text(plan: Plan, facts: dict[str, Any], verbose: bool) -> str:
    """A plan as a table. `facts` come from the machine: out, memory, threads, free disk, device."""
    methods = Counter(tensor.method for tensor in plan.tensors)
    enough = "enough" if facts["enough_disk"] else "NOT ENOUGH"
    rows = [
        ("read", format_size(plan.bytes_read)),
        ("write", f"{format_size(plan.bytes_written)} in {count_noun(len(plan.shards), 'file')} at {facts['out']}"),
        ("tensors", ", ".join(f"{n:,} {method}" for method, n in methods.most_common())),
        ("dropped", count_noun(len(plan.dropped), "tensor") if plan.dropped else "nothing"),
        ("peak memory", f"{format_size(facts['peak_memory'])} ({count_noun(facts['threads'], 'thread')})"),
        ("free disk", f"{format_size(facts['free_disk'])}, {enough}"),
        ("plan", plan.digest),
    ]
    if facts.get("device", "cpu") != "cpu":
        rows.insert(-1, ("device", facts["device"]))
    if plan.averaged:
        rows.insert(3, ("averaged", f"{_count_text(plan.averaged, plan)}: they have no statistics"))
    if plan.matrices:
        rows.insert(3, ("as matrices", _count_text(_matrices(plan), plan)))
    if push := facts.get("push"):
        rows.append(("push", f"to {push['repo']}" + (", private" if push["private"] else "")))
    for model in plan.pending:
        if isinstance(model.align, AlignRequest):
            pending = f"the merge finds the transform by {model.align.method} when it runs, and compares no outputs"
            rows.insert(3, ("aligned", f"{model.label} to {model.align.to}: {pending}"))
    rows[3:3] = [
        ("renamed", f"{model.label}: {rule.old!r} becomes {rule.new!r}")
        for model in plan.recipe.all_models
        for rule in model.rename
    ]
    rows[3:3] = [("adapter", _adapter_text(adapter)) for adapter in plan.adapters]
    rows[3:3] = [("names", f"{label}: {_rules_text(rules)}") for label, rules in plan.renamed.items()]
    rows[3:3] = [("allowed", text) for text in plan.allowed]
    rows[3:3] = [("no effect", text) for text in plan.recipe.notices]
    rows[3:3] = [("note", text) for text in (*plan.notices, *plan.warnings)]
    edited = {model.label: model.edits for model in plan.recipe.all_models if model.edits}
    for label, edits in [*edited.items(), ("the result", plan.recipe.result_edits)]:
        rows[3:3] = [("edited", f"{label}: {_edit_text(edit)}") for edit in edits]
    rows[1:1] = [
        _elsewhere_row(label, model, model.snapshot)
        for label, model in zip(plan.labels, plan.models, strict=True)
        if model.snapshot is not None
    ]
    lines = [table(rows)]
    lines += [
        f"held outside the memory budget, as its tensors are not plain byte ranges: {printable_line(file)}"
        for file in plan.mapped_files
    ]
    lines += map(printable_line, (*_dropped_lines(plan), *_file_lines(plan)))
    if verbose:
        lines += [
            "",
            table([TENSOR_COLUMNS, *map(_tensor_row, sorted(plan.tensors, key=_natural))]),
        ]
    return "\n".join(lines)


def _dropped_lines(plan: Plan) -> Iterator[str]:
    """A line for each dropped tensor; of many that are dropped alike from a model, a line for the first ones only."""
    alike = Counter((model, reason) for model, _, reason in plan.dropped)
    shown = Counter[tuple[str, str]]()
    for model, tensor, reason in plan.dropped:
        shown[model, reason] += 1
        if shown[model, reason] <= SHOWN_DROPPED:
            yield f"dropped: {model}: {tensor}: {reason}"
        elif shown[model, reason] == alike[model, reason]:
            yield f"dropped: {model}: {alike[model, reason] - SHOWN_DROPPED:,} more: {reason}"


def _file_lines(plan: Plan) -> Iterator[str]:
    """The parts of files that are read, the files that another model lends, and those left behind, by reason."""
    for label, model in zip(plan.labels, plan.models, strict=True):
        for file in (file for file in model.files if file.address):
            yield f"read: {label}: the tensors under {file.address} of {file.name}"
    for name, label in plan.lent:
        yield f"taken from {label}: {name}"
    for (label, why), names in plan.left_groups.items():
        yield f"left behind: {label}: {shorten(names)}: {why}"


def _whereabouts(model: Checkpoint) -> str:
    if nbytes := sum(file.nbytes for file in model.files if file.ranges is not None):
        return f"{format_size(nbytes)} to read by ranges"
    if model.absent:
        return f"{format_size(sum(model.absent.values()))} to download"
    listed = model.snapshot is not None and model.snapshot.listed
    return "in the cache" if listed else "in the cache; offline, other files are unknown"


def _rules_text(rules: Sequence[RenameRule]) -> str:
    """The rules that were found for a model's names."""
    shown = [
        f"{rule.old.removeprefix(PATTERN)!r} read as {rule.new!r}"
        if rule.old
        else f"read with {rule.new!r} before them"
        for rule in rules[:SHOWN_RULES]
    ]
    more = [f"{len(rules) - SHOWN_RULES} more"] if len(rules) > SHOWN_RULES else []
    return ", ".join([*shown, *more])


def _adapter_text(adapter: AppliedAdapter) -> str:
    trained = f", trained on {adapter.trained_on}" if adapter.trained_on else ""
    return f"{adapter.adapter}: {adapter.kind}, changes {adapter.changed:,} of {adapter.tensors:,} tensors{trained}"


def _edit_text(edit: Edit) -> str:
    if isinstance(edit, NamedFile):
        return edit.ref
    return f"{edit.facts.ref} by {edit.method}, when the merge runs"


def _natural(tensor: Job) -> list[tuple[bool, int, str]]:
    """A key that sorts names with their numbers as numbers: layer 2 before layer 10."""
    words = re.split(r"(\d+)", tensor.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]


def _tensor_row(job: Job) -> tuple[str, ...]:
    layer = "-" if job.layer is None else f"{job.layer[0]} of 0-{job.layer[1] - 1}"
    return job.name, str(list(job.shape)), job.dtype, job.method, layer, "; ".join(_values_of(job))


def _values_of(job: Job) -> Iterator[str]:
    """The job's parameters that have no default or differ from it, with their values: shared ones, then by input."""
    if job.method not in METHODS:
        return
    for parameter in METHODS[job.method].parameters:
        scopes = job.settings.inputs if parameter.per_input else [job.settings.shared]
        values = [scope[parameter.name] for scope in scopes if parameter.name in scope]
        if any(value != parameter.default for value in values):
            yield f"{parameter.name} {', '.join(map(value_text, values))}"


def value_text(value: Value) -> str:
    """A parameter's value as recipes have it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def push_text(pushed: Pushed) -> str:
    """The result of a push, in one or a few lines."""
    where = f"{pushed.url} at {'state' if '://' in pushed.repo else 'commit'} {pushed.commit}"
    if not pushed.files and not pushed.removed:
        lines = [f"already there: {where} holds the same files; nothing was pushed"]
    else:
        lines = [f"pushed {count_noun(len(pushed.files), 'file')}, {format_size(pushed.nbytes)}, to {where}"]
    lines += ["downloaded again: every byte is as the lock says"] if pushed.verified else []
    lines += [f"removed there, left over from an earlier push: {', '.join(pushed.removed)}"] if pushed.removed else []
    if pushed.left_out:
        lines.append(f"not pushed, as they are hidden or links out of the folder: {', '.join(pushed.left_out)}")
    if pushed.kept_card:
        lines.append(
            "the model card was edited on the Hub and is kept (--replace-card replaces it); this merge's card is "
            "MERGE.md beside it"
        )
    return "\n".join(map(printable_line, lines))


def push_data(pushed: Pushed) -> dict[str, Any]:
    """The result of a push for JSON."""
    return {
        "repo": pushed.repo,
        "url": pushed.url,
        "commit": pushed.commit,
        "files": list(pushed.files),
        "removed": list(pushed.removed),
        "bytes": pushed.nbytes,
        "verified": pushed.verified,
        "kept_card": pushed.kept_card,
        "left_out": list(pushed.left_out),
    }


def merge_data(outcome: Outcome[Merged]) -> dict[str, Any]:
    """The result of a merge for JSON."""
    plan, pushed = outcome.result.plan, outcome.result.pushed
    return {
        **outcome_data(outcome),
        **tensors_data(plan),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "resumed_bytes": outcome.result.resumed_bytes,
        "waiting": outcome.result.waiting,
        "pushed": None if pushed is None else push_data(pushed),
    }


def tensors_data(plan: Plan) -> dict[str, Any]:
    """The tensors that a plan makes, by method, and all that it leaves out, with the reasons."""
    return {
        "tensors": len(plan.tensors),
        "methods": dict(Counter(job.method for job in plan.tensors)),
        "dropped": [{"model": m, "tensor": t, "reason": why} for m, t, why in plan.dropped],
        "left_behind": [{"model": m, "file": name, "reason": why} for m, name, why in plan.left_behind],
        "lent": [{"file": name, "model": m} for name, m in plan.lent],
    }


def waiting_text(outcome: Outcome[Merged]) -> str:
    """The result of one part of a merge, in one line."""
    return f"this part is written, in {outcome.seconds:.1f} s; {outcome.path} appears when the others are"


def outcome_text(outcome: Outcome[Merged]) -> str:
    """The result of a merge, in one line."""
    if outcome.already_there:
        return "already there: the output of the same plan; nothing was done"
    plan, resumed = outcome.result.plan, outcome.result.resumed_bytes
    earlier = f" ({format_size(resumed)} of it by the interrupted run)" if resumed else ""
    size = format_size(plan.bytes_written)
    return f"wrote {count_noun(len(plan.tensors), 'tensor')}, {size}{earlier}, in {outcome.seconds:.1f} s"
