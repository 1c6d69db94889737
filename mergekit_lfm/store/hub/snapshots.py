"""A model on the Hub at one commit: the list of its files, their headers, and the files themselves, in the Hub's cache.

Finding a model fetches what a plan needs (configs, and the headers of weight files, by ranged requests); weights come
on request. Files are only read: every program on the machine shares the cache.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import free_space
from mergekit_lfm.store.hub.client import api, endpoint, hide_progress_bars, offline, translate_errors
from mergekit_lfm.store.hub.names import HubName
from mergekit_lfm.store.tensors import MAX_HEADER

TAKES_LONG = 20_000_000  # bytes; larger downloads show their progress
FIRST_RANGE = 100_000  # bytes: the headers of most files are shorter
AT_PLANNING = ("config.json", "*.index.json", "README.md")


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit. folder: the present or future folder of its files in the cache; sizes: in bytes.

    listed: True if `sizes` has the files on the Hub; else it has those in the cache.
    """

    repo: str
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    listed: bool = True

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    def lacking(self, names: Iterable[str]) -> list[str]:
        """The files among `names` that are not in the cache."""
        return [name for name in names if not (self.folder / name).exists()]

    def fetch(self, names: Collection[str]) -> None:
        """Download the files that are not in the cache, several at a time.

        Raises PlanError if the Hub refuses, is offline or the disk is full, ConnectionError if the connection fails.
        """
        lacking = self.lacking(names)
        if not lacking:
            return
        if offline():
            raise PlanError(
                f"{self} lacks {', '.join(lacking)} in the cache of the Hub, and HF_HUB_OFFLINE forbids downloads: "
                "unset it"
            )
        needed = sum(self.sizes.get(name, 0) for name in lacking)
        check_room(self, needed)
        with hide_progress_bars() if needed < TAKES_LONG else nullcontext():
            _download(self.repo, self.commit, lacking)
        if still := self.lacking(lacking):
            raise ConnectionError(f"{self}: {', '.join(still)} could not be downloaded; run the same command again")

    def head(self, name: str) -> tuple[bytes, int]:
        """The bytes of a safetensors file up to its data (if not a header, the first ones), and the file's size."""
        size = self.sizes[name]
        data = self._range(name, min(size, FIRST_RANGE))
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < length <= min(size, MAX_HEADER + 8):
            data = self._range(name, length)
        return data, size

    def _range(self, name: str, nbytes: int) -> bytes:
        """The first bytes of a file."""
        if not nbytes:
            return b""
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=endpoint())
        headers = build_hf_headers(library_name="mergekit_lfm")
        headers |= {"Range": f"bytes=0-{nbytes - 1}", "Accept-Encoding": "identity"}
        with translate_errors(str(self)):
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
            return bytes(response.content[:nbytes])


def check_room(snapshot: Snapshot, nbytes: int) -> None:
    """Raises PlanError if the disk of the snapshot's cache has no room for `nbytes`."""
    free = free_space(snapshot.folder)
    if nbytes > free:
        raise PlanError(
            f"the models need {nbytes / 1e9:,.3g} GB more in the cache of the Hub, {snapshot.folder.parents[2]}, where "
            f"{free / 1e9:,.3g} GB are free; make room, or set HF_HOME to another disk"
        )


def find_snapshot(name: HubName) -> Snapshot:
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
            return Snapshot(name.repo, commit, folder, sizes, listed=False)
        if commit != name.revision:  # if the Hub fails to answer, the client returns its previous answer
            commit = str(api().model_info(name.repo, revision=name.revision).sha)
        tree = api().list_repo_tree(name.repo, recursive=True, revision=commit)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    return Snapshot(name.repo, commit, _fetch_for_planning(name.repo, commit), sizes)


def _fetch_for_planning(repo: str, commit: str) -> Path:
    """The folder of the model in the cache, with the files that planning needs."""
    with hide_progress_bars():  # a merge offline must not fail for a card that is missing in the cache
        return Path(_download(repo, commit, [name for name in AT_PLANNING if not (offline() and name == "README.md")]))


def pull(snapshot: Snapshot, folder: Path) -> None:
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
