"""Tunings that are planned: what is trained on what, the request that the result answers, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from mergekit_lfm.artifacts.attachment import read_attachment_info
from mergekit_lfm.artifacts.patch import read_patch_info
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.output import save
from mergekit_lfm.output.lock import ADAPTER_LOCK, LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.tune_recipe import DataFile, TuneRecipe
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import open_file
from mergekit_lfm.store.folder import ADAPTER_WEIGHTS
from mergekit_lfm.store.places import beside, check_file
from mergekit_lfm.views.adapted import adapt
from mergekit_lfm.views.quantisation import dequantise

TRAINING = ".training"  # ends the name of the folder with the state and the metrics, beside OUT
SUFFIX = ".safetensors"
FOLDERS = ("adapter", "prompt")  # results that are folders as PEFT has them
# Results that are files: a reader of the options in their headers, by the kind of result.
OPTIONS: Mapping[str, Callable[[Path], Mapping[str, Any]]] = MappingProxyType(
    {
        "patch": lambda file: read_patch_info(file).options,
        "attachment": lambda file: read_attachment_info(file).options,
        "mixture": lambda file: read_attachment_info(file).options,
    }
)
NAMES: Mapping[str, str] = MappingProxyType(
    {"patch": "a patch", "attachment": "a bottleneck adapter", "mixture": "a mixture of prompts"}
)


@dataclass(frozen=True)
class FileRequest:
    """The request that a file answers, whose digest its metadata have. files: those read besides the model.

    makes: the kind of the file.
    """

    request: Request
    files: tuple[Path, ...]
    makes: str

    @property
    def paths(self) -> dict[str, Path]:
        """The folders and files that are read, by their names in messages."""
        return {**self.request.paths, **{str(path): path for path in self.files}}

    def is_answered(self, out: Path, *, overwrite: bool) -> bool:
        """True if OUT is the file of this request; False if it may be written there, else PlanError."""
        if out.is_file() and not overwrite and self.is_of(out):
            return True
        check_file(out, self.paths.values(), overwrite=overwrite)
        if out.is_file() and self._read(out) is None:
            name = NAMES[self.makes]
            raise PlanError(f"{out} exists and is not {name}, which alone is overwritten; choose another output")
        return False

    def is_of(self, out: Path) -> bool:
        """True if a file is that of this request."""
        options = self._read(out)
        return options is not None and options.get("request") == self.request.digest

    def _read(self, file: Path) -> Mapping[str, Any] | None:
        """The options in a file of the kind; None for any other file."""
        try:
            return OPTIONS[self.makes](file)
        except (ValueError, OSError):
            return None


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
        makes = self.recipe.declaration.makes
        on = f"the {makes} is for {self.recipe.model}, and its config names {found.model} alone"
        return (*self.recipe.notices, *([on] if found.adapters and makes in FOLDERS else []))

    @cached_property
    def answer(self) -> Request:
        """All that determines the result: the recipe, the model, and the content of the data."""
        recipe = self.recipe
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0], "content": self.contents}
        files = [*recipe.files, *([recipe.dev_file] if recipe.dev_file else [])]
        named = [file.ref for file in recipe.named_files]
        refs = [recipe.model, *(file.ref for file in files), *([recipe.stats] if recipe.stats else []), *named]
        names = public_names(refs)
        data = [{**entry, "path": names[entry["path"]]} for entry in whole["data"]]
        public = {**whole, "model": names[recipe.model], "data": data}
        public |= {key: names[whole[key]] for key in ("dev", "stats") if key in whole}
        if (key := recipe.declaration.files) is not None:
            public["parameters"] = {**whole["parameters"], key: ",".join(names[ref] for ref in named)}
        lock = ADAPTER_LOCK if recipe.declaration.makes in FOLDERS else LOCK
        inputs = (RequestInput(recipe.model, self.source, self.source.config),)
        return Request(whole, public, inputs, lock)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the model."""
        recipe = self.recipe
        found: list[DataFile | Path | None] = [*recipe.files, recipe.dev_file, recipe.statistics, *recipe.named_files]
        paths = [file.path if isinstance(file, DataFile) else file for file in found if file is not None]
        return tuple(path / ADAPTER_WEIGHTS[0] if path.is_dir() else path for path in paths)

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
    def request(self) -> Request | FileRequest:
        """The request that the result answers."""
        makes = self.recipe.declaration.makes
        return FileRequest(self.answer, self.files, makes) if makes in OPTIONS else self.answer

    @property
    def training(self) -> Path:
        """The folder for the state and the metrics."""
        return beside(self.out, TRAINING)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data."""
        makes = self.recipe.declaration.makes
        if makes in OPTIONS:
            use = {"patch": ", and name the file under `edits` of another"}.get(makes, "")
            raise PlanError(
                f"{self.recipe.method} makes {NAMES[makes]}, which is a file, expected a method that makes a folder "
                f"here. Tune in a recipe of its own{use}"
            )
        if makes == "prompt":
            raise PlanError(
                f"{self.recipe.method} makes a prompt, which no other stage takes; tune in a recipe of its own"
            )
        if makes == "checkpoint":
            save.stand_in(self.source, folder)
            return
        from mergekit_lfm.output.trained_adapter import stand_in_adapter
        from mergekit_lfm.runtime.load import empty_model
        from mergekit_lfm.tune.work import TuneWork

        recipe = self.recipe
        model = empty_model(self.source, recipe.task)
        steps, model_name = recipe.options.steps, recipe.found.model
        work = TuneWork(model, recipe.task, recipe.settings, steps, model_name, tasks=recipe.tasks)
        made = recipe.declaration.prepare(work).adapter()
        stand_in_adapter(folder, made.config, made.tensors)


def plan_tuning(recipe: TuneRecipe, out: Path, *, device: str | None = None) -> PlannedTuning:
    """Check a tuning, and say what it would make. It reads headers only.

    Raises PlanError without the device, FormatError for a damaged model.
    """
    found = recipe.found
    source = adapt(dequantise(open_checkpoint(found.source)), found.adapters, found.ref)
    place = str(find_device(device or "cpu"))
    makes = recipe.declaration.makes
    if makes in OPTIONS and out.suffix != SUFFIX:
        raise PlanError(
            f"{out}: {recipe.method} makes {NAMES[makes]}, which is a file; give a name that ends in {SUFFIX}"
        )
    return PlannedTuning(recipe, out, source, place)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_file(path) as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()
