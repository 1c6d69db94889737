"""The output folder: written in place and in any order, safe against a crash at any moment, readable only when whole.

    OUT.partial/   shards at full size whose header length is 0xFF (every loader refuses them), and a journal journal
    the plan's digest, then one line per segment; a line is written after the data it vouches for are synced publish
    header lengths, config and the like, the lock last, journal away, then rename OUT.partial to OUT

A lock in OUT.partial so means: complete. `--overwrite` moves OUT to OUT.replaced before the rename and deletes it
after.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan import Job, Plan
from mergekit_lfm.tensors import UNFINISHED, write_exactly

JOURNAL = "merge.journal"
LOCK = "merge.lock.json"
SYNC_BYTES = (
    256 << 20
)  # sync and vouch for about so many bytes at a time: syncing every tensor would cost more than merging


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a task vouches for: the xxh3-128 of a segment's bytes, and which tensors in it were not finite."""

    tensor: str
    segment: int
    xxh3: str
    nonfinite: tuple[str, ...] = ()


def beside(out: Path, suffix: str) -> Path:
    """The folder OUT.suffix."""
    return out.with_name(f"{out.name}.{suffix}")


def lock_of(folder: Path) -> dict[str, Any]:
    """The lock of a finished output, or {} where there is none that can be read."""
    try:
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return lock if isinstance(lock, dict) else {}


def check_destination(plan: Plan, out: Path, overwrite: bool) -> bool:
    """Whether OUT already holds this plan's output. PlanError where OUT must not be written."""
    for label, model in zip(plan.labels, plan.models, strict=True):
        home, place = model.path.resolve(), out.resolve()
        if home.is_relative_to(place) or place.is_relative_to(home):
            raise PlanError(f"the output {out} and the input {label} lie in one another; choose another output folder")
    if beside(out, "replaced").exists() and not out.exists() and not _complete(beside(out, "partial"), plan):
        beside(out, "replaced").rename(out)  # an overwriting run was killed before it could finish: undo its first step
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out} is a file, expected a folder to create; choose another output")
    if out.is_dir() and any(out.iterdir()):
        if lock_of(out).get("plan") == plan.digest:
            return True
        if not overwrite:
            raise PlanError(
                f"{out} exists and is not the output of this merge; choose another output, or use --overwrite"
            )
    return False


def _complete(partial: Path, plan: Plan) -> bool:
    return lock_of(partial).get("plan") == plan.digest


