"""The unit of a plan: one output tensor, with its sources, method and dtype. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import BLOCK, SEGMENT
from mergekit_lfm.kernels.random import key
from mergekit_lfm.methods.method import Method, Unit
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.sources import ModelRoles, TensorRef
from mergekit_lfm.recipe.recipe import Settings
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE, TensorSpec


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor. sources: one per input; base: the base's, or None.

    compute: the dtype of the arithmetic. copied: True to take the bytes of the first source, which all sources must
    equal. sums_nbytes: memory for sums by row or column and the weights from them. statistics: one per input, if the
    method takes them elementwise. added: the change added to the result before it is rounded, or None.
    """

    spec: TensorSpec
    method: str
    sources: tuple[TensorRef, ...]
    base: TensorRef | None
    settings: Settings
    compute: str
    copied: bool
    block: int
    needs_sums: bool
    sums_nbytes: int = 0
    statistics: tuple[TensorRef, ...] = ()
    added: TensorRef | None = None

    name = property(lambda self: self.spec.name)
    shape = property(lambda self: self.spec.shape)
    dtype = property(lambda self: self.spec.dtype)
    nbytes = property(lambda self: self.spec.nbytes)

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
        first = segment * self.segment_numel
        return (min(self.spec.numel, first + self.segment_numel) - first) * ITEMSIZE[self.dtype]


def make_job(
    roles: ModelRoles,
    names: Mapping[int, str],
    spec: TensorSpec,
    layer: tuple[int, int] | None,
    statistics: tuple[TensorRef, ...] | None = None,
    block: int = BLOCK,
) -> Job:
    """The job of one output tensor: merged if all its sources are floating, else copied.

    names: its source in each model. statistics: the inputs', or None without any: methods that need them then leave the
    tensor to `linear`.
    """
    recipe, models, labels, base = roles.recipe, roles.models, roles.labels, roles.base
    method = recipe.method
    sources = tuple((i, names[i]) for i in roles.inputs if i in names)
    base_source = (base, names[base]) if base is not None and base in names else None
    refs = sources if base_source is None else (*sources, base_source)
    dtypes = [models[i][name].dtype for i, name in refs]
    settings = recipe.settings(spec.name, layer)
    lone = len(names) == 1 < len(models)  # a buffer that only the template keeps
    if lone:
        refs, dtypes = tuple(names.items()), [spec.dtype]
    if lone or not all(dtype in FLOATS for dtype in dtypes):
        if len(set(dtypes)) > 1:
            types = ", ".join(f"{dtype} in {labels[i]}" for dtype, (i, _) in zip(dtypes, refs, strict=True))
            raise PlanError(
                "{place} is {found}: {expected} can be merged; {cure}",
                place=spec.name,
                found=types,
                expected="only floating-point tensors of different types",
                cure="convert them",
            )
        if dtypes[0].startswith("float8") and settings.inputs[0].get("scale") is not None:
            raise PlanError(f"{spec.name} is quantised ({dtypes[0]}) and cannot be scaled; leave it out of `scale`")
        kept = TensorSpec(spec.name, spec.shape, dtypes[0])
        return Job(kept, "copy", refs, None, settings, dtypes[0], copied=True, block=block, needs_sums=False)
    dtype = recipe.out_dtype or recipe.dtype or _promote(dtypes)
    compute = "float64" if "float64" in (*dtypes, recipe.dtype) else "float32"
    out = TensorSpec(spec.name, spec.shape, dtype)
    if method.statistics and statistics is None:
        method, settings = METHODS["linear"], averaging_settings(settings)
    job = Job(out, method.name, sources, base_source, settings, compute, copied=False, block=block, needs_sums=False)
    if method.statistics and not method.whole:
        job = replace(job, statistics=statistics or ())
    unit = unit_of([job], recipe.seed, roles.norms)
    if method.copies(unit):
        job = replace(job, sources=sources[:1], base=None, copied=dtypes[0] == dtype)
    if roles.added is not None and spec.name in roles.added:
        index = len(roles.models) + len(roles.statistics)
        job = replace(job, added=(index, spec.name), copied=False)
    needs_sums = not job.copied and _needs_sums(method, unit)
    groups = max(row, unit.numel // row) if (row := method.row(unit)) else 0
    gram = groups * len(sources) ** 2 * 8  # float64; held twice while it is gathered, and once more as weights
    return replace(job, block=block_numel(method, unit, block), needs_sums=needs_sums, sums_nbytes=3 * gram)


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


def _promote(dtypes: Sequence[str]) -> str:
    widest = max(dtypes, key=lambda dtype: ITEMSIZE[dtype])
    return "float32" if {"float16", "bfloat16"} <= set(dtypes) and ITEMSIZE[widest] == 2 else widest


def averaging_settings(settings: Settings) -> Settings:
    """Settings with which `linear` averages tensors without statistics."""
    return Settings({"normalize": True}, tuple({"weight": values["weight"]} for values in settings.inputs))


def unit_of(jobs: Sequence[Job], seed: int, norms: tuple[float, ...] = ()) -> Unit:
    """The input of a method's solve for jobs that are solved together. norms: of the inputs' statistics."""
    first = jobs[0]
    return Unit(
        name=first.name if len(jobs) == 1 else f"all {len(jobs)} tensors",
        shape=first.shape if len(jobs) == 1 else (),
        numel=sum(job.spec.numel for job in jobs),
        shared=first.settings.shared,
        inputs=first.settings.inputs,
        keys=tuple(key(seed, first.name, position) for position in range(len(first.sources))),
        double=first.compute == "float64",
        norms=norms,
    )
