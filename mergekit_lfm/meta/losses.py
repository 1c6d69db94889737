"""The loss of a meta-learning algorithm: a model and a batch of episodes, to the sum over tasks, which `fit` takes.

Parameters that an algorithm learns besides the model become a part of it, as the maps of a distillation do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters, adapt
from mergekit_lfm.meta.episodes import CLASSES, sides
from mergekit_lfm.meta.objective import TaskObjective
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.meta_algorithms import Algorithm
from mergekit_lfm.recipe.options import defaults_of
from mergekit_lfm.runtime.functional import functional_model
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import Terms

NOTHING: Mapping[str, Value] = {}
BESIDE = "meta"  # the name in a model of what is learned beside it


@dataclass(frozen=True, slots=True)
class Inner:
    """The steps by which a model adapts to a task, and their rate; None for the rates that were learned."""

    steps: int
    rate: float | None


class MetaLoss:
    """The loss of an algorithm, for a model and a task.

    head: the names of the head's parameters. settings: of the algorithm's parameters, where not the default. beside:
    what is learned with the model, a part of it if there is any.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        row: Algorithm,
        inner: Inner,
        head: frozenset[str] = frozenset(),
        settings: Mapping[str, Value] = NOTHING,
    ) -> None:
        self.row, self.inner, self.model = row, inner, model
        self.settings = {**defaults_of(row.parameters), **settings}
        self.objective = TaskObjective(functional_model(model), task)
        self.moves = head if row.head_only else None
        self.beside = self.build()
        if self.beside is not None:
            model.add_module(BESIDE, self.beside)

    def build(self) -> nn.Module | None:
        """Make what is learned beside the model."""
        return None

    def start(self) -> dict[str, Tensor]:
        """The parameters that adapting begins with."""
        return {name: x for name, x in self._own() if x.requires_grad}

    def fold(self) -> None:
        """Put what was learned beside the model into its parameters, where it is a part of them."""

    def facts(self) -> dict[str, Any]:
        """Facts about the training, for the result."""
        return {}

    def number(self, name: str) -> float:
        """A setting that is a number."""
        value = self.settings[name]
        assert isinstance(value, int | float)
        return value

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, x) for name, x in self.model.named_parameters() if not name.startswith(f"{BESIDE}.")]

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """The sum over tasks of the losses on their query sets, and how many tasks there are."""
        start = self.start()
        losses: Tensor = over_tasks(lambda support, query: self.loss_of(start, support, query), batch)
        hardness = getattr(self.beside, "hardness", None)
        if model.training and hardness is not None:
            with torch.no_grad():  # of a class: the last loss of an episode with it
                places = batch[CLASSES]
                hardness[places.flatten()] = losses.detach().repeat_interleave(places.shape[1]).to(hardness.dtype)
        return Terms(losses.sum(), len(losses))

    def loss_of(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        """The loss of a task, a scalar."""
        return self.objective(self.adapted(start, support, self.inner), query)

    def adapted(self, start: Parameters, support: Batch, inner: Inner) -> Parameters:
        """The parameters after inner steps on a support set."""
        rate = self.rates() if inner.rate is None else inner.rate
        return adapt(
            self.objective,
            start,
            support,
            steps=inner.steps,
            rate=rate,
            first_order=self.row.first_order,
            moves=self.moves,
        )

    def watch(self, classes: int) -> Tensor:
        """Numbers that say how hard each class is, which training keeps up to date; a part of the model's state."""
        hardness = torch.zeros(classes, device=next(self.model.parameters()).device)
        assert self.beside is not None
        self.beside.register_buffer("hardness", hardness)
        return hardness

    def rates(self) -> Parameters:
        """The learned rates."""
        raise NotImplementedError

    def score(self, found: Parameters, support: Batch, query: Batch) -> Tensor:  # noqa: ARG002
        """How good adapted parameters are on a query set: the share of right answers, or the loss."""
        return self.objective.score(found, query)


def over_tasks(function: Callable[[Batch, Batch], Any], batch: Batch) -> Any:
    """The values of a function for the support and query sets of each task, with a first axis of tasks."""
    episode = sides(batch)
    return torch.func.vmap(function, randomness="different")(episode.support, episode.query)


class LearnedRates(MetaLoss):
    """Meta-SGD: the rate of each number is learned with it."""

    def build(self) -> nn.Module:
        rate = self.inner.rate
        assert rate is not None
        self.inner = Inner(self.inner.steps, None)
        return nn.ParameterDict(
            {key_of(name): nn.Parameter(torch.full_like(x, rate)) for name, x in self.start().items()}
        )

    def rates(self) -> Parameters:
        return {name: self._of(name) for name in self.start()}

    def _of(self, name: str) -> Tensor:
        assert isinstance(self.beside, nn.ParameterDict)
        rate: Tensor = self.beside[key_of(name)]
        return rate


class Scales(MetaLoss):
    """Meta-transfer learning: factors and shifts of channels of a model that stays; the head is learned and adapts.

    Weights of linear layers have a factor for each output, those of convolutions for each kernel, and biases a shift.
    Source: Sun et al. 2019, arXiv 1812.02391, equations 4 to 6.
    """

    def build(self) -> nn.Module:
        scaled = dict[str, nn.Parameter]()
        for place, module in self.model.named_modules():
            if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                continue
            for name, x in module.named_parameters(prefix=place, recurse=False):
                if name in (self.moves or ()) or not x.requires_grad:
                    continue
                if name.endswith("bias"):
                    scaled[key_of(name)] = nn.Parameter(torch.zeros_like(x))
                else:
                    shape = [*x.shape[:1], *([x.shape[1], *[1] * (x.ndim - 2)] if x.ndim > 2 else [1])]
                    scaled[key_of(name)] = nn.Parameter(x.new_ones(shape))
        for name, x in self._own():
            x.requires_grad_(name in (self.moves or ()))
        return nn.ParameterDict(scaled)

    def start(self) -> dict[str, Tensor]:
        assert isinstance(self.beside, nn.ParameterDict)
        found: dict[str, Tensor] = {name: x for name, x in self._own() if x.requires_grad}
        for name, x in self._own():
            if (key := key_of(name)) in self.beside:
                found[name] = x + self.beside[key] if name.endswith("bias") else x * self.beside[key]
        return found

    @torch.no_grad()
    def fold(self) -> None:
        own = dict(self._own())
        for name, x in self.start().items():
            own[name].copy_(x)


class Reptile(MetaLoss):
    """Reptile: the slope of a parameter is the mean over tasks of how far adapting moves it back.

    A plain step of rate e is then start + e * mean(adapted - start): task arithmetic. A task adapts to all of its
    examples, those of the query set too. Source: Nichol et al. 2018, arXiv 1803.02999, algorithms 1 and 2.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:  # noqa: ARG002
        start = self.start()

        def one(support: Batch, query: Batch) -> tuple[Parameters, Tensor]:
            whole = {name: torch.cat([x, query[name]]) for name, x in support.items()}
            found = self.adapted(start, whole, self.inner)
            return found, self.objective(found, whole)

        with torch.no_grad():
            found, losses = over_tasks(one, batch)
            moved = {name: (x - found[name]).sum(0) for name, x in start.items()}
        pull = torch.stack([(x * moved[name]).sum() for name, x in start.items()]).sum()
        return Terms(losses.sum() + pull - pull.detach(), len(losses))


def key_of(name: str) -> str:
    """The name of a parameter as a key of a ParameterDict, which may have no dots."""
    return name.replace(".", "/")


def name_of(key: str) -> str:
    """The name of a parameter, from such a key."""
    return key.replace("/", ".")
