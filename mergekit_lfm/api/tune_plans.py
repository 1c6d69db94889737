"""Tunings that are planned: what is trained on what, the request that the result answers, and where it goes."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lfm.artifacts.attachment import read_attachment_info
from mergekit_lfm.artifacts.patch import read_patch_info
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.launch import local_device
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.lock import ADAPTER_LOCK, LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.tune_data import DataFile
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.runtime.calls import write_examples
from mergekit_lfm.runtime.images import digest_data
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.folder import ADAPTER_WEIGHTS
from mergekit_lfm.store.places import beside
from mergekit_lfm.views.adapted import open_found

if TYPE_CHECKING:
    from mergekit_lfm.machine.progress import Progress
    from mergekit_lfm.runtime.load import Loaded
    from mergekit_lfm.train.examples import Batches, Examples
    from mergekit_lfm.train.losses import Loss

TRAINING = ".training"  # ends the name of the folder with the state and the metrics, beside OUT
ANSWERS = "teachers"  # the folder in that one with what the teachers of a distillation say
SUFFIX = ".safetensors"
FOLDERS = ("adapter", "prompt")  # results that are folders as PEFT has them
# Results that are files: a reader of the options in their headers, by the kind of result.
OPTIONS: Mapping[str, Callable[[Path], Mapping[str, Any]]] = MappingProxyType(
    {
        "patch": lambda file: read_patch_info(file).options,
        "attachment": lambda file: read_attachment_info(file).options,
        "mixture": lambda file: read_attachment_info(file).options,
        "template": lambda file: read_attachment_info(file).options,
    }
)
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "patch": "a patch",
        "attachment": "a bottleneck adapter",
        "mixture": "a mixture of prompts",
        "template": "a template",
    }
)


class Lessons(Protocol):
    """The lessons of other models about the data of a training.

    begin: from the student, as it will be trained, and its examples to what is trained on, and the loss in place of the
    task's. end: facts about the trained student. documents: files for the folder of the result. clear: removes the
    files of the training.
    """

    def begin(self, loaded: Loaded, examples: Examples, /) -> tuple[Batches, Loss]: ...
    def end(self, loaded: Loaded, /) -> Mapping[str, Any]: ...
    @property
    def documents(self) -> Mapping[str, bytes]: ...
    def clear(self) -> None: ...


def file_request(request: Request, files: tuple[Path, ...], makes: str) -> FileRequest:
    """The request that a file of a kind answers, whose digest is among its options."""
    return FileRequest(request, files, NAMES[makes], lambda out: OPTIONS[makes](out).get("request") == request.digest)


@dataclass(frozen=True)
class PlannedTuning:
    """A tuning that is checked, and not done yet. device: where it runs. source: the model, read with its adapters."""

    recipe: TrainingRecipe
    out: Path
    source: Checkpoint
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        found = self.recipe.found
        makes = self.recipe.declaration.makes
        on = f"the {makes} is for {self.recipe.model}, and its config names {found.model} alone"
        return (*self.recipe.notices, *([on] if found.adapters and makes in FOLDERS else []))

    @cached_property
    def answer(self) -> Request:
        """All that determines the result: the recipe, the model, and the content of the data."""
        recipe = self.recipe
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0], "content": self.contents}
        files = [*recipe.files, *recipe.more_files, *([recipe.dev_file] if recipe.dev_file else [])]
        named = [file.ref for file in recipe.named_files]
        refs = [recipe.model, *(file.ref for file in files), *([recipe.stats] if recipe.stats else []), *named]
        inputs = (RequestInput(recipe.model, self.source, self.source.config), *self.others)
        public = self.name_publicly(whole, public_names([*refs, *(other.label for other in self.others)]))
        lock = ADAPTER_LOCK if recipe.declaration.makes in FOLDERS else LOCK
        return Request(whole, public, inputs, lock)

    @property
    def others(self) -> tuple[RequestInput, ...]:
        """The models that are read besides the one that is trained."""
        return ()

    def name_publicly(self, whole: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """The recipe with the public names of its models and files."""
        data = [{**entry, "path": names[entry["path"]]} for entry in whole["data"]]
        public = {**whole, "model": names[whole["model"]], "data": data}
        public |= {key: names[whole[key]] for key in ("dev", "stats") if isinstance(whole.get(key), str)}
        if (key := self.recipe.declaration.files) is not None:
            named = ",".join(names[file.ref] for file in self.recipe.named_files)
            public["parameters"] = {**whole["parameters"], key: named}
        return public

    @property
    def is_taught_before(self) -> bool:
        """Whether something is learned of other models before the one to train is loaded for that."""
        return False

    def learn(self, examples: Examples, progress: Progress) -> Lessons | None:  # noqa: ARG002
        """The lessons of other models about the examples; a tuning has none."""
        return None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the model."""
        recipe = self.recipe
        found: list[DataFile | Path | None] = [*recipe.files, *recipe.more_files, recipe.dev_file, recipe.statistics]
        paths = [self.path_of(file) if isinstance(file, DataFile) else file for file in found if file is not None]
        named = [file.path for file in recipe.named_files]
        return (*paths, *(path / ADAPTER_WEIGHTS[0] if path.is_dir() else path for path in named))

    def path_of(self, file: DataFile) -> Path:
        """Where the examples of a data file are; those of a function are written when they are first asked for."""
        return self._called[file.ref] if file.is_function else file.path

    @cached_property
    def _called(self) -> dict[str, Path]:
        """The files with the examples of functions, in a folder that goes when this plan does."""
        folder = Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        every = (*self.recipe.files, *self.recipe.more_files, self.recipe.dev_file)
        files = [file for file in every if file is not None and file.is_function]
        return {ref: write_examples(ref, folder) for ref in {file.ref: None for file in files}}

    @cached_property
    def contents(self) -> dict[str, str]:
        """The digests of these files when they were first asked for."""
        return self._digests()

    def _digests(self) -> dict[str, str]:
        return {f"{number} {path.name}": digest_data(path) for number, path in enumerate(self.files)}

    def check_unchanged(self) -> None:
        """Raise FormatError if the model or the data were changed since they were first looked at."""
        self.answer.check_unchanged()
        if self._digests() != self.contents:
            raise FormatError("the data were changed while the model was tuned; run the same command again")

    @property
    def request(self) -> Request | FileRequest:
        """The request that the result answers."""
        makes = self.recipe.declaration.makes
        return file_request(self.answer, self.files, makes) if makes in OPTIONS else self.answer

    @property
    def training(self) -> Path:
        """The folder for the state and the metrics."""
        return beside(self.out, TRAINING)

    def stand_in(self, place: Path) -> None:
        """Write something like the result, without data; a patch as if it changed each tensor."""
        from mergekit_lfm.api.tune_stand_ins import stand_in_tuning

        stand_in_tuning(self.recipe, self.source, place)


def plan_tuning(recipe: TrainingRecipe, out: Path, *, device: str | None = None) -> PlannedTuning:
    """Check a tuning, and say what it would make. It reads headers only.

    Raises PlanError without the device, FormatError for a damaged model.
    """
    source = open_found(recipe.found)
    place = str(find_device(local_device(device or "cpu")))
    makes = recipe.declaration.makes
    if makes in OPTIONS and out.suffix != SUFFIX:
        raise PlanError(
            f"{out}: {recipe.method} makes {NAMES[makes]}, which is a file; give a name that ends in {SUFFIX}"
        )
    return PlannedTuning(recipe, out, source, place)
