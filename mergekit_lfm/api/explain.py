"""`explain_plan`: where tensors of a planned merge come from, and which line of the recipe gives each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_lfm.api.planned import PlannedMerge
    from mergekit_lfm.plan.explain import Explanation
    from mergekit_lfm.plan.plan import Plan


def explain_plan(planned: PlannedMerge, names: Sequence[str]) -> tuple[Explanation, ...]:
    """Explain the output's tensors with these names, in which * and ? stand for any characters and for one.

    planned: the result of `plan_merge`. Of a recipe with several stages those of all stages count. Each explanation has
    the sources, the layer, the method, the dtype, and every parameter's value with its place in the recipe. Raises
    PlanError for a name that matches nothing, with the nearest names.
    """
    from mergekit_lfm.plan.explain import explain, refuse_unmatched_patterns

    refuse_unmatched_patterns([plan for _, plan, _, _ in _plans(planned)], names)
    return tuple(
        replace(each, stage=stage)
        for stage, plan, text, document in _plans(planned)
        for each in explain(plan, names, text, document)
    )


def _plans(planned: PlannedMerge) -> Iterator[tuple[str, Plan, str | None, int]]:
    """Each merge's stage and plan, the text of the recipe, and the index of the stage's document in it."""
    from mergekit_lfm.api.planned import PlannedMerge

    stages = planned.stages
    if stages is None:
        yield "", planned.plan, planned.plan.recipe.text, 0
        return
    for stage, each in zip(stages.stages, stages.plans, strict=True):
        if isinstance(each, PlannedMerge):
            yield stage.name, each.plan, stage.text, stage.document
    yield "", planned.plan, stages.last.text, stages.last.document
