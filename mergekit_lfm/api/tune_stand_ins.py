"""Stand-ins for the results of tunings, without data: later stages of a recipe are planned on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from mergekit_lfm.artifacts.attachment import ATTACHMENT
from mergekit_lfm.artifacts.patch import PatchInfo, TensorChange
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output import save
from mergekit_lfm.output.adapter import write_empty
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import FLOATS, encode_header


def stand_in_tuning(recipe: TrainingRecipe, source: Checkpoint, place: Path) -> None:
    """Write a folder or file like the result of a tuning of `source`. Raises PlanError for what no stage takes."""
    makes = recipe.declaration.makes
    if makes == "checkpoint":
        save.stand_in(source, place)
    elif makes == "patch":
        specs = [spec for spec in source.values() if spec.dtype in FLOATS]
        changes = {spec.name: TensorChange("replace", spec.shape, spec.dtype) for spec in specs}
        write_empty(place, encode_header(specs, PatchInfo(recipe.method, changes).metadata())[0], specs)
    elif makes in ("adapter", "attachment"):
        _stand_in_module(recipe, source, place)
    else:
        name = "a template" if makes == "template" else "a prompt"
        raise PlanError(f"{recipe.method} makes {name}, which no other stage takes; tune in a recipe of its own")


def _stand_in_module(recipe: TrainingRecipe, source: Checkpoint, place: Path) -> None:
    """The same for what the method adds to a model, whose shapes only the model shows."""
    from mergekit_lfm.output.trained_adapter import stand_in_adapter
    from mergekit_lfm.runtime.load import empty_model
    from mergekit_lfm.tune.work import TuneWork

    files = tuple(file.path for file in recipe.named_files)
    facts = (recipe.found.model, None, files, source.content, recipe.tasks)
    work = TuneWork(empty_model(source, recipe.task), recipe.task, recipe.settings, recipe.options.steps, *facts)
    prepared = recipe.declaration.prepare(work)
    if prepared.adapter is not None:
        made = prepared.adapter()
        stand_in_adapter(place, made.config, made.tensors)
        return
    attachment = prepared.attachment()
    info = replace(attachment.info, base=source.content)
    specs = [spec_of(name, x) for name, x in attachment.tensors.items()]
    write_empty(place, encode_header(specs, ATTACHMENT.encode(asdict(info)))[0], specs)
