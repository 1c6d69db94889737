"""The header of an artifact: its kind, format and facts as JSON in a safetensors file's metadata.

One codec for statistics, transforms and patches. A file of another kind or format, or with damaged facts, is refused
with the command that makes a good one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import parse_json
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header, read_header

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

KIND = "lfm.kind"  # the key of a header that names the kind


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of artifact. command: what makes one; again: what to do about a file that is too old or damaged."""

    name: str
    command: str
    again: str
    format: str = "1"

    def encode(self, facts: Mapping[str, Any], **texts: str) -> dict[str, str]:
        """The facts as metadata. texts: facts that are written as they are, not as JSON."""
        plain = {f"lfm.{name}": text for name, text in texts.items()}
        fields = {f"lfm.{name}": json.dumps(value, sort_keys=True) for name, value in facts.items()}
        return {"format": "pt", KIND: self.name, "lfm.format": self.format, **plain, **fields}

    def decode(
        self, metadata: Mapping[str, str], names: Iterable[str], build: Callable[[dict[str, Any]], T], label: object
    ) -> T:
        """build(facts), of the facts with these names. Raises FormatError if the metadata are of anything else."""
        if metadata.get(KIND) != self.name:
            raise FormatError(f"{label} is not a {self.name} file; make one with `{self.command}`")
        if metadata.get("lfm.format") != self.format:
            raise FormatError(f"{label} is a {self.name} file of another version; {self.again}")
        try:
            return build({name: parse_json(metadata[f"lfm.{name}"], name) for name in names})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{label} has damaged metadata ({error!r}); {self.again}") from None

    def is_at(self, path: object) -> bool:
        """Whether a path is a file that says it is of this kind."""
        try:
            return isinstance(path, Path) and path.is_file() and read_header(path).metadata.get(KIND) == self.name
        except (OSError, ValueError):
            return False

    def find(self, path: str | os.PathLike[str]) -> Path:
        """The path of a file that exists. Raises FileNotFoundError for any other."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no such {self.name} file: {file}")
        return file


def save_tensors(
    path: Path, specs: Sequence[TensorSpec], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file atomically. read: returns a tensor by name, called for one at a time."""
    header, _ = encode_header(specs, metadata)
    parts = (bytes_of(read(spec.name).detach().cpu().contiguous()) for spec in specs)
    replace_file(path.resolve(), chain([header], parts))
