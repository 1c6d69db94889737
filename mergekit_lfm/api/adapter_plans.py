"""Merges of adapters that are planned: what each adapter changes, and whether the changes fit together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import FormatError, PlanError, did_you_mean, several, shorten
from mergekit_lfm.recipe.adapter_recipe import AdapterRecipe
from mergekit_lfm.recipe.recipe import read_recipe
from mergekit_lfm.recipe.source import RecipeText
from mergekit_lfm.recipe.values import Setting

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.artifacts.adapter import Adapter
    from mergekit_lfm.output.adapter import AdapterOutput, NewAdapter
    from mergekit_lfm.output.request import Request
    from mergekit_lfm.store.checkpoint import Checkpoint
    from mergekit_lfm.store.tensors import TensorSpec
    from mergekit_lfm.views.adapters.pairs import Form, Pair

AdapterRecipeLike = AdapterRecipe | str | PathLike[str] | Mapping[str, Any] | RecipeText


@dataclass(frozen=True)
class PlannedAdapters:
    """A merge of adapters that is checked, and not made yet.

    modules: by name the pair of each adapter, None where it leaves the module alone; saved: by the model's name the
    tensors that stand in place of its own. base: the model, if the recipe names it, and base_names: its names of saved
    tensors. tied: the modules of an embedding and of a head that gets the same. notices: what a user should know.
    """

    recipe: AdapterRecipe
    out: Path
    adapters: tuple[Adapter, ...]
    modules: Mapping[str, tuple[Pair | None, ...]]
    saved: Mapping[str, tuple[TensorSpec | None, ...]]
    base: Checkpoint | None
    base_names: Mapping[str, str]
    tied: tuple[str, str] | None = None
    notices: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The dtype of the result."""
        return self.recipe.dtype or "float32"

    def form(self, module: str) -> Form:
        """The form of the changes of a module."""
        return next(pair.form for pair in self.modules[module] if pair is not None)

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of the changes of a module: [out, in], a convolution's with its kernel, or [experts, out, in]."""
        form = self.form(module)
        return *([form.experts] if form.experts else []), form.out, *form.columns

    def weight(self, module: str) -> str:
        """The name of the tensor that is changed in a module: that of experts is known by its own."""
        return module if self.form(module).experts else f"{module}.weight"

    @cached_property
    def request(self) -> Request:
        """The request that the adapter answers."""
        from mergekit_lfm.output.request import Request, RequestInput

        inputs = [RequestInput(adapter.label, adapter.tensors, adapter.config) for adapter in self.adapters]
        if self.base is not None:
            inputs.append(RequestInput(str(self.recipe.base_model), self.base, {}))
        return Request(self.recipe.normalised(), _public_recipe(self.recipe), tuple(inputs))

    @cached_property
    def output(self) -> AdapterOutput:
        """The facts in the adapter's files besides its tensors."""
        return _output_of(self)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data: all modules, at the rank that they can have at most."""
        import torch

        from mergekit_lfm.output.adapter import NewAdapter

        dtype = getattr(torch, self.dtype)
        adapter = NewAdapter(self.output, None)
        for name in self.modules:
            form = self.form(name)
            most = min(form.out, form.width)
            rank, count = min(self.recipe.rank or most, most), max(1, form.experts)
            a = torch.empty(count, rank, *form.columns, dtype=dtype, device="meta")
            b = torch.empty(count, form.out, rank, dtype=dtype, device="meta")
            add_module(adapter, name, form, a, b)
        for name, specs in self.saved.items():
            shape = next(spec.shape for spec in specs if spec is not None)
            adapter.save(name, torch.empty(shape, dtype=dtype, device="meta"))
        adapter.stand_in(folder)


def plan_adapters(
    recipe: AdapterRecipeLike, out: StrPath | None = None, *, seed: int | None = None, allow_unknown: bool = False
) -> Outcome[PlannedAdapters]:
    """Check a merge of adapters, and say what it would make. It reads headers, and tensors that are saved whole.

    Raises PlanError or FormatError with all that does not fit.
    """
    started = time.monotonic()
    recipe, default = _read(recipe, allow_unknown=allow_unknown)
    place = out or recipe.output or default
    if place is None:
        raise PlanError("no output: give OUT (in Python `out`), or give the recipe an `output`")
    planned = plan_adapter_recipe(recipe, expand(place), seed=seed)
    return Outcome(planned.out, planned, warnings=planned.notices, seconds=time.monotonic() - started)


def plan_adapter_recipe(recipe: AdapterRecipe, out: Path, *, seed: int | None = None) -> PlannedAdapters:
    """The same for a recipe that is read, and for the folder of its output."""
    from mergekit_lfm.store.checkpoint import open_checkpoint
    from mergekit_lfm.views.quantisation import dequantise

    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    adapters, pairs = _open_all(recipe)
    base = None if recipe.base is None else dequantise(open_checkpoint(recipe.base))
    modules = {
        name: tuple(own.get(name) for own in pairs) for name in dict.fromkeys(name for own in pairs for name in own)
    }
    saved = {
        name: tuple(adapter.saved.get(name) for adapter in adapters)
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.saved)
    }
    tied = _tied(adapters)
    if tied is not None:  # the head follows the embedding
        modules.pop(tied[1], None)
        saved.pop(f"{tied[1]}.weight", None)
    names = _names_in_base(adapters, base)
    planned = PlannedAdapters(recipe, out, adapters, modules, saved, base, names, tied)
    problems = [*_differing_forms(planned), *_saved_problems(planned), *_idle_filters(planned)]
    if problems:
        raise PlanError(several("the adapters cannot be merged", problems))
    return replace(planned, notices=(*recipe.notices, *_notices(planned)))


def _read(recipe: AdapterRecipeLike, *, allow_unknown: bool) -> tuple[AdapterRecipe, Path | None]:
    """The recipe, and the output by its file's name."""
    if isinstance(recipe, AdapterRecipe):
        return recipe, None
    if isinstance(recipe, RecipeText):
        return AdapterRecipe.parse(recipe.text, recipe.where, recipe.label, allow_unknown=allow_unknown), None
    if isinstance(recipe, Mapping):
        return AdapterRecipe.parse(recipe, allow_unknown=allow_unknown), None
    path = Path(recipe)
    read = AdapterRecipe.parse(read_recipe(path), path.absolute().parent, str(path), allow_unknown=allow_unknown)
    return read, Path("merged") / path.stem


