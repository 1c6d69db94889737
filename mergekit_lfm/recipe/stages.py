"""Recipes of several stages: a YAML document for each, whose result later ones take by its name.

The order of work follows from the names. The stage that no name is needed for, else the last, makes the output; the
others leave their results beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.adapters import names_in
from mergekit_lfm.recipe.heal import OF_OUTPUT, split_heals
from mergekit_lfm.recipe.values import FOUND

# The keys whose text may be a model, or one with adapters; and those of files.
MODEL_KEYS = (
    "model",
    "models",
    "path",
    "adapter",
    "lora",
    "base_model",
    "source",
    "tokenizer_source",
    "to",
    "teachers",
    "student",
)
FILE_KEYS = ("stats", "edits", "data", "dev", "images")
BESIDES = ("student_out",)  # keys that name a result besides the stage's own, in the same folder
LISTS = ("adapters", "earlier")  # parameters of tunings: names with commas
NAMED = ("experts",)  # keys of mappings from models to files
LONGEST_NAME = 200  # bytes: file systems allow 255, and OUT.partial and its lock take some of them
FOLDER_NAME = (
    f"a folder's name of at most {LONGEST_NAME} bytes: no slash, no dot at its beginning, no .partial at its end"
)
UNFINISHED = ".partial"  # how the folder of a result ends until it is complete


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of a recipe: its name, its data without that, the stages whose results it takes, and its label.

    takes: these results by their names, which are those of stages or of what they make besides. document: its index
    among the documents of `text`, the whole recipe; None if that was given as data.
    """

    name: str
    data: Mapping[str, Any]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    label: str
    document: int
    text: str | None

    @property
    def besides(self) -> tuple[str, ...]:
        """The names of what it makes besides its own result."""
        return _besides(self.data)


def find_stages(documents: Sequence[object], label: str, text: str | None = None) -> tuple[Stage, ...]:
    """The stages of a recipe in the order of work, the one that makes the output last; () for one document.

    text: of the recipe. Raises PlanError for stages without a name of their own, or that need one another.
    """
    split = [*split_heals(documents, label)]
    documents = [data for data, _ in split]
    if len(documents) == 1:
        return ()
    _check(documents, label, [index + 1 for _, index in split])
    datas = [data for data in documents if isinstance(data, Mapping)]
    names = [str(data.get("name") or "") for data in datas]
    named = {name: _without_name(data) for name, data in zip(names, datas, strict=True)}
    last = "" if "" in named else names[-1]
    makers = {name: name for name in named} | _find_besides({k: x for k, x in named.items() if k != last}, label)
    others = {name: {each for each, maker in makers.items() if maker != name} for name in named}
    takes = {name: tuple(dict.fromkeys(_find_names(data, others[name]))) for name, data in named.items()}
    needs = {name: tuple(dict.fromkeys(makers[each] for each in taken)) for name, taken in takes.items()}
    _refuse_used(last, needs, named, label)
    try:
        order = [name for name in TopologicalSorter(needs).static_order() if name != last]
    except CycleError as error:
        raise PlanError(f"{label}: the stages {' and '.join(error.args[1][:-1])} need one another") from None
    return tuple(
        Stage(
            name,
            named[name],
            needs[name],
            takes[name],
            f"{label}, stage {name}" if name else f"{label}, the last stage",
            split[names.index(name)][1],
            text,
        )
        for name in [*order, last]
    )


def _check(documents: Sequence[object], label: str, numbers: Sequence[int]) -> None:
    """Raise PlanError for documents of another form, and for names that are missing or used twice."""
    problems, seen, nameless = list[str](), dict[str, int](), list[int]()
    for number, data in zip(numbers, documents, strict=True):
        if not isinstance(data, Mapping):
            words = FOUND.format(found=f"{data!r:.40}", expected="a mapping with merge_method and models, or with job")
            problems.append(f"document {number}: {words}")
            continue
        name = data.get("name")
        if name is None:
            nameless.append(number)
        elif not isinstance(name, str):
            problems.append(f"document {number}: name: found {name!r}, expected text; put it in quotes")
        elif not _is_folder_name(name):
            words = FOUND.format(found=f"{name!r:.80}", expected=FOLDER_NAME)
            problems.append(f"document {number}: name: {words}")
        elif name in seen:
            problems.append(f"document {number}: name: {name} is the name of document {seen[name]}; choose another")
        else:
            seen[name] = number
    if len(nameless) > 1:
        found = " and ".join(map(str, nameless))
        problems.append(f"documents {found} have no `name`, expected one for all but the one that makes the output")
    if problems:
        raise PlanError(f"{label}: {several('stages', problems)}")


def _besides(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(data[key]) for key in BESIDES if data.get(key) is not None)


def _find_besides(named: Mapping[str, Mapping[str, Any]], label: str) -> dict[str, str]:
    """The stage of each result besides the stages' own. Raises PlanError for names that no folder can have."""
    found, problems = dict[str, str](), list[str]()
    for stage, data in named.items():
        for name in _besides(data):
            if not _is_folder_name(name):
                words = FOUND.format(found=f"{name!r:.80}", expected=FOLDER_NAME)
                problems.append(f"stage {stage}: {BESIDES[0]}: {words}")
            elif name in named or name in found:
                problems.append(f"stage {stage}: {BESIDES[0]}: {name} names another result; choose another")
            found[name] = stage
    if problems:
        raise PlanError(f"{label}: {several('stages', problems)}")
    return found


def _is_folder_name(name: str) -> bool:
    """True if a result can have this name among those of the other stages."""
    fits = name.isprintable() and 0 < len(name.encode()) <= LONGEST_NAME
    return fits and "/" not in name and not name.startswith(".") and not name.endswith(UNFINISHED)


def _refuse_used(last: str, needs: Mapping[str, tuple[str, ...]], named: Mapping[str, Any], label: str) -> None:
    """Raise PlanError if a stage takes the output, or another than that has its keys."""
    problems = [f"stage {name} takes {last}, which makes the output" for name, used in needs.items() if last in used]
    for name, data in named.items():
        keys = [key for key in OF_OUTPUT if key in data and name != last]
        problems += [f"stage {name}: `{key}` belongs to the stage that makes the output" for key in keys]
    if problems:
        raise PlanError(f"{label}: {several('stages', problems)}")


def _without_name(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name"}


def _find_names(data: object, names: set[str]) -> Iterator[str]:
    """The stages that a part of a document names as models."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            texts = value if isinstance(value, list) else [value]
            texts = [*value, *value.values()] if key in NAMED and isinstance(value, Mapping) else texts
            if key in (*MODEL_KEYS, *FILE_KEYS, *NAMED):
                named = (part for text in texts if isinstance(text, str) for part in (text, *names_in(text)))
                yield from (part for part in named if part in names)
            if key in LISTS and isinstance(value, str):
                yield from (part for part in map(str.strip, value.split(",")) if part in names)
            yield from _find_names([part for part in texts if not isinstance(part, str)], names)
    elif isinstance(data, list):
        for part in data:
            yield from _find_names(part, names)
