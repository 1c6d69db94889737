"""The common part of the recipes of jobs: how they are read, and what they tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from pydantic import PrivateAttr

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.recipe.files import Where
from mergekit_lfm.recipe.form import Strict
from mergekit_lfm.recipe.problems import Problem, problem_at
from mergekit_lfm.recipe.validation import find_problems, read_document, read_form
from mergekit_lfm.recipe.values import FOUND

A_DATA_FILE = "a .jsonl, .txt or .npz file"


def read_task(task: str, tasks: Collection[str]) -> list[Problem]:
    """The problem with a task that is not one of these; [] for one that is."""
    if task in tasks:
        return []
    sentence, cure = FOUND + "; {cure}", did_you_mean(task, tasks)
    return [problem_at("task", sentence, found=repr(task), expected=", ".join(tasks), cure=cure)]


class JobForm(Strict):
    """The recipe of a job. EXPECTED: a document of this form, in words for its user."""

    EXPECTED: ClassVar[str]
    _notices: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def parse(
        cls,
        source: Mapping[str, Any] | str,
        where: Path | None = None,
        label: str = "recipe",
        stages: Mapping[str, Path] = MappingProxyType({}),
        *,
        allow_unknown: bool = False,
    ) -> Self:
        """The recipe in YAML text or a mapping; arguments as of `Recipe.parse`. Raises PlanError with all problems."""
        data = read_document(source, label, cls.EXPECTED)
        read = partial(find_problems, cls, where=Where(where, stages))
        recipe, ignored = read_form(read, data, label, allow_unknown=allow_unknown)
        recipe._notices = (*ignored, *recipe._notices)
        return recipe

    @property
    def notices(self) -> tuple[str, ...]:
        """The entries of the recipe without an effect here, a line for each."""
        return self._notices
