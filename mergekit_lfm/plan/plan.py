"""From a recipe and the checkpoints' headers to a plan: all reads, arithmetic and writes. Pure data, no torch.

Every input tensor is merged, copied, or listed as dropped; whatever else differs between the checkpoints is reported,
all of it at once, before a byte is written. The plan's digest covers everything that determines the output's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import xxhash

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.errors import PlanError, several_errors
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.methods.method import Unit
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.layout import Shard, lay_out
from mergekit_lfm.plan.agreement import refuse_disagreements
from mergekit_lfm.plan.beside import gather_files
from mergekit_lfm.plan.job import Job, make_job, unit_of
from mergekit_lfm.plan.layers import find_layers
from mergekit_lfm.plan.match import match_tensors
from mergekit_lfm.plan.matrices import MatrixGroup, group_matrices
from mergekit_lfm.plan.rows import fit_rows
from mergekit_lfm.plan.sources import (
    ADDED,
    ModelRoles,
    TensorRef,
    assign_roles,
    identity_of,
    named_files,
    open_all,
    open_changes,
    open_models,
    refuse_resized,
)
from mergekit_lfm.plan.statistics import find_statistics
from mergekit_lfm.plan.whole import refuse_parts
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.recipe.roles import Input
from mergekit_lfm.recipe.settings import SettingsTable
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes
from mergekit_lfm.store.state import FileState, state_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.version import __version__
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.renamed import found_rules


@dataclass(frozen=True)
class Plan:
    """Everything about a merge that is decided before it starts.

    groups: the jobs that are solved together, as indices into `tensors`; matrices: those that the method merges as
    whole matrices. Each job is in one of them. dropped: (model, tensor, reason). files, left_behind, lent: of `Beside`,
    the files that go beside the weights, those that do not, and those that another model than the template has.
    licenses: what the card of each model states. edited_on: the kind of device on which edits of the result are solved,
    "" for the processor. named_files: the states of the recipe's files other than models, before they were read.
    allowed: the differences of the models that the recipe allows. vocabulary: the number of the output's tokens, if
    that is not the template's.
    """

    roles: ModelRoles
    tensors: tuple[Job, ...]
    groups: tuple[tuple[int, ...], ...]
    matrices: tuple[MatrixGroup, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[tuple[str, str, str], ...]
    files: tuple[tuple[str, Path], ...] = field(default=())
    left_behind: tuple[tuple[str, str, str], ...] = field(default=())
    lent: tuple[tuple[str, str], ...] = field(default=())
    licenses: tuple[dict[str, str], ...] = field(default=())
    edited_on: str = ""
    named_files: tuple[FileState, ...] = field(default=())
    allowed: tuple[str, ...] = ()
    vocabulary: int | None = None

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
        return (*self.roles.models, *(statistics.tensors for statistics in self.roles.statistics), *added)

    @cached_property
    def source_labels(self) -> tuple[str, ...]:
        """The name of each of `sources` in the recipe."""
        added = () if self.roles.added is None else (ADDED,)
        return (*self.roles.labels, *(file.ref for file in self.roles.recipe.statistics), *added)

    @cached_property
    def renamed(self) -> dict[str, tuple[RenameRule, ...]]:
        """The rules that were found for the names of a model, by its label; those of the recipe are not among them."""
        inputs = zip(self.recipe.all_models, self.models, strict=True)
        found = {model.label: found_rules(checkpoint) for model, checkpoint in inputs if not model.rename}
        return {label: rules for label, rules in found.items() if rules}

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
        models = zip(self.labels, self.models, strict=True)
        return tuple(label for label, m in models if m.snapshot is not None and not m.snapshot.listed)

    @property
    def unedited(self) -> bool:
        """Whether edits are still to be made, of a model or of the result, which needs a model that runs."""
        models = any(model.edits for model in self.pending)
        return models or (bool(self.recipe.result_edits) and self.roles.added is None)

    @cached_property
    def bytes_written(self) -> int:
        return sum(job.nbytes * len(job.names) for job in self.tensors)

    @property
    def bytes_read(self) -> int:
        refs = [ref for job in self.tensors for ref in job.all_inputs]
        refs += [gram for group in self.matrices for gram in group.grams]
        return sum(self.sources[i][name].nbytes for i, name in refs)

    @cached_property
    def grams(self) -> dict[str, tuple[TensorRef, ...]]:
        """The Gram matrices with which weights are merged, by the weight's name."""
        matrices = [matrix for group in self.matrices for matrix in group.matrices]
        return {self.tensors[matrix.weight].name: matrix.grams for matrix in matrices}

    @property
    def averaged(self) -> tuple[Job, ...]:
        """The jobs that are averaged because the method needs statistics and their tensors have none."""
        other = self.recipe.merge_method
        wants = self.recipe.method.statistics is not None
        return tuple(job for job in self.tensors if wants and not job.copied and job.method != other)

    @property
    def left_groups(self) -> dict[tuple[str, str], list[str]]:
        """The files left behind, by model and reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for label, name, why in self.left_behind:
            groups.setdefault((label, why), []).append(name)
        return groups

    @property
    def inputs(self) -> tuple[FileState, ...]:
        """The states, when first seen, of all files that the output is made from; none of those still on the Hub."""
        files = [file.state for source in self.sources for file in source.files]
        return tuple(dict.fromkeys(state for state in (*files, *self.named_files) if state is not None))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folders and files that are read: those of the sources, and the recipe's other files."""
        return (*(source.path for source in self.sources), *(state.path for state in self.named_files))

    @property
    def mapped_files(self) -> tuple[Path, ...]:
        """Inputs that torch must map or load, outside --memory: their tensors are not contiguous."""
        return tuple(file.path for model in self.models for file in model.files if file.fallback)

    @cached_property
    def contents(self) -> dict[str, bytes]:
        """The bytes of `files`, read once: the digest covers them, and the output's are made of them."""
        return {name: read_bytes(path) for name, path in self.files}

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that determines the output's bytes: not of threads, memory, NaN policy or device."""
        facts = {
            "versions": [__version__, version("torch")],
            "methods": {job.method: METHODS[job.method].version for job in self.tensors if job.method in METHODS},
            "recipe": self.recipe.normalised(),
            "inputs": [
                source.identity for source in (*self.models, *(statistics.tensors for statistics in self.statistics))
            ],
            "statistics": [statistics.info.metadata() for statistics in self.statistics],
            "edits": [identity_of(edit) for edit in self.recipe.result_edits],
            **({"edited_on": self.edited_on} if self.edited_on else {}),
            "files": [[name, xxhash.xxh3_128_hexdigest(data)] for name, data in self.contents.items()],
            "licenses": self.licenses,
            "shards": [[shard.name, shard.congruent, *map(str, shard.tensors)] for shard in self.shards],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())

    def unit(self, jobs: Sequence[Job]) -> Unit:
        """The input of the method's solve for jobs that are solved together."""
        return unit_of(jobs, self.recipe.seed, self.roles.norms)


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
    named = tuple(state_of(path) for path in named_files(recipe))
    models = open_models(recipe) if views is None else views
    for model in models:
        _ = model.config  # a config that cannot be read shows here
    labels = tuple(model.label for model in recipe.all_models)
    roles = assign_roles(recipe, models, open_all(recipe, dict(zip(labels, models, strict=True))))
    template = models[roles.template]
    roles = replace(roles, added=open_changes(recipe, template, edits))
    refuse_resized(recipe.all_models[roles.template], template)
    allowed = refuse_disagreements(recipe, models, labels, roles.template)
    rows = fit_rows(recipe, models, roles.template)
    roles = replace(roles, models=rows.models)
    template = rows.models[roles.template]
    matches, dropped = match_tensors(recipe, rows, labels, roles.template)
    statistics = find_statistics(roles, matches)
    layers, table = find_layers(template), SettingsTable(recipe)
    refuse_parts(recipe, rows.models, labels, layers)
    beside = gather_files(rows.models, labels, roles.template)
    jobs, problems = [], []
    for name, match in matches.items():
        try:
            layer = layers.get(name)
            jobs.append(make_job(roles, match, table.of(name, layer), layer, statistics.get(name), block))
        except PlanError as error:
            problems.append(error)
    if problems:
        raise several_errors("the checkpoints do not fit together", problems)
    matrices = group_matrices(roles, matches, jobs, statistics)
    whole = {i for group in matrices for i in group.jobs}
    for i in whole:
        jobs[i] = replace(jobs[i], method=recipe.merge_method)  # a bias, too, which has no statistics of its own
    return Plan(
        roles=roles,
        tensors=tuple(jobs),
        groups=_groups(recipe, jobs, whole),
        matrices=matrices,
        shards=lay_out(template, _outputs(template, jobs), max_shard_size),
        dropped=dropped,
        files=beside.files,
        left_behind=beside.left,
        lent=beside.lent,
        licenses=tuple(read_license(model.path) for model in models),
        named_files=named,
        allowed=allowed,
        vocabulary=rows.length,
    )


def _outputs(template: Checkpoint, jobs: Sequence[Job]) -> list[TensorSpec]:
    """The tensors of the output, those of the template in its order, the others behind them."""
    specs = {job.name: job.spec for job in jobs}
    specs |= {name: TensorSpec(name, job.shape, job.dtype) for job in jobs for name in job.match.tied}
    order = dict.fromkeys([*(name for name in template if name in specs), *specs])
    return [specs[name] for name in order]


def _groups(recipe: Recipe, jobs: Sequence[Job], whole: set[int]) -> tuple[tuple[int, ...], ...]:
    """The jobs that are solved together, less those merged as matrices: each alone, or all that are merged."""
    together = [
        i
        for i, job in enumerate(jobs)
        if job.method == recipe.merge_method and recipe.method.scope(job.settings.shared) == "model"
    ]
    others = {*together, *whole}
    alone = [(i,) for i in range(len(jobs)) if i not in others]
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
