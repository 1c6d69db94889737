"""Tunings that are planned: what is trained on what, the request that the result answers, and where it goes."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

import xxhash

from mergekit_lfm.artifacts.patch import read_patch_info
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.launch import local_device
from mergekit_lfm.output import save
from mergekit_lfm.output.lock import ADAPTER_LOCK, LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.tune_recipe import DataFile, TuneRecipe
from mergekit_lfm.runtime.calls import write_examples
from mergekit_lfm.runtime.images import find_images
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import open_file
from mergekit_lfm.store.places import beside, check_file
from mergekit_lfm.views.adapted import adapt
from mergekit_lfm.views.quantisation import dequantise

TRAINING = ".training"  # ends the name of the folder with the state and the metrics, beside OUT
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class PatchRequest:
    """The request that a patch answers, whose digest its metadata have. files: those read besides the model."""

    request: Request
    files: tuple[Path, ...]

    @property
    def paths(self) -> dict[str, Path]:
        """The folders and files that are read, by their names in messages."""
        return {**self.request.paths, **{str(path): path for path in self.files}}

    def is_answered(self, out: Path, *, overwrite: bool) -> bool:
        """True if OUT is the patch of this request; False if it may be written there, else PlanError."""
        if out.is_file() and not overwrite and self.is_of(out):
            return True
        check_file(out, self.paths.values(), overwrite=overwrite)
        if out.is_file() and not _is_patch(out):
            raise PlanError(f"{out} exists and is not a patch, which alone is overwritten; choose another output")
        return False

    def is_of(self, out: Path) -> bool:
        """True if a file is a patch of this request."""
        try:
            return read_patch_info(out).options.get("request") == self.request.digest
        except (ValueError, OSError):
            return False


@dataclass(frozen=True)
class PlannedTuning:
    """A tuning that is checked, and not done yet. device: where it runs. source: the model, read with its adapters."""

    recipe: TuneRecipe
    out: Path
    source: Checkpoint
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        found = self.recipe.found
        on = f"the adapter is for {self.recipe.model}, and its config names {found.model} alone"
        makes = self.recipe.declaration.makes
        return (*self.recipe.notices, *([on] if found.adapters and makes == "adapter" else []))

    @cached_property
    def answer(self) -> Request:
        """All that determines the result: the recipe, the model, and the content of the data."""
        recipe = self.recipe
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0], "content": self.contents}
        files = [*recipe.files, *([recipe.dev_file] if recipe.dev_file else [])]
        names = public_names([recipe.model, *(file.ref for file in files), *([recipe.stats] if recipe.stats else [])])
        data = [{**entry, "path": names[entry["path"]]} for entry in whole["data"]]
        public = {**whole, "model": names[recipe.model], "data": data}
        public |= {key: names[whole[key]] for key in ("dev", "stats") if isinstance(whole.get(key), str)}
        lock = ADAPTER_LOCK if recipe.declaration.makes == "adapter" else LOCK
        inputs = (RequestInput(recipe.model, self.source, self.source.config),)
        return Request(whole, public, inputs, lock)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the model."""
        found: list[DataFile | Path | None] = [*self.recipe.files, self.recipe.dev_file, self.recipe.statistics]
        return tuple(self.path_of(file) if isinstance(file, DataFile) else file for file in found if file is not None)

    def path_of(self, file: DataFile) -> Path:
        """Where the examples of a data file are; those of a function are written when they are first asked for."""
        return self._called[file.ref] if file.is_function else file.path

    @cached_property
    def _called(self) -> dict[str, Path]:
        """The files with the examples of functions, in a folder that goes when this plan does."""
        folder = Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files = [file for file in (*self.recipe.files, self.recipe.dev_file) if file is not None and file.is_function]
        return {ref: write_examples(ref, folder) for ref in {file.ref: None for file in files}}

    @cached_property
    def contents(self) -> dict[str, str]:
        """The digests of these files when they were first asked for."""
        return self._digests()

    def _digests(self) -> dict[str, str]:
        return {f"{number} {path.name}": _digest(path) for number, path in enumerate(self.files)}

    def check_unchanged(self) -> None:
        """Raise FormatError if the model or the data were changed since they were first looked at."""
        self.answer.check_unchanged()
        if self._digests() != self.contents:
            raise FormatError("the data were changed while the model was tuned; run the same command again")

    @property
    def request(self) -> Request | PatchRequest:
        """The request that the result answers."""
        return PatchRequest(self.answer, self.files) if self.recipe.declaration.makes == "patch" else self.answer

    @property
    def training(self) -> Path:
        """The folder for the state and the metrics."""
        return beside(self.out, TRAINING)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data."""
        makes = self.recipe.declaration.makes
        if makes == "patch":
            raise PlanError(
                f"{self.recipe.method} makes a patch, which is a file, expected a method that makes a folder here. "
                "Tune in a recipe of its own, and name the file under `edits` of another"
            )
        if makes == "checkpoint":
            save.stand_in(self.source, folder)
            return
        from mergekit_lfm.output.trained_adapter import stand_in_adapter
        from mergekit_lfm.runtime.load import empty_model
        from mergekit_lfm.tune.work import TuneWork

        recipe = self.recipe
        model = empty_model(self.source, recipe.task)
        work = TuneWork(model, recipe.task, recipe.settings, recipe.options.steps, recipe.found.model)
        made = recipe.declaration.prepare(work).adapter()
        stand_in_adapter(folder, made.config, made.tensors)


def _is_patch(file: Path) -> bool:
    try:
        return bool(read_patch_info(file))
    except (ValueError, OSError):
        return False


def plan_tuning(recipe: TuneRecipe, out: Path, *, device: str | None = None) -> PlannedTuning:
    """Check a tuning, and say what it would make. It reads headers only.

    Raises PlanError without the device, FormatError for a damaged model.
    """
    found = recipe.found
    source = adapt(dequantise(open_checkpoint(found.source)), found.adapters, found.ref)
    place = str(find_device(local_device(device or "cpu")))
    if recipe.declaration.makes == "patch" and out.suffix != SUFFIX:
        raise PlanError(f"{out}: {recipe.method} makes a patch, which is a file; give a name that ends in {SUFFIX}")
    return PlannedTuning(recipe, out, source, place)


def _digest(path: Path) -> str:
    """Of a file's content; of images with the names of their folders, and their own content."""
    images = find_images(path)
    digest = xxhash.xxh3_128()
    for file in [*([] if path.is_dir() else [path]), *(image.path for image in images or ())]:
        digest.update(b"" if images is None else f"\0{file.parent.name}/{file.name}\0".encode())
        with open_file(file) as opened:
            while data := opened.read(1 << 22):
                digest.update(data)
    return digest.hexdigest()
