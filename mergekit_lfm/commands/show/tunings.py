"""Show tunings: what is planned, and what was trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.methods import MADE
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.tune_plans import PlannedTuning
    from mergekit_lfm.api.tune_results import Tuned
    from mergekit_lfm.recipe.tune_data import DataFile


def plan_data(planned: PlannedTuning) -> dict[str, Any]:
    """A planned tuning for JSON."""
    makes = planned.recipe.declaration.makes
    return {
        "out": str(planned.out),
        "makes": makes,
        "recipe": planned.recipe.normalised(),
        "warnings": list(planned.notices),
    }


def plan_text(planned: PlannedTuning, more: Sequence[tuple[str, str]] = (), unit: str = "examples") -> str:
    """A planned tuning as a table. more: rows behind that of the task, in place of that of the loss.

    unit: the members of a batch.
    """
    recipe = planned.recipe
    options, parameters = recipe.options, ", ".join(f"{name} {value}" for name, value in recipe.settings.items())
    loss = ", ".join(f"{name} {number:g}" for name, number in recipe.loss.items())
    rows = [
        (recipe.job, recipe.model),
        ("write", f"{MADE[recipe.declaration.makes]}, {planned.out}"),
        ("method", f"{recipe.method}: {recipe.declaration.summary}"),
        *([("parameters", parameters)] if parameters else []),
        ("task", recipe.task),
        *(more or ([("loss", loss)] if loss else [])),
        *(
            (f"phase {i}, {steps} steps" if len(recipe.parts) > 1 else "trained", ", ".join(patterns))
            for i, (steps, patterns) in enumerate(recipe.parts, 1)
        ),
        *(("held out" if file.cluster in recipe.held_out else "data", _of_file(file)) for file in recipe.files),
        *([("development set", recipe.dev_file.ref)] if recipe.dev_file else []),
        *([("development set", f"{recipe.dev_share:g} of the data")] if recipe.dev_share else []),
        ("steps", f"{options.steps} of {options.batch_size} {unit}"),
        ("learning rate", f"{options.learning_rate:g}, {options.schedule}"),
        *(("note", text) for text in planned.notices),
    ]
    return table(rows)


def _of_file(file: DataFile) -> str:
    """A file of data, and how it is used."""
    facts = [file.ref, *([f"{file.most} each time"] if file.most is not None else [])]
    facts += [f"templates: {len(file.templates)}"] if file.templates else []
    return ", ".join([*facts, *([f"cluster {file.cluster}"] if file.cluster else [])])


def done_data(outcome: Outcome[Tuned]) -> dict[str, Any]:
    """A tuning for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[Tuned], besides: Collection[str] = ()) -> str:
    """The numbers that were trained, and the loss. besides: names of facts that are shown elsewhere."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    tuned = outcome.result
    rows = [
        ("made", MADE[tuned.makes]),
        ("trained", f"{tuned.trained:,} of {tuned.parameters:,} numbers, {tuned.steps} steps"),
        ("loss", f"{tuned.loss:.4g}, the mean over the last tenth of the steps"),
    ]
    if tuned.dev_loss is not None:
        rows.append(("on the development set", f"{tuned.dev_loss:.4g}, the least, after {tuned.best_step} steps"))
    rows += [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in tuned.facts.items()
        if name not in besides
    ]
    rows += [
        (f"{name}, held out", f"{loss['before']:.4g} before, {loss['after']:.4g} after")
        for name, loss in tuned.held_out.items()
    ]
    return table(rows)
