"""`merge` and `plan` of recipes with jobs: their options, and what is printed of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from mergekit_lfm.commands.console import Console

if TYPE_CHECKING:
    from mergekit_lfm.api.jobs import Job
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.planned import Planned

# The options that every recipe takes, and those that are about a merge that makes the output.
TAKEN = {"recipe", "out", "allow_unknown", "overwrite", "dry_run", "drop_stages", "verbose"}
TAKEN |= {"as_json", "quiet", "log", "report"}
OF_OUTPUT = {"push_to", "private", "pull_back", "explain"}


def show_of(job: Job) -> Any:
    """The module that prints a job's plans and outcomes: plan_data, plan_text, done_data, done_text."""
    return import_module(f"mergekit_lfm.commands.show.{job.show}")


def refuse_idle_options(planned: Planned) -> None:
    """Raise UsageError for options on the command line that no stage takes."""
    from mergekit_lfm.api.planned import PlannedJob

    stages = [planned, *(() if planned.stages is None else planned.stages.plans)]
    jobs = [stage.job for stage in stages if isinstance(stage, PlannedJob)]
    taken = TAKEN.union(*(job.plan_options | job.run_options for job in jobs))
    ctx = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name is not None
        and parameter.name not in taken
        and (len(jobs) == len(stages) or (isinstance(planned, PlannedJob) and parameter.name in OF_OUTPUT))
        and ctx.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"No stage of the recipe takes {', '.join(given)}; leave it out.")


def conclude_job(console: Console, job: Job, outcome: Outcome[Any]) -> NoReturn:
    """End with the result of a job."""
    console.warn(outcome.warnings)
    show = show_of(job)
    console.conclude(show.done_data(outcome), lambda: show.done_text(outcome), path=outcome.path)
