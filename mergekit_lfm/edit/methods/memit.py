"""MEMIT: many facts at once, by least squares over a band of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import EditMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.artifacts.facts import Fact
    from mergekit_lfm.edit.work import Changes, Editor, EditWork

ALIKE = 0.995  # the cosine above which least squares cannot tell two keys apart

SEARCH = (
    Parameter("steps", 25, kind="int", minimum=1, doc="stop the search for a layer's new output after this many steps"),
    Parameter("lr", 0.5, above=0, doc="the learning rate of that search"),
    Parameter("weight_decay", 0.5, minimum=0, doc="how strongly that search avoids large changes"),
    Parameter(
        "kl_factor",
        0.0625,
        minimum=0,
        doc="how strongly that search keeps what the model says of the subject otherwise",
    ),
    Parameter("clamp", 0.75, above=0, doc="the largest change of a layer's output, as a multiple of its size"),
    Parameter("loss_threshold", 0.05, minimum=0, doc="end the search when its loss is below this"),
    Parameter(
        "ridge",
        1e-3,
        minimum=0,
        doc="added to the diagonal of the statistics, as a multiple of its mean, so that they can be inverted",
    ),
    Parameter(
        "batch",
        25,
        kind="int",
        minimum=1,
        doc="the number of facts that the model reads at once; the result is the same",
    ),
)


def memit(work: EditWork, facts: Sequence[Fact]) -> Changes:
    """Least squares over all facts, layer by layer. Source: MEMIT, equations 14, 19 and 20."""
    from mergekit_lfm.artifacts.facts import BLANK
    from mergekit_lfm.edit.covariance import solve
    from mergekit_lfm.edit.targets import find_targets
    from mergekit_lfm.edit.work import add_change

    sites, options, last = work.sites, work.options, work.sites[-1].block
    if not options["allow_same_subject"]:
        _refuse_same_subject(facts, work.keys(facts, sites[0]))
    targets = find_targets(work.subject, last, facts, options, work.contexts, work.progress)
    targets = targets.to(work.device, work.dtype)
    changes = []
    for i, (site, moment) in enumerate(zip(sites, work.moments, strict=True)):
        keys = work.keys(facts, site)  # [n, in]
        residual = (targets - work.states(facts, [BLANK], last, inputs=False)[:, 0]) / (len(sites) - i)
        weight = options["lambda"]
        if weight is None:
            weight = options["lambda_ratio"] * site.inputs
        directions = solve(weight * moment.to(work.device) + keys.mT @ keys, keys.mT, f"layer {site.layer}")  # [in, n]
        changes.append((residual.mT, directions.mT))
        add_change(site, *changes[-1])
    return changes


def _refuse_same_subject(facts: Sequence[Fact], keys: Tensor) -> None:
    """Raise PlanError if two facts share a key: least squares would average them."""
    import torch

    unit = torch.nn.functional.normalize(keys, dim=1)
    near = ((unit @ unit.mT) > ALIKE).cpu()
    pairs = [
        f"{a.text!r} and {b.text!r}"
        for i, a in enumerate(facts)
        for j, b in enumerate(facts[:i])
        if a.subject.casefold() == b.subject.casefold() or (bool(near[i, j]) and a.target_new != b.target_new)
    ]
    if pairs:
        more = f"\n  and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
        raise PlanError(
            "one batch has several facts about one subject, which least squares would average:\n  "
            + "\n  ".join(pairs[:10])
            + f"{more}\nEdit them one after another, as several patches, or with rome; allow_same_subject edits them "
            "anyway"
        )


METHODS: tuple[Editor, ...] = (
    EditMethod(
        name="memit",
        source="Meng et al. 2022, Mass-editing memory in a transformer, arXiv 2210.07229",
        summary="many facts at once, spread over several layers",
        parameters=(
            *SEARCH,
            Parameter(
                "lambda",
                None,
                minimum=0,
                unset="see --lambda-ratio",
                doc="how strongly existing knowledge is protected, as in the paper",
            ),
            Parameter("lambda_ratio", 1.0, minimum=0, doc="the same, as a multiple of the layer's number of inputs"),
            Parameter("allow_same_subject", False, kind="bool", doc="accept several facts about one subject"),
        ),
        band=(1 / 8, 1 / 4),
        solve=memit,
    ),
)
