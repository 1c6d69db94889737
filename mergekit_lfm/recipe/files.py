"""Find the models and files that a recipe names: relative to its folder, then to the working directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path

from mergekit_lfm.errors import Refusal
from mergekit_lfm.recipe.adapters import LARGEST_SHARE, PLUS, AdapterRef, join_reference, model_of, split_reference
from mergekit_lfm.recipe.problems import Problem, attempt
from mergekit_lfm.recipe.values import NamedFile
from mergekit_lfm.store import elsewhere
from mergekit_lfm.store.elsewhere import Elsewhere
from mergekit_lfm.store.folder import split_address

EXPECTED = "expected {expected}"


@dataclass(frozen=True, slots=True)
class Where:
    """Where the models of a recipe are: relative to a folder, or the results of earlier stages, by their names."""

    folder: Path | None = None
    stages: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that a text names, where it is, and the adapters that it is read with."""

    ref: str
    source: Path | Elsewhere
    adapters: tuple[AdapterRef, ...] = ()

    @property
    def model(self) -> str:
        """The part of `ref` before the adapters."""
        return model_of(self.ref, self.adapters)


def find_reference(text: str, where: Where) -> FoundModel:
    """The model in a text MODEL+ADAPTER, as `find_model` finds it, or the result of a stage; and the adapters.

    Raises ValueError for the first part that is not there.
    """
    if text in where.stages:
        return FoundModel(text, where.stages[text])
    exists = partial(_exists, where=where.folder)
    parts = model, adapters = split_reference(text, exists)
    if large := next((ref for ref, scale in adapters if abs(scale) > LARGEST_SHARE), None):
        raise Refusal("the share of {found} is above {most:g}; choose another", found=repr(large), most=LARGEST_SHARE)
    short = join_reference(model, adapters)

    def find(ref: str) -> Path | Elsewhere:
        return where.stages[ref] if ref in where.stages else find_model(ref, where.folder)

    found = tuple(AdapterRef(ref, find(ref), scale) for ref, scale in adapters)
    return FoundModel(short if split_reference(short, exists) == parts else text, find(model), found)


def is_adapted(text: object) -> bool:
    """Whether a text names a model with adapters, MODEL+ADAPTER, not a path with a plus sign."""
    return isinstance(text, str | PathLike) and PLUS in str(text) and not Path(text).exists()


def paths_in(text: str | PathLike[str]) -> list[Path]:
    """The paths of a model and of its adapters, where a text MODEL+ADAPTER names them; else the text as a path."""
    if not is_adapted(text):
        return [Path(text)]
    found = find_reference(str(text), Where())
    sources = [found.source, *(adapter.source for adapter in found.adapters)]
    return [source for source in sources if isinstance(source, Path)]


def with_folders(text: str, folder_of: Callable[[Elsewhere, bool], Path]) -> str:
    """A text MODEL+ADAPTER with folders in place of what is elsewhere. folder_of: a name's, True for an adapter."""
    model, adapters = split_reference(text, partial(_exists, where=None))

    def local(ref: str, adapter: bool) -> str:
        source = find_model(ref, None)
        return ref if isinstance(source, Path) else str(folder_of(source, adapter))

    return join_reference(local(model, False), [(local(ref, True), scale) for ref, scale in adapters])


def _exists(ref: str, where: Path | None) -> bool:
    """True if a model's path is there."""
    try:
        _find(ref, where, "")
    except Refusal:
        return False
    return True


def find_model(ref: str, where: Path | None) -> Path | Elsewhere:
    """The absolute path of model `ref`, relative to `where`, else to the working directory, else its name elsewhere.

    Raises ValueError, naming both folders, for any other name. Asks no server.
    """
    try:
        return _find(ref, where, EXPECTED, expected=elsewhere.EXPECTED)
    except Refusal as error:
        name = elsewhere.name_elsewhere(ref)
        if name is None:
            nearest = elsewhere.nearest(ref)
            parts = {"cure": nearest.removeprefix("; "), **error.parts}
            raise Refusal("{text}{nearest}", text=error, nearest=nearest, **parts) from None
        return name


def _find(ref: str, where: Path | None, hint: str, **words: str) -> Path:
    """The path of `ref`. hint, words: the end of the sentence that refuses any other text."""
    folders = dict.fromkeys((where or Path.cwd(), Path.cwd()))
    try:
        relative = Path(ref).expanduser() if ref.startswith("~") else Path(ref)  # ./~a is a folder here
    except RuntimeError:
        raise Refusal(
            "found {found}, but no user has the home folder {home}; {cure}",
            found=repr(ref),
            home=ref.partition("/")[0],
            cure="write the path in full",
        ) from None
    tried = list(dict.fromkeys((folder / relative).absolute() for folder in folders))
    for path in tried:
        try:
            if path.exists():
                return path.resolve()
            if parts := split_address(path):
                return Path(f"{parts[0].resolve()}#{parts[1]}")
        except OSError as error:  # a name that is too long, a folder that may not be read
            sentence = "found {found}, which cannot be looked up: {why}; " + hint
            raise Refusal(sentence, found=f"{ref!r:.80}", why=error.strerror, **words) from None
    missing = " nor ".join(str(path) for path in tried)
    raise Refusal("found {found}, but there is no {missing}; " + hint, found=repr(ref), missing=missing, **words)


def read_file(ref: str, where: Where, place: str, expected: str) -> tuple[NamedFile | None, list[Problem]]:
    """The file that `ref` names, which may be the result of a stage. expected: what it should be."""
    if ref in where.stages:
        return NamedFile(ref, where.stages[ref]), []
    path, problems = attempt(partial(_find, ref, where.folder, EXPECTED, expected=expected), place)
    return None if path is None else NamedFile(ref, path), problems
