"""The settings of many tensors: looked up once for all that the same rules of a recipe match."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lfm.recipe.parts import Part, Settings


class SettingsTable:
    """The settings of a part of a recipe by tensor. Tensors with equal settings share one object."""

    def __init__(self, part: Part) -> None:
        self.part = part
        settings = [scope.settings for scope in part.scopes] + [model.settings for model in part.inputs]
        rules = [rule for values in settings for setting in values.values() for rule in setting]
        self._filters = {rule.filter for rule in rules if rule.filter is not None}
        self._by_layer = any(len(rule.values) > 1 for rule in rules)
        self._found = dict[tuple[object, ...], Settings]()

    def of(self, tensor: str, layer: tuple[int, int] | None, sources: Sequence[str] = ()) -> Settings:
        """As `Part.settings`."""
        names = (tensor, *sources) if self._filters else ()
        key = (layer if self._by_layer else None, *[text in name for text in self._filters for name in names])
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self.part.settings(tensor, layer, sources)
        return found
