"""Methods and documents of other tools, so that messages call them by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.errors import PlanError, did_you_mean

FUSION_BENCH = "FusionBench"
DIFFUSION = "tools for Stable Diffusion"
# Methods of other tools, or their names there: the tool, and the nearest method here.
METHODS_ELSEWHERE = {
    "cabs": ("mergekit", "ties"),
    "core_space": ("mergekit", "tsv"),
    "lrp": ("mergekit", "ties"),
    "zipit": ("mergekit", "linear"),
    "fisher_merging": (FUSION_BENCH, "fisher"),
    "simple_average": (FUSION_BENCH, "linear"),
    "ties_merging": (FUSION_BENCH, "ties"),
    "weighted_average": (FUSION_BENCH, "linear"),
    "add_difference": (DIFFUSION, "task_arithmetic"),
    "weighted_sum": (DIFFUSION, "linear"),
    "magnitude_prune": ("peft", "breadcrumbs"),
    "magnitude_prune_svd": ("peft", "breadcrumbs"),
    "ties_svd": ("peft", "ties"),
    "dare_ties_svd": ("peft", "dare_ties"),
    "dare_linear_svd": ("peft", "dare_linear"),
}
A_JOB = "a merge has no `job`: give the recipe to `merge` on the command line, or to run_recipe in Python"
# Documents of other tools: keys by which one is known, its description, and what to do.
DOCUMENTS = (
    (
        ("experts", "gate_mode", "experts_per_token", "shared_experts"),
        "a config of mergekit-moe, which makes a mixture of experts out of dense models",
        "that is not supported in this version; make it with mergekit-moe, whose outputs merge here like other models",
    ),
    (
        ("genome",),
        "a config of mergekit-evolve, which searches for the parameters of a merge",
        "that is not supported in this version; write a recipe with the parameters that you want",
    ),
    (
        ("donor", "donor_model"),
        "a call of mergekit-tokensurgeon, which gives a model the tokenizer of another",
        "that is not supported in this version; give the model to this program when it has its tokenizer",
    ),
    (
        ("layer_slices",),
        "a config of bakllama, which stacks layers",
        "write `slices` with `merge_method: passthrough`, each with its `sources` and their `layer_range`",
    ),
)


def unknown_method(name: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The sentence of the error about a name that is not among the methods, and its words."""
    tool, nearest = METHODS_ELSEWHERE.get(name.lower(), ("", ""))
    if tool:
        sentence = "{found} is a method of {tool} that is not here; {cure}"
        return sentence, {"found": name, "tool": tool, "cure": f"nearest: {nearest}"}
    return "unknown method {found}, {cure}", {"found": repr(name), "cure": did_you_mean(name, known)}


def refuse_foreign(data: Mapping[str, Any], label: str) -> None:
    """Raise PlanError if a document is for another job or another tool."""
    if "job" in data:
        raise PlanError("{place}: {found}: {cure}", place=label, found=f"job {data['job']}", cure=A_JOB)
    for keys, what, cure in DOCUMENTS:
        found = [f"`{key}`" for key in keys if key in data]
        if found:
            sentence = "{place}: found {found}: this is {what}; {cure}"
            raise PlanError(sentence, place=label, found=", ".join(found), what=what, cure=cure)
