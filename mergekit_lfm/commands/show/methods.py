"""The pages of the merge methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.methods import Method, Parameter

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


def method_data(method: Method) -> dict[str, Any]:
    """A method's declaration for JSON."""
    least, most = method.inputs
    return {
        "summary": method.summary,
        "source": method.source,
        "base_model": method.base,
        "models": {"least": least, "most": most},
        "parameters": [parameter_data(parameter) for parameter in method.parameters],
    }


def method_text(method: Method) -> str:
    """A method's page: summary, source, inputs and parameters."""
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
    scope = "per model" if parameter.per_input else "once"
    default = "none" if data["default"] is None else str(data["default"])
    return parameter.name, scope, default.lower(), data["values"], parameter.doc


def parameter_data(parameter: Parameter) -> dict[str, Any]:
    """A parameter for JSON; the default "required" if it has no default."""
    from mergekit_lfm.methods import REQUIRED

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
    low = f"({parameter.above:g}" if parameter.above is not None else None
    low = low or (f"[{parameter.minimum:g}" if parameter.minimum is not None else "(-inf")
    high = f"{parameter.maximum:g}]" if parameter.maximum is not None else "inf)"
    return parameter.kind if (low, high) == ("(-inf", "inf)") else f"{parameter.kind} in {low}, {high}"
