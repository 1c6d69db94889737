"""Every merge method of the registry with parameters, tensors and small models to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_stats import gram_of, write_fisher, write_grams
from safetensors.torch import load_file

from mergekit_lfm.api.contract import BLOCK, count_inputs, save_model
from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.methods.method import REQUIRED
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

Case = tuple[str, dict[str, Any]]

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "model_stock": [{"filter_wise": True}],
    "ties": [{"density": 0.4}, {"density": 0.4, "rescale": True}, {"density": 0.3, "scope": "global"}],
    "dare_linear": [{"density": 0.4}, {"density": 0.4, "rescale": "density"}],
    "dare_ties": [{"density": 0.4}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1, "normalize": True}],
    "passthrough": [{"scale": 0.5}],
    "della": [{"density": 0.5}],
    "della_linear": [{"density": 0.4, "rescale": "density", "epsilon": 0.3}],
    "ram": [{"epsilon": 0.05}],
    "ramplus_tl": [{"epsilon": 0.05, "alpha": 2.0}],
    "nearswap": [{"t": 0.02}],
    "pcb": [{"scope": "tensor", "density": 0.3}],
    "consensus": [{"threshold": 0.1, "agree": 3}],
    "sce": [{"select_topk": 0.3}],
    "fisher": [{"normalize": True, "epsilon": 1e-3}],
    "regmean": [{"alpha": 1.0, "ridge": 0.0}],
    "tsv": [{"decompose": "kernels"}],
    "iso_c": [{"decompose": "kernels"}],
}
CASES = [(name, extra) for name in METHODS for extra in [{}, *VARIANTS.get(name, [])]]
DELTAS = [name for name, method in METHODS.items() if method.base in ("required", "optional")]


def ids(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def parameters_of(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    """A value for each parameter that has no default, and the extras."""
    return {p.name: 0.6 for p in METHODS[name].parameters if p.default is REQUIRED} | extra


def save_statistics(model: Path, kind: str) -> Path:
    """A statistics file of all tensors of a model, or of its layers."""
    tensors, path = load_file(model / "model.safetensors"), model.with_name(f"{model.name}.stats")
    generator = torch.Generator().manual_seed(len(model.name))
    if kind == "fisher":
        return write_fisher(path, model, {n: torch.rand(x.shape, generator=generator) for n, x in tensors.items()})
    inputs = {name: x.shape[1] for name, x in tensors.items() if x.dim() == 2}
    grams = {name: gram_of(torch.randn(200, n, generator=generator)) for name, n in inputs.items()}
    return write_grams(path, model, grams, [Layer(name, None, 1, n, name, 200) for name, n in inputs.items()])


def plan_of(case: Case, folder: Path, *, big: tuple[int, int] = (300, 160), block: int = BLOCK, **more: Any) -> Plan:
    """A merge of small models by a method of the registry."""
    name, extra = case
    for offset in range(4):
        save_model(folder / f"m{offset}", offset, big)
    models: list[dict[str, Any]] = [{"model": str(folder / f"m{i + 1}")} for i in range(count_inputs(name))]
    if kind := METHODS[name].statistics:
        for model in models:
            model["stats"] = str(save_statistics(Path(model["model"]), kind))
    recipe = {"merge_method": name, "models": models, "parameters": parameters_of(name, extra), **more}
    if METHODS[name].base != "member":
        recipe["base_model"] = str(folder / ("m0" if name in DELTAS else "m1"))
    return make_plan(Recipe.parse(recipe), block=block)
