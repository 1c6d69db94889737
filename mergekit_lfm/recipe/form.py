"""The forms of a recipe's parts, as YAML has them: what keys they have, and the type of each. No check of content."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mergekit_lfm.errors import Refusal, did_you_mean
from mergekit_lfm.recipe.adapters import LARGEST_SHARE, join_reference
from mergekit_lfm.recipe.problems import UnknownKey
from mergekit_lfm.store.buckets import bucket_name
from mergekit_lfm.store.elsewhere import destination

OUTPUT_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Keys of mergekit and of our design that this version does not support, each with what to do instead.
NOT_YET = {
    "stats": "a statistics file belongs to one model: put `stats` beside it, under `models`",
    "align": "an alignment belongs to one model: put `align` beside it, under `models`",
    "rename": "new names belong to one model: put `rename` beside it, under `models`; for the base, on its line there",
    "revision": "write the revision after the model's name: org/name@revision",
    "override_architecture": "tensors are taken as the checkpoints name them; remove the key",
}


ADAPTER_KEYS = ("adapter", "lora", "scale")  # beside a model's name


def _without_unused(data: object, known: Iterable[str]) -> object:
    """`data` less empty keys of other versions, which some tools write."""
    if not isinstance(data, Mapping):
        return data
    unused = NOT_YET.keys() - set(known)
    return {key: value for key, value in data.items() if not (key in unused and value in (None, [], {}))}


def read_reference(value: object) -> object:
    """The path or name in any of mergekit's model references: text, or {model: {path: ..., revision: ..}}.

    A model with adapters is {model: ..., adapter: ..., scale: ...}, with one adapter or a list, or mergekit's `lora`.
    """
    return _read_reference(value, "")


def _read_reference(value: object, at: str) -> object:
    """The same for the part of a reference at a place in it."""
    if not isinstance(value, Mapping):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    for key, part in value.items():
        if key in NOT_YET and key != "revision" and part is not None:
            raise ValueError(NOT_YET[key])
        if key not in ("model", "path", "revision", *ADAPTER_KEYS) and part is not None:
            text = "unknown key {found}, expected {expected}"
            raise UnknownKey(at, key, text, found=repr(key), expected="a path or {model: {path: ...}}")
    inner = "model" if "model" in value else "path"
    name, revision = _read_reference(value.get(inner), f"{at}.{inner}"), value.get("revision")
    name = name if revision is None else f"{name}@{revision}"
    return _with_adapters(name, value, at)


def _with_adapters(name: object, value: Mapping[str, Any], at: str) -> object:
    """A model's name with the adapters that stand beside it."""
    keys = [key for key in ("adapter", "lora") if value.get(key) is not None]
    scale = value.get("scale")
    if not keys and scale is not None:
        raise ValueError("`scale` beside a model is of an adapter: name one as `adapter`, or move it to `parameters`")
    if not (keys and isinstance(name, str)):
        return name
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) <= sys.float_info.max
    if not (scale is None or is_number):
        raise Refusal("scale: found {found}, expected {expected}", found=repr(scale), expected="a number")
    given = [each for key in keys for each in (value[key] if isinstance(value[key], list) else [value[key]])]
    adapters = [_read_reference(each, f"{at}.adapter") for each in given]
    wrong = next((each for each in adapters if not isinstance(each, str) or not each), None)
    if wrong is not None:
        raise Refusal("adapter: found {found}, expected {expected}", found=repr(wrong), expected="an adapter's folder")
    share = 1.0 if scale is None else float(scale)
    return join_reference(name, [(str(each), share) for each in adapters], ones=True)


def _adapters_beside(data: object) -> object:
    """A model's line with the adapters beside the model as part of its name."""
    if not isinstance(data, Mapping) or not any(key in data for key in ADAPTER_KEYS):
        return data
    own = {key: data[key] for key in ADAPTER_KEYS if data.get(key) is not None}
    rest = {key: value for key, value in data.items() if key not in ADAPTER_KEYS}
    return {**rest, "model": {"model": rest.get("model"), **own}} if own else rest


