"""Edit facts in a model: ROME one after another, MEMIT all at once. The result is a patch; the model does not change.

The search changes the weights of the edited layers in place, since later layers depend on them, and puts them back bit
for bit at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_lfm.artifacts.facts import FactsFile, as_facts
from mergekit_lfm.artifacts.patch import Patch, TensorChange
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.edit.covariance import Covariance, second_moments
from mergekit_lfm.edit.sites import Site, find_sites
from mergekit_lfm.edit.targets import EditedModel, check_texts, frozen_eval, max_tokens
from mergekit_lfm.edit.work import CPU, Changes, Editor, EditWork, restore_weights
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.recipe.edit import edit_options
from mergekit_lfm.recipe.registry import EDIT_METHODS
from mergekit_lfm.runtime.load import Loaded, tokenizer_for_texts
from mergekit_lfm.runtime.locate import locate_tensors

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer


def edit(
    model: nn.Module | Loaded,
    tokenizer: Tokenizer | None,
    facts: Any,
    *,
    method: str = "memit",
    covariance: Covariance = None,
    preset: str | None = None,
    dtype: torch.dtype | str = torch.float64,
    progress: Count | None = None,
    **options: Any,
) -> Patch:
    """A patch that makes the model say the facts. The model itself does not change.

    model: a transformers model, or a result of `load_model`; then the patch uses its files' names and records which
    model it is for. The patch's tensors are on the CPU. facts: as `as_facts` takes them. covariance: second
    moments of the inputs of the layers' down-projections, by layer number or weight, [in, in]; a statistics file of
    kind gram; or "identity". dtype: of the solves, which run on the GPU if the model does; the model keeps its own,
    which the patch records unless it is float32. options: the parameters of the method (`EDIT_METHODS`; `lambda_` for
    `lambda`), `layers`, `context_templates` and `kl_template`. progress: called with (facts searched, all facts).

    Raises PlanError for options that are wrong or that the model cannot honour and, with MEMIT, for two facts about one
    subject, which would undo each other. Source: `EDIT_METHODS`.
    """
    user_options = {"lambda" if name == "lambda_" else name: value for name, value in options.items()}
    if isinstance(covariance, str):
        user_options["covariance"] = covariance
    all_options = edit_options(method, user_options, preset=preset, place="edit")
    covariance = all_options["covariance"] if covariance is None else covariance
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    facts_file = as_facts(facts)
    loaded = model if isinstance(model, Loaded) else None
    module = model.model if isinstance(model, Loaded) else model
    tokenizer = tokenizer_for_texts(tokenizer or (loaded.tokenizer if loaded else None))
    editor: Editor = EDIT_METHODS[method]
    sites = select_sites(find_sites(module), method, all_options["layers"])
    names = {site.weight: site.weight for site in sites}
    if loaded is not None:
        stored_names, _ = locate_tensors(module, loaded.checkpoint)
        names = {site.weight: stored_names[site.weight] for site in sites}
    content = loaded.checkpoint.content if loaded is not None and isinstance(covariance, Statistics) else None
    moments = second_moments(covariance, sites, names, content, ridge=all_options["ridge"], dtype=dtype)
    work = EditWork(EditedModel(module, tokenizer, max_tokens(module)), sites, moments, all_options, dtype, progress)
    check_texts(work.subject, facts_file.facts, work.contexts, all_options["kl_template"])
    with frozen_eval(module), restore_weights(sites), torch.no_grad():
        changes = editor.solve(work, facts_file.facts)
    used_options: dict[str, Any] = {
        **all_options,
        "layers": [site.layer for site in sites],
        "dtype": str(dtype).removeprefix("torch."),
        "covariance": _describe(covariance),
    }
    if work.device != CPU:
        used_options["device"] = work.device.type
    if (runs_in := running_dtype(module)) != "float32":
        used_options["model_dtype"] = runs_in
    return _make_patch(changes, sites, names, loaded, method, used_options, facts_file)


def running_dtype(module: nn.Module) -> str:
    """The name of the dtype in which a model runs, on which the changes depend."""
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _describe(covariance: Covariance) -> str:
    """The name that the patch records for its second moments."""
    if isinstance(covariance, Statistics):
        return f"gram of data {covariance.info.data}"
    return covariance if isinstance(covariance, str) else "given as tensors"


def select_sites(sites: Sequence[Site], method: str, layers: Sequence[int] | None) -> list[Site]:
    """The sites of `layers`, or of the method's band. Raises PlanError for layers that the model does not have."""
    depth, editor = len(sites), EDIT_METHODS[method]
    if layers is None:
        first, last = editor.band
        layers = range(round(first * depth), max(round(first * depth), round(last * depth)) + 1)
    if absent := [layer for layer in layers if layer >= depth]:
        raise PlanError(
            f"edit.layers: the model has no layer {absent[0]}; it has {depth}, 0 to {depth - 1}. Choose from them"
        )
    if not editor.several and len(layers) > 1:
        raise PlanError(f"edit.layers is {list(layers)}, but {method} edits one layer. Choose one, or use memit")
    return [sites[layer] for layer in layers]


def _make_patch(
    changes: Changes,
    sites: Sequence[Site],
    names: Mapping[str, str],
    loaded: Loaded | None,
    method: str,
    options: Mapping[str, Any],
    facts: FactsFile,
) -> Patch:
    """The changes as a patch, in the target's names, dtypes and orientation."""
    tensors = {}
    for site, (left, right) in zip(sites, changes, strict=True):
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise PlanError(
                f"the change of layer {site.layer} is not finite. Try a smaller lr or clamp, or a larger ridge"
            )
        left, right = left.cpu(), right.cpu()
        factors = (left, right) if site.axis == 1 else (right.mT, left.mT)
        spec = None if loaded is None else loaded.checkpoint[names[site.weight]]
        dtype = str(site.parameter.dtype).removeprefix("torch.") if spec is None else spec.dtype
        tensors[names[site.weight]] = (
            *factors,
            TensorChange("low_rank", tuple(site.parameter.shape), dtype, site.axis),
        )
    patch = Patch.low_rank(method, tensors, options=options, facts=facts.as_data())
    if loaded is None:
        return patch
    checkpoint = loaded.checkpoint
    return patch.made_for(checkpoint.content, {name: checkpoint.digest_of(name) for name in tensors})
