"""Decide whether an output exists already, and whether a folder may be replaced by it.

Everything in a folder that is replaced gets deleted. So each file in it must belong to a model that was saved there:
by its lock, or as one of the files that loaders read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.layout import Shard
from mergekit_lfm.output.lock import LOCK, covered_files, is_intact, is_link, lock_name, lock_of
from mergekit_lfm.store.files import open_file, read_bytes
from mergekit_lfm.store.folder import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEXES, find_weights, is_index
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import EXISTS, OVERWRITE, check_apart, check_kind, has_files, partial_of, remove

Policy = Literal["error", "warn"]  # on NaN or infinity

REPLACED = "merge.replaced"  # the folder that --overwrite replaced, in the new one until it is deleted
# The names of files that belong to a model that somebody saved: others may be the user's own.
BESIDE = re.compile(
    r"^(README\.md|LICENSE(\.\w+)?|\.gitattributes|repair\.json|mergekit_config\.yml)$"
    r"|^(config|generation_config|.*tokeni[sz]er.*|added_tokens|vocab|merges|.*(processor|preprocessor|feature_extractor).*|"
    r"modules|config_sentence_transformers|sentence_bert_config|chat_template|special_tokens_map|id2label|labels)"
    r"\.(json|txt)$|\.(jinja|py|tiktoken|spm|bpe)$|^(spiece|sentencepiece.*|.*tokeni[sz]er.*)\.model$"
)
SHOWN = 5  # files that a message names


def refuse_damage(out: Path, problems: Sequence[str], maker: str) -> None:
    """Raise PlanError about an output with problems. maker: what has made it, in words."""
    if problems:
        raise PlanError(
            "{place} is the output of {maker}, but {found}; {cure}",
            place=out,
            maker=maker,
            found=problems[0] + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""),
            cure="--overwrite makes it again",
        )


def already_there(
    digest: str,
    shards: Sequence[Shard],
    inputs: Mapping[str, Path],
    out: Path,
    *,
    overwrite: bool,
    rebuild: bool,
    nan: Policy,
) -> bool:
    """True if OUT holds the output of the plan with this digest and these shards. rebuild: write it in any case.

    Compares names, sizes, and the content of all files but the shards. inputs: the paths that are read, by label.
    Raises PlanError if OUT must not be written.
    """
    check_apart(out, inputs)
    check_kind(out)
    undo_replacement(digest, out)
    if not has_files(out):
        return False
    lock = lock_of(out)
    same = lock.get("plan") == digest
    if same and not rebuild:
        refuse_damage(out, _damage(out, lock, shards), "this merge")
        if lock.get("nonfinite") and nan == "error":
            raise PlanError(
                "{place} exists, but was made with --nan warn: {found}; {cure}",
                place=out,
                found=f"{lock['nonfinite'][0]} is not finite",
                cure="use --nan warn again, or another output",
            )
        clear_replaced(out)
        return True
    if not (overwrite or same):
        raise PlanError("{place} exists and is not the output of this merge; {cure}", place=out, cure=OVERWRITE)
    check_replaceable(out)
    return False


def _damage(out: Path, lock: Mapping[str, Any], shards: Sequence[Shard]) -> list[str]:
    """The differences of an output's names, sizes and small files from its lock and its plan; `verify` reads it all."""
    files = lock.get("files")
    if not isinstance(files, dict) or not is_intact(lock):
        return [f"{LOCK} is damaged"]
    sizes = {shard.name: shard.nbytes for shard in shards}
    problems = [f"{name} is missing" for name in (*sizes, *files) if not (out / name).is_file()]
    problems += [f"{name} is a link" for name in (*sizes, *files) if is_link(out, name)]
    problems += [
        f"{name} has {(out / name).stat().st_size:,} bytes, expected {nbytes:,}"
        for name, nbytes in sizes.items()
        if (out / name).is_file() and (out / name).stat().st_size != nbytes
    ]
    problems += [
        f"the header of {shard.name} was changed"
        for shard in shards
        if (out / shard.name).is_file() and not _has_header(out / shard.name, shard)
    ]
    problems += [
        f"{name} was changed"
        for name, digest in files.items()
        if (out / name).is_file() and xxhash.xxh3_128_hexdigest(read_bytes(out / name)) != digest
    ]
    return problems


def _has_header(path: Path, shard: Shard) -> bool:
    with open_file(path) as file:
        return file.read(len(shard.header)) == shard.header


def undo_replacement(digest: str, out: Path) -> None:
    """Move OUT back if a run of another plan with --overwrite was killed after it had moved OUT away."""
    if (partial_of(out) / REPLACED).exists() and not is_complete(digest, out):
        with lock_folder(partial_of(out)):
            put_back(out)


def put_back(out: Path) -> None:
    """Move the folder that was to be replaced back to OUT, if it is no longer there."""
    replaced = partial_of(out) / REPLACED
    if replaced.exists() and not out.exists():
        replaced.rename(out)


def is_complete(digest: str, out: Path) -> bool:
    """True if a run of the plan with this digest was killed while it published: `finish` completes it."""
    return lock_of(partial_of(out)).get("plan") == digest


def clear_replaced(folder: Path) -> None:
    """Delete the folder that `--overwrite` replaced."""
    if (folder / REPLACED).exists():
        remove(folder / REPLACED)


def check_folder(out: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise PlanError if a new folder must not go to `out`. inputs: the paths that are read, by label."""
    check_apart(out, inputs)
    check_kind(out)
    if has_files(out):
        if not overwrite:
            raise PlanError(EXISTS, place=out, cure=OVERWRITE)
        check_replaceable(out)


def check_replaceable(out: Path) -> None:
    """Raise PlanError if the folder `out` must not be deleted with all that is in it."""
    place = out.resolve()
    for label, folder in {"the working directory": Path.cwd(), "the home directory": Path.home()}.items():
        if folder.resolve().is_relative_to(place):
            raise PlanError(f"{out} is {label} or holds it, and would be deleted; choose another output")
    foreign = sorted(name for name in files_in(place) - _own_files(place) if not name.startswith(f"{REPLACED}/"))
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise PlanError(
            "{place} would be deleted, with files in it that belong to no model saved there: {found}; {cure}",
            place=out,
            found=f"{', '.join(foreign[:SHOWN])}{more}",
            cure="move them away, or choose another output",
        )


def files_in(folder: Path) -> set[str]:
    """The names of everything in a folder, of links too, but for folders."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {path.relative_to(folder).as_posix() for path in paths}


def _own_files(folder: Path) -> set[str]:
    """The files in a folder that belong to the model saved there, by its lock or by their names."""
    if lock_name(folder):
        try:
            return covered_files(folder)
        except FormatError:
            pass  # a damaged lock: go by the names
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    if ADAPTER_CONFIG in names and not names.isdisjoint(ADAPTER_WEIGHTS):
        return {name for name in names if BESIDE.search(name) or name in ADAPTER}
    try:
        weights = find_weights(folder, names, folder)
    except FormatError:
        weights = None
    if weights is None:
        return set()
    own = {name for name in names if BESIDE.search(name) or name in INDEXES or is_index(folder / name)}
    return own | {path.relative_to(folder).as_posix() for path in weights.paths}
