"""Merge recipes, in mergekit's YAML or as a mapping, checked completely before any work.

A `Recipe` object is valid in itself: every key, method, parameter and value is known and within bounds at every scope,
and every model's folder exists. The plan checks whether the tensors fit together.
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
from mergekit_lfm.recipe.rename import rename_data
from mergekit_lfm.recipe.roles import Edit, Entry, Input, ModelLine, Roles, assign_roles, missing_requirements
from mergekit_lfm.recipe.values import NamedFile, as_data, value_at
from mergekit_lfm.store.hub import repository
from mergekit_lfm.store.yaml import read_yaml

OUTPUT_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Keys of mergekit and of our design that this version does not support, each with what to do instead.
_NOT_YET = {
    "slices": "stacking layers is not supported in this version; merge whole models with `models`",
    "modules": "merging single modules is not supported in this version; use filters in `parameters`",
    "tokenizer": "building a tokenizer is not supported in this version; without the key the base model's is copied",
    "tokenizer_source": "building a tokenizer is not supported in this version; without the key the base's is copied",
    "chat_template": "changing the template is not supported in this version; without the key the base's is copied",
    "stats": "a statistics file belongs to one model: put `stats` beside it, under `models`",
    "align": "an alignment belongs to one model: put `align` beside it, under `models`",
    "rename": "new names belong to one model: put `rename` beside it, under `models`; for the base, on its line there",
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
    """Every parameter's value for one output tensor: the values that all inputs share, and one mapping per input."""

    shared: dict[str, Value]
    inputs: tuple[dict[str, Value], ...]


def _without_unused(data: object, known: Iterable[str]) -> object:
    """`data` less empty keys of other versions, which some tools write."""
    if not isinstance(data, Mapping):
        return data
    unused = _NOT_YET.keys() - set(known)
    return {key: value for key, value in data.items() if not (key in unused and value in (None, [], {}))}


def _reference(value: object) -> object:
    """The path or name in any of mergekit's model references: text, or {model: {path: ..., revision: ..}}."""
    if not isinstance(value, Mapping):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    for key, part in value.items():
        if key not in ("model", "path", "revision") and part is not None:
            raise ValueError(_NOT_YET.get(key, f"unknown key {key!r}, expected a path or {{model: {{path: ...}}}}"))
    name, revision = _reference(value.get("model", value.get("path"))), value.get("revision")
    return name if revision is None else f"{name}@{revision}"


