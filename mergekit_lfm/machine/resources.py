"""What the machine has to offer: memory, cores, room on the disk."""

import ctypes
import os
import resource
from pathlib import Path


def default_memory() -> int:
    """A quarter of the RAM, at most 4 GB."""
    return min(4_000_000_000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_space(out: Path) -> int:
    """Bytes free on the disk where `out` is or would be."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def occupied(folder: Path) -> int:
    """Bytes on the disk that the files in a folder take, reserved ones included; 0 where there is no folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0


def cache_folder(part: str) -> Path:
    """Where `part` of what can be computed again is kept."""
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
    """Raise the limit of open files as far as it may be: a large model has hundreds of shards, all of them open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
