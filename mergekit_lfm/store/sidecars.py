"""The files beside the weights: every file of a model's folder is copied, merged with the weights, or left behind.

A file is left behind for a reason: it holds other weights or the state of a training, it could hold a secret, it is too
large, it leads out of the folder. A git-lfs pointer in place of a file to copy is an error.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mergekit_lfm.errors import FormatError, several
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.secrets import find_secrets
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.elsewhere import Elsewhere
from mergekit_lfm.store.files import KINDS, SMALL, name_file
from mergekit_lfm.store.folder import STATE, WEIGHTS, files_under, is_index, is_outside
from mergekit_lfm.store.kinds import OTHERS, PAGE, PICKLE, POINTER, SAFETENSORS, ZIP, head_of, kind_of

LARGEST_SUM = 500_000_000  # bytes of all copied files, which are in memory until the output is written
# Names that are for files of the output itself: its card and lock, and the marks of unfinished work.
OWN = re.compile(r"^(README\.md|MERGE\.md|merge\.lock\.json|merge\.journal|saving\.unfinished)$|^merge\.replaced/")
# Every clone and download has these, and nobody misses them.
OF_CLONES = re.compile(r"^\.(gitattributes|gitignore)$|^\.(git|cache/huggingface)/")
KEYS = re.compile(
    r"\.(env|pem|key|p12|pfx|jks|keystore|ppk|kdbx)$|^id_(rsa|dsa|ecdsa|ed25519)$|"
    r"(^|[_.-])(token|secrets?|credentials?|passwords?|api[_-]?keys?)\.\w+$",
    re.IGNORECASE,
)
COMPILED = re.compile(r"\.(pyc|pyo|so|dll|dylib|exe)$")
PICKLES = re.compile(r"\.(pkl|pickle|joblib|dill)$")
PAGES = (".html", ".htm", ".xhtml", ".md")  # whose files may begin as a page does

OWN_REASON, CLONES_REASON, OTHER_WEIGHTS = "the output has its own", "of a clone or download", "other weights"
PICKLE_REASON = "a pickle, which can hold code"
QUIET = (OWN_REASON, CLONES_REASON)  # reasons for files that nobody misses


@dataclass(frozen=True)
class Sidecars:
    """The files that go beside the weights, by name in the folder, and those left behind: (name, reason)."""

    files: tuple[tuple[str, Path], ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    @property
    def missed(self) -> tuple[tuple[str, str], ...]:
        """Those left behind that somebody could miss."""
        return tuple((name, why) for name, why in self.left if why not in QUIET)


def download(name: Elsewhere, progress: Progress = SILENCE, *, adapter: bool = False) -> Path:
    """Download all files that loading a model, or an adapter, needs, and return their folder.

    Raises as `open_checkpoint` does.
    """
    model = open_checkpoint(name, adapter=adapter)
    model.fetch(progress)
    if not adapter:
        sidecars_of(model)
    return model.path


def sidecars_of(template: Checkpoint) -> Sidecars:
    """The files of the template's folder that go beside the weights, and those left behind.

    They are downloaded if the model is on the Hub. Raises FormatError if a file is a stand-in for what should be there.
    """
    folder, snapshot = template.path, template.snapshot
    if snapshot is not None and snapshot.folder != folder:
        snapshot = None  # a view in a folder of this machine
    if snapshot is None and not folder.is_dir():
        return Sidecars()
    everything = files_under(folder) if snapshot is None else list(snapshot.sizes)
    paths = {file.path for file in template.files}
    left = _left_by_names(everything, {name for name in everything if folder / name in paths})
    rest = [name for name in everything if name not in left and folder / name not in paths]
    if snapshot is None:
        left |= {name: why for name in rest if (why := _reason_of_place(folder, name))}
        rest = [name for name in rest if name not in left]
        left |= _too_large({name: (folder / name).stat().st_size for name in rest})
    else:
        left |= _too_large({name: snapshot.sizes[name] for name in rest})
        snapshot.fetch([name for name in rest if name not in left])
    rest = [name for name in rest if name not in left]
    left |= {name: why for name in rest if (why := _reason_of_place(folder, name) or _reason_of_content(folder / name))}
    files = tuple((name, folder / name) for name in sorted(rest) if name not in left)
    _refuse_stand_ins(files)
    return Sidecars(files, tuple(sorted(left.items())))


def _left_by_names(names: Collection[str], merged: Collection[str]) -> dict[str, str]:
    """The files that are left behind by their names, or because they are about other weights in their folder."""
    left = {name: why for name in names if name not in merged and (why := _reason_of_name(name))}
    folders = {name.rpartition("/")[0] for name, why in left.items() if why == OTHER_WEIGHTS}
    others = folders - {folder.as_posix() for name in merged for folder in PurePosixPath(name).parents} - {""}
    return {
        name: "beside other weights"
        for name in names
        if name not in merged and any(name.startswith(f"{folder}/") for folder in others)
    } | left


def examine(path: Path, folder: Path) -> str:
    """Why a file of a folder must stay there, "" if it may be copied. Raises FormatError for a stand-in."""
    name = path.relative_to(folder).as_posix()
    why = _reason_of_name(name) or _reason_of_place(folder, name) or _reason_of_content(path)
    if not why:
        _refuse_stand_ins([(name, path)])
    return why


def _reason_of_name(name: str) -> str:
    """Why a file is left behind by its name, "" if it is not."""
    if OWN.search(name):
        return OWN_REASON
    if OF_CLONES.search(name):
        return CLONES_REASON
    if why := _private(name):
        return why
    if not name.isprintable():
        return "a name with unprintable characters"
    if STATE.search(name):
        return "the state of a training"
    if WEIGHTS.search(name):
        return OTHER_WEIGHTS
    if PICKLES.search(name):
        return PICKLE_REASON
    return "compiled code" if COMPILED.search(name) else ""


def _private(name: str) -> str:
    """Why a file may be for its owner alone by its name, "" if it is not."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    return "named like a key or a token" if any(KEYS.search(part) for part in parts) else ""


