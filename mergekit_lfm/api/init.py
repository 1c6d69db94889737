"""`init_recipe`: a commented recipe to begin with, from models whose configs and cards say how they are related."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.machine.text import printable_line
from mergekit_lfm.output.card import CARD, front_matter
from mergekit_lfm.recipe.files import Where, find_reference, is_adapted
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.folder import split_address
from mergekit_lfm.store.hub import hub_name
from mergekit_lfm.store.places import ANOTHER, EXISTS, check_file
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.views.adapted import open_model

COMPARED = ("architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True)
class _Model:
    """A model: its name as given, as the recipe has it, and its tensors."""

    given: str
    ref: str
    checkpoint: Checkpoint

    def claims(self) -> Iterator[tuple[str, str]]:
        """The models that it may be made from, each with the place that says so."""
        front = front_matter(self.checkpoint.path / CARD) if self.checkpoint.path.is_dir() else {}
        bases = front.get("base_model") if front.get("base_model_relation") != "merge" else None
        named = [(name, "card") for name in (bases if isinstance(bases, list) else [bases])]
        named.append((self.checkpoint.config.get("_name_or_path"), "config"))
        yield from ((name, place) for name, place in named if isinstance(name, str) and name.strip())

    @property
    def adapts(self) -> str | None:
        """The model of MODEL+ADAPTER; None for a model without an adapter."""
        return find_reference(self.given, Where()).model if is_adapted(self.given) else None

    def is_named(self, name: str) -> bool:
        """True if the name is for this model: its own, its folder's, or the last part of either."""
        own = (self.given, str(self.checkpoint.path))
        last = {_last_part(text) for text in own}
        return name in own or _last_part(name) in last


@dataclass(frozen=True, slots=True)
class _Base:
    """The base of models: its name in the recipe, and why it is."""

    ref: str
    why: str


def init_recipe(models: Sequence[StrPath], out: StrPath | None = None) -> Outcome[str]:
    """Propose a recipe for models, folders or on the Hub, and write it to `out`, which must not exist; None: nowhere.

    The base is the model that the cards (`base_model`) or configs (`_name_or_path`) of the others name. The comments of
    the recipe say why it has its method and its base. The result is the text. Raises PlanError if `out` exists, and as
    `open_model` does.
    """
    started = time.monotonic()
    if not models:
        raise PlanError("found no models, expected one or more: folders, or names on the Hub")
    file = None if out is None else expand(out)
    folder = Path.cwd() if file is None else file.absolute().parent
    opened = [_open(os.fspath(model), folder) for model in models]
    if file is not None:
        if file.exists():
            raise PlanError(EXISTS, place=file, cure=ANOTHER)
        check_file(file, [path for model in opened for path in model.checkpoint.folders], overwrite=False)
        folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(_lines(opened, _find_base(opened))) + "\n"
    Recipe.parse(text, folder, "the new recipe")
    if file is not None:
        replace_file(file, text.encode())
    return Outcome(file, text, seconds=time.monotonic() - started)


def _open(given: str, folder: Path) -> _Model:
    """A model; in the recipe a relative path is relative to the recipe's folder."""
    path = Path(given)
    local = path.exists() or split_address(path) is not None
    ref = os.path.relpath(path.absolute(), folder) if local and not path.is_absolute() else given
    ref = f"./{ref}" if ref.startswith("~") and local else ref  # a recipe would take it for a home folder
    return _Model(given, ref, open_model(given))


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def _find_base(models: Sequence[_Model]) -> _Base | None:
    """The model that the others were made from: one of them, or another on the Hub; None if it is unclear."""
    adapted = {model.adapts or model.given for model in models}
    if len(models) > 1 and len(adapted) == 1 and any(model.adapts for model in models):
        return _Base(adapted.pop(), "the model that the adapters are applied to")
    named = dict[int, list[str]]()  # by the index of a model, the reasons of those that name it
    elsewhere = list[set[str]]()
    for model in models:
        claims = list(model.claims())
        for i, other in enumerate(models):
            places = [place for name, place in claims if other is not model and other.is_named(name)]
            if places:
                named.setdefault(i, []).append(f"the {places[0]} of {model.given}")
        elsewhere.append({name for name, _ in claims if hub_name(name) is not None})
    if named:
        (i, why), *others = sorted(named.items(), key=lambda item: -len(item[1]))
        unclear = others and len(others[0][1]) == len(why)
        return None if unclear else _Base(models[i].ref, f"named as the base by {shorten(why)}")
    common = sorted(set.intersection(*elsewhere))
    if len(common) == 1 and len(models) > 1:
        return _Base(common[0], "named as the base by the cards or configs of all models")
    return None


