"""The objective of a task: the mean loss of a batch as a function of a model's parameters, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.runtime.functional import FunctionalModel
from mergekit_lfm.train.examples import IGNORED, Batch
from mergekit_lfm.train.losses import SCORES, pair_scores, squares


def _mean_of_scores(model: nn.Module, task: str, batch: Batch) -> Tensor:
    scores, targets = (pair_scores if task == "embedding" else SCORES[task])(model, batch)
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def _right(model: nn.Module, task: str, batch: Batch) -> Tensor:
    """The share of examples whose class, or positive, has the largest score."""
    scores, targets = (pair_scores if task == "embedding" else SCORES[task])(model, batch)
    return (scores.argmax(-1) == targets).float().mean()


@dataclass(frozen=True)
class TaskObjective:
    """The mean loss of a task. Called with parameters and a batch; all of it can be mapped over tasks (vmap)."""

    model: FunctionalModel
    task: str

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """The loss, a scalar."""
        model = self.model.at(parameters)
        if self.task == "regression":
            total, number = squares(model, batch)
            return total / number
        return _mean_of_scores(model, self.task, batch)

    @property
    def counts_right(self) -> bool:
        """Whether `score` is a share of right answers, where more is better, and not the loss."""
        return self.task in ("classification", "embedding")

    def score(self, parameters: Parameters, batch: Batch) -> Tensor:
        """How good the parameters are on a batch, a scalar: the share of right answers, or the loss."""
        if not self.counts_right:
            return self(parameters, batch)
        return _right(self.model.at(parameters), self.task, batch)