def _open_all(recipe: AdapterRecipe) -> tuple[tuple[Adapter, ...], list[dict[str, Pair]]]:
    """The adapters, and what each changes. Raises PlanError with the problems of all."""
    from mergekit_lfm.artifacts.adapter import open_adapter
    from mergekit_lfm.views.adapters.pairs import find_pairs

    adapters: list[Adapter] = []
    pairs: list[dict[str, Pair]] = []
    problems: list[str] = []
    for line in recipe.lines:
        try:
            adapters.append(open_adapter(line.input.source, line.input.label))
            pairs.append(find_pairs(adapters[-1], line.scale))
        except (FormatError, PlanError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("the adapters cannot be merged", problems))
    return tuple(adapters), pairs


def _tied(adapters: Sequence[Adapter]) -> tuple[str, str] | None:
    """The modules of an embedding and of a head, if all adapters that have tensors of them keep the two alike."""
    from mergekit_lfm.arch.ties import tied_names

    own = [{f"{module.name}.weight" for module in adapter.modules} | {*adapter.saved} for adapter in adapters]
    for group in tied_names(dict.fromkeys(name for names in own for name in names)):
        having = [adapter for adapter, names in zip(adapters, own, strict=True) if not names.isdisjoint(group)]
        if len(group) > 1 and all(adapter.config.get("ensure_weight_tying") for adapter in having):
            return group[0].removesuffix(".weight"), group[-1].removesuffix(".weight")
    return None


def _names_in_base(adapters: Sequence[Adapter], base: Checkpoint | None) -> dict[str, str]:
    """By the adapters' names of saved tensors the base's."""
    from mergekit_lfm.views.adapters.names import find_names

    names: dict[str, str] = {}
    if base is None:
        return names
    for adapter in adapters:
        found = find_names(adapter, base)
        names |= {name: found.get(name, name) for name in adapter.saved}
    return names


def _differing_forms(planned: PlannedAdapters) -> Iterator[str]:
    """A problem for each module that the adapters have in several shapes."""
    for name, pairs in planned.modules.items():
        forms = {a.label: pair.form for a, pair in zip(planned.adapters, pairs, strict=True) if pair is not None}
        if len(set(forms.values())) > 1:
            found = ", ".join(f"in {label} {form}" for label, form in forms.items())
            yield f"{name} has several shapes: {found}; give adapters of one model"


def _saved_problems(planned: PlannedAdapters) -> Iterator[str]:
    """A problem for each tensor that is saved whole and cannot be merged."""
    base, method = planned.base, planned.recipe.part.method
    for name, specs in planned.saved.items():
        held = {a.label: spec for a, spec in zip(planned.adapters, specs, strict=True) if spec is not None}
        shapes = {label: spec.shape for label, spec in held.items()}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"in {label} {list(shape)}" for label, shape in shapes.items())
            yield f"{name} has several shapes: {found}; give adapters of one model"
            continue
        own = None if base is None else base.get(planned.base_names[name])
        if base is not None:
            if own is None or own.shape != next(iter(shapes.values())):
                found = "no such tensor" if own is None else f"{list(own.shape)}"
                yield f"{name} is saved in {', '.join(held)}, the base has {found}; give the model they were trained on"
            continue
        lacking = [label for label in (a.label for a in planned.adapters) if label not in held]
        if lacking:
            yield f"{name} is saved in {', '.join(held)} alone: give `base_model`, whose value the others keep"
        elif method.name != "linear" and not _are_equal(planned, name):
            text = "is saved whole, with other values in each adapter"
            yield f"{name} {text}: give `base_model`, which {method.name} subtracts, or choose `linear`"


