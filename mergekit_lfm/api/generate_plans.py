"""Texts of a language model that are planned: which model writes them, from which prompts, and where they go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.api.attachments import ReadModel, open_named
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.output.file_request import FileRequest, read_lock_beside
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.generate_recipe import JOB, GenerateRecipe
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.train.openings import Opening, read_openings

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class PlannedTexts:
    """Texts that are checked, and not written yet. device: where the model runs."""

    recipe: GenerateRecipe
    out: Path
    model: ReadModel
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def openings(self) -> list[Opening]:
        """The prompts; one without words if there is no file."""
        file = self.recipe.data_file
        return [Opening({})] if file is None else read_openings(file, self.recipe.task)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the model."""
        file = self.recipe.data_file
        return (*([] if file is None else [file]), *self.model.files)

    @cached_property
    def request(self) -> FileRequest:
        """The request that the file answers: the recipe, and the content of the model and the prompts."""
        recipe = self.recipe
        content = [digest_file(path) for path in self.files]
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0], "content": content}
        refs = [recipe.model, *([] if recipe.data is None else [recipe.data])]
        names = public_names(refs)
        public = {**whole, **{key: names[ref] for key, ref in zip(("model", "data"), refs, strict=False)}}
        inputs = (RequestInput(recipe.model, self.model.source, self.model.source.config),)
        request = Request(whole, public, inputs)

        def answers(out: Path) -> bool:
            lock = read_lock_beside(out, JOB)
            return bool(lock["request"] == request.digest and lock["content"] == digest_file(out))

        return FileRequest(request, self.files, "a file of texts with its lock", answers)

    def stand_in(self, file: Path) -> None:
        """Write a file of one text in the form of the result."""
        file.write_text(json.dumps(self.openings[0].complete(".")) + "\n")


def plan_texts(recipe: GenerateRecipe, out: Path, *, device: str | None = None) -> PlannedTexts:
    """Check a recipe of texts. Reads headers and prompts.

    Raises PlanError without the device, and for an output of another suffix than .jsonl; FormatError for a file without
    prompts.
    """
    if out.suffix != SUFFIX:
        raise PlanError(f"{out}: generate writes a data file; give a name that ends in {SUFFIX}")
    planned = PlannedTexts(recipe, out, open_named(recipe.found), str(find_device(device or "cpu")))
    _ = planned.openings
    return planned
