"""Show meta-learnings: what is planned, and how the result and what it is compared with do on new tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show import tunings
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.meta_plans import PlannedMeta
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.tune_results import Tuned

NAMES = {"random": "random start", "start": "the model", "joint": "joint training"}
done_data = tunings.done_data


def plan_data(planned: PlannedMeta) -> dict[str, Any]:
    """A planned meta-learning for JSON. memory: bytes of a step, None where the config does not say."""
    need = planned.need
    return {**tunings.plan_data(planned), "memory": None if need is None else need.total}


def plan_text(planned: PlannedMeta) -> str:
    """A planned meta-learning as a table."""
    recipe, need = planned.meta, planned.need
    steps, rate = recipe.inner
    kind = f"{recipe.ways} classes" if recipe.ways is not None else "one of the data files"
    each = "each class" if recipe.ways is not None else "it"
    rows = [
        ("algorithm", f"{recipe.algorithm}: {recipe.row.summary}"),
        ("a task", f"{kind}: {recipe.shots} examples of {each} to adapt on, {recipe.queries} to judge by"),
    ]
    if recipe.row.adapts:
        rows.append(("adapting", f"{steps} steps at {rate:g}"))
    if recipe.test is not None:
        rows.append(("test", ", ".join(file.ref for file in recipe.more_files)))
    if need is not None:
        rows.append(("memory of a step", str(need)))
    return tunings.plan_text(planned, rows, "tasks")


def done_text(outcome: Outcome[Tuned]) -> str:
    """The numbers that were trained, the loss, and the scores on new tasks."""
    text, tests = tunings.done_text(outcome, besides=("test",)), outcome.result.facts.get("test")
    if outcome.already_there or not tests:
        return text
    rows = []
    for name, score in tests.items():
        where = f"{score['steps']} steps" + (f" at {score['rate']:g}" if score["rate"] else "")
        shown = f"{score['mean']:.4g} ± {score['interval']:.2g}" + (f", after {where}" if score["steps"] else "")
        rows.append((NAMES.get(name, name), shown))
    return f"{text}\non new tasks, with 95 % intervals:\n{table(rows)}"
