"""`merge_adapters`: several adapters to one, module by module, without the model that they are for.

Of each module the matrices of all adapters are in memory, and its merged change; of a module with experts those of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.errors import FormatError, PlanError, did_you_mean, several, shorten
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.methods.method import REQUIRED
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.adapter_recipe import SUMS, AdapterRecipe
from mergekit_lfm.recipe.recipe import read_recipe
from mergekit_lfm.recipe.source import RecipeText
from mergekit_lfm.recipe.values import Setting

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.artifacts.adapter import Adapter
    from mergekit_lfm.kernels.low_rank import Product
    from mergekit_lfm.store.checkpoint import Checkpoint
    from mergekit_lfm.store.tensors import TensorSpec
    from mergekit_lfm.views.adapters.pairs import Form, Pair

AdapterRecipeLike = AdapterRecipe | str | PathLike[str] | Mapping[str, Any] | RecipeText


@dataclass(frozen=True)
class PlannedAdapters:
    """A merge of adapters that is checked, and not made yet.

    modules: by name the pair of each adapter, None where it leaves the module alone; saved: by the model's name the
    tensors that stand in place of its own. base: the model, if the recipe names it, and base_names: its names of saved
    tensors. notices: what a user should know.
    """

    recipe: AdapterRecipe
    out: Path
    adapters: tuple[Adapter, ...]
    modules: Mapping[str, tuple[Pair | None, ...]]
    saved: Mapping[str, tuple[TensorSpec | None, ...]]
    base: Checkpoint | None
    base_names: Mapping[str, str]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module of a merged adapter. kept: the share of its merged change, in squares, that its rank holds."""

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    kept: float


@dataclass(frozen=True)
class MergedAdapter:
    """The result of a merge of adapters: its modules, and the tensors that it saves whole."""

    modules: tuple[MergedModule, ...]
    saved: tuple[str, ...]

    @property
    def kept(self) -> float:
        """The share of the merged changes of all modules, in squares, that is in the adapter."""
        total = sum(module.energy for module in self.modules)
        return sum(module.energy * module.kept for module in self.modules) / total if total else 1.0


def merge_adapters(
    adapters: Sequence[StrPath],
    out: StrPath,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    space: str = "product",
    rank: int | None = None,
    energy: float | None = None,
    base: StrPath | None = None,
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **parameters: Any,
) -> Outcome[MergedAdapter]:
    """Merge adapters of one model to one adapter, which PEFT loads. The model itself is not needed.

    adapters: folders, files or names on the Hub. method: one that merges changes to a base, `linear`, or PEFT's `cat` and
    `svd`. weights: one for each adapter, 1 by default where the method needs them. space: "product" merges the changes
    of weights themselves, "knots" and "core" their coordinates in a basis that the adapters share. rank: of the result
    at most; or energy, the share of the squares of every change that it holds at least. base: the model, which is read
    where adapters save tensors whole. Parameters are those of the method, `lambda` as `lambda_`: a value for all
    adapters, or a list with one for each.

    Raises PlanError or FormatError with all that does not fit, before anything is written.
    """
    data: dict[str, Any] = {"job": "adapters", "merge_method": method, "space": space, "dtype": dtype, "seed": seed}
    data |= {key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}
    if base is not None:
        data["base_model"] = str(expand(base, "base"))
    data |= _with_parameters([str(expand(adapter, "adapter")) for adapter in adapters], method, weights, parameters)
    return merge_adapter_recipe(data, out, overwrite=overwrite, progress=progress)


