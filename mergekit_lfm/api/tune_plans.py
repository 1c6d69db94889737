"""Tunings that are planned: what is trained on what, the request that the result answers, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.artifacts.patch import PatchInfo, TensorChange, read_patch_info
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.output import save
from mergekit_lfm.output.adapter import write_empty
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.lock import ADAPTER_LOCK, LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.tune_recipe import DataFile, TuneRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.places import beside
from mergekit_lfm.store.tensors import FLOATS, encode_header
from mergekit_lfm.views.adapted import open_found

TRAINING = ".training"  # ends the name of the folder with the state and the metrics, beside OUT
SUFFIX = ".safetensors"


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
        public |= {key: names[whole[key]] for key in ("dev", "stats") if key in whole}
        lock = ADAPTER_LOCK if recipe.declaration.makes == "adapter" else LOCK
        inputs = (RequestInput(recipe.model, self.source, self.source.config),)
        return Request(whole, public, inputs, lock)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the model."""
        found: list[DataFile | Path | None] = [*self.recipe.files, self.recipe.dev_file, self.recipe.statistics]
        return tuple(file.path if isinstance(file, DataFile) else file for file in found if file is not None)

    @cached_property
    def contents(self) -> dict[str, str]:
        """The digests of these files when they were first asked for."""
        return self._digests()

    def _digests(self) -> dict[str, str]:
        return {f"{number} {path.name}": digest_file(path) for number, path in enumerate(self.files)}

    def check_unchanged(self) -> None:
        """Raise FormatError if the model or the data were changed since they were first looked at."""
        self.answer.check_unchanged()
        if self._digests() != self.contents:
            raise FormatError("the data were changed while the model was tuned; run the same command again")

    @property
    def request(self) -> Request | FileRequest:
        """The request that the result answers."""
        if self.recipe.declaration.makes != "patch":
            return self.answer
        return FileRequest(
            self.answer,
            self.files,
            "a patch",
            lambda out: bool(read_patch_info(out).options.get("request") == self.answer.digest),
        )

    @property
    def training(self) -> Path:
        """The folder for the state and the metrics."""
        return beside(self.out, TRAINING)

    def stand_in(self, folder: Path) -> None:
        """Write something like the result, without data; a patch as if it changed each tensor."""
        makes = self.recipe.declaration.makes
        if makes == "patch":
            specs = [spec for spec in self.source.values() if spec.dtype in FLOATS]
            changes = {spec.name: TensorChange("replace", spec.shape, spec.dtype) for spec in specs}
            metadata = PatchInfo(self.recipe.method, changes).metadata()
            write_empty(folder, encode_header(specs, metadata)[0], specs)
            return
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


def plan_tuning(recipe: TuneRecipe, out: Path, *, device: str | None = None) -> PlannedTuning:
    """Check a tuning, and say what it would make. It reads headers only.

    Raises PlanError without the device, FormatError for a damaged model.
    """
    source = open_found(recipe.found)
    place = str(find_device(device or "cpu"))
    if recipe.declaration.makes == "patch" and out.suffix != SUFFIX:
        raise PlanError(f"{out}: {recipe.method} makes a patch, which is a file; give a name that ends in {SUFFIX}")
    return PlannedTuning(recipe, out, source, place)
