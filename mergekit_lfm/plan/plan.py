"""From a recipe and the checkpoints' headers to a plan: all reads, arithmetic and writes. Pure data, no torch.

Every input tensor is merged, copied, or listed as dropped; whatever else differs between the checkpoints is reported,
all of it at once, before a byte is written. The plan's digest covers everything that determines the output's bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import xxhash

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.errors import PlanError, several, several_errors
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.methods.method import Method, Unit
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.layout import Shard, lay_out
from mergekit_lfm.plan.agreement import refuse_disagreements
from mergekit_lfm.plan.beside import gather_files
from mergekit_lfm.plan.job import Job, make_job, unit_of
from mergekit_lfm.plan.match import match_tensors, refuse_unmatched
from mergekit_lfm.plan.matrices import MatrixGroup, group_matrices
from mergekit_lfm.plan.pieces import Piece, Pieces, cut_pieces, unused_names
from mergekit_lfm.plan.rows import Rows, fit_rows
from mergekit_lfm.plan.sources import (
    ADDED,
    PartRoles,
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
from mergekit_lfm.plan.whole import refuse_other_tokenizers
from mergekit_lfm.recipe.parts import Input
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.recipe.settings import SettingsTable
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes
from mergekit_lfm.store.state import FileState, state_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.version import __version__
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.renamed import found_rules
from mergekit_lfm.views.selected import Selected


@dataclass(frozen=True)
class Plan:
    """Everything about a merge that is decided before it starts.

    models: the recipe's `all_models`, whose `template` is the index of the one whose form the output has. statistics:
    the inputs', part by part. added: the edits' changes to the result, float64 by tensor; None without edits, or if
    they are still to be made. norms: of the statistics of each part. part_of: by tensor the index of its part, where
    that is not the first.
    groups: the jobs that are solved together, as indices into `tensors`; matrices: those that the method merges as
    whole matrices. Each job is in one of them. dropped: (model, tensor, reason). files, left_behind, lent: of `Beside`,
    the files that go beside the weights, those that do not, and those that another model than the template has.
    licenses: what the card of each model states. edited_on: the kind of device on which edits of the result are solved,
    "" for the processor. named_files: the states of the recipe's files other than models, before they were read.
    allowed: the differences of the models that the recipe allows. vocabulary: the number of the output's tokens, if
    that is not the template's. notices: what to know about the plan beside those of the recipe. layers: for a stack,
    model and layer of each of the output's layers.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    tensors: tuple[Job, ...]
    groups: tuple[tuple[int, ...], ...]
    matrices: tuple[MatrixGroup, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[tuple[str, str, str], ...]
    template: int = 0
    statistics: tuple[Statistics, ...] = ()
    added: Checkpoint | None = None
    norms: tuple[tuple[float, ...], ...] = ()
    part_of: Mapping[str, int] = field(default_factory=dict)
    files: tuple[tuple[str, Path], ...] = field(default=())
    left_behind: tuple[tuple[str, str, str], ...] = field(default=())
    lent: tuple[tuple[str, str], ...] = field(default=())
    licenses: tuple[dict[str, str], ...] = field(default=())
    edited_on: str = ""
    named_files: tuple[FileState, ...] = field(default=())
    allowed: tuple[str, ...] = ()
    vocabulary: int | None = None
    notices: tuple[str, ...] = ()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(model.label for model in self.recipe.all_models)

    @cached_property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The models, beyond them the statistics files, and what edits add: what a job's sources point into."""
        added = () if self.added is None else (self.added,)
        return (*self.models, *(statistics.tensors for statistics in self.statistics), *added)

    @cached_property
    def source_labels(self) -> tuple[str, ...]:
        """The name of each of `sources` in the recipe."""
        added = () if self.added is None else (ADDED,)
        return (*self.labels, *(file.ref for file in self.recipe.statistics), *added)

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
        return models or (bool(self.recipe.result_edits) and self.added is None)

    @property
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
        wanting = {i: part.method for i, part in enumerate(self.recipe.parts) if part.method.statistics is not None}
        return tuple(
            job
            for job in (self.tensors if wanting else ())
            if (method := wanting.get(self.part_of.get(job.name, 0))) and not job.copied and job.method != method.name
        )

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
        norms = self.norms[self.part_of.get(jobs[0].name, 0)] if self.norms else ()
        return unit_of(jobs, self.recipe.seed, norms)


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
    template = labels.index(recipe.template.label)
    statistics = open_all(recipe, dict(zip(labels, models, strict=True)))
    added = open_changes(recipe, models[template], edits)
    refuse_resized(recipe.template, models[template])
    allowed = refuse_disagreements(recipe, models, labels, template)
    vocabulary = fit_rows(recipe, models, template)
    licenses = tuple(read_license(model.path) for model in models)
    models = vocabulary.models
    cut = cut_pieces(recipe, models)
    roles = _roles_of(recipe, cut, len(models), statistics, added)
    refuse_other_tokenizers(recipe, models, labels)
    beside = gather_files(models, labels, template)
    sources = (*models, *(each.tensors for own in statistics for each in own), *(() if added is None else (added,)))
    planned, problems = list[_Planned](), list[PlanError]()
    for piece, part in zip(cut.pieces, roles, strict=True):
        try:
            planned.append(_plan_part(part, piece, sources, vocabulary.kept, block))
        except PlanError as error:
            problems.append(error)
    if problems:
        raise several_errors("the checkpoints do not fit together", problems) if len(problems) > 1 else problems[0]
    refuse_unmatched(recipe, [name for done in planned for name in done.names])
    jobs, matrices, groups = list[Job](), list[MatrixGroup](), list[tuple[int, ...]]()
    part_of: dict[str, int] = {}
    for k, done in enumerate(planned):
        first = len(jobs)
        part_of |= {job.name: k for job in done.jobs} if k else {}
        jobs += done.jobs
        matrices += [group.behind(first) for group in done.matrices]
        groups += [tuple(first + i for i in group) for group in done.groups]
    written = Counter(name for job in jobs for name in job.names)
    twice = [name for name, count in written.items() if count > 1]
    if twice:
        raise PlanError(several("two parts of the recipe make the same tensor", twice))
    return Plan(
        recipe=recipe,
        models=models,
        template=template,
        statistics=tuple(each for own in statistics for each in own),
        added=added,
        norms=tuple(part.norms for part in roles),
        part_of=part_of,
        tensors=tuple(jobs),
        groups=tuple(groups),
        matrices=tuple(matrices),
        shards=lay_out(models[template], _outputs(recipe, models[template], jobs), max_shard_size),
        dropped=_dropped(recipe, models, cut, planned, vocabulary),
        files=beside.files,
        left_behind=beside.left,
        lent=beside.lent,
        licenses=licenses,
        named_files=named,
        allowed=allowed,
        vocabulary=vocabulary.length,
        notices=cut.notices,
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """The jobs of a part, those that are solved together and the matrices, as indices into the jobs; what is dropped.

    names: of all its tensors, also of those dropped.
    """

    jobs: list[Job]
    groups: tuple[tuple[int, ...], ...]
    matrices: tuple[MatrixGroup, ...]
    dropped: tuple[tuple[str, str, str], ...]
    names: Collection[str]


def _roles_of(
    recipe: Recipe,
    cut: Pieces,
    models: int,
    statistics: Sequence[tuple[Statistics, ...]],
    added: Checkpoint | None,
) -> list[PartRoles]:
    """The roles in each piece. models: the number of the recipe's."""
    at, roles = models, []
    changes = None if added is None else (models + sum(map(len, statistics)), added)
    for k, piece in enumerate(cut.pieces):
        own = statistics[k] if k < len(statistics) else ()
        roles.append(assign_roles(recipe, piece, own, at, changes))
        at += len(own)
    return roles


def _plan_part(
    roles: PartRoles, piece: Piece, sources: Sequence[Checkpoint], kept: Mapping[str, int], block: int
) -> _Planned:
    """The jobs of a part. Raises PlanError with all that does not fit together."""
    matches, dropped = match_tensors(roles, kept)
    statistics = find_statistics(roles, matches)
    table = SettingsTable(roles.part)
    stacked = any(isinstance(model, Selected) for model in piece.models)
    jobs, problems = [], []
    for name, match in matches.items():
        layer = piece.layers.get(name)
        own = [match.sources.get(i, (0, name))[1] for i in roles.inputs] if stacked else ()
        try:
            jobs.append(make_job(roles, sources, match, table.of(name, layer, own), layer, statistics.get(name), block))
        except PlanError as error:
            problems.append(error)
    if problems:
        raise several_errors("the checkpoints do not fit together", problems)
    matrices = group_matrices(roles, matches, jobs, statistics)
    whole = {i for group in matrices for i in group.jobs}
    for i in whole:
        jobs[i] = replace(jobs[i], method=roles.part.method.name)  # a bias, too, which has no statistics of its own
    names = {name for model in piece.models for name in model}
    return _Planned(jobs, _groups(roles.part.method, jobs, whole), matrices, dropped, names)


def _dropped(
    recipe: Recipe, models: Sequence[Checkpoint], cut: Pieces, planned: Sequence[_Planned], rows: Rows
) -> tuple[tuple[str, str, str], ...]:
    """All tensors and rows that go into no tensor of the output: (model, tensor, reason)."""
    labels = [model.label for model in recipe.all_models]
    found = [
        (label, name, why) for label, model in zip(labels, models, strict=True) for name, why in model.dropped.items()
    ]
    found += [one for part in planned for one in part.dropped]
    if recipe.slices or recipe.modules:
        used = {ref for part in planned for job in part.jobs for ref in job.all_inputs}
        kept = {(labels[i], models[i].name_in_files(name)) for i, name in used if i < len(models)}
        found = [*dict.fromkeys(one for one in found if one[:2] not in kept), *unused_names(cut.pieces, recipe, models)]
    beyond = "beyond the rows of the shortest vocabulary" if recipe.rows == "crop" else "beyond the base's vocabulary"
    return (*found, *((labels[i], f"{name}, its last {count} rows", beyond) for i, name, count in rows.cut))


def _outputs(recipe: Recipe, template: Checkpoint, jobs: Sequence[Job]) -> list[TensorSpec]:
    """The tensors of the output, those of the template in its order, the others behind them; of a stack, by slices."""
    specs = {name: TensorSpec(name, job.shape, job.dtype) for job in jobs for name in job.names}
    if any(name not in template for name in specs) and any(part.slice for part in recipe.parts):
        return list(specs.values())
    order = dict.fromkeys([*(name for name in template if name in specs), *specs])
    return [specs[name] for name in order]


def _groups(method: Method, jobs: Sequence[Job], whole: set[int]) -> tuple[tuple[int, ...], ...]:
    """The jobs that are solved together, less those merged as matrices: each alone, or all that are merged."""
    together = [
        i for i, job in enumerate(jobs) if job.method == method.name and method.scope(job.settings.shared) == "model"
    ]
    alone = [(i,) for i in range(len(jobs)) if i not in {*together, *whole}]
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
