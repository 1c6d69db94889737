"""The settings of many tensors: looked up once for all that the same rules of a recipe match."""

from __future__ import annotations

from mergekit_lfm.recipe.recipe import Recipe, Settings


class SettingsTable:
    """A recipe's settings by tensor. Tensors with equal settings share one object."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._filters = {rule.filter for rule in recipe.rules if rule.filter is not None}
        self._by_layer = any(len(rule.values) > 1 for rule in recipe.rules)
        self._found = dict[tuple[object, ...], Settings]()

    def of(self, tensor: str, layer: tuple[int, int] | None) -> Settings:
        """As `Recipe.settings`."""
        key = (layer if self._by_layer else None, *[text in tensor for text in self._filters])
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self.recipe.settings(tensor, layer)
        return found
