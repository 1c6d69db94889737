"""The files that go out with a saved model, to the Hub or into a bucket, and the result of a push.

Nothing that names this machine goes out, and nothing that looks like a token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import get_token

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.machine.secrets import find_secrets, mask_secrets
from mergekit_lfm.output.lock import LOCK, lock_of, verify
from mergekit_lfm.output.replace import REPLACED
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.files import name_file
from mergekit_lfm.store.folder import INDEX_END, is_index, is_outside
from mergekit_lfm.store.hub.client import endpoint

TEXTS = re.compile(r"\.(md|json|yaml|yml|txt|py|jinja)$")
VOCABULARIES = re.compile(r"(^|/)(tokenizer|vocab|merges)\.(json|txt)$")  # any text may be in one
RECORDED_PATH = rb'name_or_path"[ \t]*:[ \t]*"[/~]'  # where transformers once found the model
# The weights that loaders look for, one set per folder; and the files that show that one is in use.
WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?$")
IN_USE = re.compile(r"\.(safetensors|bin|gguf|pt|pth|onnx|msgpack|h5)$|(^|/)(config|adapter_config)\.json$")


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the files that it changed and deleted there; empty if all of it was there already.

    repo: the repository on the Hub, or the address in a bucket; commit: its state after that. kept_card: True if a card
    edited on the Hub was kept, so that ours is MERGE.md. left_out: hidden files, and links that lead out of the folder.
    verified: True if the model was downloaded again and compared with its lock.
    """

    repo: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int
    kept_card: bool
    left_out: tuple[str, ...]
    verified: bool = False

    @property
    def url(self) -> str:
        """The address of the repository, or in a bucket."""
        return self.repo if "://" in self.repo else f"{endpoint()}/{self.repo}"


@dataclass(frozen=True)
class Outgoing:
    """A saved model that may go out: its folder, the files by name, and those that stay."""

    folder: Path
    contents: dict[str, Path]
    left_out: tuple[str, ...]


def outgoing(folder: str | PathLike[str], *, pull_back: bool = False) -> Outgoing:
    """The files of a folder with a whole model. pull_back: they will be compared with its lock afterwards.

    Hidden files stay, and so do links out of the folder but for weights. Raises FormatError if the folder holds no
    complete model, PlanError for private content, or without a lock to compare with.
    """
    source = Path(folder)
    if not source.is_dir():
        raise PlanError(f"{source} is not a folder, expected that of a saved model")
    model = open_checkpoint(source)  # unfinished outputs have no readable headers
    if (source / REPLACED).exists():
        raise PlanError(f"{source} still holds the files it replaced: its merge was interrupted. Run that merge again")
    if pull_back and not lock_of(source):
        raise PlanError(f"{source} has no {LOCK} to compare with: push it without comparing")
    if pull_back and (problems := verify(source, alone=False)):
        listed = "\n  ".join(problems[:10])
        raise PlanError(f"{source} differs from its lock, so it can only be pushed without comparing:\n  {listed}")
    weights = {*(file.path for file in model.files), *(path for path in source.glob(f"*{INDEX_END}") if is_index(path))}
    contents, left = _contents(source, weights)
    return Outgoing(source, contents, tuple(left))


def _contents(folder: Path, weights: Collection[Path]) -> tuple[dict[str, Path], list[str]]:
    """A folder's files to push, by name; and those that stay: hidden ones, and links out of the folder but for weights.

    Raises PlanError for private content.
    """
    contents: dict[str, Path] = {}
    left, problems = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or (path not in weights and is_outside(path, folder)):
            left.append(name.as_posix())
            continue
        contents[name.as_posix()] = path
        with name_file(path):
            problems += [f"{name}, line {line}: {secret}" for line, secret in find_secrets(path, _private(name))]
    problems += [f"the name of {name} is a token or a key" for name in contents if mask_secrets(name) != name]
    if problems:
        raise PlanError(several("the folder holds private data", problems) + "\nRemove it, then push again.")
    return contents, left


def _private(name: Path) -> dict[str, re.Pattern[bytes]]:
    """Patterns of private data besides the known forms: the token in use, and in texts paths of this machine."""
    private = {} if (token := get_token()) is None else {"a token of the Hub": re.compile(re.escape(token.encode()))}
    if TEXTS.search(name.name) and not VOCABULARIES.search(name.as_posix()):
        home = os.environ.get("HOME", "").rstrip("/").encode()
        paths = [RECORDED_PATH, *([re.escape(home) + b"/"] if home else [])]
        private["a path of this machine"] = re.compile(b"|".join(paths))
    return private
