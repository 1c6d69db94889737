"""`push`: a finished output to a repository on the Hub."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.lock import lock_of
from mergekit_lfm.store.buckets import bucket_name
from mergekit_lfm.store.elsewhere import destination

if TYPE_CHECKING:
    from mergekit_lfm.output.outgoing import Pushed


def push(
    folder: StrPath,
    repo: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    replace_card: bool = False,
    message: str | None = None,
    pull_back: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Pushed]:
    """Push a saved model in a folder to a repository (org/name) on the Hub, or into a bucket (s3://bucket/path).

    On the Hub it is one commit, and the repository is made if missing. In a bucket the lock goes last; overwrite: the
    place may hold another model.

    Deletes files of an earlier push that the folder no longer has. Keeps a card edited on the Hub, unless replace_card,
    and puts ours into MERGE.md. private: the repository must be. overwrite: it may hold weights that are not of an
    earlier push. pull_back: download the pushed model again and compare it with its lock. The token is HF_TOKEN or that
    of `hf auth login`. The outcome's digest is that of the merge's plan, if the folder has a lock.

    Raises FormatError if the folder holds no complete model, PlanError if anything forbids the push, before sending
    anything if it can be known then; ConnectionError if the connection fails, which leaves the repository as it was.
    """
    started, source = time.monotonic(), expand(folder, "folder")
    how: dict[str, Any] = {"overwrite": overwrite, "replace_card": replace_card, "pull_back": pull_back}
    how["progress"] = progress
    try:
        place = destination(str(repo))
    except ValueError as wrong:
        raise PlanError(f"push: {wrong}") from None
    if (bucket := bucket_name(place)) is not None:
        _refuse_commits(place, {"private": private, "message": message})
        from mergekit_lfm.output.push_bucket import push_into_bucket

        pushed = push_into_bucket(source, bucket, **how)
    else:
        from mergekit_lfm.output.push import push as push_folder

        pushed = push_folder(source, place, private=private, message=message, **how)
    there = not pushed.files and not pushed.removed
    return Outcome(source, pushed, lock_of(source).get("plan"), there, seconds=time.monotonic() - started)


def _refuse_commits(place: str, options: Mapping[str, Any]) -> None:
    """Raise PlanError for options about a commit or a repository, which a bucket does not have."""
    if given := [name for name, value in options.items() if value]:
        sentence = "{found} has no effect on {place}, which is in a bucket; {cure}"
        raise PlanError(sentence, found=", ".join(given), place=place, cure="leave it out")
