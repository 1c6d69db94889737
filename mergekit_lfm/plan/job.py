"""The unit of a plan: one output tensor, with its sources, method and dtype. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lfm.arch.kinds import Kind
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import BLOCK, SEGMENT
from mergekit_lfm.kernels.random import key
from mergekit_lfm.methods.method import Method, Unit
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.match import Match
from mergekit_lfm.plan.roles import PartRoles, TensorRef
from mergekit_lfm.recipe.parts import Layer, Settings
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE, TensorSpec, promote

SMALL = 1 << 16  # elements; a merge of as many takes longer than the work that each task has besides


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor. sources: one per input; base: the base's, or None.

    match: its kind, and its other names in the output. compute: the dtype of the arithmetic. copied: True to take the
    first source, which all sources must equal; of a counter the largest. needs_sums: its solve needs sums over the
    tensor. row: blocks are whole rows of so many elements, or None. by_row: each block has a solve of its own, since
    rows need no others. sums: how many numbers its solve's sums by row or column are. statistics: one per input, if the
    method takes them elementwise. added: the change added to the result before it is rounded, or None. layer: its index
    and their count, for the gradients among the settings; None outside the layers.
    """

    spec: TensorSpec
    match: Match
    method: str
    sources: tuple[TensorRef, ...]
    base: TensorRef | None
    settings: Settings
    compute: str
    copied: bool
    block: int
    needs_sums: bool
    row: int | None = None
    by_row: bool = False
    sums: int = 0
    statistics: tuple[TensorRef, ...] = ()
    added: TensorRef | None = None
    layer: tuple[int, int] | None = None

    name = property(lambda self: self.spec.name)
    shape = property(lambda self: self.spec.shape)
    dtype = property(lambda self: self.spec.dtype)
    nbytes = property(lambda self: self.spec.nbytes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the output under which the result is written."""
        return (self.name, *self.match.tied)

    @property
    def small(self) -> bool:
        """True if one task may do it with other small jobs: it is one block, and is merged or copied as a whole."""
        match = self.match
        plain = (
            self.added is None and match.kind in ("parameter", "statistic") and not match.tied and match.kept is None
        )
        return plain and 0 < self.spec.numel <= min(SMALL, self.block)

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """Everything that the job reads except `added`, the base last."""
        rows = self.sources + self.statistics
        return rows if self.base is None else (*rows, self.base)

    @property
    def all_inputs(self) -> tuple[TensorRef, ...]:
        """Everything that the job reads."""
        return self.inputs if self.added is None else (*self.inputs, self.added)

    @property
    def segment_numel(self) -> int:
        """Elements of a segment; the last may have fewer."""
        return self.block * SEGMENT

    @property
    def segments(self) -> int:
        """The number of segments; an empty tensor has one."""
        return max(1, -(-self.spec.numel // self.segment_numel))

    def segment_nbytes(self, segment: int) -> int:
        """Bytes of one segment in the output."""
        return self.segment_range(segment)[1]

    def segment_range(self, segment: int) -> tuple[int, int]:
        """The first byte of one segment in the tensor of the output, and the number of its bytes."""
        first, size = segment * self.segment_numel, ITEMSIZE[self.dtype]
        return first * size, (min(self.spec.numel, first + self.segment_numel) - first) * size


def make_job(
    roles: PartRoles,
    sources: Sequence[Checkpoint],
    match: Match,
    settings: Settings,
    layer: tuple[int, int] | None,
    statistics: tuple[TensorRef, ...] | None = None,
    block: int = BLOCK,
) -> Job:
    """The job of one output tensor: merged if all its sources are floating, else copied.

    sources: the plan's. statistics: the inputs', or None without any: methods that need them then leave the tensor to
    `linear`, as all methods leave the statistics of batch normalisation, which describe data.
    """
    recipe, base = roles.recipe, roles.base
    method, spec, held = roles.part.method, match.spec, match.sources
    inputs = tuple([held[i] for i in roles.inputs if i in held])
    base_source = held.get(base) if base is not None else None
    refs = inputs if base_source is None else (*inputs, base_source)
    dtypes = [sources[i][name].dtype for i, name in refs]
    lone = len(held) == 1 < len(roles.models)  # a tensor of one model alone
    if lone:
        refs, dtypes = tuple(held.values()), [spec.dtype]
    if lone or not {*dtypes} <= {*FLOATS}:
        if spec.dtype.startswith("float8") and not lone and settings.inputs[0].get("scale") is not None:
            raise PlanError(
                "{place} is {found} and cannot be scaled; {cure}",
                place=spec.name,
                found=f"quantised ({spec.dtype})",
                cure="leave it out of `scale`",
            )
        first = held.get(roles.template)
        refs = (*(ref for ref in refs if ref == first), *(ref for ref in refs if ref != first))
        return _copy(refs, sources, match, settings, block, layer)
    dtype = recipe.out_dtype or recipe.dtype or promote([sources[i].stored_dtype(name) for i, name in refs])
    compute = "float64" if "float64" in (*dtypes, recipe.dtype) else "float32"
    out = TensorSpec(spec.name, spec.shape, dtype)
    if (method.statistics and statistics is None) or is_averaged(method, match.kind, settings):
        method, settings = METHODS["linear"], averaging_settings(settings)
        if match.kind == "statistic":
            base_source = None
    job = Job(out, match, method.name, inputs, base_source, settings, compute, False, block, False, layer=layer)
    unit = unit_of([job], recipe.seed, roles.norms)
    row, by_row, sums = method.row(unit), method.by_row(unit), method.sums(unit)
    changes: dict[str, Any] = {"block": block_numel(method, unit, block), "row": row, "by_row": by_row, "sums": sums}
    if method.statistics and not method.whole:
        changes["statistics"] = statistics or ()
    if method.copies(unit):
        changes |= {"sources": inputs[:1], "base": None, "copied": dtypes[0] == dtype}
    if roles.added is not None:
        index, added = roles.added
        changed = [name for name in (spec.name, *match.tied) if name in added]
        changes |= {"added": (index, changed[0]), "copied": False} if changed else {}
    changes["needs_sums"] = not (changes.get("copied") or by_row) and _needs_sums(method, unit)
    changes = {name: value for name, value in changes.items() if value != getattr(job, name)}
    return replace(job, **changes) if changes else job


def is_averaged(method: Method, kind: Kind, settings: Settings) -> bool:
    """True for statistics that the method would not average with weights of one sign: a variance stays one."""
    if kind != "statistic" or method.name == "passthrough":
        return False
    return method.name != "linear" or any(float(values["weight"]) < 0 for values in settings.inputs)  # type: ignore[arg-type]


def block_numel(method: Method, unit: Unit, block: int = BLOCK) -> int:
    """Elements of a block: `block`, or as many whole rows as it has room for, at least one."""
    row = method.row(unit) or 1
    return max(1, block // row) * row


def _needs_sums(method: Method, unit: Unit) -> bool:
    """True if the solve asks for reductions. Raises the solve's errors about the weights before the first one."""
    try:
        next(method.solve(unit))
    except StopIteration:
        return False
    return True


def _copy(
    refs: tuple[TensorRef, ...],
    sources: Sequence[Checkpoint],
    match: Match,
    settings: Settings,
    block: int,
    layer: Layer | None,
) -> Job:
    """The job of a tensor that the first source has as it is, or that it reads in a wider dtype, to round."""
    i, name = refs[0]
    dtype, stored = sources[i][name].dtype, sources[i].stored_dtype(name)
    spec = TensorSpec(match.spec.name, match.spec.shape, stored)
    if stored == dtype:
        return Job(spec, match, "copy", refs, None, settings, dtype, True, block, False, layer=layer)
    settings = averaging_settings(settings)
    return Job(spec, match, METHODS["linear"].name, refs[:1], None, settings, dtype, False, block, False, layer=layer)


def averaging_settings(settings: Settings) -> Settings:
    """Settings with which `linear` averages tensors: by the inputs' weights, or evenly if one of them is negative."""
    weights = [float(values.get("weight", 1.0)) for values in settings.inputs]  # type: ignore[arg-type]
    even = min(weights) < 0 or not any(weights)
    return Settings({"normalize": True}, tuple({"weight": 1.0 if even else weight} for weight in weights))


def unit_of(jobs: Sequence[Job], seed: int, norms: tuple[float, ...] = ()) -> Unit:
    """The input of a method's solve for jobs that are solved together. norms: of the inputs' statistics."""
    first = jobs[0]
    return Unit(
        name=first.name if len(jobs) == 1 else f"all {len(jobs)} tensors",
        shape=first.shape if len(jobs) == 1 else (),
        numel=sum([job.spec.numel for job in jobs]),
        shared=first.settings.shared,
        inputs=first.settings.inputs,
        keys=tuple(key(seed, first.name, i) for i in range(len(first.sources))) if METHODS[first.method].random else (),
        double=first.compute == "float64",
        norms=norms,
    )
