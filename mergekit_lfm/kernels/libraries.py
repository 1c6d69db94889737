"""Compiled code on disk: libraries, each with its digest in its name, in a folder where nobody else can write."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path
from threading import Lock

from mergekit_lfm.machine.private import make_private, why_unsafe
from mergekit_lfm.machine.resources import cache_folder


class Libraries:
    """The libraries of a run: in the user's cache, or in a temporary folder if others could write there.

    problems: gets why libraries on disk are not used.
    """

    def __init__(self, problems: set[str]) -> None:
        self.problems = problems
        self._lock = Lock()
        self._folder: Path | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def folder(self) -> Path:
        """The folder, made if it is missing."""
        with self._lock:
            if self._folder is None:
                self._folder = self._choose()
            return self._folder

    def _choose(self) -> Path:
        cache = cache_folder("kernels")
        if not (problem := make_private(cache)):
            return cache
        self.problems.add(
            f"the compiled code in {cache} is not used: {problem}. This run compiles its own; remove "
            "the folder, or make it yours alone (chown, chmod 700)"
        )
        self._temporary = tempfile.TemporaryDirectory(prefix="mergekit_lfm-")
        return Path(self._temporary.name)

    def find(self, name: str, suffix: str) -> Path | None:
        """The library of this name, as it was compiled; any other is removed. Makes no folder."""
        if self._folder is None and not cache_folder("kernels").exists():
            return None
        for library in sorted(self.folder().glob(f"{name}.*{suffix}")):
            try:
                if not why_unsafe(library) and library.name == f"{name}.{_digest(library)}{suffix}":
                    return library
            except FileNotFoundError:  # another run has removed it
                continue
            library.unlink(missing_ok=True)
            self.problems.add(f"{library} was changed after it was compiled, and is not used; it was removed")
        return None


def keep(library: Path, folder: Path, name: str) -> None:
    """Move a complete library to the folder of libraries."""
    with library.open("rb") as file:
        os.fsync(file.fileno())
    library.chmod(0o600)
    library.rename(folder / f"{name}.{_digest(library)}{library.suffix}")


def _digest(library: Path) -> str:
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compiler() -> str | None:
    """The C++ compiler that inductor would call."""
    return shutil.which(os.environ.get("CXX", "g++"))


def instructions() -> str:
    """The processor's extensions, which libraries are compiled for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
