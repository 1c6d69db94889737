"""What the user writes: a merge recipe, in mergekit's YAML or as a mapping, checked completely before any work.

A `Recipe` that exists is sound in itself: every key, method, parameter and value is known and within bounds at every
scope, and every model's folder is there. Whether the tensors fit together is the plan's question.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.methods import METHODS, REQUIRED, Method
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.roles import Edit, Entry, Model, Roles, Written, assign_roles, unmet
from mergekit_lfm.recipe.values import GivenFile, as_data, value_at
from mergekit_lfm.store.hub import repository
from mergekit_lfm.store.yaml import read_yaml

DTYPES = ("float16", "bfloat16", "float32", "float64")

# Keys of mergekit and of our design that this version does not carry out, and what to do instead.
_NOT_YET = {
    "slices": "stacking layers is not supported in this version; merge whole models with `models`",
    "modules": "merging single modules is not supported in this version; use filters in `parameters`",
    "tokenizer": "building a tokenizer is not supported in this version; without the key the base model's is copied",
    "tokenizer_source": "building a tokenizer is not supported in this version; without the key the base's is copied",
    "chat_template": "changing the template is not supported in this version; without the key the base's is copied",
    "stats": "a statistics file belongs to one model: put `stats` beside it, under `models`",
    "align": "an alignment belongs to one model: put `align` beside it, under `models`",
    "lora": "adapters are not supported in this version; merge the adapter into its model first",
    "revision": "write the revision after the model's name: org/name@revision",
    "override_architecture": "tensors are taken as the checkpoints name them; remove the key",
}

_EXPECTED = {
    "model_type": "expected a mapping such as {model: path, parameters: {weight: 0.5}}",
    "tuple_type": "expected a list of models",
    "dict_type": "expected a mapping of parameter names to values",
    "string_type": "expected text",
    "string_pattern_mismatch": "expected cpu, cuda, cuda:1 or auto",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every parameter's value for one output tensor: those all inputs share, and one mapping per input."""

    shared: dict[str, Value]
    inputs: tuple[dict[str, Value], ...]


def _without_unused(data: object, known: Iterable[str]) -> object:
    """`data` less the keys of other versions that are there but empty, as tools write them."""
    if not isinstance(data, Mapping):
        return data
    unused = _NOT_YET.keys() - set(known)
    return {key: value for key, value in data.items() if not (key in unused and value in (None, [], {}))}


def _reference(value: object) -> object:
    """The path or name in any of mergekit's forms of a model reference: text, or {model: {path: ..., revision: ..}}."""
    if not isinstance(value, Mapping):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    for key, part in value.items():
        if key not in ("model", "path", "revision") and part is not None:
            raise ValueError(_NOT_YET.get(key, f"unknown key {key!r}, expected a path or {{model: {{path: ...}}}}"))
    named, revision = _reference(value.get("model", value.get("path"))), value.get("revision")
    return named if revision is None else f"{named}@{revision}"


