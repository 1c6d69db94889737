"""`plan_merge`: from a recipe to a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from mergekit_lfm.api.arguments import as_bytes, expand
from mergekit_lfm.api.engines import find_accelerator
from mergekit_lfm.api.goals import place_output, staging_folder
from mergekit_lfm.api.jobs import JobRecipe, find_job
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.planned import Planned, PlannedMerge, Stages, plan_job
from mergekit_lfm.api.stages import in_stage, plan_stages
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.form import read_reference
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.source import RecipeText, Source, source_of
from mergekit_lfm.recipe.stages import Stage

RecipeLike = str | PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]] | RecipeText | Recipe


def plan_merge(
    recipe: RecipeLike,
    out: str | PathLike[str] | None = None,
    *,
    max_shard_size: int | str | None = None,
    seed: int | None = None,
    heads: Literal["base", "drop"] | None = None,
    device: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    card: bool = True,
    allow_unknown: bool = False,
) -> Outcome[PlannedMerge]:
    """Plan the merge of a recipe (a YAML file, its text or data, or a `Recipe`): what it would read, write and drop.

    Data are a mapping, or a list of them for the stages of a recipe; text is a `RecipeText`.

    Of the models only the headers are read; with statistics the models are read once, to know them by their content.
    The options are those of `merge`, which takes the result, too. Raises PlanError or FormatError with everything
    that is wrong; ConnectionError if the Hub cannot be reached. The outcome's path is where the output would go.
    """
    from mergekit_lfm.plan.make import make_plan

    started = time.monotonic()
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "heads": heads, "device": device}
    how["card"] = card
    stages: Stages | None = None
    if not isinstance(recipe, Recipe):
        source = source_of(recipe)
        _refuse_job(source)
        if documents := source.stages:
            out = out or output_of(documents[-1]) or source.default_output
            place_output(out, None, private=private, stages=True)
            out = need_output(out)
            stages, last = plan_stages(documents, source.where, out, plan_stage, how, allow_unknown=allow_unknown)
            assert isinstance(last, Recipe)
            recipe = last
        else:
            recipe = source.recipe(allow_unknown=allow_unknown)
            out = out or recipe.output or source.default_output
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    if heads is not None:
        recipe = recipe.model_copy(update={"heads": heads})
    if not card:
        recipe = recipe.model_copy(update={"card": False})
    goal, accelerator = recipe.goal(push_to, private=private), find_accelerator(recipe, device)
    staged = place_output(out or recipe.output, goal, private=private, stages=False)
    folder = None if staged else need_output(out or recipe.output)
    with in_stage(None if stages is None else stages.last):
        plan = make_plan(recipe, max_shard_size=as_bytes(max_shard_size))
    if staged is not None:
        folder, goal = staging_folder(staged.repo, plan.digest), staged
    assert folder is not None
    planned = PlannedMerge(plan, folder, accelerator, goal, as_bytes(max_shard_size), stages, staged=bool(staged))
    return Outcome(folder, planned, plan.digest, seconds=time.monotonic() - started)


def plan_stage(stage: Stage, recipe: Recipe | JobRecipe, out: Path, how: Mapping[str, Any]) -> Planned:
    """The plan of one stage from its recipe and the folder of its result. how: options of `plan_merge`."""
    if isinstance(recipe, Recipe):
        return plan_merge(recipe, out, **how).result
    job = find_job(stage.data, stage.label)
    assert job is not None
    return plan_job(job, recipe, out, how)


def _refuse_job(source: Source) -> None:
    """Raise PlanError if a job makes the output."""
    label, data = (source.stages[-1].label, source.stages[-1].data) if source.stages else (source.label, None)
    job = find_job(source.documents[0] if data is None else data, label)
    if job is not None:
        sentence = "{place}: job {found} makes {what}, expected a merge, which makes a model; {cure}"
        cure = "in Python plan_recipe and run_recipe take it, on the command line `merge`"
        raise PlanError(sentence, place=label, found=job.name, what=job.makes, cure=cure)


def need_output(out: str | PathLike[str] | None) -> Path:
    """The folder of the output."""
    if out is None:
        raise PlanError("no output: give OUT (in Python `out`), or give the recipe an `output`")
    return expand(out)


def output_of(stage: Stage) -> str | None:
    """The output that a stage names; None also for one of another type, which its recipe refuses."""
    try:
        output = read_reference(stage.data.get("output"))
    except ValueError:
        return None
    return output if isinstance(output, str) else None
