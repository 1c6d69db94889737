"""The resources of this machine: memory, cores, disk space."""

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lfm.errors import PlanError


def total_memory() -> int:
    """The RAM of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_memory() -> int:
    """A quarter of the RAM, at most 4 GB."""
    return min(4_000_000_000, total_memory() // 4)


def default_threads() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def explain_thread_limit() -> Iterator[None]:
    """Raise PlanError if the system starts no more threads."""
    try:
        yield
    except RuntimeError as error:  # Python has no class for it
        if "start new thread" not in str(error):
            raise
        raise PlanError(
            "{found}: {cure}",
            found="the system starts no more threads for this user or container",
            cure="use fewer --threads, end other programs, or allow more with `ulimit -u`; the same command then goes "
            "on",
        ) from None


def peak_memory() -> int:
    """The most bytes that this process has held so far, or the largest of those that it has started and that ended."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def free_space(out: Path) -> int:
    """Bytes free on the disk where `out` is or would be."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def allocated_bytes(folder: Path) -> int:
    """Bytes on the disk that the files in a folder take, reserved ones included; 0 without the folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0


def cache_folder(part: str) -> Path:
    """The cache's folder for `part`; its files can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_lfm" / part


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next ones instead of returning them to the kernel.

    Every block allocates a few MB and frees them; with glibc's defaults each is paged in anew, which doubles the time
    of elementwise operations (measured on glibc 2.36: 1.2 ms against 0.6 ms for a mask of 2^18 elements).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def allow_many_files() -> None:
    """Raise the limit of open files as far as allowed: a large model has hundreds of shards, all of them open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
