"""A recipe as it is given: a file, its text, or data; one merge, or several stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.recipe import Recipe, read_recipe
from mergekit_lfm.recipe.stages import Stage, find_stages
from mergekit_lfm.store.yaml import read_documents


@dataclass(frozen=True, slots=True)
class RecipeText:
    """The text of a recipe, as if its file were in the folder `where`; messages call it `label`."""

    text: str
    where: Path
    label: str = "recipe"


@dataclass(frozen=True, slots=True)
class Source:
    """A recipe's documents, the stages among them, and where it is from.

    text: if it was given as text. default_output: by its file's name; None without a file.
    """

    documents: Sequence[object]
    stages: tuple[Stage, ...]
    where: Path | None
    label: str
    text: str | None = None
    default_output: Path | None = None

    def recipe(self, *, allow_unknown: bool) -> Recipe:
        """The recipe of the only document. Raises PlanError as `Recipe.parse` does."""
        (alone,) = self.documents
        given: Any = alone if self.text is None else self.text
        return Recipe.parse(given, self.where, self.label, allow_unknown=allow_unknown)


def source_of(given: str | PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]] | RecipeText) -> Source:
    """The documents of a recipe in any form. Raises PlanError if it cannot be read, or its stages make no sense."""
    if isinstance(given, RecipeText):
        return _of_text(given)
    if isinstance(given, str | PathLike):
        path = Path(given)
        text = RecipeText(read_recipe(path), path.absolute().parent, str(path))
        return _of_text(text, Path("merged") / path.stem)
    documents = [given] if isinstance(given, Mapping) else list(given)
    if not documents:
        raise PlanError("recipe: found no stage, expected a mapping or a list of them")
    return Source(documents, find_stages(documents, "recipe"), None, "recipe")


def _of_text(given: RecipeText, output: Path | None = None) -> Source:
    documents = read_documents(given.text, given.label)
    stages = find_stages(documents, given.label, given.text)
    return Source(documents, stages, given.where, given.label, given.text, output)
