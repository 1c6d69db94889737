"""What people read on the terminal: tables, the plan, a method's page, the progress bar. No torch is imported."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergekit_lfm.sizes import format_size

if TYPE_CHECKING:
    from mergekit_lfm.checkpoint import Checkpoint
    from mergekit_lfm.evaluate import Perplexity
    from mergekit_lfm.execute import Outcome
    from mergekit_lfm.methods import Method, Parameter
    from mergekit_lfm.plan import Plan

BASES = {
    "required": "required; deltas to it are merged",
    "optional": "optional; with it deltas are merged, without it weights",
    "member": "an input like the others",
    "first": "required; it is the first input",
}
COUNTS = {
    "required": ", the base not counted",
    "optional": ", the base not counted",
    "member": "",
    "first": ", the base included",
}


def table(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """rows, the first one the headings, in aligned columns. `right`: headings of the columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if heading in right.split() else str.ljust for heading in rows[0]]
    lines = ("  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def counted(n: int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextmanager
def progress_bar(nbytes: int, doing: str, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `nbytes` with rate and time left on standard error, where that is a terminal; none where `hidden`.

    Called with numbers of bytes done, from any thread. It disappears at the end.
    """
    from tqdm import tqdm

    unseen = True if hidden else None  # None: unless the stream is a terminal
    lock = Lock()
    with tqdm(total=nbytes, desc=doing, unit="B", unit_scale=True, leave=False, disable=unseen, file=sys.stderr) as bar:

        def advance(done: int) -> None:
            with lock:
                bar.update(done)

        yield advance


def plan_text(plan: Plan, facts: dict[str, Any], verbose: bool) -> str:
    """What a run of the plan would do. `facts` are those of the machine: out, memory, threads, free disk."""
    methods = Counter(tensor.method for tensor in plan.tensors)
    enough = "enough" if facts["enough_disk"] else "NOT ENOUGH"
    rows = [
        ("read", format_size(plan.bytes_read)),
        ("write", f"{format_size(plan.bytes_written)} in {counted(len(plan.shards), 'file')} at {facts['out']}"),
        ("tensors", ", ".join(f"{n:,} {method}" for method, n in methods.most_common())),
        ("dropped", counted(len(plan.dropped), "tensor") if plan.dropped else "nothing"),
        ("peak memory", f"{format_size(facts['peak_memory'])} ({counted(facts['threads'], 'thread')})"),
        ("free disk", f"{format_size(facts['free_disk'])}, {enough}"),
        ("plan", plan.digest),
    ]
    lines = [table(rows)]
    lines += [f"held beside the memory budget, its tensors are no byte ranges: {file}" for file in plan.held]
    lines += [f"dropped: {model}: {tensor}: {reason}" for model, tensor, reason in plan.dropped]
    if verbose:
        lines += ["", table([("tensor", "shape", "dtype", "method"), *map(_tensor_row, plan.tensors)])]
    return "\n".join(lines)


def _tensor_row(tensor: Any) -> tuple[str, str, str, str]:
    return tensor.name, str(list(tensor.shape)), tensor.dtype, tensor.method


def outcome_text(plan: Plan, outcome: Outcome) -> str:
    """One line about what a merge did."""
    if outcome.already_there:
        return "already there: the output of this very plan; nothing was done"
    earlier = f" ({format_size(outcome.resumed_bytes)} of it by the interrupted run)" if outcome.resumed_bytes else ""
    size = format_size(plan.bytes_written)
    return f"wrote {counted(len(plan.tensors), 'tensor')}, {size}{earlier}, in {outcome.seconds:.1f} s"


def checkpoint_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's tensors and totals as JSON has them."""
    specs = list(checkpoint.values())
    dtypes: dict[str, dict[str, int]] = {}
    for spec in specs:
        total = dtypes.setdefault(spec.dtype, {"tensors": 0, "numbers": 0, "bytes": 0})
        for key, more in (("tensors", 1), ("numbers", spec.numel), ("bytes", spec.nbytes)):
            total[key] += more
    return {
        "path": str(checkpoint.path),
        "files": [file.path.name for file in checkpoint.files],
        "tensors": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype, "bytes": s.nbytes} for s in specs],
        "dtypes": dtypes,
        "numbers": sum(spec.numel for spec in specs),
        "bytes": checkpoint.nbytes,
        "digest": checkpoint.digest,
    }


