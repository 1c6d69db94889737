"""The models of a recipe before any alignment or edit: open, dequantised, in the template's layout and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit_lfm.arch.heads import HEAD, POOLER
from mergekit_lfm.arch.kinds import kind_of
from mergekit_lfm.arch.ties import tied_names
from mergekit_lfm.artifacts.attachment import refuse_attachment
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.elsewhere import Elsewhere
from mergekit_lfm.store.hub import HubName
from mergekit_lfm.views.adapted import adapt
from mergekit_lfm.views.experts import regroup
from mergekit_lfm.views.quantisation import dequantise
from mergekit_lfm.views.renamed import Renamed
from mergekit_lfm.views.renaming import find_renaming


def open_stored(recipe: Recipe) -> dict[str, Checkpoint]:
    """Open the recipe's `all_models`, by label, under their new names; quantised ones as float32 unless copied.

    Raises one PlanError about all models missing on the Hub, all quantised ones that cannot be read, or all new names
    that do not fit.
    """
    models = _open_files(recipe)
    if any(method.name != "passthrough" for method in recipe.methods):
        models = _dequantise(models)
    models = _adapt(recipe, models)
    return _find_names(recipe, _regroup_experts(recipe, _rename(recipe, models)))


def _open_files(recipe: Recipe) -> dict[str, Checkpoint]:
    """The recipe's `all_models` as they are stored, by label. Raises one PlanError about all missing on the Hub."""
    checkpoints: dict[Path | Elsewhere, Checkpoint] = {}
    problems = []
    for model in recipe.all_models:
        refuse_attachment(model.source, model.label)
        try:
            if model.source not in checkpoints:
                checkpoints[model.source] = open_checkpoint(model.source)
        except PlanError as error:
            if not isinstance(model.source, HubName) or model.source.repo not in str(error):
                raise  # it is about the account: the other models would raise the same
            problems.append(str(error))
    if problems:
        raise PlanError(several("models of the recipe are not available", problems))
    names: dict[str, Path | Elsewhere] = {}
    for source, checkpoint in checkpoints.items():
        other = names.setdefault(str(checkpoint.snapshot), source) if checkpoint.snapshot is not None else source
        if other != source:
            raise PlanError(
                f"{other} and {source} are one model, {checkpoint.snapshot}, under two names: use one name everywhere"
            )
    return {model.label: checkpoints[model.source] for model in recipe.all_models}


def _dequantise(models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models, by label, with float32 in place of quantised tensors."""
    readable, problems = dict[str, Checkpoint](), []
    for label, checkpoint in models.items():
        try:
            readable[label] = dequantise(checkpoint)
        except PlanError as error:
            problems.append(f"{label} is quantised ({error})")
    if problems:
        raise PlanError("; ".join(problems) + ": merge the unquantised models, or dequantise them first")
    return readable


def _adapt(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models, by label, with the adapters that they are read with."""
    adapted, problems = dict(models), []
    for model in (model for model in recipe.all_models if model.adapters):
        try:
            plain, exact = dequantise(models[model.label]), not (model.edits or model.align or model.stats)
            adapted[model.label] = adapt(plain, model.adapters, model.label, exact=exact)
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("adapters do not fit their models", problems))
    return adapted


def _rename(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models, by label, with the names that the recipe gives to their tensors."""
    renamed, problems = dict(models), []
    for model in (model for model in recipe.all_models if model.rename):
        try:
            renamed[model.label] = Renamed(models[model.label], model.rename)
        except PlanError as error:
            problems.append(f"the `rename` of {model.label}: {error}")
    if problems:
        raise PlanError(several("new names do not fit", problems))
    return renamed


def _regroup_experts(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models, by label, with the experts of a mixture in tensors as the template has them.

    As with names, a model stays as it is whose statistics, alignment or edits are about its tensors.
    """
    template, regrouped = models[recipe.template.label], dict(models)
    for model in recipe.all_models:
        if model != recipe.template and not (model.align or model.edits or model.stats):
            regrouped[model.label] = regroup(models[model.label], template)
    return regrouped


def _find_names(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models, by label, with the template's names in place of those that differ from them by known rules.

    A model's statistics, alignment and edits are about its own names, so one that has any keeps these.
    """
    template, renamed = models[recipe.template.label], dict(models)
    for model in recipe.all_models:
        fixed = model.rename or model.align or model.edits or model.stats
        if fixed or models[model.label].keys() == template.keys():
            continue
        excused = _excuse(recipe, models[model.label], template)
        if rules := find_renaming(models[model.label], template, excused):
            renamed[model.label] = Renamed(models[model.label], rules)
    return renamed


def _excuse(recipe: Recipe, model: Checkpoint, template: Checkpoint) -> Callable[[str], bool]:
    """Whether a tensor may be in one of both models alone: tied, a head's, no parameter, or as the recipe wants."""
    both = {**template, **model}
    tied = {name for group in tied_names(both) for name in group}

    def excused(name: str) -> bool:
        if recipe.tensors == "common" or name in tied or any(part in name for part in recipe.keep):
            return True
        if HEAD.search(name) or POOLER.search(name):
            return True
        return name in both and kind_of(both[name]) in ("constant", "counter")

    return excused
