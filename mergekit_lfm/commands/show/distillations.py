"""Show distillations: what is planned, and how the teachers and the student do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show import tunings
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.distill_plans import PlannedDistillation
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.tune_results import Tuned

SHOWN = ("accuracy", "top1", "mrr", "bits_per_byte", "perplexity", "loss", "error", "correlation")
done_data = tunings.done_data


def plan_data(planned: PlannedDistillation) -> dict[str, Any]:
    """A planned distillation for JSON."""
    return {**tunings.plan_data(planned), "layers": [[[*pair] for pair in each] for each in planned.course.pairs]}


def plan_text(planned: PlannedDistillation) -> str:
    """A planned distillation as a table."""
    recipe, rows = planned.distillation, list[tuple[str, str]]()
    for entry, pairs in zip(recipe.teachers, planned.course.pairs, strict=True):
        facts = [entry.model, *([f"classes {entry.classes[0]} to {entry.classes[1]}"] if entry.classes else [])]
        facts += [f"weight {entry.weight:g}"] if len(recipe.teachers) > 1 else []
        facts += [f"layers {', '.join(f'{mine} to {theirs}' for mine, theirs in pairs)}"] if pairs else []
        rows.append(("teacher", ", ".join(facts)))
    rows.append(("loss", ", ".join(f"{name} {weight:g}" for name, weight in recipe.terms.items())))
    if "kd" in recipe.terms:
        rows.append(("kd", f"temperature {recipe.temperature:g}, {recipe.divergence}"))
    if recipe.top_k is not None:
        rows.append(("top_k", f"{recipe.top_k} of the teachers' scores, and the share of the rest"))
    rows.append(("teachers are asked", "before the training" if recipe.is_cached else "in each step"))
    return tunings.plan_text(planned, rows)


def done_text(outcome: Outcome[Tuned]) -> str:
    """The numbers that were trained, the loss, and the scores on the development set."""
    facts = outcome.result.facts
    text = tunings.done_text(outcome, besides=("teachers", "before", "after", "recovered"))
    if "after" not in facts or outcome.already_there:
        return text
    models = {f"teacher {name}": score for name, score in facts["teachers"].items()}
    models |= {"student before": facts["before"], "student after": facts["after"]}
    rows = [(name, _score(score)) for name, score in models.items()]
    if facts["teachers"] and facts["recovered"] is None:
        rows.append(("came back", "nothing was lacking: the student was as good as the best teacher before"))
    elif facts["teachers"]:
        rows.append(("came back", f"{facts['recovered']:.1%} of what the student lacked to the best teacher"))
    return f"{text}\n{table(rows)}"


def _score(score: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {score[name]:.4g}" for name in SHOWN if name in score)
