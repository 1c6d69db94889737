"""What a recipe asks to be edited before its merge, or in its result: each leaves a patch, which the plan reads.

The patches are kept, by the content of the model, the facts, all options and the kind of device, so that a merge that
was interrupted, or is made again with other weights, finds them there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mergekit_lfm.api.prepare import noted
from mergekit_lfm.artifacts.cache import kept_or_made, key_of
from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.accelerators import Accelerator
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.machine.resources import cache_folder
from mergekit_lfm.output.writer import Policy, already_there
from mergekit_lfm.plan.plan import Plan, make_plan
from mergekit_lfm.plan.sources import identity_of
from mergekit_lfm.recipe.edit import EditRequest
from mergekit_lfm.recipe.roles import Edit
from mergekit_lfm.recipe.values import GivenFile
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.version import __version__
from mergekit_lfm.views.patched import patched

Notice = Callable[[str], None]


def solve_edits(
    plan: Plan,
    out: Path,
    notice: Notice | None = None,
    *,
    max_shard_size: int | None = None,
    memory: int | None = None,
    threads: int | None = None,
    nan: Policy = "error",
    resume: bool = True,
    overwrite: bool = False,
    device: str = "cpu",
) -> Plan:
    """The plan with all edits made, unless `out` holds its output already. The options are those of `execute`.

    device: where the models run that are edited, what solves for the changes, and merges; `noted` says it of the plan.
    notice is called with a line for each edit that is not known from an earlier run. Edits of the result need the
    result: it is merged once without them, beside `out`, and that is removed again. Raises what `edit` and `execute`
    do, where `out` is in the way before anything else; ImportError without transformers.
    """
    notice = notice or (lambda _: None)
    if not plan.unedited:
        return plan
    plan = noted(plan, device)
    if already_there(plan, out.resolve(), overwrite=overwrite, rebuild=overwrite and not resume, nan=nan):
        return plan
    plan.fetch(notice)
    models = list(plan.models)
    for i, model in enumerate(plan.recipe.all_models):
        if any(isinstance(asked, EditRequest) for asked in model.edits):
            source = models[i].as_stored()
            patches = _patches(source, model.edits, model.label, _own, notice, device)
            held = patched(source, *patches)
            models[i] = Checkpoint(held.path, held.files, models[i].view)
    plan = replace(plan, cast=replace(plan.cast, models=tuple(models)))
    if not plan.unedited:
        return plan
    plain = make_plan(plan.recipe.without_result_edits(), views=plan.models)
    folder = out.resolve().with_name(f"{out.resolve().name}.unedited")
    notice("merging once without the edits of the result")
    place = find_gpu(device)
    gpu = None if place is None else Accelerator(place)
    execute(plain, folder, memory=memory, threads=threads, nan=nan, overwrite=True, gpu=gpu, notice=notice)
    result = open_checkpoint(folder)
    patches = _patches(result, plan.recipe.result_edits, "the result", _of_any(plan), notice, device)
    shutil.rmtree(folder)
    made = make_plan(plan.recipe, max_shard_size=max_shard_size, views=plan.models, edits=patches)
    return replace(made, edited_on=plan.edited_on)


Grams = Callable[[Statistics], Any]  # what `edit` takes as covariance, of a statistics file


def _own(statistics: Statistics) -> Any:
    """The statistics themselves, which `edit` checks to be of the model that it edits."""
    return statistics


def _of_any(plan: Plan) -> Grams:
    """Of statistics of any model of the recipe the matrices: there are none of a result that is not there yet."""

    def grams(statistics: Statistics) -> Any:
        contents = {model.content for model in plan.models}
        if statistics.facts.models[0] not in contents:
            raise PlanError(
                f"{statistics.path} is of a model of content {statistics.facts.models[0]}, which is not merged here; "
                "collect the statistics of one of the recipe's models with `mergekit-lfm stats gram`"
            )
        return {layer.weight: statistics.read(name)[:-1, :-1] for name, layer in statistics.facts.layers.items()}

    return grams


def _patches(
    source: Checkpoint, edits: Sequence[Edit], label: str, grams: Grams, notice: Notice, device: str
) -> list[Patch]:
    """The patches of the edits, each made on the model with those before it applied."""
    patches: list[Patch] = []
    for asked in edits:
        if isinstance(asked, GivenFile):
            patches.append(open_patch(asked.path))
            continue
        held = patched(source, *patches, any_base=True) if patches else source
        patches.append(_found(held, asked, label, grams, notice, device))
    return patches


def _found(source: Checkpoint, asked: EditRequest, label: str, grams: Grams, notice: Notice, device: str) -> Patch:
    """The patch that was asked for, from an earlier run or made now."""

    def make() -> Patch:
        notice(f"editing {label}: {asked.facts.ref} by {asked.method}")
        given = {"lambda_" if name == "lambda" else name: value for name, value in asked.given.items()}
        if asked.stats is not None:
            given["covariance"] = grams(open_statistics(asked.stats.path))
        patch = edit(load_model(source, "lm", device=device), None, asked.facts.path, method=asked.method, **given)
        torch.cuda.empty_cache()  # the merge takes what is free
        return patch

    return kept_or_made(cache_folder("patches") / f"{_key(source, asked, device)}.safetensors", make, open_patch)


def _key(source: Checkpoint, asked: EditRequest, device: str) -> str:
    versions = {"mergekit_lfm": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    return key_of([source.content, identity_of(asked), versions], device)
