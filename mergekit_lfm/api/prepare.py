"""Everything that a plan needs before the engine can carry it out: downloads, alignments, edits.

Transforms and patches that a recipe asks for are kept in the cache, by the contents of the models, all options and the
kind of device: a merge that was interrupted, or is made again with other weights, finds them there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.artifacts.cache import key_of, kind_of, load_or_make
from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.engine.execute import execute, is_written
from mergekit_lfm.engine.inputs import Comparison
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.accelerators import accelerator_of
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import cache_folder, default_memory
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.replace import Policy
from mergekit_lfm.plan.budget import Budget, check_disk
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.sources import identity_of
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.edit import EditRequest
from mergekit_lfm.recipe.parts import Edit
from mergekit_lfm.recipe.values import NamedFile
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.places import place_of
from mergekit_lfm.version import versions
from mergekit_lfm.views.patched import Patched, check_base, patched_view
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.rewritten import Rewritten

Notice = Callable[[str], None]  # shows one line
Grams = Callable[[Statistics], Any]  # from a statistics file to what `edit` takes as covariance


def prepare(
    plan: Plan,
    out: Path,
    *,
    memory: int | None = None,
    threads: int | None = None,
    max_shard_size: int | None = None,
    nan: Policy = "error",
    resume: bool = True,
    overwrite: bool = False,
    trust_times: bool = False,
    device: str = "cpu",
    progress: Progress = SILENCE,
) -> Plan:
    """The plan with its weights downloaded and all alignments and edits made, unless `out` holds its output already.

    The options are those of `execute`; device: where matrices are multiplied and models run. progress shows a notice
    of each download, alignment and edit that is not known from an earlier run. Edits of the result need the result: it
    is merged once without them, beside `out`, and removed again. Raises what `find_transform`, `edit` and `execute`
    raise, PlanError about `out`, memory and disk before anything else; ImportError without transformers.
    """
    plan = note_device(plan, device)
    folder = place_of(out)
    budget, notice = memory or default_memory(), progress.notice
    where: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "nan": nan}
    if is_written(Comparison(plan, budget, threads, progress, trust_times), folder, **where):
        return plan
    if not (plan.pending or plan.absent or plan.unedited):
        return plan
    Budget(plan).peak(budget, threads or 1)
    check_disk(plan, folder)
    plan = prepare_models(plan, device, progress)
    if not plan.unedited or is_written(Comparison(plan, budget, threads, progress, trust_times), folder, **where):
        return plan
    how: dict[str, Any] = {"memory": memory, "threads": threads, "nan": nan, "resume": resume}
    patches = _result_patches(plan, folder, notice, device, **how)
    made = make_plan(plan.recipe, max_shard_size=max_shard_size, views=plan.models, edits=patches)
    return replace(made, edited_on=plan.edited_on)


def prepare_models(plan: Plan, device: str, progress: Progress) -> Plan:
    """The plan with its weights downloaded, and its models aligned and edited."""
    _fetch_weights(plan, progress)
    return _with_edits(_with_alignments(plan, progress.notice, device), progress.notice, device)


def note_device(plan: Plan, device: str) -> Plan:
    """Record the kind of device in all that is still to be aligned or edited, but for the CPU.

    CPU and GPU results differ by rounding: no output may mix them. Raises PlanError if the device does not exist.
    """
    kind = kind_of(device)
    if kind is None or not (plan.pending or plan.unedited):
        return plan
    edited = any(not isinstance(request, NamedFile) for request in plan.recipe.result_edits)
    models = tuple(
        checkpoint.on_device(kind) if isinstance(checkpoint, Pending) else checkpoint for checkpoint in plan.models
    )
    return replace(plan, models=models, edited_on=kind if edited else "")


def _fetch_weights(plan: Plan, progress: Progress) -> None:
    """Download the weights of the plan's models that are still on the Hub, with a notice for each."""
    snapshot = next((model.snapshot for model in plan.models if model.absent), None)
    if snapshot is not None:
        snapshot.check_room(plan.absent)
    for label, model in zip(plan.labels, plan.models, strict=True):
        if absent := model.absent:
            files = f"{len(absent)} files" if len(absent) > 1 else next(iter(absent))
            progress.notice(f"downloading {files} of {label}, {format_size(sum(absent.values()))}")
            model.fetch(progress)


