"""`merge_adapters`: several adapters to one, module by module, without the model that they are for.

Of each module the matrices of all adapters are in memory, and its merged change; of a module with experts those of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.adapter_plans import AdapterRecipeLike, PlannedAdapters, add_module, plan_adapters
from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.errors import FormatError, PlanError, did_you_mean
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.methods.method import REQUIRED, Value
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.adapter_recipe import SUMS
from mergekit_lfm.recipe.parts import Settings
from mergekit_lfm.recipe.settings import SettingsTable

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.artifacts.adapter import Adapter
    from mergekit_lfm.kernels.products import Product
    from mergekit_lfm.output.adapter import NewAdapter
    from mergekit_lfm.store.tensors import TensorSpec


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

    adapters: folders, files or names on the Hub. method: one that merges changes to a base, `linear`, or PEFT's `cat`
    and `svd`. weights: one for each adapter, 1 by default where the method needs them. space: "product" merges the
    changes of weights themselves, "knots" and "core" their coordinates in a basis that the adapters share. rank: of the
    result at most; or energy, the share of the squares of every change that it holds at least. base: the model, which
    is read where adapters save tensors whole. Parameters are those of the method, `lambda` as `lambda_`: a value for
    all adapters, or a list with one for each.

    Raises PlanError or FormatError with all that does not fit, before anything is written.
    """
    data: dict[str, Any] = {"job": "adapters", "merge_method": method, "space": space, "dtype": dtype, "seed": seed}
    data |= {key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}
    if base is not None:
        data["base_model"] = str(expand(base, "base"))
    if isinstance(adapters, str | PathLike):
        raise PlanError(f"adapters: found {str(adapters)!r}, expected a list of adapters")
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
    import torch

    from mergekit_lfm.output.adapter import new_adapter
    from mergekit_lfm.plan.layers import find_layers

    started = time.monotonic()
    planned = recipe
    if not isinstance(planned, PlannedAdapters):
        planned = plan_adapters(planned, out, allow_unknown=allow_unknown).result
    request = planned.request
    if request.is_answered(planned.out, overwrite=overwrite):
        there, warnings = _read_result(planned.out), warn_of(planned.notices)
        return Outcome(planned.out, there, request.digest, True, warnings, time.monotonic() - started)
    table, modules = SettingsTable(planned.recipe.part), list[MergedModule]()
    layers = find_layers([*map(planned.weight, planned.modules), *planned.saved])
    threads, counting = torch.get_num_threads(), progress.by_count("modules", "merging")
    torch.set_num_threads(1)  # more would add the parts of a sum in another order
    try:
        with new_adapter(planned.out, planned.output, request) as adapter, counting as count:
            for name in planned.modules:
                modules.append(_merge_module(planned, name, table, layers.get(planned.weight(name)), adapter))
                count(len(modules), len(planned.modules))
            for name in planned.saved:
                tensor = _merge_saved(planned, name, table.of(name, layers.get(name)))
                adapter.save(name, _round(tensor, name, planned.dtype))
            merged = MergedAdapter(tuple(modules), tuple(planned.saved))
            adapter.result = asdict(merged)
    finally:
        torch.set_num_threads(threads)
    return Outcome(planned.out, merged, request.digest, False, warn_of(planned.notices), time.monotonic() - started)


def _read_result(out: Path) -> MergedAdapter:
    """The contents of an adapter that an earlier run has made, from its lock."""
    from mergekit_lfm.output.request import result_of

    result = result_of(out)
    modules = (MergedModule(**{**module, "shape": tuple(module["shape"])}) for module in result["modules"])
    return MergedAdapter(tuple(modules), tuple(result["saved"]))


