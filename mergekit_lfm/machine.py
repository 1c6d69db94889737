"""The resources of this machine: memory, cores, disk space."""

import os
from pathlib import Path


def default_memory() -> int:
    """A quarter of the RAM, at most 4 GB."""
    return min(4_000_000_000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def default_threads() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_space(out: Path) -> int:
    """Bytes free on the disk where `out` is or would be."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def occupied(folder: Path) -> int:
    """Bytes on the disk that the files in a folder take, reserved ones included; 0 without the folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0


def cache_folder(part: str) -> Path:
    """The cache's folder for `part`; its files can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_lfm" / part