def checkpoint_text(data: dict[str, Any]) -> str:
    """`checkpoint_data` as tables: the tensors, then totals per dtype and in all."""
    tensors = [(t["name"], str(t["shape"]), t["dtype"], format_size(t["bytes"])) for t in data["tensors"]]
    totals = [
        (dtype, f"{n['tensors']:,}", f"{n['numbers']:,}", format_size(n["bytes"]))
        for dtype, n in data["dtypes"].items()
    ]
    whole = ("all", f"{len(data['tensors']):,}", f"{data['numbers']:,}", format_size(data["bytes"]))
    return "\n".join(
        [
            table([("tensor", "shape", "dtype", "size"), *tensors], right="size"),
            "",
            table([("dtype", "tensors", "numbers", "size"), *totals, whole], right="tensors numbers size"),
            "",
            f"{data['path']}: {counted(len(data['files']), 'file')}, digest {data['digest']}",
        ]
    )


def method_data(method: Method) -> dict[str, Any]:
    """A method's declaration as JSON has it."""
    least, most = method.inputs
    return {
        "summary": method.summary,
        "source": method.source,
        "base_model": method.base,
        "models": {"least": least, "most": most},
        "parameters": [parameter_data(parameter) for parameter in method.parameters],
    }


def method_text(method: Method) -> str:
    """A method's page: what it does, what it takes, and where it comes from."""
    least, most = method.inputs
    number = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    page = [
        f"{method.name}: {method.summary}",
        "",
        table(
            [
                ("source", method.source),
                ("base_model", BASES[method.base]),
                ("models", number + COUNTS[method.base]),
            ]
        ),
    ]
    if method.parameters:
        heads = ("parameter", "given", "default", "values", "meaning")
        page += ["", table([heads, *map(_parameter_row, method.parameters)])]
    return "\n".join(page)


def _parameter_row(parameter: Parameter) -> tuple[str, ...]:
    data = parameter_data(parameter)
    given = "per model" if parameter.per_input else "once"
    default = "none" if data["default"] is None else str(data["default"])
    return parameter.name, given, default.lower(), data["values"], parameter.doc


def parameter_data(parameter: Parameter) -> dict[str, Any]:
    """A parameter as JSON has it; its default is "required" where it has none."""
    from mergekit_lfm.methods import REQUIRED

    return {
        "name": parameter.name,
        "per_input": parameter.per_input,
        "default": "required" if parameter.default is REQUIRED else parameter.default,
        "values": _values(parameter),
        "meaning": parameter.doc,
    }


def _values(parameter: Parameter) -> str:
    """The values a parameter takes, in words: "float in (0, 1]", "true, false or l1"."""
    if parameter.kind in ("bool", "switch"):
        names = ("true", "false", *parameter.choices)
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if parameter.choices:
        return " or ".join(parameter.choices)
    low = f"({parameter.above:g}" if parameter.above is not None else None
    low = low or (f"[{parameter.minimum:g}" if parameter.minimum is not None else "(-inf")
    high = f"{parameter.maximum:g}]" if parameter.maximum is not None else "inf)"
    return parameter.kind if (low, high) == ("(-inf", "inf)") else f"{parameter.kind} in {low}, {high}"


def evaluation_data(scores: Mapping[str, Mapping[str, Perplexity]]) -> list[dict[str, Any]]:
    """Per model its numbers on every text, and their means, as JSON has them (which knows no infinity: null)."""
    return [
        {
            "model": model,
            "texts": [{"text": name, **_finite(asdict(score))} for name, score in texts.items()],
            "mean": _finite(_means(list(texts.values()))),
        }
        for model, texts in scores.items()
    ]


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}


def _means(scores: Sequence[Perplexity]) -> dict[str, float]:
    """The geometric mean of the perplexities and the arithmetic mean of the bits per byte."""
    logarithm = sum(score.nll / score.tokens for score in scores) / len(scores)
    return {
        "perplexity": math.exp(logarithm) if logarithm < 709 else math.inf,
        "bits_per_byte": sum(score.bits_per_byte for score in scores) / len(scores),
    }


def evaluation_text(scores: Mapping[str, Mapping[str, Perplexity]]) -> str:
    """A table with one row for each model and text, and the means where there are several texts."""
    rows = [("model", "text", "tokens", "perplexity", "bits/byte")]
    for model, texts in scores.items():
        for name, score in texts.items():
            rows.append((model, name, f"{score.tokens:,}", f"{score.perplexity:.4g}", f"{score.bits_per_byte:.4f}"))
        if len(texts) > 1:
            mean = _means(list(texts.values()))
            rows.append((model, "mean", "", f"{mean['perplexity']:.4g}", f"{mean['bits_per_byte']:.4f}"))
    return table(rows, right="tokens perplexity bits/byte")
