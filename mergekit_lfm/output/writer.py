"""The output folder: written in place and in any order, safe against a crash at any moment, readable only when whole.

OUT.partial holds shards at full size whose header length is 0xFF, so that every loader refuses them, and a journal: the
plan's digest, the states of its input files, then one line per segment, written after the segment's data are synced.
Publishing checks that no input was changed, and writes the header lengths, then the other files, the lock last, removes
the journal, and renames OUT.partial to OUT. So a lock in OUT.partial means that it is complete. `--overwrite` moves OUT
into OUT.partial before the rename, and deletes it afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import allocated_bytes
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.journal import (
    JOURNAL,
    Receipt,
    first_lines,
    journal_of,
    part_journals,
    read_journal,
    running,
)
from mergekit_lfm.output.layout import Shard
from mergekit_lfm.output.lock import LOCK, lock_of
from mergekit_lfm.output.publish import JOINING_S, check_whole, move_into_place
from mergekit_lfm.output.shards import ShardFiles
from mergekit_lfm.store.durable import leftovers, replace_file, reserve, sync_folder, write_all
from mergekit_lfm.store.files import name_file, open_file, parse_json
from mergekit_lfm.store.locks import BUSY, BusyError, hold, lock_folder, lock_parts, parts_lock
from mergekit_lfm.store.places import partial_of, refuse_links, remove
from mergekit_lfm.store.state import FileState, refuse_changed
from mergekit_lfm.store.tensors import UNFINISHED, write_exactly

SHOWN = 5  # tensors that a notice names
OPENING_S = 600.0  # to wait for another part that opens the folder
SYNC_BYTES = 256 << 20  # about so many are synced and journalled at a time: syncing each tensor costs more than merging


class PublishedError(Exception):
    """Another part has made OUT of the work of all."""


class Output:
    """OUT.partial while it is written: its journal and its end. Use as a context manager; `publish` makes it OUT.

    inputs: the states of the files that it is made from. done: the receipts of the segments that need no more work,
    from the journals of interrupted runs of the same plan on the same inputs. notices: why other work of those is done
    again. trust_times: tell a change of an input by its size and modification time alone. part: the number, from 1, of
    this run among several that write the output together; `join` says which of them publishes it. Raises PublishedError
    if another part has done so meanwhile.
    """

    def __init__(
        self,
        digest: str,
        shards: Sequence[Shard],
        inputs: Sequence[FileState],
        out: Path,
        resume: bool = True,
        *,
        trust_times: bool = False,
        part: int | None = None,
    ) -> None:
        self.trust_times, self.part = trust_times, part
        self.notices: list[str] = []
        self.digest, self.shards, self.inputs, self.out, self.partial = digest, shards, inputs, out, partial_of(out)
        self.done: dict[tuple[str, int], Receipt] = {}
        self._files = ShardFiles(self.partial, shards)
        self._pending, self._pending_bytes = list[Receipt](), 0
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._journal, self._held = -1, ExitStack()
        self._broken = False  # True once a sync failed: which other data are lost cannot be known
        try:
            self._open(resume)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncer.shutdown()
        self._files.close()
        self._held.close()

    def _open(self, resume: bool) -> None:
        journal, own = self.partial / JOURNAL, self.partial / journal_of(self.part)
        with ExitStack() as opening:
            if self.part is None:
                self._refuse_strangers(journal)
            others = self._keep_out(opening)
            self._refuse_strangers(journal)  # of parts only now, as another may just have made the folder
            refuse_links(self.partial, (LOCK, *(shard.name for shard in self.shards)))
            if resume:
                self._refuse_other_work(journal)
            journal.touch()
            with name_file(self.partial / LOCK):
                (self.partial / LOCK).unlink(missing_ok=True)
            sync_folder(self.partial)
            kept = self._adopt(journal, own) if resume and self._shards_whole() else None
            if kept is None:
                if others:
                    cure = "wait for them to end, or end them, and start all parts again"
                    raise BusyError(f"{BUSY}, in other parts; {{cure}}", place=self.partial, cure=cure)
                self._start_over(journal)
            self._open_journal(own, kept or 0)
            if not others:  # else they have made them, and write into them
                self._make_shards()

    def _refuse_strangers(self, journal: Path) -> None:
        """Raise PlanError if the folder is not one of ours."""
        if self.partial.exists() and not (journal.exists() or lock_of(self.partial) or not any(self.partial.iterdir())):
            raise PlanError(f"{self.partial} exists and is not the unfinished output of a merge; move it away")

    def _keep_out(self, opening: ExitStack) -> list[Path]:
        """Keep other runs out: for good, or, of a part, while the folder is opened. The journals of running parts."""
        if self.part is None:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_folder(self.partial))
        else:
            opening.enter_context(lock_parts(self.partial, OPENING_S))
            if not self.partial.is_dir() and lock_of(self.out).get("plan") == self.digest:
                parts_lock(self.partial).unlink(missing_ok=True)
                raise PublishedError
            self.partial.mkdir(parents=True, exist_ok=True)
            opening.enter_context(lock_folder(self.partial, OPENING_S))
        own = self.partial / journal_of(self.part)
        refuse_links(self.partial, (JOURNAL, own.name, *(path.name for path in part_journals(self.partial))))
        others = self._others()
        if own.exists() and running([own]):  # of another machine, where folders lock for one alone
            raise self._busy(own)
        if others and (self.part is None or self.partial / JOURNAL in others):
            raise BusyError(f"{BUSY}; {{cure}}", place=self.partial, cure="wait for it to end")
        return others

    @staticmethod
    def _busy(own: Path) -> BusyError:
        cure = "wait for it; give each part its own number, and start none twice"
        return BusyError("another run writes {place}; {cure}", place=own, cure=cure)

    def _others(self) -> list[Path]:
        """The journals of other runs that are at work now."""
        own, journals = journal_of(self.part), [*part_journals(self.partial), self.partial / JOURNAL]
        return running([path for path in journals if path.name != own and path.exists()])

    def _make_shards(self) -> None:
        """Make the shards at full size, unreadable."""
        for number, shard in enumerate(self.shards):
            path = self._files.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with name_file(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                reserve(self._files.fileno(number), shard.nbytes)
                write_exactly(self._files.fileno(number), 0, memoryview(UNFINISHED + shard.header[8:]))
        for folder in {self._files.path(number).parent for number in range(len(self.shards))} | {self.partial}:
            sync_folder(folder)

    def _open_journal(self, own: Path, kept: int) -> None:
        """Open this run's journal to be continued after so many bytes; a part's begins as the common one does."""
        with name_file(own):
            self._journal = os.open(own, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._held.callback(os.close, self._journal)
            if not hold(self._journal):
                raise self._busy(own)
            if kept or self.part is None:
                os.ftruncate(self._journal, kept or os.fstat(self._journal).st_size)
            else:
                os.ftruncate(self._journal, 0)
                write_all(self._journal, first_lines(self.digest, self.inputs))
            os.lseek(self._journal, 0, os.SEEK_END)
            os.fsync(self._journal)

    def _refuse_other_work(self, journal: Path) -> None:
        """Raise PlanError if the folder holds work of another plan, which starting over would delete."""
        try:
            with open_file(journal) as lines:
                plan = parse_json(lines.readline(1 << 10), journal)["plan"]
        except (OSError, ValueError, TypeError, KeyError):
            plan = lock_of(self.partial).get("plan", self.digest)
        if plan != self.digest:
            nbytes = format_size(allocated_bytes(self.partial))
            raise PlanError(
                f"{self.partial} holds the unfinished work of another merge, {nbytes} on the disk: complete that with "
                "its own recipe, choose another output, or delete it with --no-resume"
            )

    def _shards_whole(self) -> bool:
        """True if all shards exist at full size."""
        paths = [(self.partial / shard.name, shard.nbytes) for shard in self.shards]
        return all(path.exists() and path.stat().st_size == nbytes for path, nbytes in paths)

    def _adopt(self, journal: Path, own: Path) -> int | None:
        """Adopt the receipts of earlier runs. The bytes of this run's journal to keep; None to start over.

        That is if the journals hold nothing of use: for a part, which others may follow, if they are not of its inputs.
        """
        common = read_journal(journal, self.digest)
        if common is None:
            return None
        journals = {journal: common}
        journals |= {path: found for path in part_journals(self.partial) if (found := read_journal(path, self.digest))}
        used = any(found.receipts for found in journals.values())
        if (used or self.part is not None) and (changed := self._find_change(common.states)):
            if used and self.part is not None:
                sentence = "{found} was changed since another part began, or this machine sees it so; {cure}"
                cure = (
                    f"delete {self.partial} to start over, or try --trust-times if only inodes or change times differ"
                )
                raise PlanError(sentence, found=changed, cure=cure)
            if used:
                self.notices.append(f"{changed} was changed since the interrupted run, whose work was done again")
            return None
        fit = {
            path: found for path, found in journals.items() if path == journal or not self._find_change(found.states)
        }
        for found in fit.values():
            self.done |= {(receipt.tensor, receipt.segment): receipt for receipt in found.receipts}
        if not self.done and self.part is None:
            return None
        return fit[own].nbytes if own in fit else 0

    def _find_change(self, before: Iterable[FileState]) -> str | None:
        """An input that is in another state than an earlier run found."""
        then, now = (
            {str(state.path): state.as_data(trust_times=self.trust_times) for state in states}
            for states in (before, self.inputs)
        )
        return next((path for path in {**now, **then} if then.get(path) != now.get(path)), None)

    def _start_over(self, journal: Path) -> None:
        """Empty the folder: first the journal, then the rest."""
        self.done.clear()
        with name_file(journal):
            fd = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                os.ftruncate(fd, 0)
                os.fsync(fd)
                sync_folder(self.partial)
                for path in self.partial.iterdir():
                    if path != journal:
                        remove(path)
                write_all(fd, first_lines(self.digest, self.inputs))
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(self.partial.parent)

    def drop_damaged(
        self,
        range_of: Callable[[str, int], tuple[int, int]],
        threads: int,
        mine: Callable[[str, int], bool] = lambda *_: True,
    ) -> None:
        """Read the segments in `done` again, and drop those whose bytes are not as their receipts say.

        range_of: from a tensor and the number of a segment to its first byte in the tensor, and their number. mine:
        True for those that belong to this part.
        """

        def is_damaged(receipt: Receipt) -> bool:
            return self._files.digest(receipt.tensor, *range_of(receipt.tensor, receipt.segment)) != receipt.xxh3

        receipts = [receipt for place, receipt in self.done.items() if mine(*place)]
        with ThreadPoolExecutor(threads) as pool:
            damaged = [receipt for receipt, bad in zip(receipts, pool.map(is_damaged, receipts), strict=True) if bad]
        for receipt in damaged:
            del self.done[receipt.tensor, receipt.segment]
        if damaged:
            names = ", ".join(dict.fromkeys(receipt.tensor for receipt in damaged[:SHOWN]))
            more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
            self.notices.append(f"damaged segments of the interrupted run were made again, of {names}{more}")

    def record(self, receipt: Receipt, nbytes: int) -> None:
        """Record that a segment of `nbytes` is written; the journal has it once its data are synced."""
        self._pending.append(receipt)
        self._pending_bytes += nbytes
        self.done[receipt.tensor, receipt.segment] = receipt
        if self._pending_bytes >= SYNC_BYTES:
            self._hand_over()
        for sync in [sync for sync in self._syncs if sync.done()]:
            sync.result()

    def _hand_over(self) -> None:
        batch, self._pending, self._pending_bytes = self._pending, [], 0
        self._syncs.append(self._syncer.submit(self._sync, batch))

    def _sync(self, batch: Iterable[Receipt]) -> None:
        if self._broken:
            return
        self._broken = True
        lines = "".join(receipt.as_line() for receipt in batch).encode()
        for shard in sorted({self._files.shard_of(receipt.tensor) for receipt in batch}):
            with name_file(self._files.path(shard)):
                os.fdatasync(self._files.fileno(shard))
        with name_file(self.partial / journal_of(self.part)):
            write_all(self._journal, lines)
            os.fdatasync(self._journal)
        self._broken = False

    def flush(self) -> None:
        """Sync all recorded segments and wait until the journal has them."""
        if self._pending:
            self._hand_over()
        for sync in self._syncs:
            sync.result()
        self._syncs.clear()

    def join(self, places: Iterable[tuple[str, int]]) -> bool:
        """Of several parts: True if all is written and no part runs any more but this one, which then publishes.

        places: all tensors and segments. Keeps other runs out from then on. Raises PublishedError if another part has.
        """
        joining = ExitStack()
        joining.enter_context(lock_parts(self.partial, JOINING_S))
        own = self.partial / journal_of(self.part)
        if not own.exists() or own.stat().st_ino != os.fstat(self._journal).st_ino:
            joining.close()
            if lock_of(self.out).get("plan") == self.digest:
                raise PublishedError
            raise PlanError("{place} was removed while this run wrote it; {cure}", place=own, cure="start it again")
        for path in part_journals(self.partial):
            if found := read_journal(path, self.digest):
                self.done |= {(receipt.tensor, receipt.segment): receipt for receipt in found.receipts}
        whole = not self._others() and all(place in self.done for place in places)
        if whole:
            self._held.enter_context(joining.pop_all())
            self._held.enter_context(lock_folder(self.partial, OPENING_S))
            return True
        self._held.close()  # the journal first: the next part that looks shall not find this one running
        joining.close()
        return False

    def publish(self, files: Mapping[str, bytes]) -> None:
        """Make the shards readable, add the other files (the lock is the last of them), and move everything to OUT.

        Raises FormatError if an input was changed, PlanError if OUT.partial does not hold exactly the planned files.
        """
        self.flush()
        refuse_changed(self.inputs)
        for path in leftovers(self.partial):
            path.unlink()
        for number, shard in enumerate(self.shards):
            with name_file(self._files.path(number)):
                write_exactly(self._files.fileno(number), 0, memoryview(shard.header[:8]))
                os.fsync(self._files.fileno(number))
        for name, data in sorted(files.items(), key=lambda item: item[0] == LOCK):
            if name == LOCK:
                check_whole(self.partial, self.shards, {name: files[name] for name in files if name != LOCK})
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
            sync_folder(path.parent)
        move_into_place(self.out)
