"""From a recipe and the checkpoints' headers to a plan: all reads, arithmetic and writes. Pure data, no torch.

Every input tensor is merged, copied, or listed as dropped; whatever else differs between the checkpoints is reported,
all of it at once, before a byte is written. The plan's digest covers everything that determines the output's bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.methods import METHODS
from mergekit_lfm.methods.method import Unit
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.layout import Shard, lay_out
from mergekit_lfm.plan.job import Job, make_job, unit_of
from mergekit_lfm.plan.match import layers_of, match_tensors
from mergekit_lfm.plan.sources import (
    ADDED,
    ModelRoles,
    assign_roles,
    identity_of,
    open_all,
    open_changes,
    open_models,
    refuse_resized,
)
from mergekit_lfm.plan.statistics import LinearGroup, find_statistics, group_linears
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.roles import Edit, Input
from mergekit_lfm.recipe.values import NamedFile
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.version import __version__
from mergekit_lfm.views.pending import Pending


@dataclass(frozen=True)
class Plan:
    """Everything about a merge that is decided before it starts.

    groups: the jobs that are solved together, as indices into `tensors`; linears: those that are linear layers, which
    the method sees as matrices. Each job is in one of them. dropped: (model, tensor, reason). licenses: what the card
    of each model states. edited_on: the kind of device on which edits of the result are solved, "" for the processor.
    """

    roles: ModelRoles
    tensors: tuple[Job, ...]
    groups: tuple[tuple[int, ...], ...]
    linears: tuple[LinearGroup, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[tuple[str, str, str], ...]
    files: tuple[Path, ...] = field(default=())
    licenses: tuple[dict[str, str], ...] = field(default=())
    edited_on: str = ""

    @property
    def recipe(self) -> Recipe:
        return self.roles.recipe

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        return self.roles.models

    @property
    def labels(self) -> tuple[str, ...]:
        return self.roles.labels

    @property
    def template(self) -> int:
        return self.roles.template

    @property
    def statistics(self) -> tuple[Statistics, ...]:
        """Those of the inputs; () where the method takes none."""
        return self.roles.statistics

    @cached_property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The models, beyond them the statistics files, and what edits add: what a job's sources point into."""
        added = () if self.roles.added is None else (self.roles.added,)
        return (*self.roles.models, *(given.tensors for given in self.roles.statistics), *added)

    @cached_property
    def source_labels(self) -> tuple[str, ...]:
        """The name of each of `sources` in the recipe."""
        added = () if self.roles.added is None else (ADDED,)
        return (*self.roles.labels, *(given.ref for given in self.roles.recipe.statistics), *added)

    @property
    def pending(self) -> tuple[Input, ...]:
        """The models whose alignment is still to be found, or that are still to be edited."""
        models = zip(self.recipe.all_models, self.models, strict=True)
        return tuple(model for model, checkpoint in models if isinstance(checkpoint, Pending))

    @property
    def absent(self) -> int:
        """Bytes of the models that are still on the Hub."""
        files = {(str(model.snapshot), file): nbytes for model in self.models for file, nbytes in model.absent.items()}
        return sum(files.values())

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The models on the Hub whose files are only known as far as they are in the cache, offline."""
        held = zip(self.labels, self.models, strict=True)
        return tuple(label for label, m in held if m.snapshot is not None and not m.snapshot.listed)

    def fetch(self, notice: Callable[[str], None]) -> None:
        """Download the weights that are still on the Hub. notice is called with a line for each model."""
        snapshot = next((model.snapshot for model in self.models if model.absent), None)
        if snapshot is not None:
            from mergekit_lfm.store.hub.snapshots import check_room

            check_room(snapshot, self.absent)
        for label, model in zip(self.labels, self.models, strict=True):
            if absent := model.absent:
                files = f"{len(absent)} files" if len(absent) > 1 else next(iter(absent))
                notice(f"downloading {files} of {label}, {format_size(sum(absent.values()))}")
                model.fetch()

    @property
    def unedited(self) -> bool:
        """Whether edits are still to be made, of a model or of the result, which needs a model that runs."""
        models = any(model.edits for model in self.pending)
        return models or (bool(self.recipe.result_edits) and self.roles.added is None)

    @property
    def bytes_written(self) -> int:
        return sum(job.nbytes for job in self.tensors)

    @property
    def bytes_read(self) -> int:
        read = [source for job in self.tensors for source in job.read_at_all]
        read += [gram for group in self.linears for gram in group.grams]
        return sum(self.sources[i][name].nbytes for i, name in read)

    @property
    def averaged(self) -> tuple[Job, ...]:
        """The jobs that are averaged because the method needs statistics and their tensors have none."""
        other = self.recipe.merge_method
        wants = self.recipe.method.statistics is not None
        return tuple(job for job in self.tensors if wants and not job.copied and job.method != other)

    @property
    def held(self) -> tuple[Path, ...]:
        """Inputs that torch must map or load, outside --memory: their tensors are not contiguous."""
        return tuple(file.path for model in self.models for file in model.files if file.fallback)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that determines the output's bytes: not of threads, memory, NaN policy or device."""
        facts = {
            "versions": [__version__, version("torch")],
            "methods": {job.method: METHODS[job.method].version for job in self.tensors if job.method in METHODS},
            "recipe": self.recipe.normalised(),
            "inputs": [source.identity for source in (*self.models, *(held.tensors for held in self.statistics))],
            "edits": [identity_of(edit) for edit in self.recipe.result_edits],
            **({"edited_on": self.edited_on} if self.edited_on else {}),
            "files": [xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in self.files],
            "licenses": self.licenses,
            "shards": [[shard.name, shard.congruent, *map(str, shard.tensors)] for shard in self.shards],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())

    def unit(self, jobs: Sequence[Job]) -> Unit:
        """The input of the method's solve for jobs that are solved together."""
        return unit_of(jobs, self.recipe.seed, self.roles.norms)

    def summary(self) -> dict[str, Any]:
        """The plan as plain data, which `--dry-run` prints."""
        return {
            "method": self.recipe.merge_method,
            "models": [
                {"model": label, "tensors": len(model), "bytes": model.nbytes, **_on_the_hub(model)}
                for label, model in zip(self.labels, self.models, strict=True)
            ],
            "statistics": [
                {"statistics": given.ref, "kind": held.info.kind, "bytes": held.tensors.nbytes}
                for given, held in zip(self.recipe.statistics, self.statistics, strict=True)
            ],
            "averaged": {"tensors": len(self.averaged), "numbers": sum(job.spec.numel for job in self.averaged)},
            "aligned": {
                model.label: model.align.ref if isinstance(model.align, NamedFile) else model.align.as_data()
                for model in self.recipe.all_models
                if model.align is not None
            },
            "edited": {
                **{model.label: _shown(model.edits) for model in self.recipe.all_models if model.edits},
                **({"the result": _shown(self.recipe.result_edits)} if self.recipe.result_edits else {}),
            },
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


def _on_the_hub(model: Checkpoint) -> dict[str, Any]:
    """Where a model of the Hub is, and what is still to be downloaded, in bytes."""
    if model.snapshot is None:
        return {}
    return {"repo": model.snapshot.repo, "commit": model.snapshot.commit, "download": sum(model.absent.values())}


def _shown(edits: Sequence[Edit]) -> list[str | dict[str, Any]]:
    return [edit.ref if isinstance(edit, NamedFile) else edit.as_data() for edit in edits]


def make_plan(
    recipe: Recipe,
    *,
    max_shard_size: int | None = None,
    views: tuple[Checkpoint, ...] | None = None,
    edits: Sequence[Patch] | None = None,
    block: int = BLOCK,
) -> Plan:
    """The plan of a recipe. Raises PlanError with all that does not fit, FormatError if a checkpoint is damaged.

    views: the recipe's `all_models`, open, in place of the alignments and edits that it names. edits: patches in place
    of the result's edits, such as those made from its facts. block: elements to merge at a time; sums depend on it by
    their order, so it differs from BLOCK only in tests.
    """
    models = open_models(recipe) if views is None else views
    for model in models:
        _ = model.config  # a config that cannot be read shows here
    labels = tuple(model.label for model in recipe.all_models)
    roles = assign_roles(recipe, models, open_all(recipe, dict(zip(labels, models, strict=True))))
    template = models[roles.template]
    roles = replace(roles, added=open_changes(recipe, template, edits))
    refuse_resized(recipe.all_models[roles.template], template)
    names, dropped = match_tensors(models, labels, roles.template)
    statistics = find_statistics(roles, names)
    layers = layers_of(template)
    jobs, problems = [], []
    for name in names:
        try:
            jobs.append(make_job(roles, names[name], template[name], layers.get(name), statistics.get(name), block))
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("the checkpoints do not fit together", problems))
    linears = group_linears(roles, names, jobs, statistics)
    for i in (i for group in linears for i in group.jobs):
        jobs[i] = replace(jobs[i], method=recipe.merge_method)  # a bias, too, which has no statistics of its own
    return Plan(
        roles=roles,
        tensors=tuple(jobs),
        groups=_groups(recipe, jobs, {i for group in linears for i in group.jobs}),
        linears=linears,
        shards=lay_out(template, [job.spec for job in jobs], max_shard_size),
        dropped=dropped,
        files=sidecars_of(template),
        licenses=tuple(read_license(model.path) for model in models),
    )


def _groups(recipe: Recipe, jobs: Sequence[Job], linears: set[int]) -> tuple[tuple[int, ...], ...]:
    """The jobs that are solved together, less those of linear layers: each alone, or all that are merged."""
    together = [
        i for i, job in enumerate(jobs) if not job.copied and recipe.method.scope(job.settings.shared) == "model"
    ]
    alone = [(i,) for i in range(len(jobs)) if i not in {*together, *linears}]
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
