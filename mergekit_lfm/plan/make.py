"""Make the plan of a recipe: open its models, cut them into the recipe's parts, and match and plan each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.errors import PlanError, several, several_errors
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.methods.method import Method
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.layout import lay_out
from mergekit_lfm.plan.agreement import refuse_disagreements
from mergekit_lfm.plan.assembly import refuse_patchwork
from mergekit_lfm.plan.filters import refuse_idle_filters
from mergekit_lfm.plan.job import Job, make_job
from mergekit_lfm.plan.match import match_tensors, refuse_unmatched
from mergekit_lfm.plan.matrices import MatrixGroup, group_matrices
from mergekit_lfm.plan.pieces import Piece, Pieces, cut_pieces, stacked_config, stacks_of, unused_names
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.roles import PartRoles, assign_roles
from mergekit_lfm.plan.rows import Rows
from mergekit_lfm.plan.sources import named_files, open_all, open_changes, open_models, refuse_resized
from mergekit_lfm.plan.statistics import find_statistics
from mergekit_lfm.plan.tokenizer import make_files
from mergekit_lfm.plan.vocabulary import fit_vocabulary, without_fit
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.settings import SettingsTable
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.state import state_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapted import Adapted, adapted_in
from mergekit_lfm.views.experts import note_of
from mergekit_lfm.views.selected import Selected


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
    models = open_models(recipe) if views is None else without_fit(views)
    _ = [model.config for model in models]  # one that cannot be read shows here
    labels = tuple(model.label for model in recipe.all_models)
    template = labels.index(recipe.template.label)
    statistics = open_all(recipe, dict(zip(labels, models, strict=True)))
    refuse_resized(recipe.template, models[template])
    allowed = refuse_disagreements(recipe, models, labels, template)
    vocabulary = fit_vocabulary(recipe, models, labels, template)
    files = make_files(recipe.chat_template, vocabulary, models, labels, template)
    licenses = tuple(read_license(model.path) for model in models)
    rows, models = vocabulary.rows, vocabulary.rows.models
    added = open_changes(recipe, models[template], edits)
    cut = cut_pieces(recipe, models)
    sources = (*models, *(each.tensors for own in statistics for each in own), *(() if added is None else (added,)))
    roles = _roles_of(recipe, cut, len(models), statistics, added)
    planned = _plan_parts(cut, roles, sources, rows, block)
    jobs, stacks = _joined(planned), stacks_of(cut.pieces, recipe, models)
    stacked_config(models[template].config, stacks, models)  # raises where the layers fit no config
    refuse_patchwork(recipe, jobs, models, template, stacks)
    return Plan(
        recipe=recipe,
        models=models,
        template=template,
        statistics=tuple(each for own in statistics for each in own),
        added=added,
        norms=tuple(part.norms for part in roles),
        part_of={job.name: k for k, part in enumerate(planned) if k for job in part.jobs},
        tensors=jobs,
        groups=tuple(tuple(first + i for i in group) for first, part in _numbered(planned) for group in part.groups),
        matrices=tuple(group.behind(first) for first, part in _numbered(planned) for group in part.matrices),
        shards=lay_out(models[template], _outputs(recipe, models[template], jobs), max_shard_size),
        dropped=_dropped(recipe, models, cut, planned, rows),
        files=files.beside.files,
        left_behind=files.beside.left,
        lent=files.beside.lent,
        licenses=licenses,
        named_files=named,
        allowed=allowed,
        vocabulary=rows.lengths,
        made=tuple(sorted(files.made.items())),
        notices=(*cut.notices, *_model_notes(models, labels), *files.notices),
        warnings=files.warnings,
        stacks=stacks,
    )


def _model_notes(models: Sequence[Checkpoint], labels: Sequence[str]) -> Iterator[str]:
    """Lines about models whose experts are read in the layout of the template, or whose head an adapter changes."""
    for model, label in zip(models, labels, strict=True):
        heads = [view.note for view in adapted_in(model) if isinstance(view, Adapted)]
        for note in (note_of(model), *heads):
            if note:
                yield f"{label}: {note}"


def _plan_parts(
    cut: Pieces, roles: Sequence[PartRoles], sources: Sequence[Checkpoint], rows: Rows, block: int
) -> list[_Planned]:
    """The jobs of all parts. Raises PlanError with all that does not fit together."""
    recipe = roles[0].recipe
    if recipe.keep:
        refuse_unmatched(recipe, [name for piece in cut.pieces for model in piece.models for name in model])
    refuse_idle_filters(roles)
    planned, problems = list[_Planned](), list[PlanError]()
    for piece, part in zip(cut.pieces, roles, strict=True):
        try:
            planned.append(_plan_part(part, piece, sources, rows.kept, block))
        except PlanError as error:
            problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else several_errors("the checkpoints do not fit together", problems)
    return planned


def _joined(planned: Sequence[_Planned]) -> tuple[Job, ...]:
    """The jobs of all parts. Raises PlanError if two make the same tensor."""
    jobs = tuple(job for part in planned for job in part.jobs)
    if len(planned) == 1:
        return jobs
    written = Counter(name for job in jobs for name in job.names)
    twice = [name for name, count in written.items() if count > 1]
    if twice:
        raise PlanError(several("two parts of the recipe make the same tensor", twice))
    return jobs


def _numbered(planned: Sequence[_Planned]) -> Iterator[tuple[int, _Planned]]:
    """Each part, and the number of jobs of those before it."""
    first = 0
    for part in planned:
        yield first, part
        first += len(part.jobs)


@dataclass(frozen=True, slots=True)
class _Planned:
    """The jobs of a part; as indices into them those solved together and the matrices; and what is dropped."""

    jobs: list[Job]
    groups: tuple[tuple[int, ...], ...]
    matrices: tuple[MatrixGroup, ...]
    dropped: tuple[tuple[str, str, str], ...]


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
    jobs, problems = [], dict[str, list[PlanError]]()  # by the line of the recipe
    for name, match in matches.items():
        layer = piece.layers.get(name)
        own = [match.sources.get(i, (0, name))[1] for i in roles.inputs] if stacked else ()
        try:
            jobs.append(make_job(roles, sources, match, table.of(name, layer, own), layer, statistics.get(name), block))
        except PlanError as error:
            problems.setdefault(error.parts.get("place", str(error)), []).append(error)
    if problems:
        errors = [
            first if not others else PlanError(f"{first}; {len(others)} other tensors have the same problem")
            for first, *others in problems.values()
        ]
        raise several_errors("the checkpoints do not fit together", errors)
    matrices = group_matrices(roles, matches, jobs, statistics)
    whole = {i for group in matrices for i in group.jobs}
    for i in whole:
        jobs[i] = replace(jobs[i], method=roles.part.method.name)  # a bias, too, which has no statistics of its own
    return _Planned(jobs, _groups(roles.part.method, jobs, whole), matrices, dropped)


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
    specs = {job.name: job.spec for job in jobs}
    specs |= {name: TensorSpec(name, job.shape, job.dtype) for job in jobs for name in job.match.tied}
    if any(name not in template for name in specs) and any(part.slice for part in recipe.parts):
        return list(specs.values())
    order = dict.fromkeys([*(name for name in template if name in specs), *specs])
    return [specs[name] for name in order]


def _groups(method: Method, jobs: Sequence[Job], whole: set[int]) -> tuple[tuple[int, ...], ...]:
    """The jobs that are solved together, less those merged as matrices: each alone, or all that are merged."""
    together = [
        i for i, job in enumerate(jobs) if job.method == method.name and method.scope(job.settings.shared) == "model"
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
