"""Push a saved model into a folder of a bucket. It has no commits, so the lock goes there last, and is deleted first.

While files are on their way a mark is there. It names their merge, keeps others away, and shows before the work that
the store takes files at all. Every file carries the digest of its bytes: a file without one is not of a push, and
nothing that is not of one is replaced or deleted unless that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.card import CARD, OWN_CARD, without_front_matter
from mergekit_lfm.output.lock import LOCK, lock_of, verify
from mergekit_lfm.output.outgoing import IN_USE, WEIGHTS, Pushed, outgoing
from mergekit_lfm.store.buckets import BucketName
from mergekit_lfm.store.buckets.put import create_text, delete_files, put_file, put_text, read_small, tag_of
from mergekit_lfm.store.buckets.snapshots import BucketSnapshot, find_in_bucket, list_folder
from mergekit_lfm.store.files import digest_file, read_text
from mergekit_lfm.store.folder import INDEX_END

MARK = "merge.unfinished"  # the mark's name
LARGEST_LOCK = 500_000_000  # bytes
ELSE = "choose another place, or use --overwrite"


@dataclass(frozen=True)
class Place:
    """A folder in a bucket: its files with their sizes, and the lock and the mark of an earlier push, {} without."""

    name: BucketName
    sizes: Mapping[str, int]
    lock: Mapping[str, Any]
    mark: Mapping[str, Any]

    @property
    def used(self) -> list[str]:
        """The files that make it the place of a model."""
        return sorted(file for file in self.sizes if IN_USE.search(file) or file == LOCK)

    @property
    def named(self) -> dict[str, str]:
        """The files of the lock, with their digests, but "" for weights."""
        files, headers = (self.lock.get(key) for key in ("files", "headers"))
        digests = dict.fromkeys(headers, "") if isinstance(headers, dict) else {}
        return digests | ({str(file): str(digest) for file, digest in files.items()} if isinstance(files, dict) else {})

    def is_of(self, plan: str) -> bool:
        """True if a push of this plan is there, or was begun there, and no other."""
        if self.mark:
            return bool(self.mark.get("plan") == plan)
        return bool(self.lock.get("plan") == plan)


def look_at(name: BucketName) -> Place:
    """The folder as it is now."""
    sizes = {file: size for file, (size, _) in list_folder(name).items()}
    return Place(name, sizes, _read(name, LOCK, sizes), _read(name, MARK, sizes))


def _read(name: BucketName, file: str, sizes: Collection[str]) -> Mapping[str, Any]:
    """The entries of one of our own files there; {} without it, an unreadable one has none that fit."""
    if file not in sizes:
        return {}
    try:
        data = json.loads(read_small(name, file, LARGEST_LOCK))
    except ValueError:
        data = None
    return data if isinstance(data, dict) and data else {"plan": None}


def is_whole(place: Place, shards: Mapping[str, int]) -> bool:
    """True if all files of the lock are there, none of them changed since a push, and the shards with their sizes."""
    named = place.named
    if place.mark or not {*named, *shards} <= place.sizes.keys():
        return False
    tags = {file: tag_of(place.name, file) for file in {*named, *shards}}
    return all(tags.values()) and all(
        place.sizes[file] == shards[file] if file in shards else tags[file] == digest for file, digest in named.items()
    )


def check_place(name: BucketName, plan: str, made: str | None = None, *, overwrite: bool) -> None:
    """Mark the folder, if a model of this plan may go there. plan: its digest. made: that of the model as it is here.

    Raises PlanError if the folder holds something else, unless it may be replaced, and if the store takes no files.
    """
    place = look_at(name)
    if overwrite or place.is_of(plan) or (made is not None and place.is_of(made)):
        if place.lock.get("plan") != plan:
            _mark(place, plan, overwrite=overwrite)
        return
    _refuse_mark(place)
    if place.used:
        _refuse(place, place.used[0])
    _mark(place, plan, overwrite=False)
    if used := look_at(name).used:  # of a merge that has begun and ended since the first look
        delete_files(name, [MARK])
        _refuse(place, used[0])


def _refuse(place: Place, file: str) -> None:
    sentence = "{place} holds {found}, which is of another model; {cure}"
    raise PlanError(sentence, place=place.name, found=file, cure=ELSE)


def _refuse_mark(place: Place) -> None:
    """Raise PlanError if another merge writes there, or did not end."""
    if place.mark:
        sentence = "{place} holds {found}: another merge writes there, or was interrupted; {cure}"
        raise PlanError(sentence, place=place.name, found=MARK, cure=f"wait for it, or {ELSE}")


def _mark(place: Place, plan: str, *, overwrite: bool) -> None:
    """Put the mark. Raises PlanError if another merge puts one at the same time."""
    text = json.dumps({"plan": plan})
    if place.mark.get("plan") == plan:
        return
    if overwrite:
        put_text(place.name, MARK, text)
    elif not create_text(place.name, MARK, text):
        now = look_at(place.name)
        if not now.is_of(plan):
            _refuse_mark(now)


def push_into_bucket(
    folder: Path,
    name: BucketName,
    *,
    mark: str | None = None,
    overwrite: bool = False,
    replace_card: bool = False,
    pull_back: bool = False,
    progress: Progress = SILENCE,
) -> Pushed:
    """Push the model in a folder; files that are there already with the same bytes are not sent again.

    mark: the digest that `check_place` has marked the place with, by default that of the folder's lock. overwrite: the
    place may hold another model; files of its lock, and weights, that the new one does not have are deleted. Keeps a
    card that was edited there, unless replace_card, and puts ours into MERGE.md. pull_back: download the model again
    and compare it with its lock. Raises as `output.push.push` does; a push that fails leaves a mark and no lock, and
    the same command goes on.
    """
    going = outgoing(folder, pull_back=pull_back)
    with TemporaryDirectory(prefix="mergekit_lfm-card-") as scratch:
        place, contents = look_at(name), dict(going.contents)
        digests = {file: digest_file(path) for file, path in contents.items()}
        plan = mark or str(lock_of(folder).get("plan") or xxhash.xxh3_128_hexdigest(json.dumps(digests).encode()))
        tags = {file: tag_of(name, file) for file in {*contents, *place.used, CARD} & place.sizes.keys()}
        if not overwrite:
            _refuse_foreign(place, plan, digests, tags)
        if kept := not (replace_card or overwrite) and _card_kept(place, contents, digests, tags):
            path = Path(scratch) / OWN_CARD
            path.write_text(without_front_matter(read_text(contents.pop(CARD))), encoding="utf-8")
            contents[OWN_CARD], digests[OWN_CARD] = path, digest_file(path)
            tags[OWN_CARD] = tag_of(name, OWN_CARD) if OWN_CARD in place.sizes else ""
        changed = [file for file in sorted(contents, key=_turn) if tags.get(file) != digests[file]]
        removed = sorted(_outdated(place, weights=overwrite) - contents.keys() - {CARD})
        if changed or removed:
            _mark(place, plan, overwrite=overwrite)
            delete_files(name, [LOCK] if LOCK in place.sizes else [])
            changed += [LOCK] if LOCK in contents and LOCK not in changed else []
            _send(name, plan, {file: contents[file] for file in changed}, digests, progress)
            delete_files(name, removed)
        delete_files(name, [MARK] if MARK in place.sizes or changed or removed else [])
        snapshot = find_in_bucket(name)
        _compare(snapshot, {file: digests[file] for file in contents}, changed, removed)
        nbytes = sum(contents[file].stat().st_size for file in changed)
    if pull_back:
        compare_copy(snapshot, contents, folder.resolve().parent)
    sent, state = (tuple(changed), tuple(removed)), snapshot.commit
    return Pushed(str(name), state, *sent, nbytes, kept, going.left_out, pull_back)


def _refuse_foreign(place: Place, plan: str, digests: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Raise PlanError if the place holds files that are not of a push of this plan, nor the same as ours."""
    own = place.is_of(plan)
    if not own:
        _refuse_mark(place)
    for file in place.used:
        if file not in digests or not (tags[file] if own else tags[file] == digests[file]):
            _refuse(place, file)


