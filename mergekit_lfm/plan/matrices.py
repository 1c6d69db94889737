"""The tensors of a merge that its method sees as whole matrices, and which of these it merges together.

They follow from what the method declares: tensors that it has a view of, one by one; or, with Gram matrices, the linear
layers that have these, together where they read the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.job import Job, averaging_settings, unit_of
from mergekit_lfm.plan.match import Match
from mergekit_lfm.plan.roles import PartRoles, TensorRef


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """One matrix of the output: a tensor, or a linear layer whose bias is the last column.

    weight, bias: its tensors, as indices into the plan's; bias may be None. weights, biases, grams: one for each input;
    biases and grams may be (). base: the base's tensor if inputs are deltas to it. columns: the bias's among them.
    transposed: True if the weight is stored as [inputs, outputs].
    """

    weight: int
    bias: int | None
    weights: tuple[TensorRef, ...]
    biases: tuple[TensorRef, ...]
    grams: tuple[TensorRef, ...]
    base: TensorRef | None
    rows: int
    columns: int
    transposed: bool = False

    @property
    def jobs(self) -> tuple[int, ...]:
        """The indices of its tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """Matrices that are merged together. nbytes: memory for merging them."""

    matrices: tuple[MatrixJob, ...]
    nbytes: int

    @property
    def jobs(self) -> tuple[int, ...]:
        """The indices of all its tensors."""
        return tuple(i for matrix in self.matrices for i in matrix.jobs)

    @property
    def grams(self) -> tuple[TensorRef, ...]:
        """The Gram matrices that all of them share."""
        return self.matrices[0].grams

    def behind(self, count: int) -> MatrixGroup:
        """The same with its tensors behind so many others."""
        moved = (
            replace(each, weight=each.weight + count, bias=None if each.bias is None else each.bias + count)
            for each in self.matrices
        )
        return MatrixGroup(tuple(moved), self.nbytes)


def group_matrices(
    roles: PartRoles,
    matches: Mapping[str, Match],
    jobs: Sequence[Job],
    statistics: Mapping[str, tuple[TensorRef, ...]],
) -> tuple[MatrixGroup, ...]:
    """The tensors that the method merges as matrices, by what it merges together.

    statistics: each weight's Gram matrices, by output tensor. Raises PlanError naming all layers that differ between
    the models, or that no tensor is a matrix for the method.
    """
    method = roles.part.method
    if method.whole is None:
        return ()
    layers = _find_layers(roles, matches, jobs, statistics)
    matrices = layers if method.statistics else list(_find_matrices(roles, jobs))
    if not matrices and any(not job.copied for job in jobs):
        raise PlanError(
            f"{method.name} merges matrices, and the parameters leave it none of the {len(jobs)} tensors; "
            "choose another method, or other parameters"
        )
    groups: dict[tuple[object, ...], list[MatrixJob]] = {}
    for matrix in matrices:
        settings = repr(jobs[matrix.weight].settings)
        together = (matrix.grams, matrix.bias is None, settings) if matrix.grams else (matrix.weight,)
        groups.setdefault(together, []).append(matrix)
    matrix_groups = []
    for members in groups.values():
        unit = unit_of([jobs[members[0].weight]], roles.recipe.seed)
        most = max(matrix.rows for matrix in members)
        matrix_groups.append(MatrixGroup(tuple(members), method.whole.nbytes(unit, most, members[0].columns)))
    return tuple(matrix_groups)


def _find_matrices(roles: PartRoles, jobs: Sequence[Job]) -> Iterator[MatrixJob]:
    """The merged tensors that the method has a view of."""
    whole = roles.part.method.whole
    assert whole is not None
    for i, job in enumerate(jobs):
        shape = None if job.copied or not job.spec.numel else whole.view(unit_of([job], roles.recipe.seed))
        if shape is not None:
            yield MatrixJob(i, None, job.sources, (), (), job.base, *shape)


def _find_layers(
    roles: PartRoles, matches: Mapping[str, Match], jobs: Sequence[Job], grams: Mapping[str, tuple[TensorRef, ...]]
) -> list[MatrixJob]:
    """The linear layers that have Gram matrices."""
    index = {job.name: i for i, job in enumerate(jobs)}
    layers: list[MatrixJob] = []
    problems: list[str] = []
    taken: set[int] = set()
    for name in (name for name in grams if not jobs[index[name]].copied):
        try:
            layer = _make_layer(roles, matches, jobs, index, name, grams[name])
        except PlanError as error:
            problems.append(str(error))
            continue
        twice = [jobs[i].name for i in layer.jobs if i in taken]
        if twice:
            problems.append(f"{twice[0]} belongs to two layers; leave one of them out of the statistics")
        taken.update(layer.jobs)
        layers.append(layer)
    if problems:
        raise PlanError(several("linear layers cannot be merged", problems))
    return layers


def _make_layer(
    roles: PartRoles,
    matches: Mapping[str, Match],
    jobs: Sequence[Job],
    index: Mapping[str, int],
    name: str,
    grams: tuple[TensorRef, ...],
) -> MatrixJob:
    """The layer whose weight is the output tensor `name`."""
    inputs = list(zip(roles.inputs, roles.statistics, strict=True))
    layers = [statistics.by_weight[matches[name].sources[i][1]][1] for i, statistics in inputs]
    job = jobs[index[name]]
    for k, (layer, (_, statistics)) in enumerate(zip(layers, inputs, strict=True)):
        entry = statistics.tensors[statistics.entry(statistics.by_weight[layer.weight][0])]
        if len(job.shape) != 2 or layer.axis != layers[0].axis or entry.shape != (job.shape[layer.axis] + 1,) * 2:
            raise PlanError(
                f"{roles.part.statistics[k].ref}: {entry} is not a Gram matrix for {name} {list(job.shape)} with "
                f"inputs along axis {layers[0].axis}; collect the statistics again"
            )
    biases = {layer.bias and _output_of(matches, i, layer.bias) for layer, (i, _) in zip(layers, inputs, strict=True)}
    if len(biases) > 1:
        raise PlanError(f"{name} has different biases in the models: {', '.join(map(str, biases))}")
    bias, axis = biases.pop(), layers[0].axis
    if bias is not None and jobs[index[bias]].settings != averaging_settings(job.settings):
        raise PlanError(
            f"{name} and {bias} have different parameters, but are one regression: give both the same parameters"
        )
    return MatrixJob(
        weight=index[name],
        bias=None if bias is None else index[bias],
        weights=job.sources,
        biases=() if bias is None else jobs[index[bias]].sources,
        grams=grams,
        base=job.base,
        rows=job.shape[1 - axis],
        columns=job.shape[axis] + (bias is not None),
        transposed=axis == 0,
    )


def _output_of(matches: Mapping[str, Match], model: int, tensor: str) -> str:
    """The output tensor whose source in a model is `tensor`; usually the one of the same name."""
    if tensor in matches and matches[tensor].sources.get(model, (0, ""))[1] == tensor:
        return tensor
    return next(name for name, match in matches.items() if match.sources.get(model, (0, ""))[1] == tensor)