def _path_or_mapping(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _dtype(value: object) -> object:
    """A dtype's name without the optional "torch."."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in DTYPES:
        short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
        raise ValueError(f"found {value!r}, expected a dtype; {did_you_mean(short.get(str(name), name), DTYPES)}")
    return name


_Reference = Annotated[str, BeforeValidator(_reference), Field(min_length=1)]
_Dtype = Annotated[str | None, BeforeValidator(_dtype)]
_Edits = Annotated[
    tuple[Annotated[str | dict[str, Any], BeforeValidator(_path_or_mapping)], ...],
    BeforeValidator(lambda value: () if value is None else value),
]
_Repository = Annotated[str, AfterValidator(repository)]
_Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: object) -> object:
        return _without_unused(data, cls.model_fields)


class ModelEntry(_Strict):
    """One line of `models`: a reference, parameters that hold for this model only, its statistics file, its alignment.

    align: a transform file, or {to, method, ...} for one that is found before the merge. edits: what is changed in it
    before the merge, each a patch file or {facts, method, ...}.
    """

    model: _Reference
    stats: Annotated[str | None, BeforeValidator(_reference)] = None
    align: Annotated[str | dict[str, Any] | None, BeforeValidator(_path_or_mapping)] = None
    edits: _Edits = ()
    parameters: _Parameters = Field(default_factory=dict)


class Push(_Strict):
    """Where the result goes on the Hub: a repository, and whether it is private if it is made."""

    repo: _Repository
    private: bool = Field(default=False, strict=True)


class Recipe(_Strict):
    """A merge as the user wrote it. `dtype` is the output's unless `out_dtype` says another; arithmetic is float32.

    edits: what is changed in the result of the merge, before it is rounded. push: the repository on the Hub that the
    result goes to, as `org/name` or {repo, private}. device: where it is computed, cpu, cuda, cuda:1 or auto.

    Build one with `Recipe.load` or `Recipe.parse`. Relative model paths are relative to the recipe's folder, then to
    the working directory; `output` is relative to the working directory.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: _Reference | None = None
    edits: _Edits = ()
    parameters: _Parameters = Field(default_factory=dict)
    dtype: _Dtype = None
    out_dtype: _Dtype = None
    output: Annotated[str | None, BeforeValidator(_reference)] = None
    push: Annotated[
        Push | None, BeforeValidator(lambda value: {"repo": value} if isinstance(value, str) else value)
    ] = None
    seed: int = Field(default=0, strict=True, ge=0, lt=2**64)
    device: str = Field(default="cpu", pattern=r"^(cpu|auto|cuda(:\d+)?)$")

    _roles: Roles = PrivateAttr()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in the file `path`. PlanError lists everything that is wrong with it."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise PlanError(f"{path}: cannot be read: {reason}; expected a recipe in YAML") from error
        return cls.parse(text, where=path.absolute().parent, label=str(path))

    @classmethod
    def parse(cls, source: Mapping[str, Any] | str, where: Path | None = None, label: str = "recipe") -> Self:
        """The recipe in YAML text or a mapping, written in the folder `where`; `label` names it in messages."""
        data = read_yaml(source, label) if isinstance(source, str) else source
        if not isinstance(data, Mapping):
            raise PlanError(f"{label}: found {data!r:.40}, expected a mapping with merge_method and models")
        problems: list[str] = []
        context = {"where": where, "problems": problems}
        try:
            return cls.model_validate(dict(data), context=context)
        except ValidationError as error:
            problems += _lines(error)
            rest = _without(data, error)
        if rest != data:  # what is wrong in form hides what is wrong in content
            with suppress(ValidationError):
                cls.model_validate(rest, context=context)
        count = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
        raise PlanError(f"{label}: {count}" + "\n  ".join(problems))

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        context = info.context or {"where": None, "problems": []}
        problems: list[str] = context["problems"]
        method = METHODS.get(self.merge_method)
        if method is None:
            known = did_you_mean(self.merge_method, METHODS)
            problems.append(f"merge_method: there is no method {self.merge_method!r}, {known}")
        else:
            models = [Written(e.model, e.parameters, e.stats, e.align, e.edits) for e in self.models]
            self._roles = assign_roles(
                method, models, self.base_model, self.parameters, self.edits, context["where"], problems
            )
            problems += [] if problems else unmet(method, self._roles)
        if problems:
            raise PlanError("\n".join(problems))
        return self

    def goal(self, repo: str | None, *, private: bool = False) -> Push | None:
        """Where the result is pushed: to `repo`, else as the recipe says; None for nowhere. private: in any case.

        PlanError where `repo` is no name of a repository.
        """
        try:
            asked = self.push if repo is None else Push(repo=repo)
        except ValidationError:
            raise PlanError(f"found {repo!r} to push to, expected a repository on the Hub as org/name") from None
        return asked and Push(repo=asked.repo, private=asked.private or private)

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.merge_method]

    @property
    def base(self) -> Model | None:
        """The base model; with some methods it is also one of the inputs."""
        return self._roles.base

    @property
    def inputs(self) -> tuple[Model, ...]:
        """The method's inputs in the recipe's order."""
        return tuple(entry.model for entry in self._roles.inputs)

    @property
    def statistics(self) -> tuple[GivenFile, ...]:
        """The statistics file of each input, or () where the method takes none."""
        return tuple(entry.stats for entry in self._roles.inputs if entry.stats is not None)

    @property
    def result_edits(self) -> tuple[Edit, ...]:
        """What is changed in the result of the merge, in order."""
        return self._roles.edits

    def without_result_edits(self) -> Recipe:
        """The recipe that does not change the result of its merge."""
        plain = self.model_copy(update={"edits": ()})
        plain._roles = replace(self._roles, edits=())
        return plain

    @property
    def all_models(self) -> tuple[Model, ...]:
        """Every model the recipe reads, the base first."""
        base = () if self.base is None else (self.base,)
        return tuple(dict.fromkeys((*base, *self.inputs)))

    def settings(self, tensor: str, layer: tuple[int, int] | None) -> Settings:
        """The values of all parameters for the output tensor `tensor` in layer (index, count), None outside the layers.

        A model's own settings come first, then the top level's, then the method's default. PlanError when a parameter
        without a default has filters of which none matches.
        """
        missing: list[str] = []
        shared = self._values(None, tensor, layer, missing)
        inputs = tuple(self._values(entry, tensor, layer, missing) for entry in self._roles.inputs)
        if missing:
            raise PlanError("\n".join(missing))
        return Settings(shared, inputs)

    def _values(
        self, entry: Entry | None, tensor: str, layer: tuple[int, int] | None, missing: list[str]
    ) -> dict[str, Value]:
        """The per-input values of `entry`, or with None the shared ones; what has no value is added to `missing`."""
        scopes = [entry.settings, self._roles.settings] if entry else [self._roles.settings]
        values: dict[str, Value] = {}
        for parameter in (p for p in self.method.parameters if p.per_input == (entry is not None)):
            name = parameter.name
            said = (value_at(scope[name], parameter, tensor, layer) for scope in scopes if name in scope)
            value = next((found[0] for found in said if found is not None), parameter.default)
            if value is REQUIRED:
                place = f"{entry.place}." if entry else ""
                missing.append(f"{place}parameters.{name}: no filter matches {tensor}; add an entry without a filter")
            else:
                values[name] = cast(Value, value)
        return values

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical, JSON-able form that parses back to the same merge, wherever that is done."""
        models = [
            {"model": entry.model.ref, "parameters": {k: as_data(v) for k, v in sorted(entry.settings.items())}}
            | ({} if entry.stats is None else {"stats": entry.stats.ref})
            | _align_data(entry.model.align)
            | _edits_data(entry.model.edits)
            for entry in self._roles.entries
        ]
        return {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": {k: as_data(v) for k, v in sorted(self._roles.settings.items())},
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "seed": self.seed,
            **_edits_data(self.result_edits),
        }


def _align_data(align: GivenFile | AlignRequest | None) -> dict[str, Any]:
    if align is None:
        return {}
    return {"align": align.ref if isinstance(align, GivenFile) else align.as_data()}


def _edits_data(edits: tuple[Edit, ...]) -> dict[str, Any]:
    written = [edit.ref if isinstance(edit, GivenFile) else edit.as_data() for edit in edits]
    return {"edits": written} if written else {}


def _lines(error: ValidationError) -> Iterator[str]:
    """One line per problem of form; those of content have been collected where they were found."""
    details = error.errors(include_url=False)
    unknown = {detail["loc"] for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details:
        kind, path, found = detail["type"], detail["loc"], detail["input"]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        if path == () and isinstance(detail.get("ctx", {}).get("error"), PlanError):
            continue
        if kind == "missing" and path == ("models",) and unknown & {("slices",), ("modules",)}:
            continue
        if kind == "extra_forbidden":
            form = Recipe if len(path) == 1 else Push if path[0] == "push" else ModelEntry
            key = str(path[-1])
            yield f"{place}: {_NOT_YET.get(key) or 'unknown key, ' + did_you_mean(key, form.model_fields)}"
        elif kind == "missing":
            yield f"{place}: required"
        elif kind == "value_error":
            yield f"{place}: {detail['ctx']['error']}"
        else:
            expected = _EXPECTED.get(kind) or detail["msg"].replace("Input should be", "expected")
            yield f"{place}: found {found!r:.60}, {expected}"


def _without(data: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of `data` less the keys of the top level and of `models` that `error` is about."""
    rest = dict(data)
    if isinstance(rest.get("models"), list | tuple):
        rest["models"] = [dict(entry) if isinstance(entry, Mapping) else entry for entry in rest["models"]]
    for path in (detail["loc"] for detail in error.errors() if detail["loc"]):
        if path[0] == "push":
            path = path[:1]
        parent = rest["models"][path[1]] if len(path) == 3 and path[0] == "models" else rest
        if isinstance(parent, dict):
            parent.pop(str(path[-1]), None)
    return rest
