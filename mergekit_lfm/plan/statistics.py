"""Match statistics to the tensors of a merge, and group the linear layers that are solved together.

A statistics file belongs to one model, by its content; a file of another model is an error. Either all inputs have
statistics of a tensor, or none, and then the tensor is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.job import Job, averaging_settings, unit_of
from mergekit_lfm.plan.sources import ModelRoles, TensorRef

SourceNames = Mapping[str, Mapping[int, str]]  # for each output tensor the name of its source in every model


@dataclass(frozen=True, slots=True)
class LinearJob:
    """One linear layer of the output: its tensors, as indices into the plan's, and the weight's axis of inputs."""

    weight: int
    bias: int | None
    axis: int
    outputs: int

    @property
    def jobs(self) -> tuple[int, ...]:
        """The indices of its tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers that read the same inputs and are solved together.

    grams: each model's Gram matrix [inputs + 1, inputs + 1]. columns: the number of columns of the layers' matrices:
    the inputs, and one more if the layers have biases. nbytes: memory for solving them.
    """

    layers: tuple[LinearJob, ...]
    grams: tuple[TensorRef, ...]
    columns: int
    nbytes: int

    @property
    def jobs(self) -> tuple[int, ...]:
        """The indices of all its tensors."""
        return tuple(i for layer in self.layers for i in layer.jobs)


def find_statistics(roles: ModelRoles, names: SourceNames) -> dict[str, tuple[TensorRef, ...]]:
    """The statistics of every output tensor that has them: an entry of each input's file.

    Raises PlanError naming all tensors for which only some inputs have them.
    """
    sources_of: dict[str, tuple[TensorRef, ...]] = {}
    problems = []
    for name, sources in names.items() if roles.statistics else ():
        entries = [
            statistics.entry_of(sources.get(i, ""))
            for i, statistics in zip(roles.inputs, roles.statistics, strict=True)
        ]
        lacking = [roles.recipe.statistics[k].ref for k, entry in enumerate(entries) if entry is None]
        if not lacking:
            sources_of[name] = tuple(
                (len(roles.models) + k, entry) for k, entry in enumerate(entries) if entry is not None
            )
        elif len(lacking) < len(entries):
            kind = roles.recipe.method.statistics
            reasons = {statistics.info.skipped.get(_layer_of(name)) for statistics in roles.statistics} - {None}
            why = f" ({'; '.join(sorted(map(str, reasons)))})" if reasons else ""
            problems.append(f"{', '.join(lacking)} lacks the {kind} statistics of {name}, which the others have{why}")
    if problems:
        raise PlanError(
            several("the statistics do not cover the same layers", problems)
            + "\nCollect them all with the same --task and the same --layers, on data that all layers see"
        )
    if roles.statistics and not sources_of:
        raise PlanError("the statistics cover no tensor of the models; collect them without --layers")
    return sources_of


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def group_linears(
    roles: ModelRoles, names: SourceNames, jobs: Sequence[Job], grams: Mapping[str, tuple[TensorRef, ...]]
) -> tuple[LinearGroup, ...]:
    """The linear layers that the method solves as matrices, grouped by equal Gram matrices and parameters.

    grams: each weight's, by output tensor. Raises PlanError naming all layers that differ between the models.
    """
    whole = roles.recipe.method.whole
    if whole is None:
        return ()
    index = {job.name: i for i, job in enumerate(jobs)}
    groups: dict[tuple[object, ...], list[LinearJob]] = {}
    problems: list[str] = []
    taken: set[int] = set()
    for name in (name for name in grams if not jobs[index[name]].copied):
        try:
            layer = _make_linear_job(roles, names, jobs, index, name)
        except PlanError as error:
            problems.append(str(error))
            continue
        twice = [jobs[i].name for i in layer.jobs if i in taken]
        if twice:
            problems.append(f"{twice[0]} belongs to two layers; leave one of them out of the statistics")
        taken.update(layer.jobs)
        settings = jobs[layer.weight].settings
        groups.setdefault((grams[name], layer.bias is None, repr(settings)), []).append(layer)
    if problems:
        raise PlanError(several("linear layers cannot be merged", problems))
    linear_groups = []
    for layers in groups.values():
        first = jobs[layers[0].weight]
        columns = first.shape[layers[0].axis] + (layers[0].bias is not None)
        most = max(layer.outputs for layer in layers)
        nbytes = whole.nbytes(unit_of([first], roles.recipe.seed), most, columns)
        linear_groups.append(LinearGroup(tuple(layers), grams[first.name], columns, nbytes))
    return tuple(linear_groups)


def _make_linear_job(
    roles: ModelRoles, names: SourceNames, jobs: Sequence[Job], index: Mapping[str, int], name: str
) -> LinearJob:
    """The layer whose weight is the output tensor `name`."""
    inputs = list(zip(roles.inputs, roles.statistics, strict=True))
    layers = [statistics.by_weight[names[name][i]][1] for i, statistics in inputs]
    for k, (layer, (_, statistics)) in enumerate(zip(layers, inputs, strict=True)):
        shape, entry = (
            jobs[index[name]].shape,
            statistics.tensors[statistics.entry(statistics.by_weight[layer.weight][0])],
        )
        if len(shape) != 2 or layer.axis != layers[0].axis or entry.shape != (shape[layer.axis] + 1,) * 2:
            raise PlanError(
                f"{roles.recipe.statistics[k].ref}: {entry} is not a Gram matrix for {name} {list(shape)} with inputs "
                f"along axis {layers[0].axis}; collect the statistics again"
            )
    biases = {layer.bias and _output_of(names, i, layer.bias) for layer, (i, _) in zip(layers, inputs, strict=True)}
    if len(biases) > 1:
        raise PlanError(f"{name} has different biases in the models: {', '.join(map(str, biases))}")
    bias, axis = biases.pop(), layers[0].axis
    if bias is not None and jobs[index[bias]].settings != averaging_settings(jobs[index[name]].settings):
        raise PlanError(
            f"{name} and {bias} have different parameters, but are one regression: give both the same parameters"
        )
    return LinearJob(index[name], None if bias is None else index[bias], axis, jobs[index[name]].shape[1 - axis])


def _output_of(names: SourceNames, model: int, tensor: str) -> str:
    """The output tensor whose source in a model is `tensor`; usually the one of the same name."""
    if names.get(tensor, {}).get(model) == tensor:
        return tensor
    return next(name for name, sources in names.items() if sources.get(model) == tensor)