def _merge_module(
    planned: PlannedAdapters, name: str, table: SettingsTable, layer: tuple[int, int] | None, adapter: NewAdapter
) -> MergedModule:
    """Merge the changes of one module, and add it to the new adapter."""
    import torch

    from mergekit_lfm.api.spaces import ModuleMerge, merge_products
    from mergekit_lfm.kernels.products import Limit

    recipe, form, weight = planned.recipe, planned.form(name), planned.weight(name)
    limit = Limit(recipe.rank, recipe.energy)
    if recipe.merge_method == "svd" and limit == Limit():
        limit = Limit(max(pair.rank for pair in planned.modules[name] if pair is not None))
    merge = ModuleMerge(recipe.part.method, weight, table.of(weight, layer), recipe.space, limit, recipe.seed)
    products = _read_products(planned, name)
    if form.experts:
        done = [
            merge_products(replace(merge, name=f"{weight}[{e}]"), [x and x.expert(e, form.experts) for x in products])
            for e in range(form.experts)
        ]
        rank = max(each.product.rank for each in done)
    else:
        done = [merge_products(merge, products)]
        rank = done[0].product.rank
    padded = [each.product.padded(rank) for each in done]
    a, b = (_round(torch.stack([each[side] for each in padded]), name, planned.dtype) for side in (1, 0))
    add_module(adapter, name, form, a, b)
    energy, kept = (sum(values) for values in zip(*((each.energy, each.kept) for each in done), strict=True))
    return MergedModule(name, planned.shape(name), rank, energy, kept / energy if energy else 1.0)


def _read_products(planned: PlannedAdapters, name: str) -> list[Product | None]:
    """The change of a module by each adapter; of experts that of all of them, as PEFT has it."""
    import torch

    from mergekit_lfm.kernels.products import Product

    products: list[Product | None] = []
    for adapter, pair in zip(planned.adapters, planned.modules[name], strict=True):
        if pair is None:
            products.append(None)
            continue
        a, b = (_read(adapter, spec).flatten(1) for spec in (pair.a, pair.b))
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        products.append(Product(b.to(dtype) * pair.scale, a.to(dtype)))
    return products


def _read(adapter: Adapter, spec: TensorSpec) -> torch.Tensor:
    """A tensor of an adapter. Raises FormatError if it is not finite."""
    x = adapter.tensors.read(spec.name).view(spec.shape)
    if not bool(x.isfinite().all()):
        raise FormatError(f"{adapter.label}: {spec.name} holds NaN or infinity; train or save the adapter again")
    return x


def _round(x: torch.Tensor, name: str, dtype: str) -> torch.Tensor:
    """A merged tensor in the output's dtype. Raises PlanError if it overflows there."""
    import torch

    rounded = x.to(getattr(torch, dtype))
    if not bool(rounded.isfinite().all()):
        raise PlanError(f"{name}: its merged values are too large for {dtype}; choose another `dtype`")
    return rounded


def _merge_saved(planned: PlannedAdapters, name: str, settings: Settings) -> torch.Tensor:
    """A tensor that is saved whole: its merged change to the base, or without one the weighted mean of its values."""
    import torch

    from mergekit_lfm.api.tensors import merge_checked

    recipe, method = planned.recipe, planned.recipe.part.method
    values = [
        None if spec is None else _read(adapter, spec)
        for adapter, spec in zip(planned.adapters, planned.saved[name], strict=True)
    ]
    held, scales = [x for x in values if x is not None], [line.scale for line in recipe.lines]
    if planned.base is None and all(x.dtype == held[0].dtype and torch.equal(x, held[0]) for x in held):
        return held[0]
    if planned.base is None:
        weights = [float(own["weight"]) for own in settings.inputs]  # type: ignore[arg-type]
        shares: list[dict[str, Value]] = [{"weight": w * scale} for w, scale in zip(weights, scales, strict=True)]
        mean = Settings({"normalize": True}, tuple(shares))
        return merge_checked(method, name, mean, held, None, (), recipe.seed)
    spec = planned.base[planned.base_names[name]]
    base = planned.base.read(spec.name).view(spec.shape)
    dtype = torch.float64 if torch.float64 in {x.dtype for x in (base, *held)} else torch.float32
    base = base.to(dtype)
    changes = [
        torch.zeros_like(base) if x is None else (x.to(dtype) - base) * scale
        for x, scale in zip(values, scales, strict=True)
    ]
    zero = None if method.base == "member" else torch.zeros_like(base)
    return base + merge_checked(method, name, settings, changes, zero, (), recipe.seed)
