"""Push a saved model into a folder of a bucket. It has no commits, so the lock goes there last, and is deleted first.

While files are on their way a mark is there. It names their merge, and shows before the work that the store takes
files at all. Nothing is deleted that is not of an earlier push.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.lock import LOCK, lock_of, verify
from mergekit_lfm.output.outgoing import IN_USE, WEIGHTS, Outgoing, Pushed, outgoing
from mergekit_lfm.store.buckets import BucketName
from mergekit_lfm.store.buckets.put import delete_files, has_file, put_file, put_text, read_small
from mergekit_lfm.store.buckets.snapshots import BucketSnapshot, find_in_bucket, list_folder
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.folder import INDEX_END

MARK = "merge.unfinished"  # the mark's name
LARGEST_LOCK = 500_000_000  # bytes


@dataclass(frozen=True)
class Place:
    """A folder in a bucket: its files with their sizes, and the lock and the mark of an earlier push, {} without."""

    name: BucketName
    sizes: Mapping[str, int]
    lock: Mapping[str, Any]
    mark: Mapping[str, Any]


def look_at(name: BucketName) -> Place:
    """The folder as it is now."""
    sizes = {file: size for file, (size, _) in list_folder(name).items()}
    return Place(name, sizes, _read(name, LOCK, sizes), _read(name, MARK, sizes))


def _read(name: BucketName, file: str, sizes: Collection[str]) -> Mapping[str, Any]:
    """The entries of one of our own files there; {} without a readable one."""
    if file not in sizes:
        return {}
    try:
        data = json.loads(read_small(name, file, LARGEST_LOCK))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def is_whole(place: Place, shards: Mapping[str, int]) -> bool:
    """True if all files of the lock are there, and the shards with their sizes."""
    named = {file for key in ("files", "headers") for file in place.lock.get(key) or {}}
    return named <= place.sizes.keys() and all(place.sizes.get(name) == size for name, size in shards.items())


def check_place(name: BucketName, plan: str | None, *, overwrite: bool) -> Place:
    """The folder, if a model of this plan may go there, and the store takes files. plan: its digest, None without one.

    Raises PlanError if the folder holds something else, unless it may be replaced.
    """
    place = look_at(name)
    ours = plan is not None and plan in (place.lock.get("plan"), place.mark.get("plan"))
    used = sorted(file for file in place.sizes if IN_USE.search(file) or file in (LOCK, MARK))
    if used and not (ours or overwrite):
        sentence = "{place} holds {found}, which is of another model; {cure}"
        raise PlanError(sentence, place=name, found=used[0], cure="choose another place, or use --overwrite")
    if place.lock.get("plan") != plan or plan is None:
        _mark(name, plan)
    return place


def _mark(name: BucketName, plan: str | None) -> None:
    put_text(name, MARK, json.dumps({"plan": plan}))


def push_into_bucket(
    folder: Path, name: BucketName, *, overwrite: bool = False, pull_back: bool = False, progress: Progress = SILENCE
) -> Pushed:
    """Push the model in a folder; files that are there already with the same bytes are not sent again.

    overwrite: the place may hold another model; files of its lock, and weights, that the new one does not have are
    deleted. pull_back: download the model again and compare it with its lock. Raises as `output.push.push` does; a push
    that fails leaves a mark and no lock, and the same command goes on.
    """
    going = outgoing(folder, pull_back=pull_back)
    digests = {file: digest_file(path) for file, path in going.contents.items()}
    plan = lock_of(folder).get("plan")
    place = check_place(name, plan, overwrite=overwrite)
    order = sorted(going.contents, key=_turn)
    changed = [file for file in order if not _is_there(place, file, going.contents[file], digests[file])]
    removed = sorted(_outdated(place) - going.contents.keys())
    if changed or removed:
        _mark(name, plan)
        delete_files(name, [LOCK] if LOCK in place.sizes else [])
        changed += [LOCK] if LOCK in going.contents and LOCK not in changed else []
        _send(going, name, changed, digests, progress)
        delete_files(name, removed)
    delete_files(name, [MARK])
    snapshot = find_in_bucket(name)
    _compare(snapshot, going, removed)
    if pull_back:
        _pull_back(snapshot, going)
    nbytes = sum(going.contents[file].stat().st_size for file in changed)
    sent, state = (tuple(changed), tuple(removed)), snapshot.commit
    return Pushed(str(name), state, *sent, nbytes, False, going.left_out, pull_back)


def _turn(file: str) -> tuple[int, str]:
    """The place of a file in the order: weights before what makes them a model, the lock last."""
    last = 3 if file == LOCK else 2 if file == "config.json" or file.endswith(INDEX_END) else 1
    return (0 if WEIGHTS.search(file) and last == 1 else last), file


def _is_there(place: Place, file: str, path: Path, digest: str) -> bool:
    return place.sizes.get(file) == path.stat().st_size and has_file(place.name, file, digest)


def _outdated(place: Place) -> set[str]:
    """The files there that a push replaces: weights, and files of an earlier push."""
    lock = place.lock
    named = [lock.get(key) for key in ("files", "headers")]
    ours = {file for entries in named if isinstance(entries, dict) for file in entries}
    return {file for file in place.sizes if file in ours or WEIGHTS.search(file)}


def _send(
    going: Outgoing, name: BucketName, files: Collection[str], digests: Mapping[str, str], progress: Progress
) -> None:
    nbytes = sum(going.contents[file].stat().st_size for file in files)
    with progress.by_bytes(nbytes, f"pushing to {name}") as advance:
        for file in files:
            put_file(name, file, going.contents[file], digests[file], advance)


def _compare(snapshot: BucketSnapshot, going: Outgoing, removed: Collection[str]) -> None:
    """Raises ConnectionError if the place does not list what was pushed."""
    sizes = {file: path.stat().st_size for file, path in going.contents.items()}
    wrong = [file for file, size in sizes.items() if snapshot.sizes.get(file) != size]
    wrong += [file for file in removed if file in snapshot.sizes]
    if wrong:
        raise ConnectionError(
            f"{snapshot}: {', '.join(wrong)} differ from the pushed files; somebody else changes them"
        )


def _pull_back(snapshot: BucketSnapshot, going: Outgoing) -> None:
    """Download the pushed model past the cache and compare it with its lock. Raises PlanError if a byte differs."""
    with TemporaryDirectory(prefix="pulled-", dir=going.folder.resolve().parent) as folder:
        snapshot.copy_to(Path(folder), going.contents)
        problems = verify(Path(folder), alone=False)
    if problems:
        summary = f"{snapshot} was pushed, but downloaded again it differs from its lock:\n  "
        raise PlanError(summary + "\n  ".join(problems[:10]))
