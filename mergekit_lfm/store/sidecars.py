"""The files beside the weights: configs, tokenizers, templates and the code that a config may name.

Files that could hold a secret, and links that lead out of the folder, are left behind and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit_lfm.errors import FormatError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.secrets import find_secrets
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import SMALL, name_file, read_json
from mergekit_lfm.store.folder import is_outside, leads_away
from mergekit_lfm.store.hub import HubName

SIDECAR = re.compile(
    r"^(config|generation_config|.*tokeni[sz]er.*|added_tokens|vocab|merges|.*(processor|preprocessor|feature_extractor).*|modules|"
    r"config_sentence_transformers|sentence_bert_config|chat_template|special_tokens_map|id2label|labels)\.(json|txt)$"
    r"|\.(jinja|py|tiktoken|spm|bpe)$|^(spiece|sentencepiece.*|.*tokeni[sz]er.*)\.model$"
)
# Names of files that are for their owner alone. Every clone has the two of git, which nobody misses.
HIDDEN = re.compile(r"^\.(?!git(attributes|ignore)$)")
KEYS = re.compile(
    r"\.(env|pem|key|p12|pfx|jks|keystore|ppk|kdbx)$|^id_(rsa|dsa|ecdsa|ed25519)$|"
    r"(^|[_.-])(token|secrets?|credentials?|passwords?|api[_-]?keys?)\.\w+$",
    re.IGNORECASE,
)


def download(name: HubName, progress: Progress = SILENCE) -> Path:
    """Download all files that loading a model needs, and return their folder. Raises as `open_checkpoint` does."""
    model = open_checkpoint(name)
    model.fetch(progress)
    sidecars_of(model)
    return model.path


@dataclass(frozen=True)
class Sidecars:
    """The files that go beside the weights, and those left behind: (name, reason)."""

    files: tuple[Path, ...] = ()
    left: tuple[tuple[str, str], ...] = ()


def sidecars_of(template: Checkpoint) -> Sidecars:
    """The template's files that go beside the weights, and those of the modules that sentence-transformers lists.

    They are downloaded if the model is on the Hub.
    """
    folder, names = template.path, set[str]()
    if template.snapshot is not None:
        names = {name for name in template.snapshot.sizes if "/" not in name}
        small = [name for name, nbytes in template.snapshot.sizes.items() if nbytes <= SMALL]
        template.snapshot.fetch([name for name in small if name in names and _is_sidecar(name)])
        if "modules.json" in small:
            template.snapshot.fetch([name for name in small if name.endswith(".json") and name.count("/") == 1])
    if not folder.is_dir():
        return Sidecars()
    names |= {path.name for path in folder.iterdir() if path.is_file()}
    left = {name: reason for name in names if (reason := _private_name(name))}
    files = []
    for path in _candidates(folder):
        name = path.relative_to(folder).as_posix()
        if reason := _private_content(path, folder):
            left[name] = reason
        else:
            files.append(path)
    return Sidecars(tuple(sorted(files)), tuple(sorted(left.items())))


def _is_sidecar(name: str) -> bool:
    return bool(SIDECAR.search(name)) and not _private_name(name)


def _candidates(folder: Path) -> Iterator[Path]:
    """The files that go beside the weights by their names and sizes."""
    paths = [path for path in folder.iterdir() if _is_sidecar(path.name)]
    if (folder / "modules.json").exists():
        inner = [path for name in _modules(folder) for path in (folder / name).glob("*.json")]
        paths += [path for path in inner if not _private_name(path.name)]
    return (path for path in paths if path.is_file() and path.stat().st_size <= SMALL)


def _private_name(name: str) -> str:
    """Why a file is left behind by its name, "" if it is not."""
    if HIDDEN.search(name):
        return "it is hidden"
    return "its name is that of a key or a token" if KEYS.search(name) else ""


def _private_content(path: Path, folder: Path) -> str:
    """Why a file is left behind by where it lies and what it holds, "" if it is not."""
    if is_outside(path, folder):
        return "it is a link that leads out of the folder"
    with name_file(path):
        return next((f"line {line} holds {secret}" for line, secret in find_secrets(path)), "")


def _modules(folder: Path) -> list[str]:
    """The folders of the modules that sentence-transformers lists. Raises FormatError for paths that lead elsewhere."""
    modules = read_json(folder / "modules.json")
    try:
        names = [entry["path"] for entry in modules]
    except (TypeError, KeyError):
        names = [None]
    wrong = [name for name in names if name != "" and leads_away(name)]
    if wrong:
        raise FormatError(
            f"{folder / 'modules.json'}: found {wrong[0]!r}, expected a list of modules, each with the path of a "
            "folder in this one"
        )
    return [name for name in names if name]
