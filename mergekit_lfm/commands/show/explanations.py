"""Show where tensors of a plan come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.plans import value_text
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.plan.explain import Explanation, ValueOrigin


def explanations_data(explanations: Sequence[Explanation]) -> dict[str, Any]:
    """Explanations for JSON."""
    return {"tensors": [asdict(each) for each in explanations]}


def explanations_text(explanations: Sequence[Explanation]) -> str:
    """A paragraph for each tensor."""
    return "\n\n".join("\n".join(_lines(each)) for each in explanations)


def _lines(each: Explanation) -> Iterator[str]:
    yield f"stage {each.stage}: {each.name}" if each.stage else each.name
    rows = [("also written as", name, "") for name in each.names[1:]]
    rows += [(source.role, f"{source.model}: {source.tensor}", "") for source in each.sources]
    layer = "none" if each.layer is None else f"{each.layer[0]} of 0-{each.layer[1] - 1}"
    rows += [("layer", layer, ""), ("method", each.method, ""), ("dtype", f"{each.dtype}, from {each.arithmetic}", "")]
    rows += [(value.parameter, _value_text(value), _place_text(value)) for value in each.values]
    yield from (f"  {line}".rstrip() for line in table(rows).splitlines())


def _value_text(value: ValueOrigin) -> str:
    text = value_text(value.value)
    return text if value.model is None else f"{value.model}: {text}"


def _place_text(value: ValueOrigin) -> str:
    if value.place is None:
        return "default"
    return value.place if value.line is None else f"{value.place}, line {value.line}"
