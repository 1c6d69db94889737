"""Show the parts that the outcomes of all workflows have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome

ALREADY_THERE = "already there: the adapter of the same request; nothing was done"


def outcome_data(outcome: Outcome[Any]) -> dict[str, Any]:
    """The parts of an outcome for JSON, whatever the workflow. output_digest: of the lock in the folder, or None."""
    from mergekit_lfm.output.lock import LOCK, OWN_DIGEST, lock_name, lock_of

    path = outcome.path
    return {
        "out": None if path is None else str(path),
        "already_there": outcome.already_there,
        "digest": outcome.digest,
        "output_digest": None if path is None else lock_of(path, lock_name(path) or LOCK).get(OWN_DIGEST),
        "seconds": round(outcome.seconds, 3),
        "warnings": list(outcome.warnings),
    }
