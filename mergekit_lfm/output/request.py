"""The request that a job's folder answers, and its lock: the recipe, the inputs, and digests of all bytes.

The form is that of a merge's lock. Two requests are the same if their options are, the versions, and the content of
their inputs: then the folder that is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.errors import FormatError
from mergekit_lfm.output.lock import ADAPTER_LOCK, FORMAT, compare_files, encode_lock, lock_of, read_lock
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.replace import clear_replaced, refuse_damage
from mergekit_lfm.output.save import check_out
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.places import check_apart, check_kind, has_files
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.version import versions


@dataclass(frozen=True)
class RequestInput:
    """An input of a job: its label, its tensors, and its config, on which the result depends, too."""

    label: str
    tensors: Checkpoint
    config: Mapping[str, Any]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Data that identify it by its content; on the Hub its commit does. Reads all data, once on a machine."""
        is_local = any(file.snapshot is None for file in self.tensors.files)
        return {
            "files": self.tensors.identity,
            **({"content": self.tensors.content} if is_local else {}),
            "config": xxhash.xxh3_128_hexdigest(json.dumps(self.config, sort_keys=True).encode()),
        }


@dataclass(frozen=True)
class Request:
    """The recipe of a job in its canonical form, and the inputs.

    public: the recipe without the folders of this machine, as the lock has it. lock_file: the lock's name, that of an
    adapter's or of a model's.
    """

    recipe: Mapping[str, Any]
    public: Mapping[str, Any]
    inputs: tuple[RequestInput, ...]
    lock_file: str = ADAPTER_LOCK

    @cached_property
    def states(self) -> list[Any]:
        """The states of the inputs' files when they were first asked for."""
        return [source.tensors.states for source in self.inputs]

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that determines the result. Reads the inputs, as `RequestInput.facts` does."""
        _ = self.states
        facts = {
            "versions": versions("torch"),
            "recipe": self.recipe,
            "inputs": [[source.label, source.facts] for source in self.inputs],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())

    @property
    def paths(self) -> dict[str, Path]:
        """The folders and files that are read, by their names in messages."""
        folders = [(source, folder) for source in self.inputs for folder in source.tensors.folders]
        return {source.label if folder == source.tensors.path else str(folder): folder for source, folder in folders}

    def is_answered(self, out: Path, *, overwrite: bool) -> bool:
        """True if OUT is the result of this request; False if it may be written there.

        Compares the content of all files but the tensors'. Raises PlanError if OUT must not be written.
        """
        check_apart(out, self.paths)
        check_kind(out)
        if overwrite or not has_files(out) or not self.is_of(out):
            check_out(out, self.paths, overwrite=overwrite)
            return False
        refuse_damage(out, _find_damage(out, adapter=self.lock_file == ADAPTER_LOCK), "this recipe")
        clear_replaced(out)
        return True

    def is_of(self, out: Path) -> bool:
        """True if the lock in OUT is that of this request. Reads the inputs only if there is one."""
        lock = lock_of(out, self.lock_file)
        return bool(lock) and lock.get("plan") == self.digest

    def check_unchanged(self) -> None:
        """Raise FormatError if an input was changed since it was first looked at."""
        for source, state in zip(self.inputs, self.states, strict=True):
            if source.tensors.states != state:
                raise FormatError(f"{source.label} was changed while it was read; run the same command again")

    def lock(
        self,
        files: Mapping[str, bytes],
        headers: Mapping[str, bytes],
        tensors: Iterable[tuple[TensorSpec, str, str]],
        result: Mapping[str, Any],
    ) -> bytes:
        """The bytes of the lock. headers: of the files of tensors; tensors: each with its file and its bytes' digest.

        result: facts about the result that only making it shows. Raises FormatError if an input was changed meanwhile.
        """
        self.check_unchanged()
        names = public_names(source.label for source in self.inputs)
        facts = {
            "format": FORMAT,
            "plan": self.digest,
            "versions": versions("torch"),
            "recipe": self.public,
            "inputs": [{"input": names[source.label], **source.facts} for source in self.inputs],
            "result": result,
            "segments": {},
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(files.items())},
            "headers": {name: xxhash.xxh3_128_hexdigest(header) for name, header in headers.items()},
            "tensors": {
                spec.name: {
                    "method": str(self.recipe["job"]),
                    "dtype": spec.dtype,
                    "shape": list(spec.shape),
                    "file": file,
                    "xxh3": [digest],
                }
                for spec, file, digest in tensors
            },
        }
        return encode_lock(facts)[0]


def result_of(out: Path, lock_file: str = ADAPTER_LOCK) -> Mapping[str, Any]:
    """The facts in a lock that only making the result showed."""
    result: Mapping[str, Any] = lock_of(out, lock_file)["result"]
    return result


def _find_damage(out: Path, *, adapter: bool) -> list[str]:
    """The differences of a folder's names, sizes and small files from its lock; `verify` reads the tensors, too."""
    try:
        problems = [*compare_files(out, read_lock(out), alone=False)]
        open_checkpoint(out, adapter=adapter)
    except (FormatError, FileNotFoundError) as error:
        return [str(error)]
    return problems