def _lines(models: Sequence[_Model], base: _Base | None) -> Iterator[str]:
    """The lines of the recipe."""
    lines = [model for model in models if base is None or model.ref != base.ref]
    if not lines:
        lines, base = list(models), None
    yield from (f"# {line}" for line in (*_reasons(len(lines), base), *_differences(models)))
    yield ""
    yield from _body(lines, base)
    dtype = _dtype_of(models[0].checkpoint)
    if dtype is not None and len(models) > 1:
        yield f"dtype: {dtype} # of the output; the arithmetic is float32"
    if len(models) == 1:
        yield "# dtype: bfloat16 # writes all tensors in this dtype"
    if len({str(model.checkpoint.config.get("vocab_size")) for model in models}) > 1:
        yield "# rows: crop # leaves out the rows beyond the shortest vocabulary; keep: those of the base stay"


def _reasons(count: int, base: _Base | None) -> Iterator[str]:
    """Why the recipe is as it is."""
    if base is not None:
        yield printable_line(f"{base.ref} is {base.why}.")
    if base is not None and count == 1:
        yield "task_arithmetic adds a share of what training has changed in one model to the base."
    elif base is not None:
        yield "ties keeps the largest changes of each model, and averages those that agree in their sign."
        yield "task_arithmetic, without `density`, is the simpler choice: it adds all changes."
    elif count == 1:
        yield "One model: passthrough copies it."
    else:
        yield "No card and no config names one of the models as the base of the others."
        if count == 2:
            yield "slerp goes from one model to the other on a great circle."
        else:
            yield "linear averages the models."
        yield "If they share a base, give it as `base_model`, and choose task_arithmetic or ties."
    yield "`mergekit-lfm plan` checks the recipe, `merge` carries it out; `mergekit-lfm methods` lists all methods."


def _differences(models: Iterable[_Model]) -> Iterator[str]:
    """A line for each entry of the configs that differs."""
    for key in COMPARED:
        values = {model.given: model.checkpoint.config.get(key) for model in models}
        if len({str(value) for value in values.values() if value is not None}) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            yield printable_line(f"The configs differ in {key}: {found}.")


def _body(lines: Sequence[_Model], base: _Base | None) -> Iterator[str]:
    """The method with its models and parameters."""
    count = len(lines)
    method = _method_of(count, base)
    yield f"merge_method: {method}"
    if method == "slerp":
        yield f"base_model: {_quote(lines[0].ref)} # t = 0"
    elif base is not None:
        yield f"base_model: {_quote(base.ref)}"
    yield "models:"
    for i, model in enumerate(lines):
        yield f"  - model: {_quote(model.ref)}" + (" # t = 1" if method == "slerp" and i else "")
        yield from PARAMETERS.get(method, ())
    if method == "slerp":
        yield "parameters:"
        yield "  t: 0.5 # a list, such as [0, 0.5, 1], gives each layer its own"


def _method_of(count: int, base: _Base | None) -> str:
    if base is not None:
        return "task_arithmetic" if count == 1 else "ties"
    return {1: "passthrough", 2: "slerp"}.get(count, "linear")


# The lines below each model.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("    parameters:", "      weight: 1"),
    "task_arithmetic": ("    parameters:", "      weight: 0.5 # 0 gives the base, 1 the model"),
    "ties": (
        "    parameters:",
        "      weight: 1",
        "      density: 0.5 # the share of each tensor's changes to keep",
    ),
}


def _dtype_of(checkpoint: Checkpoint) -> str | None:
    """The dtype of most numbers in a model, if it is one that a recipe can name."""
    counts = Counter[str]()
    for spec in checkpoint.values():
        counts[spec.dtype] += spec.numel
    dtype = counts.most_common(1)[0][0] if counts else None
    return dtype if dtype in FLOATS else None


def _quote(text: str) -> str:
    """The text as YAML has it."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else yaml.safe_dump(text, default_style='"', width=10**6, allow_unicode=True).strip()
