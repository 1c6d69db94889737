"""The data of a tuning as a recipe names them: files, with templates, clusters and shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mergekit_lfm.errors import Refusal
from mergekit_lfm.recipe.files import Where, read_file
from mergekit_lfm.recipe.form import Strict, read_reference
from mergekit_lfm.recipe.problems import Problem, problem_at
from mergekit_lfm.recipe.templates import Template
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.calls import is_function

A_FILE = "a .jsonl, .txt or .npz file, or a folder of images"


class DataEntry(Strict):
    """A file of examples. most: how many of them, drawn anew each time round, are used in one; all by default.

    templates: ways to make a prompt and a completion of a line; for each example one is drawn each time round.
    cluster: the name of the kind of tasks that the file is of.
    """

    path: Annotated[str, BeforeValidator(read_reference)]
    most: int | None = Field(default=None, strict=True, ge=1)
    templates: tuple[Template, ...] = ()
    cluster: str | None = Field(default=None, min_length=1)

    @property
    def facts(self) -> dict[str, Any]:
        """The entry as data, without what is as by default."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _as_entries(value: object) -> object:
    """One file or several, each a path or {path, most}."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(each if isinstance(each, Mapping | DataEntry) else {"path": each} for each in entries)


Entries = Annotated[tuple[DataEntry, ...], BeforeValidator(_as_entries), Field(min_length=1)]


def read_dev(value: object) -> object:
    """A share of the data, or a file."""
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        expected = "a share of the data above 0 and below 1, or a file"
        raise Refusal("found {found}, expected {expected}", found=str(value), expected=expected)
    return read_reference(value)


Dev = Annotated[str | float | None, BeforeValidator(read_dev)]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of examples as named, where it is, and how many of them are used in one time round; None for all.

    templates, cluster: as of a `DataEntry`. is_function: `ref` names a function that returns the examples, and `path`
    is nothing.
    """

    ref: str
    path: Path
    most: int | None = None
    templates: tuple[Template, ...] = ()
    cluster: str | None = None
    is_function: bool = False


def find_data(entry: DataEntry, where: Where, place: str) -> tuple[DataFile | None, list[Problem]]:
    """The file of an entry, or the function; a recipe in a file runs none."""
    found = DataFile(
        entry.path, Path(), entry.most, entry.templates, entry.cluster, is_function=is_function(entry.path)
    )
    if found.is_function:
        expected = "a file: a recipe runs no code; name functions by `tune --data`, or in Python"
        wrong = problem_at(place, FOUND, found=entry.path, expected=expected)
        return found, [] if where.folder is None else [wrong]
    functions = ", or package.module:function" if where.folder is None else ""
    file, problems = read_file(entry.path, where, place, f"{A_FILE}{functions}")
    return None if file is None else replace(found, path=file.path), problems


def read_named(text: str, parameter: str, where: Where) -> tuple[tuple[DataFile, ...], list[Problem]]:
    """The files in a text with commas."""
    place, files, problems = f"parameters.{parameter}", list[DataFile](), list[Problem]()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        problems.append(problem_at(place, FOUND, found=repr(text), expected="files with commas"))
    for name in names:
        found, missing = read_file(name, where, place, "a file, such as the result of an earlier tuning")
        problems += missing
        files += [] if found is None else [DataFile(name, found.path)]
    return tuple(files), problems


def check_clusters(data: Sequence[DataEntry], held_out: Sequence[str], task: str) -> Iterator[Problem]:
    """The problems of templates, clusters and those held out."""
    for i, entry in enumerate(data):
        if entry.templates and task != "lm":
            expected = "none for this task: they make prompts and completions, for lm"
            yield problem_at(f"data[{i}].templates", FOUND, found=str(len(entry.templates)), expected=expected)
        elif entry.templates and not entry.path.endswith(".jsonl"):
            yield problem_at(f"data[{i}].path", FOUND, found=repr(entry.path), expected="a .jsonl for templates")
    clusters = {entry.cluster for entry in data}
    for i, name in enumerate(held_out):
        if name not in clusters:
            known = sorted(cluster for cluster in clusters if cluster)
            expected = f"a cluster of the data: {', '.join(known) or 'none has one'}"
            yield problem_at(f"held_out[{i}]", FOUND, found=repr(name), expected=expected)
    if clusters <= {*held_out}:
        yield Problem("held_out", "all data are held out, expected some to train on; leave out a cluster")