def _with_alignments(plan: Plan, notice: Notice, device: str) -> Plan:
    """The plan with every alignment found."""
    models = list(plan.models)
    for i, (model, checkpoint) in enumerate(zip(plan.recipe.all_models, plan.models, strict=True)):
        if isinstance(model.align, AlignRequest) and isinstance(checkpoint, Pending):
            (source,) = checkpoint.inners
            to = plan.models[plan.labels.index(model.align.to)]
            notice(f"aligning {model.label} to {model.align.to} by {model.align.method}")
            models[i] = Rewritten(source, _transform_of(source, to, model.align, device), checkpoint.key)
    return replace(plan, models=tuple(models))


def _with_edits(plan: Plan, notice: Notice, device: str) -> Plan:
    """The plan with the facts edited that a model's own `edits` name."""
    models = list(plan.models)
    for i, (model, checkpoint) in enumerate(zip(plan.recipe.all_models, plan.models, strict=True)):
        if model.edits and isinstance(checkpoint, Pending):
            (source,) = checkpoint.inners
            patches = _patches(source, model.edits, model.label, _own_statistics, notice, device)
            check_base(source, patches)
            models[i] = Patched(source, patches, checkpoint.key)
    return replace(plan, models=tuple(models))


def _result_patches(plan: Plan, folder: Path, notice: Notice, device: str, **how: Any) -> list[Patch]:
    """The patches of the result's edits, made on the merge without them, which is removed again."""
    plain = make_plan(plan.recipe.without_result_edits(), views=plan.models)
    folder = folder.with_name(f"{folder.name}.unedited")
    notice("merging once without the edits of the result")
    execute(plain, folder, overwrite=True, accelerator=accelerator_of(find_gpu(device)), **how)
    result = open_checkpoint(folder)
    patches = _patches(result, plan.recipe.result_edits, "the result", _any_statistics(plan), notice, device)
    shutil.rmtree(folder)
    return patches


def _own_statistics(statistics: Statistics) -> Any:
    """The statistics themselves: `edit` checks that they are of the model that it edits."""
    return statistics


def _any_statistics(plan: Plan) -> Grams:
    """Gram matrices from any input model's statistics: the merge result has none yet."""

    def grams(statistics: Statistics) -> Any:
        contents = {model.content for model in plan.models}
        if statistics.info.models[0] not in contents:
            raise PlanError(
                f"{statistics.path} is of a model of content {statistics.info.models[0]}, which is not merged here; "
                "collect the statistics of one of the recipe's models with `mergekit-lfm stats gram`"
            )
        return {layer.weight: statistics.read(name)[:-1, :-1] for name, layer in statistics.info.layers.items()}

    return grams


def _patches(
    source: Checkpoint, edits: Sequence[Edit], label: str, grams: Grams, notice: Notice, device: str
) -> list[Patch]:
    """The patches of the edits, each made on the model with those before it applied."""
    patches: list[Patch] = []
    for request in edits:
        if isinstance(request, NamedFile):
            patches.append(open_patch(request.path))
            continue
        edited = patched_view(source, *patches, any_base=True) if patches else source
        patches.append(_patch_of(edited, request, label, grams, notice, device))
    return patches


def _transform_of(source: Checkpoint, to: Checkpoint, request: AlignRequest, device: str) -> Transform:
    """The requested transform, from an earlier run or found now."""

    def find() -> Transform:
        statistics = None if request.stats is None else open_statistics(request.stats.path)
        options: dict[str, Any] = dict(request.options)
        return find_transform(source, to, request.method, statistics=statistics, device=device, **options)

    stats = None if request.stats is None else digest_file(request.stats.path)
    needed = versions("torch", "numpy", "scipy", "pot")
    key = key_of([source.content, to.content, stats, request.method, request.options, needed], device)
    return load_or_make(cache_folder("transforms") / f"{key}.safetensors", find, open_transform)


def _patch_of(source: Checkpoint, request: EditRequest, label: str, grams: Grams, notice: Notice, device: str) -> Patch:
    """The requested patch, from an earlier run or solved now."""

    def make() -> Patch:
        notice(f"editing {label}: {request.facts.ref} by {request.method}")
        options = dict(request.user_options)
        if request.stats is not None:
            options["covariance"] = grams(open_statistics(request.stats.path))
        patch = edit(
            load_model(source, "lm", device=device), None, request.facts.path, method=request.method, **options
        )
        torch.cuda.empty_cache()  # the merge takes what is free
        return patch

    key = key_of([source.content, identity_of(request), versions("torch", "transformers")], device)
    return load_or_make(cache_folder("patches") / f"{key}.safetensors", make, open_patch)
