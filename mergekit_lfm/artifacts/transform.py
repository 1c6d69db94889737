"""The transform file: how to rewrite one model's hidden units; merges apply it while they stream.

One safetensors file: an element for each group of the symmetry table, and metadata with the table itself, the method,
and the content digests of both models. Applying it needs only this file and the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, read_axis
from mergekit_lfm.artifacts.header import Kind, save_tensors
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import read_header

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORM = Kind("transform", "mergekit-lfm align", "align the models again")
SAME, DIFFERENT = "the same", "different"  # outputs of a rewritten model, beside those of the model
PANEL = 1 << 18  # elements of a tensor to rewrite at a time


@dataclass(frozen=True)
class UnitsElement:
    """An element of a `Units` group: an order with factors, or a matrix.

    order: int64 [n], new unit i is the old unit order[i]; None keeps it. In memory it may be shorter, a choice of
    units; a file has permutations alone. scale: float64 [n], the factor of new unit i; None for ones.
    matrix: float64 [m, n], new = matrix @ old, in place of order and scale. dual: float64 [m, n], acts on axes that
    read the units; None if the matrix is orthogonal, and so acts there, too.
    """

    order: Tensor | None = None
    scale: Tensor | None = None
    matrix: Tensor | None = None
    dual: Tensor | None = None


@dataclass(frozen=True)
class HeadsElement:
    """An element of a `Heads` group. None leaves that part as it is.

    groups: int64 [groups], new group j is the old group groups[j]. queries: int64 [groups, per_group], its query head r
    is the query head queries[j, r] of that old group. query_key, value_output: float64 [groups, head_dim, head_dim],
    act on the keys and on the values of new group j; the inverse transposed acts on queries and the output's columns.
    """

    groups: Tensor | None = None
    queries: Tensor | None = None
    query_key: Tensor | None = None
    value_output: Tensor | None = None


Element = UnitsElement | HeadsElement


@dataclass(frozen=True)
class Gain:
    """A norm's gain before and after a rotation of its inputs, float64 [n]: the new one replaces the old."""

    old: Tensor
    new: Tensor


@dataclass(frozen=True)
class TransformInfo:
    """The facts in a transform file.

    method: the aligner. models: content digests of the rewritten model and of the one that it is aligned to; () for
    models given as tensors. exact: True if the outputs stay the same, by the table. options: those of the method.
    scores: the objective and the distance, before and after. outputs: what running the rewritten model showed, SAME,
    DIFFERENT, or "not compared: " and why not.
    """

    method: str
    exact: bool = True
    models: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    outputs: str = "not compared: the models did not run"


@dataclass(frozen=True)
class Transform:
    """How to rewrite a model. elements: by group, without untouched groups; gains: by norm."""

    symmetries: Symmetries
    elements: Mapping[str, Element]
    info: TransformInfo
    gains: Mapping[str, Gain] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the transform file, whole or not at all."""
        tensors = {
            f"{part}/{group}": value.contiguous()
            for group, element in self.elements.items()
            for part, value in vars(element).items()
            if value is not None
        }
        for norm, gain in self.gains.items():
            tensors |= {f"gain/old/{norm}": gain.old.contiguous(), f"gain/new/{norm}": gain.new.contiguous()}
        save_tensors(Path(path), [spec_of(n, x) for n, x in tensors.items()], tensors.__getitem__, _metadata(self))


def _metadata(transform: Transform) -> dict[str, str]:
    parts: dict[str, Any] = {
        **asdict(transform.info),
        "groups": {name: asdict(group) for name, group in transform.symmetries.groups.items()},
        "tensors": {
            name: ["|".join(map(str, axis)) for axis in axes] for name, axes in transform.symmetries.tensors.items()
        },
    }
    return TRANSFORM.encode(parts)


def _group(fields: dict[str, Any]) -> Group:
    return Heads(**fields) if "head_dim" in fields else Units(**fields)


def read_transform_info(path: Path) -> tuple[Symmetries, TransformInfo]:
    """The table and the facts in a transform file's header. Raises FormatError for any other file."""

    def build(facts: dict[str, Any]) -> tuple[Symmetries, TransformInfo]:
        groups = {name: _group(fields) for name, fields in facts.pop("groups").items()}
        tensors = {
            name: tuple(read_axis(word, groups) for word in words) for name, words in facts.pop("tensors").items()
        }
        return Symmetries(groups, tensors), TransformInfo(**{**facts, "models": tuple(facts["models"])})

    names = [*TransformInfo.__dataclass_fields__, "groups", "tensors"]
    return TRANSFORM.decode(read_header(path).metadata, names, build, path)


