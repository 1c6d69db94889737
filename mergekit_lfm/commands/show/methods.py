"""The pages of the methods, of every kind."""

from __future__ import annotations

from typing import Any

from mergekit_lfm.commands.show.terminal import table
from mergekit_lfm.methods.kinds import AlignMethod, AnyMethod, EditMethod, TuneMethod
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter
from mergekit_lfm.recipe.values import bound_text

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

MADE = {
    "checkpoint": "a model's folder",
    "patch": "a patch file, with the tensors that changed",
    "adapter": "an adapter's folder, as PEFT has it",
    "prompt": "a prompt's folder, as PEFT has it",
    "mixture": "a file with a mixture of prompts",
    "template": "a file with a template around texts",
    "attachment": "a file with a bottleneck adapter",
}


def method_data(method: AnyMethod) -> dict[str, Any]:
    """A method's declaration for JSON."""
    return {
        "summary": method.summary,
        "source": method.source,
        **_inputs(method),
        "parameters": [parameter_data(parameter) for parameter in method.parameters],
    }


def _inputs(method: AnyMethod) -> dict[str, Any]:
    """The inputs of a method, by its kind, for JSON."""
    if isinstance(method, Method):
        least, most = method.inputs
        return {"base_model": method.base, "models": {"least": least, "most": most}}
    if isinstance(method, AlignMethod):
        return {"statistics": method.statistics}
    if isinstance(method, EditMethod):
        return {"layers": {"default": method.band, "several": method.several}}
    if isinstance(method, TuneMethod):
        return {"makes": method.makes, "learning_rate": method.rate, "statistics": method.needs}
    return {"models": method.models}


def method_text(method: AnyMethod, kind: str) -> str:
    """A method's page: summary, kind, source, inputs and parameters."""
    rows = [("kind", kind), ("source", method.source), *_input_rows(method)]
    page = [f"{method.name}: {method.summary}", "", table(rows)]
    if method.parameters:
        heads = ("parameter", "given", "default", "values", "meaning")
        page += ["", table([heads, *map(_parameter_row, method.parameters)])]
    return "\n".join(page)


def _input_rows(method: AnyMethod) -> list[tuple[str, str]]:
    """The inputs of a method, by its kind, in words."""
    if isinstance(method, Method):
        least, most = method.inputs
        number = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        return [("base_model", BASES[method.base]), ("models", number + COUNTS[method.base])]
    if isinstance(method, AlignMethod):
        return [("stats", {"no": "none"}.get(method.statistics, f"{method.statistics}, of kind cross"))]
    if isinstance(method, EditMethod):
        return [("layers", "several" if method.several else "one")]
    if isinstance(method, TuneMethod):
        stats = [] if method.needs is None else [("stats", f"required, of kind {method.needs}")]
        return [("makes", MADE[method.makes]), ("learning rate", f"{method.rate:g} by default"), *stats]
    return [("models", str(method.models))]


def _parameter_row(parameter: Parameter) -> tuple[str, ...]:
    data = parameter_data(parameter)
    scope = "per model" if parameter.per_input else "once"
    default = parameter.unset or "none" if data["default"] is None else str(data["default"])
    return parameter.name, scope, default.lower(), data["values"], parameter.doc


def parameter_data(parameter: Parameter) -> dict[str, Any]:
    """A parameter for JSON; the default "required" if it has no default."""
    return {
        "name": parameter.name,
        "per_input": parameter.per_input,
        "default": "required" if parameter.default is REQUIRED else parameter.default,
        "values": _values(parameter),
        "meaning": parameter.doc,
    }


def _values(parameter: Parameter) -> str:
    """The values of a parameter, in words: "float in (0, 1]", "true, false or l1"."""
    if parameter.kind in ("bool", "switch"):
        names = ("true", "false", *parameter.choices)
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if parameter.choices:
        return " or ".join(parameter.choices)
    low = f"({bound_text(parameter.above)}" if parameter.above is not None else None
    low = low or (f"[{bound_text(parameter.minimum)}" if parameter.minimum is not None else "(-inf")
    high = f"{bound_text(parameter.maximum)}]" if parameter.maximum is not None else "inf)"
    return parameter.kind if (low, high) == ("(-inf", "inf)") else f"{parameter.kind} in {low}, {high}"
