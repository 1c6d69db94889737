"""The models of a recipe as they are merged: as they are stored, or rewritten by an alignment or by edits.

Headers suffice to check an alignment or edit that is still to be made, and to know the shapes of its result: a plan
needs no more. `api.prepare` puts the rewritten model in its place before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.arch.pairs import check_alike
from mergekit_lfm.arch.table import Symmetries, Units, check_fit
from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.artifacts.transform import PANEL, Transform, open_transform, read_transform_info
from mergekit_lfm.errors import FormatError, PlanError, several
from mergekit_lfm.methods.kinds import AlignMethod
from mergekit_lfm.plan.stored import open_stored
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.edit import EditRequest
from mergekit_lfm.recipe.parts import Edit, Input, Part
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.recipe.values import NamedFile
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import View
from mergekit_lfm.views.pending import Pending


def open_models(recipe: Recipe) -> tuple[Checkpoint, ...]:
    """Open the recipe's `all_models`, aligned and edited as it says.

    Raises one PlanError about all alignments and edits that do not fit; before that, as `open_stored` does.
    """
    models = open_stored(recipe)
    opened, problems = [], []
    for model in recipe.all_models:
        try:
            opened.append(_open_model(model, models))
        except (FormatError, PlanError, FileNotFoundError) as error:
            key = "align" if model.align else "edits"
            problems.append(f"the `{key}` of {model.label}: {error}" if model.align or model.edits else str(error))
    if problems:
        raise PlanError(several("alignments or edits do not fit their models", problems))
    if any(isinstance(model.align, NamedFile) for model in recipe.all_models):
        check_targets(recipe, opened)
    return tuple(opened)


def _open_model(model: Input, models: Mapping[str, Checkpoint]) -> Checkpoint:
    checkpoint = models[model.label]
    if isinstance(model.align, NamedFile):
        return aligned_view(checkpoint, model.align.path, model.align.ref, model.label)
    if model.edits:
        return edited_view(checkpoint, model.edits)
    return (
        checkpoint
        if model.align is None
        else pending_view(checkpoint, models[model.align.to], model.align, model.label)
    )


def check_targets(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """Raise PlanError if a transform aligns a model to one that the recipe does not merge with it."""
    contents = {
        checkpoint.content for model, checkpoint in zip(recipe.all_models, models, strict=True) if model.align is None
    }
    problems = []
    for model in recipe.all_models if len(models) > 1 else ():
        if isinstance(model.align, NamedFile):
            _, facts = read_transform_info(model.align.path)
            if len(facts.models) > 1 and facts.models[1] not in contents:
                problems.append(
                    f"{model.align.ref} aligns {model.label} to a model of content {facts.models[1]}, which is not in "
                    f"the recipe: list that one, or align {model.label} to a model that is"
                )
    if problems:
        raise PlanError(several("the alignments do not fit the models", problems))


def aligned_view(checkpoint: Checkpoint, file: Path, ref: str, label: object) -> View:
    """The checkpoint as the transform in a file rewrites it. Raises PlanError if that was made for another model."""
    from mergekit_lfm.views.rewritten import Rewritten

    transform = open_transform(file)
    check_source(transform, checkpoint, ref, label)
    return Rewritten(checkpoint, transform, {"transform": digest_file(file)})


def check_source(transform: Transform, checkpoint: Checkpoint, ref: str, label: object) -> None:
    """Raise PlanError if the transform was made for another checkpoint."""
    check_fit(transform.symmetries, checkpoint, label)
    source = next(iter(transform.info.models), None)
    if source not in (None, checkpoint.content):
        raise PlanError(
            f"{ref} rewrites another model, of content {source}; {label} has {checkpoint.content}. Name the "
            f"right file, or align this model with `mergekit-lfm align {label} ...`"
        )


def edited_view(checkpoint: Checkpoint, edits: Sequence[Edit]) -> Checkpoint:
    """The checkpoint with a model's edits applied; if facts are still to be edited, only the shapes of the result."""
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.views.patched import patched_view

    if all(isinstance(edit, NamedFile) for edit in edits):
        return patched_view(checkpoint, *(open_patch(edit.path) for edit in edits if isinstance(edit, NamedFile)))
    key = {"edits": [identity_of(edit) for edit in edits]}
    return Pending(checkpoint, checkpoint, dict.fromkeys(checkpoint, 0), 0, key)


def identity_of(edit: Edit) -> dict[str, Any]:
    """Digests and options of an edit's inputs other than the model."""
    if isinstance(edit, NamedFile):
        return {"patch": digest_file(edit.path)}
    stats = [] if edit.stats is None else _statistics_identity(edit.stats)
    return {"facts": digest_file(edit.facts.path), "method": edit.method, "options": edit.user_options, "stats": stats}


def _statistics_identity(file: NamedFile) -> list[Any]:
    """Data that identify a statistics file with its content, which is read unless the cache has its digest."""
    statistics = open_statistics(file.path)
    return [statistics.info.metadata(), statistics.tensors.content]


def named_files(recipe: Recipe) -> tuple[Path, ...]:
    """The files, other than models, that a recipe names: transforms, patches, facts and statistics."""
    edits = [edit for model in recipe.all_models for edit in model.edits] + list(recipe.result_edits)
    requests = [model.align for model in recipe.all_models if model.align is not None] + edits
    files = [part for request in requests for part in _files_of(request)] + list(recipe.statistics)
    return tuple(dict.fromkeys(file.path for file in files))


