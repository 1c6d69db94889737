"""The input of a tuning method, and its result: a model that is ready to be trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_lfm.artifacts.attachment import Attachment
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.training import Group
from mergekit_lfm.train.hooks import Hook
from mergekit_lfm.train.losses import Loss

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class TuneWork:
    """A model to be tuned. options: a value for each parameter of the method. steps: of the training.

    reference: the model as its user names it. fisher: Fisher information by the names of parameters, if it is given.
    files: those that the method's parameter names. content: the digest of the model's content. tasks: the names of the
    data files, without their ends. tokenizer: the model's.
    """

    model: nn.Module
    task: str
    options: Mapping[str, Value]
    steps: int
    reference: str
    fisher: Mapping[str, Tensor] | None = None
    files: tuple[Path, ...] = ()
    content: str = ""
    tasks: tuple[str, ...] = ()
    tokenizer: Any = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters; one with several names has its first."""
        return tuple(name for name, _ in self.model.named_parameters())

    @cached_property
    def head(self) -> frozenset[str]:
        """The parameters of the head, which reads the rest of the model; none for an encoder, or where it is tied."""
        prefix = getattr(self.model, "base_model_prefix", "")
        if not prefix or not hasattr(self.model, prefix):  # T5 has no trunk of its own
            head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
            own = () if head is None else {id(x) for x in head.parameters()} - self.embedded
            return frozenset(name for name, x in self.model.named_parameters() if id(x) in own)
        return frozenset(name for name in self.names if not name.startswith(f"{prefix}."))

    @property
    def embedded(self) -> frozenset[int]:
        """The ids of the weights of embeddings, which are those of tied heads, too."""
        return frozenset(id(each.weight) for each in self.model.modules() if isinstance(each, nn.Embedding))

    @cached_property
    def groups(self) -> tuple[frozenset[str], ...]:
        """The parameters from the model's end to its beginning: what is above all layers, each layer, what is below.

        The layers of several stacks that have one number are one group.
        """
        names = [name for name in self.names if self.task != "embedding" or not name.startswith("pooler.")]  # unused
        numbers = {name: int(found[1]) for name in names if (found := NUMBER.search(name))}
        if not numbers:
            raise PlanError(f"{type(self.model).__name__} has no numbered layers; expected some. Choose another method")
        first = next(i for i, name in enumerate(names) if name in numbers)
        below = frozenset(names[:first])
        above = frozenset(name for name in names[first:] if name not in numbers)
        layers = [frozenset(n for n in numbers if numbers[n] == i) for i in sorted(set(numbers.values()), reverse=True)]
        return tuple(group for group in (above, *layers, below) if group)

    def integer(self, name: str) -> int:
        """A parameter of the method that is a whole number."""
        value = self.options[name]
        assert isinstance(value, int)
        return value

    def parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """The parameters of these names."""
        wanted = set(names)
        return [parameter for name, parameter in self.model.named_parameters() if name in wanted]

    def train(self, names: Iterable[str]) -> None:
        """Have these parameters trained, and no others. Raises PlanError for none."""
        wanted = set(names)
        if not wanted:
            raise PlanError(f"{type(self.model).__name__} has no parameter that this method trains; choose another")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted)


def _nothing() -> None:
    """Do nothing."""


def _no_facts() -> Mapping[str, Any]:
    """No facts."""
    return {}


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's form: its config as data, and its tensors by PEFT's names.

    parts: further adapters, by the folders that they are written to inside of its own.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    parts: Mapping[str, PeftAdapter] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained. model: the one to run, which may wrap that of the work.

    decays: whether weight decay makes sense. count: how many numbers are trained, if not all of those parameters.
    changed: the parameters of the work's model that will have other values, if not the trained ones. fold: puts the
    trained values into these. adapter: the trained values as an adapter, in its place; attachment: as that. loss: makes
    the loss that is trained of the task's own; in evaluation it has to be equal to that. virtual: the virtual tokens
    before each text. rates: factors of the learning rate, by patterns for the names of parameters. facts: what a user
    should know about the trained values, by its name, as JSON has it.
    """

    model: nn.Module
    hooks: tuple[Hook, ...] = ()
    decays: bool = True
    count: int | None = None
    changed: tuple[nn.Parameter, ...] | None = None
    fold: Callable[[], None] = field(default=_nothing)
    adapter: Callable[[], PeftAdapter] | None = None
    attachment: Callable[[], Attachment] | None = None
    loss: Callable[[Loss], Loss] | None = None
    virtual: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, Any]] = field(default=_no_facts)

    def groups(self, rate: float) -> tuple[Group, ...]:
        """The groups of parameters with a rate of their own, without weight decay. rate: that of the others."""
        return tuple(Group(pattern, rate * factor, weight_decay=0.0) for pattern, factor in self.rates.items())


Tuner = Callable[[TuneWork], Prepared]
