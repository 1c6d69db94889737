"""The model's names of the tensors that an adapter changes: as a module has them that runs, or as files have them.

PEFT names a tensor as the running model does; the file may have it without a wrapper's prefix, or by an older name.
Trainers of image models write the dots of a name as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mergekit_lfm.arch.ties import tied_names
from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.renaming import find_renaming

_UNDERSCORES = re.compile(r"^lora_(?:unet|te\d?|transformer|prior_unet)_")
_EXPERTS = re.compile(r"(^|\.)experts$")
# The models of transformers whose layers are Conv1D, which stores [in, out], and their layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


def is_conv1d(module: str, model_type: str, stated: bool) -> bool:
    """Whether a layer stores its weight as [in, out]. stated: as the adapter's config says, for unknown models."""
    return bool(_CONV1D.search(module)) if model_type in _CONV1D_MODELS else stated


def is_experts(module: Module) -> bool:
    """Whether a module holds all experts of a layer in tensors of its own."""
    return bool(_EXPERTS.search(module.name))


def has_underscores(modules: Iterable[str]) -> bool:
    """Whether some modules have the names of trainers of image models."""
    return any(_UNDERSCORES.match(name) for name in modules)


def find_names(adapter: Adapter, model: Mapping[str, TensorSpec]) -> dict[str, str]:
    """By the adapter's name of each tensor that it changes the model's; the same where no rule leads to one."""
    wanted = [f"{module.name}.weight" for module in adapter.modules if module.name and not is_experts(module)]
    wanted += adapter.saved
    if adapter.config.get("ensure_weight_tying"):  # the adapter then has the embedding's for a head without its own
        twins = {name for group in tied_names(wanted) for name in group[1:]}
        wanted = [name for name in wanted if name in model or name not in twins]
    if has_underscores(wanted):
        return _without_underscores(wanted, model, adapter.label)
    if all(name in model for name in wanted):
        return {name: name for name in wanted}
    theirs, ours = ({name: TensorSpec(name, (), "float32") for name in names} for names in (wanted, model))
    rules = find_renaming(theirs, ours, lambda name: name in ours, wrappers=True)
    rules = rules or find_renaming(theirs, ours, lambda _: True, wrappers=True)  # so that only the rest is lacking
    return {name: next((new for rule in rules if (new := rule.apply(name)) is not None), name) for name in wanted}


def _without_underscores(wanted: Iterable[str], model: Mapping[str, TensorSpec], label: str) -> dict[str, str]:
    """The model's names, under the beginning that leads to most of them, such as that of a file with several models.

    Raises PlanError if two of the model's names are alike without dots.
    """
    wanted = list(wanted)
    bare = {name: _UNDERSCORES.sub("", name.removesuffix(".weight")) for name in wanted}
    best: dict[str, list[str]] = {}
    for beginning in sorted(
        {name[: i + 1] for name in model for i, char in enumerate(name) if char == "."} | {""}, key=len
    )[:200]:
        own: dict[str, list[str]] = {}
        for name in model:
            if name.startswith(beginning) and name.endswith(".weight"):
                own.setdefault(name[len(beginning) :].removesuffix(".weight").replace(".", "_"), []).append(name)
        found = {name: own[text] for name, text in bare.items() if text in own}
        if len(found) > len(best):
            best = found
    if unclear := [f"{name}: {' or '.join(names)}" for name, names in best.items() if len(names) > 1]:
        open_names = shorten(unclear, 3)
        raise PlanError(
            f"{label}: its names have underscores for dots, which leaves open {open_names}; name them with dots"
        )
    return {name: best.get(name, [name])[0] for name in wanted}
