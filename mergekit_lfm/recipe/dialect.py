"""Forms of published recipes that mean one thing exactly: read as ours, with a notice where a key has no effect.

`slices` with one slice over all layers of its models is `models`; the plan checks that these are all. A parameter at
the top level, beside `parameters`, has no effect with its default, and `embed_slerp` none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_lfm.methods.registry import METHODS

EMBED_SLERP = "embed_slerp"  # of an early mergekit, which later ones do not read


def read_dialect(data: Mapping[str, Any], known: Mapping[str, object]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The recipe in our form, and the notices. known: our keys."""
    ours, notices = _without_slices(dict(data)), list[str]()
    method = METHODS.get(str(ours.get("merge_method")))
    for parameter in method.parameters if method is not None else ():
        name = parameter.name
        if name in ours and name not in known and ours[name] == parameter.default:
            del ours[name]
            notices.append(f"`{name}` at the top level has no effect here: {parameter.default!r} is its default")
    if EMBED_SLERP in ours:
        del ours[EMBED_SLERP]
        notices.append(
            f"`{EMBED_SLERP}` has no effect here: rows of the vocabulary are merged as all other tensors are"
        )
    return ours, tuple(notices)


def _without_slices(data: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `models` in place of `slices`, if that is one slice with a list of models and their layers."""
    slices = data.get("slices")
    if data.get("models") or not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
        return data
    (piece,) = slices
    sources, parameters = piece.get("sources"), data.get("parameters") or {}
    fits = isinstance(sources, list) and piece.keys() <= {"sources", "parameters"} and isinstance(parameters, Mapping)
    if not fits or not all(isinstance(source, Mapping) and "layer_range" in source for source in sources):
        return data
    own = piece.get("parameters") or {}
    merged = {**parameters, **own} if isinstance(own, Mapping) else own
    rest = {key: value for key, value in data.items() if key not in ("slices", "models", "parameters")}
    return {**rest, "models": [dict(source) for source in sources], **({"parameters": merged} if merged else {})}
