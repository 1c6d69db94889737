"""The diagonal of the Fisher information: how much each parameter matters for the model's predictions on its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.collect.examplewise import (
    NotSeparable,
    Parameters,
    add_squares,
    add_squares_singly,
    gradients_agree,
    record_calls,
)
from mergekit_lfm.collect.likelihoods import LikelihoodScores, outcome, scores_of
from mergekit_lfm.collect.request import FILTERED, Outline, StatisticsRequest, select_names
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch
    from mergekit_lfm.runtime.subject import Subject

NOT_USED = "no prediction on the data depends on it"


class FisherStatistic:
    """F = 1/N sum_n E_y (d log p(y | x_n) / d theta)^2, entry by entry, for every parameter.

    The square is taken per example and label, never of a sum over a batch. Source: Matena and Raffel 2022 (arXiv
    2111.09832), the estimate of the Fisher information's diagonal that weights their merge.
    """

    def __init__(self, request: StatisticsRequest) -> None:
        (self.subject,) = request.subjects
        self.examples = request.examples
        self.scores = scores_of(request)
        if request.task == "classification":
            _check_problem(self.subject.module)
        if request.options["labels"] == "true" and request.task == "classification":
            _check_labelled(request.data)
        self.skipped: dict[str, str] = {}
        self.tensors: dict[nn.Parameter, list[str]] = {}  # the names under which each wanted parameter is stored
        self._choose(request)
        used = self._used(request)
        for parameter, names in list(self.tensors.items()):
            if parameter not in used:
                self.skipped |= dict.fromkeys(names, NOT_USED)
                parameter.requires_grad_(False)
                del self.tensors[parameter]
        if not self.tensors:
            raise PlanError("no prediction on the data depends on any of the parameters; choose others (`layers`)")
        self.units = {n: {f"fisher/{n}": tuple(p.shape)} for p, names in self.tensors.items() for n in names}
        self.together = self._separable(request)

    def _choose(self, request: StatisticsRequest) -> None:
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.subject.module.named_parameters():
            if not parameter.is_floating_point():
                continue
            tensors = self.subject.tensors_of(parameter)
            parameters |= dict.fromkeys(tensors, parameter)
            if not tensors:
                self.skipped[name] = self.subject.why_unknown(parameter)
        wanted = select_names(list(parameters), request.layers, "parameter")
        for tensor, parameter in parameters.items():
            if tensor in wanted:
                self.tensors.setdefault(parameter, []).append(tensor)
                parameter.requires_grad_(True)  # in every pass, so that each does the same arithmetic
            else:
                self.skipped[tensor] = FILTERED

    def _graph(self, batch: Batch, scores: LikelihoodScores) -> Iterator[Tensor]:
        """The scores of a batch, from a forward pass that keeps the graph for gradients."""
        return scores(self.subject.run(batch), batch)

    def _used(self, request: StatisticsRequest) -> set[nn.Parameter]:
        """The parameters that predictions depend on; reads batches until all were seen, or to the end."""
        used: set[nn.Parameter] = set()
        for batch in request.data:
            (result,) = self._graph(batch, lambda output, _: iter([outcome(request.task, output)]))
            used |= _leaves(result) & self.tensors.keys()
            if len(used) == len(self.tensors):
                break
        return used

    def _separable(self, request: StatisticsRequest) -> bool:
        """True if a batch gives the gradients that its examples give one by one, tried on the first two of a batch."""
        first = next(iter(request.data))
        batch = _slice(next((batch for batch in request.data if len(batch) > 1), first), slice(0, 2))

        def projected(output: Any, rows: Batch) -> Iterator[Tensor]:
            x = outcome(request.task, output)
            flat = x.reshape(len(rows), -1)
            random = torch.Generator().manual_seed(0)
            yield flat.float() @ torch.randn(flat.shape[1], generator=random).to(flat.device)

        together = partial(self._add_together, batch, projected)
        singly = partial(self._add_singly, batch, projected)
        return gradients_agree(list(self.tensors), together, singly, request.memory)

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Add the squared gradients of every example."""
        wanted = {
            parameter: [sums[f"fisher/{name}"] for name in names if f"fisher/{name}" in sums]
            for parameter, names in self.tensors.items()
        }
        wanted = {parameter: totals for parameter, totals in wanted.items() if totals}
        if self.together:
            try:
                return self._add_together(batch, self.scores, wanted)
            except NotSeparable:
                pass  # it was raised before anything was added
        return self._add_singly(batch, self.scores, wanted)

    def _add_together(self, batch: Batch, scores: LikelihoodScores, wanted: Parameters) -> None:
        owners = [m for m in self.subject.module.modules() if any(p in wanted for p in m.parameters(recurse=False))]
        with record_calls(owners, len(batch)) as calls:
            example_scores = self._graph(batch, scores)
        add_squares(wanted, calls, example_scores)

    def _add_singly(self, batch: Batch, scores: LikelihoodScores, wanted: Parameters) -> None:
        for i in range(len(batch)):
            add_squares_singly(wanted, self._graph(_slice(batch, slice(i, i + 1)), scores))

    def finish(self, unit: str, sums: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The mean over examples."""
        return {f"fisher/{unit}": sums[f"fisher/{unit}"].div_(self.examples)}, self.examples

    def layers(self, counts: Mapping[str, int]) -> dict[str, Layer]:  # noqa: ARG002
        """No layers: the entries belong to parameters."""
        return {}

    def norm(self, squares: float) -> float:
        """The Euclidean norm over all parameters. Raises PlanError if it is 0."""
        if squares == 0:
            raise PlanError(
                "the Fisher information is 0 everywhere, expected some: the model's predictions do not change with "
                "its parameters. Check the model, and whether there is anything to predict in the data"
            )
        return math.sqrt(squares)


def outline_fisher(subject: Subject, patterns: Sequence[str]) -> Outline:
    """The file of a model without values: as if the predictions depended on each parameter."""
    shapes = {
        f"fisher/{name}": tuple(parameter.shape)
        for parameter in subject.module.parameters()
        for name in subject.tensors_of(parameter)
    }
    wanted = select_names([name.removeprefix("fisher/") for name in shapes], patterns, "parameter")
    return Outline({name: shape for name, shape in shapes.items() if name.removeprefix("fisher/") in wanted}, norm=1.0)


def _check_problem(module: nn.Module) -> None:
    """Raises PlanError if the config says that the outputs are not logits of one distribution over classes."""
    problem = getattr(getattr(module, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise PlanError(
            f"the config of the model says problem_type {problem!r}, expected a classifier with one label for each "
            "example: a softmax over classes. Take another model, or the task 'embedding'"
        )


def _check_labelled(data: Sequence[Batch]) -> None:
    unlabelled = sum(len(batch) for batch in data if batch.labels is None)
    if unlabelled:
        raise PlanError(f"{unlabelled} examples have no label, expected one each; add some, or choose other `labels`")


def _slice(batch: Batch, rows: slice) -> Batch:
    """These examples of the batch."""
    return replace(
        batch,
        indices=batch.indices[rows],
        args=tuple(x[rows] for x in batch.args),
        kwargs={name: x[rows] for name, x in batch.kwargs.items()},
        labels=None if batch.labels is None else batch.labels[rows],
    )


def _leaves(x: Tensor) -> set[Any]:
    """The leaf tensors that x was computed from and that require gradients."""
    seen, pending, leaves = set(), [x.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        pending += [following for following, _ in node.next_functions]
    return leaves
