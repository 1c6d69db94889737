"""Show the contents of files: a checkpoint's tensors, a statistics file's metadata, and an adapter."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.adapter import dropped_of
from mergekit_lfm.commands.show.terminal import count_noun, table
from mergekit_lfm.errors import shorten
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.machine.text import printable_line

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.adapter import Adapter
    from mergekit_lfm.artifacts.statistics import Statistics
    from mergekit_lfm.store.checkpoint import Checkpoint

SHOWN_NAMES = 3  # most names not covered by a statistics file, for each reason


def checkpoint_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's tensors and totals for JSON."""
    specs = list(checkpoint.values())
    dtypes: dict[str, dict[str, int]] = {}
    for spec in specs:
        total = dtypes.setdefault(spec.dtype, {"tensors": 0, "numbers": 0, "bytes": 0})
        for key, more in (("tensors", 1), ("numbers", spec.numel), ("bytes", spec.nbytes)):
            total[key] += more
    return {
        "path": str(checkpoint.snapshot or checkpoint.path),
        "files": [file.path.name for file in checkpoint.files],
        "tensors": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype, "bytes": s.nbytes} for s in specs],
        "dtypes": dtypes,
        "numbers": sum(spec.numel for spec in specs),
        "bytes": checkpoint.nbytes,
        "digest": checkpoint.digest,
    }


def checkpoint_text(data: dict[str, Any]) -> str:
    """`checkpoint_data` as tables: the tensors, then totals per dtype and overall."""
    tensors = [(t["name"], str(t["shape"]), t["dtype"], format_size(t["bytes"])) for t in data["tensors"]]
    totals = [
        (dtype, f"{n['tensors']:,}", f"{n['numbers']:,}", format_size(n["bytes"]))
        for dtype, n in data["dtypes"].items()
    ]
    whole = ("all", f"{len(data['tensors']):,}", f"{data['numbers']:,}", format_size(data["bytes"]))
    content = f", content {data['content']}" if "content" in data else ""
    return "\n".join(
        [
            table([("tensor", "shape", "dtype", "size"), *tensors], right="size"),
            "",
            table([("dtype", "tensors", "numbers", "size"), *totals, whole], right="tensors numbers size"),
            "",
            printable_line(
                f"{data['path']}: {count_noun(len(data['files']), 'file')}, digest {data['digest']}{content}"
            ),
        ]
    )


def adapter_data(adapter: Adapter) -> dict[str, Any]:
    """An adapter's kind, its own word for its model, the rank of each module, and the tensors that it replaces."""
    stated = adapter.config.get("r")
    ranks = Counter(adapter.rank_patterns.value(module.name, stated) for module in adapter.modules if stated)
    return {
        "kind": adapter.kind,
        "trained_on": adapter.base,
        "settings": adapter.key,
        "modules": [module.name for module in adapter.modules],
        "ranks": [{"rank": rank, "modules": count} for rank, count in ranks.most_common()],
        "saved": [*adapter.saved],
        "unused": [*dropped_of(adapter)],
    }


def adapter_text(data: dict[str, Any]) -> str:
    """`adapter_data` in lines."""
    rows = [
        ("adapter", data["kind"] + (f", trained on {data['trained_on']}" if data["trained_on"] else "")),
        ("modules", f"{len(data['modules']):,}"),
        ("ranks", ", ".join(f"{own['rank']} ({count_noun(own['modules'], 'module')})" for own in data["ranks"])),
        ("settings", ", ".join(f"{name} {value}" for name, value in data["settings"].items())),
        ("whole", shorten(data["saved"], SHOWN_NAMES)),
        ("unused", shorten(data["unused"], SHOWN_NAMES)),
    ]
    return table([row for row in rows if row[1]])


def statistics_data(statistics: Statistics) -> dict[str, Any]:
    """A statistics file's metadata for JSON."""
    facts = statistics.info
    return {
        "kind": facts.kind,
        "models": list(facts.models),
        "data": facts.data,
        "examples": facts.examples,
        "tokens": max((layer.count for layer in facts.layers.values()), default=None),
        "layers": len(facts.layers),
        "entries": len(statistics.tensors),
        "bytes": statistics.tensors.nbytes,
        "norm": facts.norm,
        "options": facts.options,
        "skipped": facts.skipped,
        "versions": facts.versions,
    }


def statistics_text(data: dict[str, Any]) -> str:
    """`statistics_data` as a table, with the reason for everything that the file does not cover."""
    stored = f"{count_noun(data['entries'], 'tensor')}, {format_size(data['bytes'])}"
    of = f"{count_noun(data['layers'], 'layer')} in {stored}" if data["layers"] else stored
    tokens = "" if data["tokens"] is None else f", {count_noun(data['tokens'], 'token')}"
    options = {name: " and ".join(v) if isinstance(v, list) else v for name, v in data["options"].items()}
    rows = [
        ("statistics", f"{data['kind']} of {of}"),
        ("model" if len(data["models"]) == 1 else "models", ", ".join(data["models"])),
        ("data", f"{data['data']}: {count_noun(data['examples'], 'example')}{tokens}"),
        ("options", ", ".join(f"{name} {value}" for name, value in options.items() if value != "")),
        *([] if data["norm"] is None else [("norm", f"{data['norm']:.6g}")]),
        ("skipped", "nothing" if not data["skipped"] else count_noun(len(data["skipped"]), "name")),
    ]
    return "\n".join([table(rows), *_reasons(data["skipped"])])


def _reasons(skipped: dict[str, str]) -> list[str]:
    """A line for each reason, with its first names."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    lines = []
    for reason, skipped_names in names.items():
        more = f" and {len(skipped_names) - SHOWN_NAMES} more" if len(skipped_names) > SHOWN_NAMES else ""
        lines.append(printable_line(f"skipped: {', '.join(skipped_names[:SHOWN_NAMES])}{more}: {reason}"))
    return lines