def _reason_of_place(folder: Path, name: str) -> str:
    """Why a file is left behind by where it lies, "" if it is not: a link is followed, and judged by its target."""
    path = folder / name
    if is_outside(path, folder):
        return "a link that leads out of the folder"
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "a link to a folder" if path.is_dir() else KINDS.get(stat.S_IFMT(path.stat().st_mode), "no regular file")
    target, home = path.resolve(), folder.resolve()
    return _private(target.relative_to(home).as_posix()) if target.is_relative_to(home) else ""


def _too_large(sizes: Mapping[str, int]) -> dict[str, str]:
    """The files that are left behind by their sizes: each that is large, and the largest if all together are."""
    left, total = {}, 0
    for name, nbytes in sorted(sizes.items(), key=lambda item: item[::-1]):
        total += nbytes
        if nbytes > SMALL or total > LARGEST_SUM:
            left[name] = f"over {SMALL // 10**6} MB" if nbytes > SMALL else f"over {LARGEST_SUM // 10**6} MB together"
    return left


def _reason_of_content(path: Path) -> str:
    """Why a file is left behind by what it holds, "" if it is not."""
    if is_index(path):
        return OWN_REASON
    kind = kind_of(head_of(path))
    if kind in OTHERS.keys() - {POINTER, PAGE} or kind == SAFETENSORS:
        return OTHER_WEIGHTS if "archive" not in kind else "an archive"
    if kind in (ZIP, PICKLE):
        return "an archive" if kind == ZIP else PICKLE_REASON
    with name_file(path):
        return next((f"line {line} holds {secret}" for line, secret in find_secrets(path)), "")


def _refuse_stand_ins(files: Iterable[tuple[str, Path]]) -> None:
    """Raise FormatError about all files that are pointers or pages in place of the files that should be there."""
    kinds = {path: kind_of(head_of(path)) for name, path in files if not name.endswith(PAGES)}
    problems = [f"{path} is {kind}, not the file; {OTHERS[kind]}" for path, kind in kinds.items() if kind in OTHERS]
    if problems:
        raise FormatError(several("files beside the weights are not what their names say", problems))