def open_transform(path: str | os.PathLike[str]) -> Transform:
    """The transform in a file. Raises FormatError for any other file, FileNotFoundError for a missing one."""
    file = TRANSFORM.find(path)
    symmetries, facts = read_transform_info(file)
    stored = open_checkpoint(file)
    tensors = {name: stored.read(name).view(spec.shape) for name, spec in stored.items()}
    elements: dict[str, Element] = {}
    gain_names = {name.removeprefix("gain/old/"): name for name in tensors if name.startswith("gain/old/")}
    for name, group in symmetries.groups.items():
        kind = UnitsElement if isinstance(group, Units) else HeadsElement
        parts = {part: tensors[f"{part}/{name}"] for part in kind.__dataclass_fields__ if f"{part}/{name}" in tensors}
        if parts:
            elements[name] = kind(**parts)
    try:
        gains = {norm: Gain(tensors[old], tensors[f"gain/new/{norm}"]) for norm, old in gain_names.items()}
    except KeyError as error:
        raise FormatError(f"{file} lacks {error}; align the models again") from None
    transform = Transform(symmetries, elements, facts, gains)
    check_elements(transform, file)
    return transform


def check_elements(transform: Transform, label: object) -> None:
    """Raises FormatError if an order is not a permutation, or if a shape or number does not fit its group."""
    problems = []
    for name, element in transform.elements.items():
        group = transform.symmetries.groups[name]
        wrong = (
            _wrong_units(group, element)
            if isinstance(group, Units) and isinstance(element, UnitsElement)
            else _wrong_heads(group, element)
            if isinstance(group, Heads) and isinstance(element, HeadsElement)
            else ["its kind"]
        )
        problems += [f"{part} of {name}" for part in wrong]
    if problems:
        raise FormatError(
            f"{label}: {', '.join(problems)} does not fit the group in the file's table; align the models again"
        )


def _wrong_units(group: Units, element: UnitsElement) -> list[str]:
    n = group.count
    wrong = []
    if element.order is not None and not _permutes(element.order, n):
        wrong.append("order")
    if element.scale is not None and not (
        element.scale.shape == (n,) and bool((element.scale.isfinite() & (element.scale != 0)).all())
    ):
        wrong.append("scale")
    for part, value in (("matrix", element.matrix), ("dual", element.dual)):
        if value is not None and not (value.ndim == 2 and value.shape[1] == n and bool(value.isfinite().all())):
            wrong.append(part)
    return wrong


def _wrong_heads(group: Heads, element: HeadsElement) -> list[str]:
    wrong = []
    if element.groups is not None and not _permutes(element.groups, group.groups):
        wrong.append("groups")
    if element.queries is not None and not (
        element.queries.shape == (group.groups, group.per_group)
        and all(_permutes(row, group.per_group) for row in element.queries)
    ):
        wrong.append("queries")
    shape = (group.groups, group.head_dim, group.head_dim)
    for part, value in (("query_key", element.query_key), ("value_output", element.value_output)):
        if value is not None and not (value.shape == shape and bool(value.isfinite().all())):
            wrong.append(part)
    return wrong


def _permutes(order: Tensor, n: int) -> bool:
    import torch

    return order.dtype == torch.int64 and order.shape == (n,) and bool((order.sort()[0] == torch.arange(n)).all())
