"""The output folder: written in place and in any order, safe against a crash at any moment, readable only when whole.

OUT.partial holds shards at full size whose header length is 0xFF, so that every loader refuses them, and a journal: the
plan's digest, the states of its input files, then one line per segment, written after the segment's data are synced.
Publishing checks that no input was changed, and writes the header lengths, then the other files, the lock last, removes
the journal, and renames OUT.partial to OUT. So a lock in OUT.partial means that it is complete. `--overwrite` moves OUT
into OUT.partial before the rename, and deletes it afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.machine.resources import allocated_bytes
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.layout import Shard
from mergekit_lfm.output.lock import LOCK, lock_of
from mergekit_lfm.output.replace import REPLACED, clear_replaced, files_in, put_back
from mergekit_lfm.output.shards import ShardFiles
from mergekit_lfm.store.durable import leftovers, replace_file, reserve, sync_folder, write_all
from mergekit_lfm.store.files import name_file, open_file, parse_json
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import partial_of, refuse_links, remove
from mergekit_lfm.store.state import FileState, refuse_changed
from mergekit_lfm.store.tensors import UNFINISHED, write_exactly

JOURNAL = "merge.journal"
LONGEST_LINE = 1_000_000  # bytes; a receipt has some hundred
SHOWN = 5  # tensors that a notice names
SYNC_BYTES = 256 << 20  # about so many are synced and journalled at a time: syncing each tensor costs more than merging
_ENCODER = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of a written segment: the xxh3-128 of its bytes, and the names of the tensors that were not finite.

    inputs: the xxh3-128 of the segment of each tensor that it was made from; () if it is a copy of them.
    """

    tensor: str
    segment: int
    xxh3: str
    nonfinite: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    def as_line(self) -> str:
        """Its line in the journal: its entries as JSON, with a check of them."""
        data = {"tensor": self.tensor, "segment": self.segment, "xxh3": self.xxh3}
        text = _ENCODER.encode({**data, "nonfinite": self.nonfinite, "inputs": self.inputs})
        return f'{text[:-1]}, "check": "{_check_of(text)}"}}\n'

    @classmethod
    def of_data(cls, data: Any) -> Receipt:
        """The receipt with these entries. Raises ValueError if they are not as they were written."""
        entries = {name: value for name, value in data.items() if name != "check"} if isinstance(data, Mapping) else {}
        if not entries or data["check"] != _check_of(_ENCODER.encode(entries)):
            raise ValueError("the receipt was changed")
        return cls(**{**entries, "nonfinite": tuple(entries["nonfinite"]), "inputs": tuple(entries["inputs"])})


def _check_of(text: str) -> str:
    """xxh3-64 of a receipt's entries: digests of inputs, unlike those of outputs, are not computed again."""
    return xxhash.xxh3_64_hexdigest(text.encode())


