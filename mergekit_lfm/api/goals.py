"""The repository on the Hub that a merge goes to at the end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.planned import Merged
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.recipe.form import Push


def check_goal(goal: Push | None) -> None:
    """Raise PlanError if a push would fail, before the work."""
    if goal is not None:
        from mergekit_lfm.output.push import check_repository

        check_repository(goal.repo, private=goal.private)


def push_merged(
    outcome: Outcome[Merged], folder: Path, goal: Push, verify: bool, progress: Progress, started: float
) -> Outcome[Merged]:
    """Push the merged checkpoint; the outcome with the result of the push, and the seconds since `started`."""
    from mergekit_lfm.output.push import push

    pushed = push(folder, goal.repo, private=goal.private, pull_back=verify, progress=progress)
    return replace(outcome, result=replace(outcome.result, pushed=pushed), seconds=time.monotonic() - started)