def _with_parameters(
    adapters: Sequence[str], method: str, weights: Sequence[float] | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe's `adapters` and `parameters`, from arguments with a list for what each adapter has its own of."""
    declared = METHODS.get("linear" if method in SUMS else method)
    known = {} if declared is None else {parameter.name: parameter for parameter in declared.parameters}
    given = {"lambda" if name == "lambda_" else name: value for name, value in parameters.items()}
    for name in given.keys() - known.keys() if known else ():
        raise PlanError(f"{method} has no parameter {name!r}, {did_you_mean(name, known)}")
    if weights is not None:
        given["weight"] = list(weights)
    elif "weight" in known and known["weight"].default is REQUIRED:
        given.setdefault("weight", 1.0)
    lines: list[dict[str, Any]] = [{"adapter": adapter, "parameters": {}} for adapter in adapters]
    for name in [name for name, value in given.items() if isinstance(value, list | tuple) and known.get(name)]:
        values = given.pop(name)
        if len(values) != len(lines):
            raise PlanError(f"{name}: found {len(values)} values, expected one for each of {len(lines)} adapters")
        for line, value in zip(lines, values, strict=True):
            line["parameters"][name] = value
    return {"adapters": lines, "parameters": given}


def merge_adapter_recipe(
    recipe: AdapterRecipeLike | PlannedAdapters,
    out: StrPath | None = None,
    *,
    overwrite: bool = False,
    allow_unknown: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[MergedAdapter]:
    """Merge adapters as a recipe with `job: adapters` says (a YAML file, data, or the result of `plan_adapters`).

    out: by default the recipe's `output`, else `merged/<name of the recipe file>`. Otherwise as `merge_adapters`.
    """
    from mergekit_lfm.output.adapter import new_adapter
    from mergekit_lfm.output.save import check_out

    started = time.monotonic()
    planned = recipe
    if not isinstance(planned, PlannedAdapters):
        planned = plan_adapters(planned, out, allow_unknown=allow_unknown).result
    inputs = {adapter.label: adapter.tensors.path for adapter in planned.adapters}
    if planned.base is not None:
        inputs[f"the base {planned.recipe.base_model}"] = planned.base.path
    check_out(planned.out, inputs, overwrite=overwrite)
    modules = list[MergedModule]()
    with new_adapter(planned.out, _output_of(planned)) as adapter, progress.by_count("modules", "merging") as count:
        for name in planned.modules:
            modules.append(_merge_module(planned, name, adapter))
            count(len(modules), len(planned.modules))
        for name, tensor in _merged_saved(planned):
            adapter.save(name, tensor)
    merged = MergedAdapter(tuple(modules), tuple(planned.saved))
    warnings = warn_of(planned.notices)
    return Outcome(planned.out, merged, warnings=warnings, seconds=time.monotonic() - started)


def plan_adapters(
    recipe: AdapterRecipeLike, out: StrPath | None = None, *, allow_unknown: bool = False
) -> Outcome[PlannedAdapters]:
    """Check a merge of adapters, and say what it would make. Only headers are read, but for tensors that are saved whole.

    Raises PlanError or FormatError with all that does not fit.
    """
    from mergekit_lfm.store.checkpoint import open_checkpoint
    from mergekit_lfm.views.quantisation import dequantise

    started = time.monotonic()
    recipe, default = _read(recipe, allow_unknown=allow_unknown)
    place = out or recipe.output or default
    if place is None:
        raise PlanError("no output: give OUT (in Python `out`), or give the recipe an `output`")
    adapters, pairs = _open_all(recipe)
    base = None if recipe.base is None else dequantise(open_checkpoint(recipe.base))
    modules = {
        name: tuple(own.get(name) for own in pairs) for name in dict.fromkeys(name for own in pairs for name in own)
    }
    saved = {
        name: tuple(adapter.saved.get(name) for adapter in adapters)
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.saved)
    }
    names = _names_in_base(adapters, base)
    planned = PlannedAdapters(recipe, expand(place), adapters, modules, saved, base, names, ())
    problems = [*_differing_forms(planned), *_saved_problems(planned), *_idle_filters(planned)]
    if problems:
        raise PlanError(several("the adapters cannot be merged", problems))
    notices = (*recipe.notices, *_notices(planned))
    planned = PlannedAdapters(recipe, expand(place), adapters, modules, saved, base, names, notices)
    return Outcome(planned.out, planned, warnings=notices, seconds=time.monotonic() - started)


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

    adapters, pairs, problems = list[Adapter](), list[dict[str, Pair]](), list[str]()
    for line in recipe.lines:
        try:
            adapters.append(open_adapter(line.input.source, line.input.label))
            pairs.append(find_pairs(adapters[-1], line.scale))
        except (FormatError, PlanError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("the adapters cannot be merged", problems))
    return tuple(adapters), pairs


def _names_in_base(adapters: Sequence[Adapter], base: Checkpoint | None) -> dict[str, str]:
    """By the adapters' names of saved tensors the base's."""
    from mergekit_lfm.views.adapters.names import find_names

    names: dict[str, str] = {}
    for adapter in adapters if base is not None else ():
        found = find_names(adapter, base)
        names |= {name: found[name] for name in adapter.saved}
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
    known = [*map(_weight, planned.modules), *planned.saved]
    settings: list[tuple[str, Mapping[str, Setting]]] = [(scope.place, scope.settings) for scope in part.scopes]
    settings += [(f"{model.place}.parameters", model.settings) for model in part.inputs]
    for place, own in settings:
        for name, rule in ((name, rule) for name, setting in own.items() for rule in setting):
            if rule.filter is not None and not any(rule.filter in each for each in known):
                words = {word for each in known for word in each.split(".") if not word.isdecimal()}
                cure = did_you_mean(rule.filter, words)
                yield f"{place}.{name}: filter {rule.filter!r} is part of no tensor's name, {cure}"


def _notices(planned: PlannedAdapters) -> Iterator[str]:
    """What a user should know, although the adapters are merged."""
    bases = dict.fromkeys(adapter.base for adapter in planned.adapters if adapter.base)
    if len(bases) > 1:
        named = ", ".join(f"{a.label} on {a.base}" for a in planned.adapters if a.base)
        yield f"the adapters say that they were trained on several models: {named}; the result names the first"
    for i, adapter in enumerate(planned.adapters):
        alone = [name for name, pairs in planned.modules.items() if pairs[i] is None]
        if alone:
            count = f"{len(alone)} of {len(planned.modules)} modules"
            yield f"{adapter.label} does not change {count}, such as {shorten(alone, 1)}; there its change is 0"


def _weight(module: str) -> str:
    return f"{module}.weight"


def _output_of(planned: PlannedAdapters) -> Any:
    raise NotImplementedError


def _merge_module(planned: PlannedAdapters, name: str, adapter: Any) -> MergedModule:
    """Merge one module, and add it to the new adapter."""
    raise NotImplementedError


def _merged_saved(planned: PlannedAdapters) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged tensors that are saved whole."""
    raise NotImplementedError
