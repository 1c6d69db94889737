"""ROME: facts one after another, a rank-one change of one layer for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_lfm.artifacts.facts import BLANK, Fact
from mergekit_lfm.edit.covariance import solve
from mergekit_lfm.edit.targets import find_targets
from mergekit_lfm.edit.work import Changes, EditWork, add_change


def rome(work: EditWork, facts: Sequence[Fact]) -> Changes:
    """Rank-one changes, one fact after another. Source: ROME, equation 2; keys as in the authors' code."""
    (site,), (moment,) = work.sites, work.moments
    moment = moment.to(work.device)
    options, factors = work.options, []
    for i, fact in enumerate(facts):
        (target,) = find_targets(work.subject, site.mlp, [fact], options, work.contexts).to(work.device, work.dtype)
        contexts = [BLANK] if options["key"] == "bare" else work.contexts
        mean_key = work.states([fact], contexts, site.projection, inputs=True)[0].mean(0)
        prompts = contexts if options["key"] == "mean" else [BLANK]
        key = work.states([fact], prompts, site.projection, inputs=True)[0].mean(0)
        value = work.states([fact], prompts, site.projection, inputs=False)[0].mean(0)
        direction = solve(moment, mean_key[:, None], f"layer {site.layer}")[:, 0]
        factors.append((((target - value) / (key @ direction))[:, None], direction[None]))
        add_change(site, *factors[-1])
        if work.progress is not None:
            work.progress(i + 1, len(facts))
    return [(torch.cat([left for left, _ in factors], 1), torch.cat([right for _, right in factors]))]
