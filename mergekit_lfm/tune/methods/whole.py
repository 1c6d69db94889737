"""Tuning of parameters as they are: all of them, in phases, or the biases alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter
from mergekit_lfm.runtime.tasks import HEADED

if TYPE_CHECKING:
    from mergekit_lfm.tune.work import Prepared, TuneWork


def full(work: TuneWork) -> Prepared:
    """All parameters."""
    from mergekit_lfm.tune.work import Prepared

    work.train(work.names)
    return Prepared(work.model)


def probe_first(work: TuneWork) -> Prepared:
    """The head, then all parameters. Source: Kumar et al. 2022, arXiv 2202.10054, section 3.4."""
    from mergekit_lfm.train.hooks import Phases
    from mergekit_lfm.tune.work import Prepared

    if not work.head:
        raise PlanError(
            "this model has no head of its own, which lp_ft trains first; choose another method, or a task with a head"
        )
    probing = round(_share(work, "probe") * work.steps)
    work.train(work.head if probing == work.steps else work.names)
    if probing == work.steps:
        return Prepared(work.model)
    return Prepared(work.model, (Phases([(0, work.head), (probing, frozenset(work.names))]),))


def layer_by_layer(work: TuneWork) -> Prepared:
    """The last layer, then one more after the other. Source: Howard and Ruder 2018, arXiv 1801.06146, section 3.3."""
    from mergekit_lfm.train.hooks import Phases
    from mergekit_lfm.tune.work import Prepared

    work.train(work.names)
    groups, phases, names = work.groups, list[tuple[int, frozenset[str]]](), frozenset[str]()
    for number, group in enumerate(groups):
        names |= group
        phases.append((round(_share(work, "thaw") * work.steps * number / max(1, len(groups) - 1)), names))
    return Prepared(work.model, (Phases(phases),))


def biases(work: TuneWork) -> Prepared:
    """The biases, and the head of a classifier. Source: Ben Zaken et al. 2021, arXiv 2106.10199."""
    from mergekit_lfm.tune.work import Prepared

    found = {name for name in work.names if name.rpartition(".")[2] == "bias"}
    found |= work.head if work.task in HEADED else frozenset()
    if not found:
        raise PlanError(f"{type(work.model).__name__} has no biases, which bitfit trains; choose another method")
    work.train(found)
    return Prepared(work.model)


def _share(work: TuneWork, name: str) -> float:
    value = work.options[name]
    assert isinstance(value, float)
    return value


METHODS = (
    TuneMethod("full", "-", "all parameters", "checkpoint", full, 2e-5),
    TuneMethod(
        "lp_ft",
        "Kumar et al. 2022, arXiv 2202.10054",
        "the head first, then all parameters, so that a head of random weights spoils no features",
        "checkpoint",
        probe_first,
        2e-5,
        (Parameter("probe", 0.3, minimum=0, maximum=1, doc="share of the steps that train the head alone"),),
    ),
    TuneMethod(
        "layerwise",
        "Howard and Ruder 2018, arXiv 1801.06146",
        "the last layer first, then one more after the other down to the embeddings",
        "checkpoint",
        layer_by_layer,
        2e-5,
        (Parameter("thaw", 0.5, minimum=0, maximum=1, doc="share of the steps after which all layers are trained"),),
    ),
    TuneMethod(
        "bitfit",
        "Ben Zaken et al. 2021, arXiv 2106.10199",
        "the biases alone, and the head of a classifier",
        "patch",
        biases,
        1e-3,
    ),
)
