"""ROME: facts one after another, a rank-one change of one layer for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lfm.edit.methods.memit import SEARCH
from mergekit_lfm.methods.kinds import EditMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.facts import Fact
    from mergekit_lfm.edit.work import Changes, Editor, EditWork


def rome(work: EditWork, facts: Sequence[Fact]) -> Changes:
    """Rank-one changes, one fact after another. Source: ROME, equation 2; keys as in the authors' code."""
    import torch

    from mergekit_lfm.artifacts.facts import BLANK
    from mergekit_lfm.edit.covariance import solve
    from mergekit_lfm.edit.targets import find_targets
    from mergekit_lfm.edit.work import add_change

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


_BY_NAME = {parameter.name: parameter for parameter in SEARCH}

METHODS: tuple[Editor, ...] = (
    EditMethod(
        name="rome",
        source="Meng et al. 2022, Locating and editing factual associations in GPT, arXiv 2202.05262",
        summary="one fact after another, in one layer",
        parameters=(
            replace(_BY_NAME["steps"], default=20),
            *(parameter for parameter in SEARCH if parameter.name not in ("steps", "clamp")),
            replace(_BY_NAME["clamp"], default=4.0),
            Parameter(
                "key",
                "rome",
                kind="str",
                choices=("rome", "mean", "bare"),
                doc="the texts that stand for the subject: mean takes the prompt in several contexts, bare the prompt "
                "alone, rome mixes both as the authors do",
            ),
        ),
        band=(1 / 6, 1 / 6),
        several=False,
        solve=rome,
    ),
)
