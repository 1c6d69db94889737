"""A head of unit norm, for R4F: the linear layers of a classifier's head are trained with the spectral norm 1."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.train.hooks import Masks
from mergekit_lfm.train.unit_norms import UnitNorms
from mergekit_lfm.tune.work import Prepared, TuneWork


def normalise_head(prepared: Prepared, work: TuneWork, method: str) -> Prepared:
    """The same training with each matrix of the head divided by its largest singular value, in the result too.

    Source: Aghajanyan et al. 2020, arXiv 2008.03156, section 2, R4F: the head does not lengthen vectors. The authors'
    code divides the last matrix of the head alone. Raises PlanError for a head that is not of linear layers, is tied,
    or is not trained as a whole.
    """
    parameters, modules = dict(work.model.named_parameters()), dict(work.model.named_modules())
    matrices = [name for name in parameters if name in work.head and parameters[name].ndim > 1]
    layers = [modules[name.rpartition(".")[0]] for name in matrices]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linear or len(linear) < len(layers):
        found = shorten([type(layer).__name__ for layer in layers], 3) or "no head of its own"
        raise PlanError(f"r4f is for heads of linear layers, and {type(work.model).__name__} has {found}; choose r3f")
    if tied := [name for name in matrices if id(parameters[name]) in work.embedded]:
        raise PlanError(f"r4f divides the head by its norm, and {tied[0]} is tied to embeddings; choose r3f")
    masked = {name for hook in prepared.hooks if isinstance(hook, Masks) for name in hook.masks}
    if still := [name for name in matrices if name in masked or not parameters[name].requires_grad]:
        raise PlanError(
            f"r4f divides the head by its norm, and {method} does not train all of {shorten(still, 3)}; choose a "
            "method and parts that do, or r3f"
        )
    if empty := [name for name in matrices if not bool(parameters[name].any())]:
        raise PlanError(f"r4f divides the head by its norm, and {empty[0]} is 0; make a head by `mergekit-lfm head`")
    norms = UnitNorms(linear)

    def fold() -> None:
        prepared.fold()
        norms.fold()

    return replace(prepared, hooks=(*prepared.hooks, norms), fold=fold)