def _path_or_mapping(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _dtype(value: object) -> object:
    """A dtype's name without the optional "torch."."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in OUTPUT_DTYPES:
        short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
        raise ValueError(
            f"found {value!r}, expected a dtype; {did_you_mean(short.get(str(name), name), OUTPUT_DTYPES)}"
        )
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
    """One line of `models`: a reference, this model's own parameters, its statistics file, alignment and edits.

    align: a transform file, or {to, method, ...} to find one before the merge. edits: changes to the model before the
    merge, each a patch file or {facts, method, ...}. rename: new names for its tensors, {old beginning: new beginning}
    or {"re:PATTERN": new text}; the first match holds, and all else about the model is about the new names.
    """

    model: _Reference
    stats: Annotated[str | None, BeforeValidator(_reference)] = None
    align: Annotated[str | dict[str, Any] | None, BeforeValidator(_path_or_mapping)] = None
    edits: _Edits = ()
    rename: Any = None
    parameters: _Parameters = Field(default_factory=dict)


class Push(_Strict):
    """The result's repository on the Hub, and whether to make it private if it is new."""

    repo: _Repository
    private: bool = Field(default=False, strict=True)


class Recipe(_Strict):
    """A merge as the user wrote it. `dtype` is the output's unless `out_dtype` names another; arithmetic is float32.

    edits: changes to the result of the merge, before it is rounded. push: the result's repository on the Hub, as
    `org/name` or {repo, private}. device: where the merge is computed: cpu, cuda, cuda:1 or auto.

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
        """The recipe in the file `path`. Raises PlanError with a list of all its problems."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise PlanError(f"{path}: cannot be read: {reason}; expected a recipe in YAML") from error
        return cls.parse(text, where=path.absolute().parent, label=str(path))

    @classmethod
    def parse(cls, source: Mapping[str, Any] | str, where: Path | None = None, label: str = "recipe") -> Self:
        """The recipe in YAML text or a mapping, as if read from the folder `where`; messages call it `label`."""
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
        if rest != data:  # errors of form hide errors of content
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
            problems.append(f"merge_method: unknown method {self.merge_method!r}, {known}")
        else:
            models = [ModelLine(e.model, e.parameters, e.stats, e.align, e.edits, e.rename) for e in self.models]
            self._roles = assign_roles(
                method, models, self.base_model, self.parameters, self.edits, context["where"], problems
            )
            problems += [] if problems else missing_requirements(method, self._roles)
        if problems:
            raise PlanError("\n".join(problems))
        return self

    def goal(self, repo: str | None, *, private: bool = False) -> Push | None:
        """Where to push the result: `repo`, else the recipe's `push`, else None. private: make it private in any case.

        Raises PlanError if `repo` is not a repository's name.
        """
        try:
            push = self.push if repo is None else Push(repo=repo)
        except ValidationError:
            raise PlanError(f"found {repo!r} to push to, expected a repository on the Hub as org/name") from None
        return push and Push(repo=push.repo, private=push.private or private)

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.merge_method]

    @property
    def base(self) -> Input | None:
        """The base model; with some methods it is also one of the inputs."""
        return self._roles.base

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The method's inputs in the recipe's order."""
        return tuple(entry.model for entry in self._roles.inputs)

    @property
    def statistics(self) -> tuple[NamedFile, ...]:
        """The statistics file of each input, or () if the method takes no statistics."""
        return tuple(entry.stats for entry in self._roles.inputs if entry.stats is not None)

    @property
    def result_edits(self) -> tuple[Edit, ...]:
        """The edits of the merge's result, in order."""
        return self._roles.edits

    def without_result_edits(self) -> Recipe:
        """The recipe without the edits of its result."""
        plain = self.model_copy(update={"edits": ()})
        plain._roles = replace(self._roles, edits=())
        return plain

    @property
    def all_models(self) -> tuple[Input, ...]:
        """Every model the recipe reads, the base first."""
        base = () if self.base is None else (self.base,)
        return tuple(dict.fromkeys((*base, *self.inputs)))

    def settings(self, tensor: str, layer: tuple[int, int] | None) -> Settings:
        """The values of all parameters for the output tensor `tensor` in layer (index, count), None outside the layers.

        A model's own settings win over the top level's, and these over the method's default. Raises PlanError if a
        parameter without a default has filters but none matches.
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
        """The per-input values of `entry`, or the shared ones for None; adds those without a value to `missing`."""
        scopes = [entry.settings, self._roles.settings] if entry else [self._roles.settings]
        values: dict[str, Value] = {}
        for parameter in (p for p in self.method.parameters if p.per_input == (entry is not None)):
            name = parameter.name
            candidates = (value_at(scope[name], parameter, tensor, layer) for scope in scopes if name in scope)
            value = next((candidate[0] for candidate in candidates if candidate is not None), parameter.default)
            if value is REQUIRED:
                place = f"{entry.place}." if entry else ""
                missing.append(f"{place}parameters.{name}: no filter matches {tensor}; add an entry without a filter")
            else:
                values[name] = cast(Value, value)
        return values

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same merge on any machine."""
        models = [
            {"model": entry.model.ref, "parameters": {k: as_data(v) for k, v in sorted(entry.settings.items())}}
            | ({} if entry.stats is None else {"stats": entry.stats.ref})
            | _align_data(entry.model.align)
            | _edits_data(entry.model.edits)
            | ({"rename": rename_data(entry.model.rename)} if entry.model.rename else {})
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


def _align_data(align: NamedFile | AlignRequest | None) -> dict[str, Any]:
    if align is None:
        return {}
    return {"align": align.ref if isinstance(align, NamedFile) else align.as_data()}


def _edits_data(edits: tuple[Edit, ...]) -> dict[str, Any]:
    data = [edit.ref if isinstance(edit, NamedFile) else edit.as_data() for edit in edits]
    return {"edits": data} if data else {}


def _lines(error: ValidationError) -> Iterator[str]:
    """One line per problem of form; problems of content were collected during the check."""
    details = error.errors(include_url=False)
    unknown = {detail["loc"] for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details:
        kind, path, value = detail["type"], detail["loc"], detail["input"]
        key_path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        if path == () and isinstance(detail.get("ctx", {}).get("error"), PlanError):
            continue
        if kind == "missing" and path == ("models",) and unknown & {("slices",), ("modules",)}:
            continue
        if kind == "extra_forbidden":
            form = Recipe if len(path) == 1 else Push if path[0] == "push" else ModelEntry
            key = str(path[-1])
            yield f"{key_path}: {_NOT_YET.get(key) or 'unknown key, ' + did_you_mean(key, form.model_fields)}"
        elif kind == "missing":
            yield f"{key_path}: required"
        elif kind == "value_error":
            yield f"{key_path}: {detail['ctx']['error']}"
        else:
            expected = _EXPECTED.get(kind) or detail["msg"].replace("Input should be", "expected")
            yield f"{key_path}: found {value!r:.60}, {expected}"


def _without(data: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of `data` less the keys of the top level and of `models` that `error` names."""
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
