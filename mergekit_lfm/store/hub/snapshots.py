"""A model on the Hub at one commit: the list of its files, their headers, and the files themselves, in the Hub's cache.

Finding a model fetches what a plan needs (configs, and the headers of weight files, by ranged requests); weights come
on request, and each download is compared with the digest that the Hub lists. Files are only read: every program on the
machine shares the cache.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, final

from huggingface_hub import hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.store.files import open_file
from mergekit_lfm.store.hub.arrivals import count_arrivals
from mergekit_lfm.store.hub.client import (
    api,
    endpoint,
    hide_progress_bars,
    offline,
    offline_variable,
    translate_errors,
)
from mergekit_lfm.store.hub.names import HubName
from mergekit_lfm.store.hub.requests import list_files, request_range
from mergekit_lfm.store.snapshot import AT_PLANNING, Snapshot

TAKES_LONG = 20_000_000  # bytes; larger downloads show their progress


@dataclass(frozen=True)
class ListedDigest:
    """The digest of a file in a listing: "sha256" if the file is stored outside git, else git's "sha1"."""

    kind: Literal["sha256", "sha1"]
    value: str

    @classmethod
    def of_entry(cls, entry: RepoFile) -> ListedDigest:
        """The digest of an entry."""
        return cls("sha1", entry.blob_id) if entry.lfs is None else cls("sha256", entry.lfs.sha256)

    def of(self, path: Path) -> str:
        """The digest of the same kind of a file here."""
        start = b"" if self.kind == "sha256" else f"blob {path.stat().st_size}\0".encode()
        with open_file(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.new(self.kind, start)).hexdigest()


@final
@dataclass(frozen=True)
class HubSnapshot(Snapshot):
    """A repository at one commit. digests: as the Hub lists them, {} if it was not asked."""

    repo: str
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    digests: Mapping[str, ListedDigest] = field(default_factory=dict)
    listed: bool = True

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def cache(self) -> tuple[str, Path, str]:
        return "the cache of the Hub", self.folder.parents[2], "HF_HOME"

    def fetch(self, names: Collection[str], progress: Progress = SILENCE) -> None:
        lacking = self.lacking(names)
        if not lacking:
            return
        if offline():
            raise PlanError(
                f"{self} lacks {', '.join(lacking)} in the cache of the Hub, and {offline_variable()} forbids "
                "downloads: unset it"
            )
        needed = sum(self.sizes.get(name, 0) for name in lacking)
        self.check_room(needed)
        with hide_progress_bars() if needed < TAKES_LONG else self._show_arrivals(needed, progress):
            _download(self.repo, self.commit, lacking)
        if still := self.lacking(lacking):
            raise ConnectionError(f"{self}: {', '.join(still)} could not be downloaded; run the same command again")
        self.compare(lacking)

    @contextmanager
    def _show_arrivals(self, nbytes: int, progress: Progress) -> Iterator[None]:
        """Within it, show what arrives in the cache, beside the client's own bars."""
        blobs = self.folder.parents[1] / "blobs"
        with progress.by_bytes(nbytes, f"downloading {self}", bar=False) as advance, count_arrivals(blobs, advance):
            yield

    def compare(self, names: Iterable[str]) -> None:
        """Raise FormatError if one of these files in the cache is not as the Hub lists it, and remove it there."""
        for name in names:
            path, listed = self.folder / name, self.digests.get(name)
            if listed is not None and (found := listed.of(path)) != listed.value:
                blob = path.resolve()
                path.unlink()
                blob.unlink(missing_ok=True)
                raise FormatError(
                    f"{self}: {name} was downloaded with the {listed.kind} {found}, but the Hub lists {listed.value}; "
                    "it was removed from the cache. Run the same command again; if it stays so, the server or the way "
                    "to it changes files"
                )

    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first bytes of a file; it is downloaded if its server does not answer requests for a range."""
        if not nbytes:
            return b""
        path = self.folder / name
        if not path.exists():
            data = self._request(name, 0, nbytes)
            if data is not None:
                return data
            self.fetch([name])
        with open_file(path) as file:
            return file.read(nbytes)

    def read_range(self, name: str, start: int, stop: int) -> memoryview:
        data = self._request(name, start, stop)
        if data is None:
            sentence = "{place}: its server does not answer requests for a range of bytes; {cure}"
            raise PlanError(sentence, place=f"{self}: {name}", cure="leave --stream-inputs out")
        return memoryview(data)

    def _request(self, name: str, start: int, stop: int) -> bytes | None:
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=endpoint())
        with translate_errors(str(self)):
            return request_range(f"{self}: {name}", url, start, stop, self.sizes[name])


def find_snapshot(name: HubName) -> HubSnapshot:
    """The model at the current commit of its revision, with its configs and its card in the cache.

    With HF_HUB_OFFLINE, the commit and the files downloaded before. Raises the errors of `Snapshot.fetch`.
    """
    with translate_errors(str(name)):
        resolved = api().resolve_revision(name.repo, revision=name.revision, local_files_only=offline())
        commit = str(resolved.resolved)
        if offline():
            folder = _fetch_for_planning(name.repo, commit)
            paths = (path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
            return HubSnapshot(name.repo, commit, folder, sizes, listed=False)
        if commit != name.revision:  # if the Hub fails to answer, the client returns its previous answer
            commit = str(api().model_info(name.repo, revision=name.revision).sha)
        files = list_files(name.repo, commit)
    new = [path for path in files if _for_planning(path) and not _is_cached(name.repo, commit, path)]
    folder = _fetch_for_planning(name.repo, commit)
    sizes = {path: file.size for path, file in files.items()}
    listed = {path: ListedDigest.of_entry(file) for path, file in files.items()}
    digests = {
        path: digest for path, digest in listed.items() if digest.value.strip("0")
    }  # git's null id stands for no digest
    snapshot = HubSnapshot(name.repo, commit, folder, sizes, digests)
    snapshot.compare(new)
    return snapshot


def _for_planning(path: str) -> bool:
    """True if the file is among those that planning needs; the client matches its patterns in the same way."""
    return any(fnmatch(path, pattern) for pattern in AT_PLANNING)


def _is_cached(repo: str, commit: str, path: str) -> bool:
    return isinstance(try_to_load_from_cache(repo, path, revision=commit), str)


def _fetch_for_planning(repo: str, commit: str) -> Path:
    """The folder of the model in the cache, with the files that planning needs."""
    with hide_progress_bars():  # a merge offline must not fail for a card that is missing in the cache
        return Path(_download(repo, commit, [name for name in AT_PLANNING if not (offline() and name == "README.md")]))


def pull(snapshot: HubSnapshot, folder: Path) -> None:
    """Download every file of the model into a separate folder, bypassing the cache."""
    _download(snapshot.repo, snapshot.commit, list(snapshot.sizes), local_dir=folder, force_download=True)


def _download(repo: str, commit: str, names: Iterable[str], **options: Any) -> str:
    patterns = [name if name in AT_PLANNING else glob.escape(name) for name in names]
    with translate_errors(f"{repo}@{commit}"):
        return str(
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=patterns,
                local_files_only=offline(),
                endpoint=endpoint(),
                library_name="mergekit_lfm",
                **options,
            )
        )
