"""What the machine has to offer: memory, cores, room on the disk."""

import os
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
