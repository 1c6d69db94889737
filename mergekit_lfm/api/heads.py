"""`add_head`: a saved model with a new head for labels, as a model of its own: the base of everything tuned from it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.output.adapter import METADATA, write_empty
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput, result_of
from mergekit_lfm.output.save import make_folder
from mergekit_lfm.output.written import copy_sidecars, lock_written, stored_tensors
from mergekit_lfm.recipe.head_recipe import HeadRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.store.tensors import encode_header
from mergekit_lfm.views.adapted import open_found

WEIGHTS = "model.safetensors"  # as transformers calls the file of a model


@dataclass(frozen=True, slots=True)
class NewHead:
    """The result. added: the names of the new parameters. dropped: tensors of the model that the new one lacks."""

    added: tuple[str, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedHead:
    """A new head that is checked, and not made yet."""

    recipe: HeadRecipe
    out: Path
    source: Checkpoint

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def request(self) -> Request:
        """The request that the folder answers."""
        whole = self.recipe.normalised()
        public = {**whole, "model": public_names([self.recipe.model])[self.recipe.model]}
        return Request(whole, public, (RequestInput(self.recipe.model, self.source, self.source.config),), LOCK)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data."""
        self._write(folder, empty=True)

    def _write(self, folder: Path, *, empty: bool) -> NewHead:
        """Write the model's files into a folder that is not there, or empty."""
        from mergekit_lfm.runtime.load import classifier_with_new_head, save_quietly

        labels, seed = self.recipe.labels, self.recipe.seed
        model, added, dropped = classifier_with_new_head(self.source, labels, seed, empty=empty)
        folder.mkdir(exist_ok=True)
        copy_sidecars(self.source, folder)
        if not empty:
            save_quietly(model, folder, stored_tensors(model, dict.fromkeys(added), self.source))
            return NewHead(added, dropped)
        specs = [spec_of(name, x) for name, x in model.state_dict().items()]
        write_empty(folder / WEIGHTS, encode_header(specs, METADATA)[0], specs)
        model.config.save_pretrained(folder)
        return NewHead(added)

    def make(self) -> NewHead:
        """Write the folder of the result."""
        _ = self.request.digest
        with make_folder(self.out) as partial:
            made = self._write(partial, empty=False)
            lock_written(partial, self.request, {"added": list(made.added), "dropped": list(made.dropped)})
        return made


def plan_head(recipe: HeadRecipe, out: Path) -> PlannedHead:
    """Check a recipe for a new head, from headers alone. Raises FormatError for a damaged model."""
    return PlannedHead(recipe, out, open_found(recipe.found))


def add_head(
    model: StrPath, out: StrPath, *, labels: int | Sequence[str], seed: int = 0, overwrite: bool = False
) -> Outcome[NewHead]:
    """Write a model with a new head for labels, of random weights, in place of any that it has.

    labels: their names, or their number. The rest of the model is as it was, under the names that a classifier of its
    architecture has in transformers. The outcome's digest is that of the request. Raises PlanError for an architecture
    without classifiers, FormatError for a damaged model, ImportError without transformers.
    """
    names = labels if isinstance(labels, int) else [*labels]
    recipe = HeadRecipe.parse({"job": "head", "model": os.fspath(model), "labels": names, "seed": seed}, label="head")
    return make_head(plan_head(recipe, expand(out)), overwrite=overwrite)


def make_head(planned: PlannedHead, *, overwrite: bool = False, progress: object = None) -> Outcome[NewHead]:  # noqa: ARG001
    """Carry a planned head out; as `add_head` does."""
    started, request = time.monotonic(), planned.request
    there = request.is_answered(planned.out, overwrite=overwrite)
    if there:
        facts = result_of(planned.out, LOCK)
        made = NewHead(tuple(facts["added"]), tuple(facts["dropped"]))
    else:
        made = planned.make()
    findings = [f"{name} is of a head that the new one replaces, and is dropped" for name in made.dropped]
    findings += [f"{name} is left behind: {why}" for name, why in sidecars_of(planned.source).missed]
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(planned.out, made, request.digest, there, warnings, time.monotonic() - started)
