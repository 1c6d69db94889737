"""`inspect_file`: the tensors of a model or file, read from headers alone, and the artifact that a file holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mergekit_lfm.api.arguments import StrPath
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.artifacts.adapter import Adapter, open_adapter
from mergekit_lfm.artifacts.attachment import Attachment, open_attachment
from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.folder import is_adapter
from mergekit_lfm.store.tensors import read_header
from mergekit_lfm.views.adapted import open_model

Artifact = Statistics | Transform | Patch | Adapter | Attachment
OPENERS: Mapping[str, Callable[[Path], Statistics | Transform | Patch | Attachment]] = MappingProxyType(
    {
        "statistics": open_statistics,
        "transform": open_transform,
        "patch": open_patch,
        "bottleneck adapter": open_attachment,
    }
)


@dataclass(frozen=True, slots=True)
class Inspected:
    """The tensors of a model or file by name, and the artifact in a file that holds one.

    content: the digest of names and data, by which artifacts name a model; None if it was not asked for.
    """

    checkpoint: Checkpoint
    artifact: Artifact | None = None
    content: str | None = None


def inspect_file(path: StrPath, *, content: bool = False) -> Outcome[Inspected]:
    """List the tensors of a model's folder, of one file, or of a model on the Hub, and open the artifact in a file.

    A folder with an adapter, and no model, is opened as that. On the Hub (org/name, org/name@revision) only headers are
    read. content: compute the digest of the content, too, which reads everything. The outcome's digest is that of the
    headers. Raises FormatError for damaged files, FileNotFoundError if nothing is there.
    """
    started = time.monotonic()
    adapter = open_adapter(Path(path)) if is_adapter(Path(path)) else None
    checkpoint = open_model(path) if adapter is None else adapter.tensors
    artifact = _open_artifact(checkpoint) if adapter is None else adapter
    inspected = Inspected(checkpoint, artifact, checkpoint.content if content else None)
    return Outcome(checkpoint.path, inspected, checkpoint.digest, seconds=time.monotonic() - started)


def _open_artifact(checkpoint: Checkpoint) -> Artifact | None:
    """The artifact that the checkpoint's only file holds, whatever its name; None for a model."""
    file = checkpoint.files[0].path
    if len(checkpoint.files) > 1 or not checkpoint.files[0].is_safetensors or checkpoint.snapshot is not None:
        return None
    opener = OPENERS.get(read_header(file).metadata.get("lfm.kind", ""))
    return None if opener is None else opener(file)