def _are_equal(planned: PlannedAdapters, name: str) -> bool:
    """True if all adapters save the same bytes as a tensor."""
    pairs = [(a, spec) for a, spec in zip(planned.adapters, planned.saved[name], strict=True) if spec is not None]
    kinds = {(spec.dtype, adapter.tensors.digest_of(spec.name)) for adapter, spec in pairs}
    return len(kinds) == 1 and len(pairs) == len(planned.adapters)


def _idle_filters(planned: PlannedAdapters) -> Iterator[str]:
    """A problem for each filter that is part of no tensor's name."""
    part = planned.recipe.part
    known = [*map(planned.weight, planned.modules), *planned.saved]
    settings: list[tuple[str, Mapping[str, Setting]]] = [(scope.place, scope.settings) for scope in part.scopes]
    settings += [(f"{model.place}.parameters", model.settings) for model in part.inputs]
    for place, own in settings:
        for name, rule in ((name, rule) for name, setting in own.items() for rule in setting):
            if rule.filter is not None and not any(rule.filter in each for each in known):
                words = {word for each in known for word in each.split(".") if not word.isdecimal()}
                cure = did_you_mean(rule.filter, words)
                yield f"{place}.{name}: filter {rule.filter!r} is part of no tensor's name, {cure}"


def _notices(planned: PlannedAdapters) -> Iterator[str]:
    """The facts that a user should know, although the adapters are merged."""
    bases = dict.fromkeys(adapter.base for adapter in planned.adapters if adapter.base)
    if len(bases) > 1:
        named = ", ".join(f"{a.label} on {a.base}" for a in planned.adapters if a.base)
        yield f"the adapters say that they were trained on several models: {named}; the result names the first"
    for i, adapter in enumerate(planned.adapters):
        alone = [name for name, pairs in planned.modules.items() if pairs[i] is None]
        if alone:
            count = f"{len(alone)} of {len(planned.modules)} modules"
            yield f"{adapter.label} does not change {count}, such as {shorten(alone, 1)}; there its change is 0"


def add_module(adapter: NewAdapter, name: str, form: Form, a: Tensor, b: Tensor) -> None:
    """Add a module's matrices a [experts or 1, rank, in] and b [experts or 1, out, rank] to a new adapter."""
    if form.experts:
        adapter.add_experts(name, a, b)
        return
    rank, axes = a.shape[1], [1] * (len(form.columns) - 1)  # a convolution's
    adapter.add(name, a.view(rank, *form.columns), b.view(form.out, rank, *axes), embedding=form.embedding)


def _output_of(planned: PlannedAdapters) -> AdapterOutput:
    """The facts about the new adapter besides its tensors."""
    from mergekit_lfm.output.adapter import AdapterOutput
    from mergekit_lfm.output.card import code_block, recipe_text
    from mergekit_lfm.store.hub import hub_name

    configs = [adapter.config for adapter in planned.adapters]
    tasks = {config.get("task_type") for config in configs}
    base = next((adapter.base for adapter in planned.adapters if adapter.base), None)
    recipe = code_block(recipe_text(_public_recipe(planned.recipe)), "yaml")
    layers = {name.removesuffix("bias") + "weight" for name in planned.saved if name.endswith(".bias")}
    return AdapterOutput(
        names={*map(planned.weight, planned.modules), *planned.saved, *layers},
        complete=False,
        base=base,
        repo=base if base and hub_name(base) else None,
        task=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        tied=planned.tied,
        about=f"It was merged from other adapters:\n\n{recipe}",
    )


def _public_recipe(recipe: AdapterRecipe) -> dict[str, Any]:
    """The recipe without the folders of this machine, and without empty settings."""
    from mergekit_lfm.output.names import last_name, public_names

    data = recipe.normalised()
    names = public_names([line["adapter"] for line in data["adapters"]])
    lines = [{**line, "adapter": names[line["adapter"]]} for line in data["adapters"]]
    data["adapters"] = [{key: value for key, value in line.items() if value != {}} for line in lines]
    if "base_model" in data:
        data["base_model"] = last_name(data["base_model"])
    return {key: value for key, value in data.items() if value != {}}
