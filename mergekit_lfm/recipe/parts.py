"""The parts of a recipe: output tensors that one method makes from the same models, and the settings for each of them.

A recipe with `models` has one part. Each slice is a part, of the layers that it makes, and each module is one, or one
for each of its slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Value
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.adapters import AdapterRef, model_of
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.edit import EditRequest
from mergekit_lfm.recipe.problems import Problem
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.recipe.values import NamedFile, Setting, find_rule, value_of
from mergekit_lfm.store.elsewhere import Elsewhere

Edit = NamedFile | EditRequest
Layer = tuple[int, int]  # index and count


@dataclass(frozen=True, slots=True)
class Input:
    """A model of a recipe: `ref` as written, its `source`, and a `label` unique in the recipe.

    source: the absolute path of its folder, or its name elsewhere. adapters: those that it is read with. rename: new
    names for its tensors, which all else sees. align: the transform file that rewrites it before the merge, or the
    request to find one. edits: patch files that change it before the merge, or requests to make one. These are the
    model; the rest is of its line in the recipe. place: of the line, in messages. settings: its own. layers: of a
    slice, the first and the one behind the last; None for all.
    """

    ref: str
    source: Path | Elsewhere
    label: str
    adapters: tuple[AdapterRef, ...] = ()
    align: NamedFile | AlignRequest | None = None
    edits: tuple[Edit, ...] = ()
    rename: tuple[RenameRule, ...] = ()
    place: str = field(default="base_model", compare=False)
    settings: Mapping[str, Setting] = field(default_factory=dict, compare=False)
    stats: NamedFile | None = field(default=None, compare=False)
    layers: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def model_ref(self) -> str:
        """The part of `ref` before the adapters."""
        return model_of(self.ref, self.adapters)


@dataclass(frozen=True, slots=True)
class Scope:
    """The settings of one mapping `parameters`, and its place in the recipe."""

    place: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a stack: its index, their number, the index of its first layer in the output, and its layers."""

    index: int
    of: int
    start: int
    layers: int


@dataclass(frozen=True, slots=True)
class Settings:
    """Every parameter's value for one output tensor: the values that all inputs share, and one mapping per input."""

    shared: dict[str, Value]
    inputs: tuple[dict[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Output tensors that one method makes from the same models.

    place: of the list of models in the recipe. base: the base model; with some methods it is also one of the inputs.
    lines: the models as written; inputs: the method's, in order. scopes: the settings for all inputs, the nearest
    first. module: the name of the module, None for the whole model. slice: its place in a stack.
    """

    method_name: str
    base: Input | None
    lines: tuple[Input, ...]
    inputs: tuple[Input, ...]
    scopes: tuple[Scope, ...] = ()
    place: str = "models"
    module: str | None = None
    slice: Slice | None = None

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    @property
    def models(self) -> tuple[Input, ...]:
        """All its models, the base first."""
        return tuple(dict.fromkeys((*((self.base,) if self.base else ()), *self.inputs)))

    @property
    def statistics(self) -> tuple[NamedFile, ...]:
        """The statistics file of each input, or () if the method takes no statistics."""
        return tuple(model.stats for model in self.inputs if model.stats is not None)

    def scopes_of(self, model: Input | None) -> tuple[Scope, ...]:
        """The scopes in which a parameter of one input is looked up, the nearest first; None: one that all share."""
        return self.scopes if model is None else (Scope(f"{model.place}.parameters", model.settings), *self.scopes)

    def settings(self, tensor: str, layer: Layer | None, sources: Sequence[str] = ()) -> Settings:
        """The values of all parameters for the output tensor `tensor` in layer (index, count), None outside the layers.

        sources: its name in each input, if that is another; filters of the inputs' own parameters look at it. A model's
        own settings win over those of its slice, of its module and of the top level, in this order, and these over the
        method's default. Raises PlanError if a parameter without a default has filters but none matches.
        """
        shared, problems = self._values(None, tensor, layer)
        names = sources or [tensor] * len(self.inputs)
        inputs = [self._values(model, name, layer) for model, name in zip(self.inputs, names, strict=True)]
        problems += [problem for _, missing in inputs for problem in missing]
        if problems:
            places = "; ".join(problem.place for problem in problems)
            raise PlanError("{lines}", lines="\n".join(map(str, problems)), place=places)
        return Settings(shared, tuple(values for values, _ in inputs))

    def _values(self, model: Input | None, tensor: str, layer: Layer | None) -> tuple[dict[str, Value], list[Problem]]:
        """The per-input values of `model`, or the shared ones for None; and a problem for each without a value."""
        values: dict[str, Value] = {}
        missing: list[Problem] = []
        for parameter in self.parameters_of(model):
            value, place = self.find(parameter, model, tensor, layer)
            if place is None and value is REQUIRED:
                own = f"{model.place}." if model else ""
                text = f"no filter matches {tensor}; add an entry without a filter"
                missing.append(Problem(f"{own}parameters.{parameter.name}", text))
            else:
                values[parameter.name] = cast(Value, value)
        return values, missing

    def parameters_of(self, model: Input | None) -> Iterator[Parameter]:
        """The method's parameters that each input has its own value of; those that all share for None."""
        return (each for each in self.method.parameters if each.per_input == (model is not None))

    def find(
        self, parameter: Parameter, model: Input | None, tensor: str, layer: Layer | None
    ) -> tuple[object, str | None]:
        """The value of a parameter and its place in the recipe; the method's default, and None, without a place."""
        name = parameter.name
        for scope in self.scopes_of(model):
            rule = find_rule(scope.settings[name], tensor) if name in scope.settings else None
            if rule is not None:
                number = f"[{scope.settings[name].index(rule)}]" if len(scope.settings[name]) > 1 else ""
                return value_of(rule, parameter, layer), f"{scope.place}.{name}{number}"
        return parameter.default, None


def copy_of(model: Input, place: str, module: str | None) -> Part:
    """The part that copies a model."""
    return Part("passthrough", None, (model,), (model,), (), place, module)