class Output:
    """OUT.partial while it is written: its journal and its end. Use as a context manager; `publish` makes it OUT.

    inputs: the states of the files that it is made from. done: the receipts of the segments that need no more work,
    from the journal of an interrupted run of the same plan on the same inputs. notices: why other work of that run is
    done again. trust_times: tell a change of an input by its size and modification time alone.
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
    ) -> None:
        self.trust_times = trust_times
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
        journal = self.partial / JOURNAL
        if self.partial.exists() and not (journal.exists() or lock_of(self.partial) or not any(self.partial.iterdir())):
            raise PlanError(f"{self.partial} exists and is not the unfinished output of a merge; move it away")
        refuse_links(self.partial, (JOURNAL, LOCK, *(shard.name for shard in self.shards)))
        self.partial.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(lock_folder(self.partial))
        if resume:
            self._refuse_other_work(journal)
        self._journal = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._held.callback(os.close, self._journal)
        with name_file(self.partial / LOCK):
            (self.partial / LOCK).unlink(missing_ok=True)
        sync_folder(self.partial)
        if not (resume and self._shards_whole() and self._read_journal(journal)):
            self._start_over(journal)
        for number, shard in enumerate(self.shards):
            path = self._files.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with name_file(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                reserve(self._files.fileno(number), shard.nbytes)
                write_exactly(self._files.fileno(number), 0, memoryview(UNFINISHED + shard.header[8:]))
        for folder in {self._files.path(number).parent for number in range(len(self.shards))} | {self.partial}:
            sync_folder(folder)

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

    def _read_journal(self, journal: Path) -> bool:
        """Adopt the receipts of an earlier run, up to a torn last line. False if it has none that are of any use."""
        kept, states = 0, list[FileState]()
        with open_file(journal) as lines:
            for line in iter(lambda: lines.readline(LONGEST_LINE), b""):
                try:
                    entry = parse_json(line, journal)
                    if not kept and entry != {"plan": self.digest}:
                        return False
                    state = FileState(**{**entry, "path": Path(entry["path"])}) if "path" in entry else None
                    if state is not None:
                        os.fsencode(state.path)  # a path cannot hold half of a character
                    receipt = None
                    if kept and state is None:
                        receipt = Receipt.of_data(entry)
                except (ValueError, TypeError, KeyError):
                    break
                if not line.endswith(b"\n"):
                    break
                if state is not None:
                    states.append(state)
                if receipt is not None:
                    if not self.done and self._find_change(states):
                        return False
                    self.done[receipt.tensor, receipt.segment] = receipt
                kept += len(line)
        os.ftruncate(self._journal, kept)
        os.lseek(self._journal, 0, os.SEEK_END)
        return bool(self.done)

    def _find_change(self, before: Iterable[FileState]) -> bool:
        """True if the inputs are in other states than an earlier run found, which `notices` then says."""
        then, now = (
            {str(state.path): state.as_data(trust_times=self.trust_times) for state in states}
            for states in (before, self.inputs)
        )
        paths = [path for path in {**now, **then} if then.get(path) != now.get(path)]
        if paths:
            self.notices.append(f"{paths[0]} was changed since the interrupted run, whose work was done again")
        return bool(paths)

    def _start_over(self, journal: Path) -> None:
        """Empty the folder: first the journal, then the rest."""
        self.done.clear()
        with name_file(journal):
            os.ftruncate(self._journal, 0)
            os.fsync(self._journal)
        sync_folder(self.partial)
        for path in self.partial.iterdir():
            if path != journal:
                remove(path)
        with name_file(journal):
            os.lseek(self._journal, 0, os.SEEK_SET)
            states = ({**asdict(state), "path": str(state.path)} for state in self.inputs)
            lines = "".join(json.dumps(entry) + "\n" for entry in ({"plan": self.digest}, *states))
            write_all(self._journal, lines.encode())
            os.fsync(self._journal)
        sync_folder(self.partial.parent)

    def drop_damaged(self, range_of: Callable[[str, int], tuple[int, int]], threads: int) -> None:
        """Read the segments in `done` again, and drop those whose bytes are not as their receipts say.

        range_of: from a tensor and the number of a segment to its first byte in the tensor, and their number.
        """

        def is_damaged(receipt: Receipt) -> bool:
            return self._files.digest(receipt.tensor, *range_of(receipt.tensor, receipt.segment)) != receipt.xxh3

        receipts = list(self.done.values())
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
        with name_file(self.partial / JOURNAL):
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


def check_whole(partial: Path, shards: Iterable[Shard], files: Mapping[str, bytes], *, lock: bool = False) -> None:
    """Raise PlanError unless OUT.partial holds exactly these shards and files, in their sizes. lock: and the lock."""
    sizes = {shard.name: shard.nbytes for shard in shards} | {name: len(data) for name, data in files.items()}
    ours = {*sizes, LOCK} if lock else set(sizes)
    problems = [f"{name} is missing" for name in sorted(ours) if not os.path.lexists(partial / name)]
    for name in sorted(files_in(partial) - {JOURNAL}):
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
    (partial / JOURNAL).unlink(missing_ok=True)
    if out.exists() and any(out.iterdir()):
        clear_replaced(partial)
        out.rename(partial / REPLACED)
    sync_folder(partial)
    partial.rename(out)
    sync_folder(out.parent)
    clear_replaced(out)


def finish(shards: Iterable[Shard], files: Mapping[str, bytes], out: Path, is_sound: Callable[[Path], bool]) -> bool:
    """Complete the publishing of a run that was killed in the middle of it, if its work `is_sound`.

    files: all but the shards and the lock. Else a folder that was to be replaced is put back. Raises PlanError if
    OUT.partial does not hold exactly the planned files.
    """
    with lock_folder(partial_of(out)):
        check_whole(partial_of(out), shards, files, lock=True)
        if not is_sound(partial_of(out)):
            put_back(out)
            return False
        move_into_place(out)
    return True