def _files_of(request: Edit | AlignRequest) -> list[NamedFile]:
    if isinstance(request, NamedFile):
        return [request]
    facts = [request.facts] if isinstance(request, EditRequest) else []
    return facts if request.stats is None else [*facts, request.stats]


def pending_view(checkpoint: Checkpoint, to: Checkpoint, request: AlignRequest, label: object) -> Checkpoint:
    """The checkpoint with the shapes that it will have. Raises PlanError if the two models cannot be aligned."""
    method = ALIGN_METHODS[request.method]
    tables = find_symmetries(checkpoint, label), find_symmetries(to, request.to)
    check_alike((checkpoint, to), tables, (label, request.to), widths=method.widths)
    specs = {n: TensorSpec(n, to[n].shape, s.dtype) if method.widths else s for n, s in checkpoint.items()}
    scratch, resident = bounds(checkpoint, tables[0], method)
    return Pending(checkpoint, specs, scratch, resident, key_of(request, to))


def bounds(checkpoint: Checkpoint, table: Symmetries, method: AlignMethod[Any]) -> tuple[dict[str, int], int]:
    """The most bytes that rewriting holds: for each tensor in every thread, and in all as long as the merge runs.

    A tensor whose rows may all be mixed with one another is rewritten at once.
    """
    wide = {
        name
        for name, group in table.groups.items()
        if isinstance(group, Units) and (method.widths or (method.rotates and group.rotation))
    }
    scratch = {}
    for name, spec in checkpoint.items():
        row = spec.numel // max(1, spec.shape[0] if spec.shape else 1)
        mixed = bool(spec.shape) and any(part.group in wide for part in table.tensors[name][0])
        scratch[name] = (spec.numel if mixed else min(spec.numel, PANEL + 1024 * row)) * 32
    entries = 0
    for name, group in table.groups.items():
        if isinstance(group, Units):
            entries += group.count**2 if name in wide else 2 * group.count
        else:
            entries += 2 * (1 + group.per_group) * group.groups * group.head_dim**2 + 2 * group.size("query")
    return scratch, entries * 20  # float64, and once more in float32 and float64


def key_of(request: AlignRequest, to: Checkpoint) -> dict[str, Any]:
    """The method, options and input identities on which the result of a request depends, besides the model."""
    stats = [] if request.stats is None else _statistics_identity(request.stats)
    options = {"method": request.method, **dict(request.options)}
    return {"align": options, "to": to.identity, "stats": stats}


def refuse_resized(model: Input, checkpoint: Checkpoint) -> None:
    """Raise PlanError if alignment changes the shapes of the model whose config the output takes."""
    if model.align is not None and isinstance(checkpoint, View):
        (before,) = checkpoint.inners
        resized = next((name for name, spec in checkpoint.items() if before[name].shape != spec.shape), None)
        if resized is not None:
            raise PlanError(
                f"{model.label} is transported to other widths ({before[resized]} becomes "
                f"{list(checkpoint[resized].shape)}), so its config would no longer fit: list the model that it is "
                "aligned to first, or as base_model"
            )


def open_all(recipe: Recipe, models: Mapping[str, Checkpoint]) -> tuple[tuple[Statistics, ...], ...]:
    """The statistics of every input of each part, () if its method takes none. models: the recipe's, by label.

    Raises PlanError naming all files of another kind or another model.
    """
    opened, problems = list[tuple[Statistics, ...]](), list[str]()
    for part in recipe.parts:
        wanted = part.method.statistics
        found, wrong = ((), []) if wanted is None else _open_statistics(part, wanted, models)
        opened.append(tuple(found))
        problems += wrong
    if problems:
        raise PlanError(several("the statistics do not fit the models", problems))
    return tuple(opened)


def _open_statistics(part: Part, wanted: str, models: Mapping[str, Checkpoint]) -> tuple[list[Statistics], list[str]]:
    """The statistics of a part's inputs, and what is wrong with them."""
    opened, problems = list[Statistics](), list[str]()
    for model, file in zip(part.inputs, part.statistics, strict=True):
        try:
            statistics = open_statistics(file.path)
        except (FormatError, FileNotFoundError) as error:
            problems.append(f"the `stats` of {model.label}: {error}")
            continue
        opened.append(statistics)
        if statistics.info.kind != wanted:
            problems.append(
                f"{file.ref} holds {statistics.info.kind} statistics, {part.method.name} needs {wanted}: "
                f"collect them with `mergekit-lfm stats {wanted} {model.label} ...`"
            )
        elif statistics.info.models[0] != models[model.label].content:
            problems.append(
                f"{file.ref} was collected on another model: on content {statistics.info.models[0]}, "
                f"{model.label} has {models[model.label].content}; name the right file, or collect the statistics of "
                f"this model with `mergekit-lfm stats {wanted} {model.label} ...`, from Python with `checkpoint=`"
            )
    return opened, problems


ADDED = "edits"  # the plan's name for the source of the changes that edits add to the result


def open_changes(recipe: Recipe, template: Checkpoint, edits: Sequence[Patch] | None) -> Checkpoint | None:
    """The changes that edits add to the result; None without edits, or while facts are still to be edited."""
    files = [edit for edit in recipe.result_edits if isinstance(edit, NamedFile)]
    if edits is None and len(files) < len(recipe.result_edits):
        return None
    patches = [open_patch(edit.path) for edit in files] if edits is None else list(edits)
    if not patches:
        return None
    from mergekit_lfm.views.patched import summed_changes

    return summed_changes(patches, template, files[0].path if files else template.files[0].path)
