"""Masked tuning: the entries with the largest Fisher information alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.tune.work import Prepared, TuneWork


def largest_gradients(work: TuneWork) -> Prepared:
    """The share of all entries whose squared gradients are largest. Source: Fu et al. 2022, arXiv 2211.15583, 4.2.

    Among equals those that come first are trained.
    """
    import torch

    from mergekit_lfm.train.hooks import Masks
    from mergekit_lfm.tune.work import Prepared

    assert work.fisher is not None
    known = {name: x for name, x in work.model.named_parameters() if name in work.fisher}
    if not known:
        raise PlanError("the Fisher file has no tensor that is a parameter of this model; collect it for this model")
    everything = torch.cat([work.fisher[name].flatten().float() for name in known])
    share = work.options["share"]
    assert isinstance(share, float)
    count = max(1, int(share * len(everything)))
    least = everything.kthvalue(len(everything) - count + 1).values
    chosen = everything > least
    chosen[(everything == least).nonzero()[: count - int(chosen.sum())]] = True
    parts = torch.split(chosen, [x.numel() for x in known.values()])
    masks = {name: part.view(x.shape) for (name, x), part in zip(known.items(), parts, strict=True)}
    masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
    work.train(masks)
    return Prepared(work.model, (Masks(masks),), decays=False, count=count)


METHODS = (
    TuneMethod(
        "mask",
        "Fu et al. 2022, arXiv 2211.15583",
        "the entries with the largest Fisher information alone, from a file of `mergekit-lfm stats fisher`",
        "patch",
        largest_gradients,
        1e-4,
        (Parameter("share", 0.005, above=0, maximum=1, doc="share of all entries to train"),),
        needs="fisher",
    ),
)
