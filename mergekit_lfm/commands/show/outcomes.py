"""Show the parts that the outcomes of all workflows have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome


def outcome_data(outcome: Outcome[Any]) -> dict[str, Any]:
    """The parts of an outcome for JSON, whatever the workflow. output_digest: of the lock in the folder, or None."""
    from mergekit_lfm.output.lock import OWN_DIGEST, lock_of

    return {
        "out": None if outcome.path is None else str(outcome.path),
        "already_there": outcome.already_there,
        "digest": outcome.digest,
        "output_digest": None if outcome.path is None else lock_of(outcome.path).get(OWN_DIGEST),
        "seconds": round(outcome.seconds, 3),
        "warnings": list(outcome.warnings),
    }