def _card_kept(place: Place, contents: Mapping[str, Path], digests: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    """True if a card is there that is neither ours nor as it was pushed."""
    if CARD not in place.sizes or CARD not in contents:
        return False
    return tags[CARD] not in (digests[CARD], place.named.get(CARD)) or not tags[CARD]


def _turn(file: str) -> tuple[int, str]:
    """The place of a file in the order: weights before what makes them a model, the lock last."""
    last = 3 if file == LOCK else 2 if file == "config.json" or file.endswith(INDEX_END) else 1
    return (0 if WEIGHTS.search(file) and last == 1 else last), file


def _outdated(place: Place, *, weights: bool) -> set[str]:
    """The files there that a push replaces: those of an earlier push, and weights if they may be of others."""
    return {file for file in place.sizes if file in place.named or (weights and WEIGHTS.search(file))}


def _send(
    name: BucketName, plan: str, contents: Mapping[str, Path], digests: Mapping[str, str], progress: Progress
) -> None:
    nbytes = sum(path.stat().st_size for path in contents.values())
    with progress.by_bytes(nbytes, f"pushing to {name}") as advance:
        for file, path in contents.items():
            if file == LOCK and not (now := look_at(name)).is_of(plan):
                _refuse_mark(now)
            put_file(name, file, path, digests[file], advance)


def _compare(
    snapshot: BucketSnapshot, digests: Mapping[str, str], changed: Collection[str], removed: Collection[str]
) -> None:
    """Raises ConnectionError if the place does not hold the files that were pushed."""
    wrong = [file for file in digests if file not in snapshot.sizes]
    wrong += [file for file in changed if file not in wrong and tag_of(snapshot.name, file) != digests[file]]
    wrong += [file for file in removed if file in snapshot.sizes]
    if wrong:
        raise ConnectionError(
            f"{snapshot}: {', '.join(wrong)} differ from the pushed files; does another program write there?"
        )


def compare_copy(snapshot: BucketSnapshot, files: Iterable[str], near: Path) -> None:
    """Download a pushed model past the cache and compare it with its lock. Raises PlanError if a byte differs.

    near: a folder on the disk that has room for it.
    """
    near.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="pulled-", dir=near) as folder:
        snapshot.copy_to(Path(folder), files)
        problems = [
            line
            for line in verify(Path(folder), alone=False)
            if OWN_CARD not in snapshot.sizes or not line.startswith(f"{CARD} ")
        ]
    if problems:
        summary = f"{snapshot} was pushed, but downloaded again it differs from its lock:\n  "
        raise PlanError(summary + "\n  ".join(problems[:10]))
