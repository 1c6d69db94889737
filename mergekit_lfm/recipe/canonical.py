"""The parts of a recipe in one canonical form: what its digest, its lock and its card are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.form import ModuleEntry, SliceEntry
from mergekit_lfm.recipe.parts import Edit, Input, Part
from mergekit_lfm.recipe.rename import rename_data
from mergekit_lfm.recipe.values import NamedFile, as_data


def structure_data(
    parts: Sequence[Part], slices: Sequence[SliceEntry], modules: Mapping[str, ModuleEntry]
) -> dict[str, Any]:
    """The models, slices or modules, with the entries of the recipe that made the parts."""
    if modules:
        return {"modules": {name: _module_data(parts, name, entry) for name, entry in modules.items()}}
    if slices:
        return {"slices": _slices_data(parts, slices)}
    return {"models": _lines_data(parts[0])}


def settings_data(parts: Sequence[Part], place: str) -> dict[str, Any]:
    """The settings of a mapping `parameters`, which several parts may read."""
    scopes = [scope.settings for part in parts for scope in part.scopes if scope.place == place]
    settings = {name: setting for scope in scopes for name, setting in scope.items()}
    return {name: as_data(setting) for name, setting in sorted(settings.items())}


def edits_data(edits: Sequence[Edit]) -> dict[str, Any]:
    """The edits of a model or of the result; {} without any."""
    data = [edit.ref if isinstance(edit, NamedFile) else edit.as_data() for edit in edits]
    return {"edits": data} if data else {}


def _module_data(parts: Sequence[Part], name: str, entry: ModuleEntry) -> dict[str, Any]:
    own = [part for part in parts if part.module == name]
    models = {"slices": _slices_data(own, entry.slices)} if entry.slices else {"models": _lines_data(own[0])}
    given = {"merge_method": entry.merge_method, "base_model": entry.base_model, **models}
    return _without_empty({**given, "parameters": settings_data(own, f"modules.{name}.parameters")})


def _slices_data(parts: Sequence[Part], entries: Sequence[SliceEntry]) -> list[dict[str, Any]]:
    return [
        _without_empty(
            {
                "sources": _lines_data(part),
                "base_model": entry.base_model,
                "parameters": settings_data([part], part.place.replace(".sources", ".parameters")),
            }
        )
        for part, entry in zip(parts, entries, strict=True)
    ]


def _lines_data(part: Part) -> list[dict[str, Any]]:
    return [_line_data(line) for line in part.lines]


def _line_data(line: Input) -> dict[str, Any]:
    """A model's line."""
    return (
        {"model": line.ref}
        | ({} if line.layers is None else {"layer_range": list(line.layers)})
        | {"parameters": {k: as_data(v) for k, v in sorted(line.settings.items())}}
        | ({} if line.stats is None else {"stats": line.stats.ref})
        | _align_data(line.align)
        | edits_data(line.edits)
        | ({"rename": rename_data(line.rename)} if line.rename else {})
    )


def _align_data(align: NamedFile | AlignRequest | None) -> dict[str, Any]:
    if align is None:
        return {}
    return {"align": align.ref if isinstance(align, NamedFile) else align.as_data()}


def _without_empty(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value}
