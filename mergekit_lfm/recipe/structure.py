"""From `models`, `slices` or `modules` to the parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_lfm.methods.method import Method
from mergekit_lfm.recipe.files import Where
from mergekit_lfm.recipe.form import ModelEntry, ModuleEntry, SliceEntry
from mergekit_lfm.recipe.parts import Input, Part, Scope, Slice, copy_of
from mergekit_lfm.recipe.problems import Problem
from mergekit_lfm.recipe.requirements import lacking_models, missing_requirements
from mergekit_lfm.recipe.roles import assign_roles, read_base, read_scope


@dataclass
class Structure:
    """The parts of a recipe, and what was noticed while they were read.

    methods: all that the recipe merges with, the first that of the top level. where: its models are. whole:
    False for the rest of a recipe whose wrong keys were left out.
    """

    methods: Sequence[Method]
    where: Where
    whole: bool = True
    parts: list[Part] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def read_models(self, models: Sequence[ModelEntry], base: Input | None, parameters: Mapping[str, Any]) -> None:
        """The part that merges whole models."""
        for i, entry in enumerate(models):
            if entry.layer_range is not None:
                self.problems.append(Problem(f"models[{i}].layer_range", "layers are those of a slice; use `slices`"))
        scopes = self._scopes([("parameters", parameters)], self.methods)
        self._add(models, base, scopes, self.methods, "models")

    def read_slices(
        self,
        slices: Sequence[SliceEntry],
        base: Input | None,
        around: Sequence[tuple[str, Mapping[str, Any]]],
        methods: Sequence[Method] = (),
        place: str = "slices",
        module: str | None = None,
    ) -> None:
        """A part for each slice. around: the places and settings of the mappings `parameters` around them."""
        methods, start = methods or self.methods, 0
        for i, entry in enumerate(slices):
            at = f"{place}[{i}]"
            if not entry.sources:
                self.problems.append(Problem(f"{at}.sources", "found none, expected one or more"))
                continue
            spans = [source.layer_range for source in entry.sources]
            layers = sorted({span[1] - span[0] for span in spans if span is not None})
            for k in (k for k, span in enumerate(spans) if span is None and self.whole):
                text = "required: the first layer and the one behind the last, as in [0, 16]"
                self.problems.append(Problem(f"{at}.sources[{k}].layer_range", text))
            if len(layers) > 1:
                found = ", ".join(str(list(span)) for span in spans if span)
                text = f"the sources of a slice are merged layer by layer, so they need as many layers; found {found}"
                self.problems.append(Problem(f"{at}.sources", text))
            own, wrong = read_base(entry.base_model, self.where, f"{at}.base_model")
            self.problems += wrong
            scopes = self._scopes([(f"{at}.parameters", entry.parameters), *around], methods)
            count = layers[-1] if layers else 0
            piece = Slice(i, len(slices), start, count)
            self._add(entry.sources, own or base, scopes, methods, f"{at}.sources", module, piece)
            start += count

    def read_modules(
        self,
        modules: Mapping[str, ModuleEntry],
        methods: Mapping[str, Method],
        base: Input | None,
        parameters: Mapping[str, Any],
    ) -> None:
        """The parts of the modules. methods: by their names."""
        for name, entry in modules.items():
            at, method = f"modules.{name}", methods[name]
            order = [method, *(other for other in self.methods if other != method)]
            own, wrong = read_base(entry.base_model, self.where, f"{at}.base_model")
            self.problems += wrong
            around = [(f"{at}.parameters", entry.parameters), ("parameters", parameters)]
            if bool(entry.models) == bool(entry.slices):
                self.problems.append(Problem(at, "expected either `models` or `slices`"))
            elif entry.slices:
                self.read_slices(entry.slices, own or base, around, order, f"{at}.slices", name)
            else:
                self._add(entry.models, own or base, self._scopes(around, order), order, f"{at}.models", name)

    def _scopes(self, raws: Sequence[tuple[str, Mapping[str, Any]]], methods: Sequence[Method]) -> tuple[Scope, ...]:
        scopes = []
        for place, raw in raws:
            scope, told, wrong = read_scope(raw, methods, place)
            scopes.append(scope)
            self.notices += told
            self.problems += wrong
        return tuple(scopes)

    def _add(
        self,
        models: Sequence[ModelEntry],
        base: Input | None,
        scopes: tuple[Scope, ...],
        methods: Sequence[Method],
        place: str,
        module: str | None = None,
        slice: Slice | None = None,
    ) -> None:
        part, told, wrong = assign_roles(
            methods, models, base, scopes, self.where, place=place, module=module, slice=slice
        )
        if place != "models" and len(part.lines) == 1 and _is_copied(part):
            part = replace(copy_of(part.lines[0], place, module), slice=slice)
            told = []
        self.parts.append(part)
        self.notices += told
        self.problems += wrong

    def conflicts(self) -> Iterator[Problem]:
        """The models that the parts change in different ways: each has one label."""
        first: dict[str, Input] = {}
        for model in (model for part in self.parts for model in part.models):
            known = first.setdefault(model.label, model)
            if known != model:
                text = f"{model.label} has other `rename`, `align` or `edits` than at {known.place}; give it the same"
                yield Problem(model.place, text)


def _is_copied(part: Part) -> bool:
    """True if the one model of a slice or module is copied: its method cannot merge that.

    A method of two models takes the base as the first: in a module only if its parameters are set, in a slice never,
    since the sources of a slice are all in it.
    """
    unlisted = part.method.base == "first" and (part.slice is not None or bool(missing_requirements(part)))
    return unlisted or bool(lacking_models(part))
