"""The last steps of an output: OUT.partial holds exactly what was planned, and becomes OUT. Each can be done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.output.journal import JOURNAL, is_journal, part_journals
from mergekit_lfm.output.layout import Shard
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.replace import REPLACED, clear_replaced, files_in, put_back
from mergekit_lfm.store.durable import sync_folder
from mergekit_lfm.store.locks import lock_folder, lock_parts, parts_lock
from mergekit_lfm.store.places import partial_of

JOINING_S = 3600.0  # to wait for another part that publishes the output, which may read all of it before


def check_whole(partial: Path, shards: Iterable[Shard], files: Mapping[str, bytes], *, lock: bool = False) -> None:
    """Raise PlanError unless OUT.partial holds exactly these shards and files, in their sizes. lock: and the lock."""
    sizes = {shard.name: shard.nbytes for shard in shards} | {name: len(data) for name, data in files.items()}
    ours = {*sizes, LOCK} if lock else set(sizes)
    problems = [f"{name} is missing" for name in sorted(ours) if not os.path.lexists(partial / name)]
    for name in sorted(name for name in files_in(partial) if not is_journal(name)):
        path = partial / name
        if name.startswith(f"{REPLACED}/"):
            continue
        if name.endswith(".tmp") and any(name.startswith(f"{known}.") for known in (*sizes, LOCK)):
            path.unlink()  # of a run that was killed while it wrote the file
        elif path.is_symlink():
            problems.append(f"{name} is a link to {path.readlink()}")
        elif name not in ours:
            problems.append(f"{name} does not belong to it")
        elif path.stat().st_size != sizes.get(name, path.stat().st_size):
            problems.append(f"{name} has {path.stat().st_size:,} bytes, expected {sizes[name]:,}")
    if problems:
        raise PlanError(
            several(f"{partial} does not hold the output of this merge", [f"{partial}: {line}" for line in problems])
            + "\nMove away what does not belong there, or start over with --no-resume"
        )


def move_into_place(out: Path) -> None:
    """Turn a complete OUT.partial into OUT: the last steps of publishing, each repeatable after a crash."""
    partial = partial_of(out)
    for path in [*part_journals(partial), partial / JOURNAL]:
        path.unlink(missing_ok=True)
    if out.exists() and any(out.iterdir()):
        clear_replaced(partial)
        out.rename(partial / REPLACED)
    sync_folder(partial)
    partial.rename(out)
    parts_lock(partial).unlink(missing_ok=True)
    sync_folder(out.parent)
    clear_replaced(out)


def finish(
    shards: Iterable[Shard],
    files: Mapping[str, bytes],
    out: Path,
    is_sound: Callable[[Path], bool],
    *,
    shared: bool = False,
) -> bool:
    """Complete the publishing of a run that was killed in the middle of it, if its work `is_sound`.

    files: all but the shards and the lock. Else a folder that was to be replaced is put back. shared: by one part of
    several, which waits for others; False if one of these has done it. Raises PlanError if OUT.partial does not hold
    exactly the planned files.
    """
    with ExitStack() as stack:
        if shared:
            stack.enter_context(lock_parts(partial_of(out), JOINING_S))
            if not partial_of(out).is_dir():
                return False
        stack.enter_context(lock_folder(partial_of(out), JOINING_S if shared else 0))
        check_whole(partial_of(out), shards, files, lock=True)
        if not is_sound(partial_of(out)):
            put_back(out)
            return False
        move_into_place(out)
    return True
