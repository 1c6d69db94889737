"""Where the workers of a merge run: an executor for them, and what one machine there has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Pool
from mergekit_lfm.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Site:
    """A pool of workers. memory, threads: what one machine has for them by default; None: what this one has."""

    pool: Pool
    memory: int | None = None
    threads: int | None = None


# Opens a site for the work on a plan, before anything is written. Raises PlanError if the plan cannot be done there.
Engine = Callable[[Plan], AbstractContextManager[Site]]


def this_machine(_: Plan) -> AbstractContextManager[Site]:
    """The site of threads of this process."""
    return nullcontext(Site(thread_pool))