def _path_or_mapping(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _dtype(value: object) -> object:
    """A dtype's name without the optional "torch."."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in OUTPUT_DTYPES:
        short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
        cure = did_you_mean(short.get(str(name), name), OUTPUT_DTYPES)
        raise Refusal("found {found}, expected {expected}; {cure}", found=repr(value), expected="a dtype", cure=cure)
    return name


def _layer_range(value: object) -> object:
    """The two numbers of a range, which may also be text as in `0, 32`."""
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else part for part in value.split(",")]
    if value is None:
        return None
    numbers = [each for each in value if type(each) is int] if isinstance(value, list | tuple) else []
    if not (isinstance(value, list | tuple) and len(numbers) == len(value) == 2 and 0 <= numbers[0] < numbers[1]):
        expected = "the first layer and the one behind the last, as in [0, 16]"
        raise Refusal("found {found}, expected {expected}", found=repr(value), expected=expected)
    return tuple(numbers)


Reference = Annotated[str, BeforeValidator(read_reference), Field(min_length=1)]
LayerRange = Annotated[tuple[int, int] | None, BeforeValidator(_layer_range)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]


def _none_as_empty(value: object) -> object:
    return () if value is None else value


Edits = Annotated[
    tuple[Annotated[str | dict[str, Any], BeforeValidator(_path_or_mapping)], ...],
    BeforeValidator(_none_as_empty),
]
_Destination = Annotated[str, AfterValidator(destination)]
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class Strict(BaseModel):
    """A form that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: object) -> object:
        return _without_unused(data, cls.model_fields)


class ModelEntry(Strict):
    """One line of `models`: a reference, this model's own parameters, its statistics file, alignment and edits.

    adapter, scale: what the model is read with, and the share of what that does; they become part of the reference.

    align: a transform file, or {to, method, ...} to find one before the merge. edits: changes to the model before the
    merge, each a patch file or {facts, method, ...}. rename: new names for its tensors, {old beginning: new beginning}
    or {"re:PATTERN": new text}; the first match holds, and all else about the model is about the new names.
    layer_range: of a slice, the first of its layers and the one behind the last.
    """

    model: Reference
    stats: Annotated[str | None, BeforeValidator(read_reference)] = None
    align: Annotated[str | dict[str, Any] | None, BeforeValidator(_path_or_mapping)] = None
    edits: Edits = ()
    rename: Any = None
    layer_range: LayerRange = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _take_adapters(cls, data: object) -> object:
        return _adapters_beside(data)


class AdapterEntry(Strict):
    """One line of `adapters`: an adapter, its share of what it does, and its own parameters."""

    adapter: Reference
    scale: float = Field(default=1.0, strict=True, allow_inf_nan=False, ge=-LARGEST_SHARE, le=LARGEST_SHARE)
    parameters: Parameters = Field(default_factory=dict)


class SliceEntry(Strict):
    """Layers that follow on those of the slice before: as many of each source, merged with one another."""

    sources: tuple[ModelEntry, ...]
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)


Models = Annotated[tuple[ModelEntry, ...], BeforeValidator(_none_as_empty)]
Slices = Annotated[tuple[SliceEntry, ...], BeforeValidator(_none_as_empty)]


class ModuleEntry(Strict):
    """A part of the model with its own models or slices, and its own method if it names one."""

    merge_method: str | None = None
    models: Models = ()
    slices: Slices = ()
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)


Modules = Annotated[dict[str, ModuleEntry], BeforeValidator(lambda value: {} if value is None else value)]


class Push(Strict):
    """The result's repository on the Hub, or place in a bucket; private: make a repository so if it is new."""

    repo: _Destination
    private: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def _refuse_private_bucket(self) -> Push:
        if self.private and bucket_name(self.repo):
            raise ValueError(f"private has no effect on {self.repo}: who may read there, the bucket says; leave it out")
        return self
