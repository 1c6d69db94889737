"""From a recipe and the checkpoints' headers to a plan: what is read, computed and written where. Pure data, no torch.

Every input tensor is merged, copied, or listed as dropped; whatever else differs between the checkpoints is reported,
all of it at once, before a byte is written. The plan's digest covers everything that determines the output's bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm import __version__
from mergekit_lfm.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.random import key
from mergekit_lfm.layout import Shard, lay_out, tagalong
from mergekit_lfm.matching import layers_of, match, refuse_quantised, several
from mergekit_lfm.methods import METHODS, Method
from mergekit_lfm.methods.declare import Unit
from mergekit_lfm.recipe import Recipe, Settings
from mergekit_lfm.tensors import FLOATS, ITEMSIZE, TensorSpec

BLOCK = 1 << 18  # elements; every sum runs over blocks of this size, whatever the memory or the number of threads
SEGMENT = 64  # blocks; the unit of digests and of resumption, and of parallel work within a large tensor


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor. sources: (model index, tensor name) of each input; base: likewise, or None.

    compute is the dtype of the arithmetic. copied: the bytes of the first source, which all sources must equal.
    sums_nbytes: what sums by row or column, and the weights from them, take.
    """

    spec: TensorSpec
    method: str
    sources: tuple[tuple[int, str], ...]
    base: tuple[int, str] | None
    settings: Settings
    compute: str
    copied: bool
    block: int
    needs_sums: bool
    sums_nbytes: int = 0

    name = property(lambda self: self.spec.name)
    shape = property(lambda self: self.spec.shape)
    dtype = property(lambda self: self.spec.dtype)
    nbytes = property(lambda self: self.spec.nbytes)

    @property
    def read(self) -> tuple[tuple[int, str], ...]:
        """All that the job reads, the base last."""
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def segment_numel(self) -> int:
        """Elements of a segment; the last may have fewer."""
        return self.block * SEGMENT

    @property
    def segments(self) -> int:
        """How many segments the tensor has; an empty tensor has one."""
        return max(1, -(-self.spec.numel // self.segment_numel))

    def segment_nbytes(self, segment: int) -> int:
        """Bytes of one segment in the output."""
        first = segment * self.segment_numel
        return (min(self.spec.numel, first + self.segment_numel) - first) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Plan:
    """Everything about a merge that is decided before it starts.

    groups: the jobs that are solved together, as indices into `tensors`. dropped: (model, tensor, reason).
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    template: int
    tensors: tuple[Job, ...]
    groups: tuple[tuple[int, ...], ...]
    shards: tuple[Shard, ...]
    dropped: tuple[tuple[str, str, str], ...]
    files: tuple[Path, ...] = field(default=())

    @property
    def bytes_written(self) -> int:
        return sum(job.nbytes for job in self.tensors)

    @property
    def bytes_read(self) -> int:
        return sum(self.models[m][name].nbytes for job in self.tensors for m, name in job.read)

    @property
    def held(self) -> tuple[Path, ...]:
        """The input files that torch maps, or holds beside the budget, as their tensors are no byte ranges."""
        return tuple(file.path for model in self.models for file in model.files if file.fallback)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that determines the output's bytes: not of threads, memory, NaN policy or device."""
        facts = {
            "versions": [__version__, version("torch")],
            "method": [self.recipe.merge_method, METHODS[self.recipe.merge_method].version],
            "recipe": self.recipe.normalised(),
            "inputs": [model.identity for model in self.models],
            "files": [xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in self.files],
            "shards": [[shard.name, shard.congruent, *map(str, shard.tensors)] for shard in self.shards],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())

    def unit(self, jobs: Sequence[Job]) -> Unit:
        """What the method's solve is told of jobs that are solved together."""
        return _unit(jobs, self.recipe.seed)

    def scratch(self, job: Job) -> int:
        """Bytes that one worker holds to process the job block by block."""
        numel = min(job.block, job.spec.numel)
        if job.copied:
            return numel * ITEMSIZE[job.dtype]
        return numel * len(job.read) * (ITEMSIZE[job.compute] * 8 + 8) + job.sums_nbytes

    def most_threads(self, memory: int) -> int:
        """The number of threads, at least one, for which a budget of `memory` bytes suffices."""
        return max(1, memory // max([1, *(self.scratch(job) for job in self.tensors)]))

    def resident(self, group: Sequence[int]) -> int:
        """Bytes that one worker holds to read a group once: inputs, scratch, and what order statistics may collect."""
        jobs = [self.tensors[i] for i in group]
        inputs = sum(self.models[m][name].nbytes for job in jobs for m, name in job.read)
        return inputs * 5 // 4 + max(self.scratch(job) for job in jobs)

    def peak_memory(self, memory: int, threads: int) -> int:
        """An upper bound of the bytes that the engine will hold, at most `memory`. PlanError if that is too little."""
        share = memory // max(1, threads)
        if not self.tensors:
            return 0
        largest = max(self.tensors, key=self.scratch)
        if self.scratch(largest) > share:
            raise PlanError(
                f"{largest.name} needs {self.scratch(largest) / 1e6:,.0f} MB for one worker, a budget of "
                f"{memory / 1e6:,.0f} MB gives each of {threads} {share / 1e6:,.0f} MB: raise --memory, lower --threads"
            )
        kept = [self.resident(g) for g in self.groups if self.tensors[g[0]].needs_sums and self.resident(g) <= share]
        return min(memory, threads * max([self.scratch(largest), *kept]))

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` prints, as plain data."""
        return {
            "method": self.recipe.merge_method,
            "models": [
                {"model": label, "tensors": len(model), "bytes": model.nbytes}
                for label, model in zip(self.labels, self.models, strict=True)
            ],
            "template": self.labels[self.template],
            "tensors": len(self.tensors),
            "methods": dict(Counter(job.method for job in self.tensors)),
            "dtypes": dict(Counter(job.dtype for job in self.tensors)),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "shards": [
                {"file": shard.name, "tensors": len(shard.tensors), "bytes": shard.nbytes} for shard in self.shards
            ],
            "files": [path.name for path in self.files],
            "held": [str(file) for file in self.held],
            "dropped": [{"model": m, "tensor": t, "reason": why} for m, t, why in self.dropped],
            "digest": self.digest,
        }


def make_plan(recipe: Recipe, *, max_shard_size: int | None = None) -> Plan:
    """The plan of a recipe. Raises PlanError with all that does not fit, FormatError where a checkpoint is damaged."""
    models = tuple(open_checkpoint(model.path) for model in recipe.all_models)
    labels = tuple(model.label for model in recipe.all_models)
    for model in models:
        _ = model.config  # a config that cannot be read shows here
    index = {model: i for i, model in enumerate(recipe.all_models)}
    inputs = tuple(index[model] for model in recipe.inputs)
    base = None if recipe.base is None or recipe.method.base in ("member", "first") else index[recipe.base]
    template = index[recipe.base] if recipe.base else inputs[0]
    refuse_quantised(recipe, models, labels)
    names, dropped = match(models, labels, template)
    layers = layers_of(models[template])
    jobs, problems = [], []
    for name in names:
        try:
            jobs.append(
                _job(recipe, models, labels, names[name], inputs, base, models[template][name], layers.get(name))
            )
        except PlanError as error:
            problems.append(str(error))
    groups = () if problems else _groups(recipe, jobs)
    if problems:
        raise PlanError(several("the checkpoints do not fit together", problems))
    shards = lay_out(models[template], [job.spec for job in jobs], max_shard_size)
    return Plan(recipe, models, labels, template, tuple(jobs), groups, shards, dropped, tagalong(models[template].path))


def _job(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    names: Mapping[int, str],
    inputs: Sequence[int],
    base: int | None,
    spec: TensorSpec,
    layer: tuple[int, int] | None,
) -> Job:
    """The job of one output tensor: merged if all its sources are floating, else copied."""
    method = recipe.method
    sources = tuple((i, names[i]) for i in inputs if i in names)
    base_source = (base, names[base]) if base is not None and base in names else None
    read = sources if base_source is None else (*sources, base_source)
    dtypes = [models[i][name].dtype for i, name in read]
    settings = recipe.settings(spec.name, layer)
    lone = len(names) == 1 < len(models)  # a buffer of which the template's is kept
    if lone:
        read, dtypes = tuple(names.items()), [spec.dtype]
    if lone or not all(dtype in FLOATS for dtype in dtypes):
        if len(set(dtypes)) > 1:
            found = ", ".join(f"{dtype} in {labels[i]}" for dtype, (i, _) in zip(dtypes, read, strict=True))
            raise PlanError(
                f"{spec.name} is {found}: only floating tensors of different types can be merged; convert them"
            )
        if dtypes[0].startswith("float8") and settings.inputs[0].get("scale") is not None:
            raise PlanError(f"{spec.name} is quantised ({dtypes[0]}) and cannot be scaled; leave it out of `scale`")
        kept = TensorSpec(spec.name, spec.shape, dtypes[0])
        return Job(kept, "copy", read, None, settings, dtypes[0], copied=True, block=BLOCK, needs_sums=False)
    dtype = recipe.out_dtype or recipe.dtype or _promoted(dtypes)
    compute = "float64" if "float64" in (*dtypes, recipe.dtype) else "float32"
    out = TensorSpec(spec.name, spec.shape, dtype)
    job = Job(out, method.name, sources, base_source, settings, compute, copied=False, block=BLOCK, needs_sums=False)
    unit = _unit([job], recipe.seed)
    if method.copies(unit):
        job = replace(job, sources=sources[:1], base=None, copied=dtypes[0] == dtype)
    needs_sums = not job.copied and _needs_sums(method, unit)
    groups = max(row, unit.numel // row) if (row := method.row(unit)) else 0
    gram = groups * len(sources) ** 2 * 8  # float64; held twice while it is gathered, and once more as weights
    return replace(job, block=block_numel(method, unit), needs_sums=needs_sums, sums_nbytes=3 * gram)


def block_numel(method: Method, unit: Unit) -> int:
    """Elements of a block: BLOCK, or as many whole rows as it has room for, at least one."""
    row = method.row(unit) or 1
    return max(1, BLOCK // row) * row


def _needs_sums(method: Method, unit: Unit) -> bool:
    """Whether the solve asks for reductions. What it finds wrong with the weights before it does is raised here."""
    try:
        next(method.solve(unit))
    except StopIteration:
        return False
    return True


def _promoted(dtypes: Sequence[str]) -> str:
    widest = max(dtypes, key=lambda dtype: ITEMSIZE[dtype])
    return "float32" if {"float16", "bfloat16"} <= set(dtypes) and ITEMSIZE[widest] == 2 else widest


def _unit(jobs: Sequence[Job], seed: int) -> Unit:
    first = jobs[0]
    return Unit(
        name=first.name if len(jobs) == 1 else f"all {len(jobs)} tensors",
        shape=first.shape if len(jobs) == 1 else (),
        numel=sum(job.spec.numel for job in jobs),
        shared=first.settings.shared,
        inputs=first.settings.inputs,
        keys=tuple(key(seed, first.name, position) for position in range(len(first.sources))),
        double=first.compute == "float64",
    )


def _groups(recipe: Recipe, jobs: Sequence[Job]) -> tuple[tuple[int, ...], ...]:
    """The jobs that are solved together: each alone, or all that are merged."""
    together = [
        i for i, job in enumerate(jobs) if not job.copied and recipe.method.scope(job.settings.shared) == "model"
    ]
    alone = [(i,) for i in range(len(jobs)) if i not in set(together)]
    if not together:
        return tuple(alone)
    first = jobs[together[0]]
    for i in together:
        if jobs[i].settings != first.settings:
            raise PlanError(
                f"{jobs[i].name} and {first.name} have different parameters, but one solve runs over the whole model: "
                "give every parameter one value, without filters or gradients, or merge with `scope: tensor`"
            )
        if jobs[i].compute != first.compute:
            raise PlanError(
                f"{jobs[i].name} is {jobs[i].compute}, {first.name} {first.compute}: one solve needs one dtype"
            )
    return (*alone, tuple(together))
