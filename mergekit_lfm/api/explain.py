"""`explain_plan`: where tensors of a planned merge come from, and which line of the recipe gives each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_lfm.api.merge import PlannedMerge
    from mergekit_lfm.plan.explain import Explanation


def explain_plan(planned: PlannedMerge, names: Sequence[str]) -> tuple[Explanation, ...]:
    """Explain the output's tensors with these names, in which * and ? stand for any characters and for one.

    planned: the result of `plan_merge`. Of a recipe with several stages those of all stages count. Each explanation has
    the sources, the layer, the method, the dtype, and every parameter's value with its place in the recipe. Raises
    PlanError for a name that matches nothing, with the nearest names.
    """
    from mergekit_lfm.plan.explain import explain, refuse_unmatched_patterns

    stages = planned.stages
    earlier = [] if stages is None else zip(stages.stages, stages.plans, strict=True)
    plans = [*((stage.name, each.plan) for stage, each in earlier), ("", planned.plan)]
    refuse_unmatched_patterns([plan for _, plan in plans], names)
    return tuple(replace(each, stage=stage) for stage, plan in plans for each in explain(plan, names))