class Output:
    """OUT.partial while it is written. Use as a context manager; `publish` makes it OUT.

    done: the receipts of the segments that need no more work, from the journal of an interrupted run of the same plan.
    """

    def __init__(self, plan: Plan, out: Path, resume: bool = True) -> None:
        self.plan, self.out, self.partial = plan, out, beside(out, "partial")
        self.done: dict[tuple[str, int], Receipt] = {}
        self._places = {
            spec.name: (s, shard.offsets[spec.name]) for s, shard in enumerate(plan.shards) for spec in shard.tensors
        }
        self._lock, self._pending, self._pending_bytes = Lock(), list[Receipt](), 0
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._fds: list[int] = []
        self._journal = -1
        try:
            self._open(resume)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncer.shutdown()
        for fd in (*self._fds, self._journal):
            if fd >= 0:
                os.close(fd)
        self._fds, self._journal = [], -1

    def _open(self, resume: bool) -> None:
        journal = self.partial / JOURNAL
        if self.partial.exists() and not (journal.exists() or lock_of(self.partial) or not any(self.partial.iterdir())):
            raise PlanError(f"{self.partial} exists and is not an unfinished merge of ours; move it away")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlanError(f"another run is writing {self.partial}; wait for it, or choose another output") from None
        if not resume or not self._read_journal(journal):
            self._start_over(journal)
        for shard in self.plan.shards:
            path = self.partial / shard.name
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._fds.append(fd)
            with _named(path):
                _reserve(fd, shard.nbytes)
                write_exactly(fd, 0, memoryview(UNFINISHED + shard.header[8:]))

    def _read_journal(self, journal: Path) -> bool:
        """Take over the receipts of an earlier run of this plan, up to a torn last line. False if there are none."""
        kept = 0
        with journal.open("rb") as lines:
            for number, line in enumerate(lines):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if number == 0:
                    if entry != {"plan": self.plan.digest} or not line.endswith(b"\n"):
                        return False
                elif line.endswith(b"\n"):
                    receipt = Receipt(**{**entry, "nonfinite": tuple(entry["nonfinite"])})
                    self.done[receipt.tensor, receipt.segment] = receipt
                else:
                    break
                kept += len(line)
        os.ftruncate(self._journal, kept)
        os.lseek(self._journal, 0, os.SEEK_END)
        return kept > 0

    def _start_over(self, journal: Path) -> None:
        self.done.clear()
        for path in self.partial.iterdir():
            if path != journal:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        os.write(self._journal, json.dumps({"plan": self.plan.digest}).encode() + b"\n")
        os.fsync(self._journal)
        _sync_folder(self.partial)
        _sync_folder(self.partial.parent)

    def place(self, name: str) -> tuple[int, int]:
        """The descriptor of the tensor's shard, and the offset of its bytes there."""
        shard, offset = self._places[name]
        return self._fds[shard], offset

    def write(self, job: Job, start: int, data: memoryview) -> None:
        """Write bytes of a tensor from byte `start` of it on."""
        fd, offset = self.place(job.name)
        with _named(self.partial / self.plan.shards[self._places[job.name][0]].name):
            write_exactly(fd, offset + start, data)

    def copy(self, job: Job, start: int, source: int, offset: int, nbytes: int) -> bool:
        """Copy bytes from a file's descriptor and offset to byte `start` of the tensor. False if the kernel cannot.

        Where source and destination lie alike modulo 4096, whole pages are copied by themselves: a filesystem that has
        reflinks then shares them.
        """
        fd, place = self.place(job.name)
        place += start
        page = min(nbytes, -place % 4096) if (place - offset) % 4096 == 0 else 0
        whole = (nbytes - page) // 4096 * 4096 if page else nbytes
        done = 0
        try:
            for end in (page, page + whole, nbytes):
                while done < end:
                    done += os.copy_file_range(source, fd, end - done, offset + done, place + done)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def record(self, receipt: Receipt, nbytes: int) -> None:
        """Note that a segment of `nbytes` is written; the journal vouches for it once it is synced."""
        with self._lock:
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
        lines = "".join(json.dumps(asdict(receipt)) + "\n" for receipt in batch).encode()
        for shard in sorted({self._places[receipt.tensor][0] for receipt in batch}):
            with _named(self.partial / self.plan.shards[shard].name):
                os.fdatasync(self._fds[shard])
        with _named(self.partial / JOURNAL):
            write_all(self._journal, lines)
            os.fdatasync(self._journal)

    def flush(self) -> None:
        """Sync everything that was recorded and wait until the journal vouches for it."""
        with self._lock:
            if self._pending:
                self._hand_over()
        for sync in self._syncs:
            sync.result()
        self._syncs.clear()

    def publish(self, files: dict[str, bytes]) -> None:
        """Make the shards readable, add the other files (the lock is the last of them), and move everything to OUT."""
        self.flush()
        for fd, shard in zip(self._fds, self.plan.shards, strict=True):
            write_exactly(fd, 0, memoryview(shard.header[:8]))
            os.fsync(fd)
        for name, data in sorted(files.items(), key=lambda item: item[0] == LOCK):
            path = self.partial / name
            path.parent.mkdir(exist_ok=True)
            with _named(path):
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_bytes(data)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.rename(path)
            _sync_folder(path.parent)
        move_into_place(self.out)


def move_into_place(out: Path) -> None:
    """The last steps of publishing, each of which can be repeated: a complete OUT.partial becomes OUT."""
    partial, replaced = beside(out, "partial"), beside(out, "replaced")
    (partial / JOURNAL).unlink(missing_ok=True)
    _sync_folder(partial)
    if out.exists() and any(out.iterdir()):
        clear_replaced(out)
        out.rename(replaced)
    partial.rename(out)
    _sync_folder(out.parent)
    clear_replaced(out)


def clear_replaced(out: Path) -> None:
    """Delete what `--overwrite` replaced."""
    if beside(out, "replaced").exists():
        shutil.rmtree(beside(out, "replaced"))


def finish(plan: Plan, out: Path) -> bool:
    """Complete the publishing of a run that was killed in the middle of it. False where there is none of this plan."""
    if not _complete(beside(out, "partial"), plan):
        return False
    move_into_place(out)
    return True


class _named:
    """Gives an OSError from a descriptor the name of its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(self.path)


def write_all(fd: int, data: bytes) -> None:
    """Append all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _reserve(fd: int, nbytes: int) -> None:
    """Give the file its full size on the disk, so that a full disk shows before work starts."""
    os.ftruncate(fd, nbytes)
    if nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
