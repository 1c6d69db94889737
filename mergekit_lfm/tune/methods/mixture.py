"""A mixture of soft prompts: several before every text, and the predictions behind them averaged by trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter
from mergekit_lfm.runtime.tasks import HEADED
from mergekit_lfm.tune.methods.prompts import TOKENS, first_values

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.attachment import Attachment
    from mergekit_lfm.tune.work import Prepared, TuneWork


def mixture(work: TuneWork) -> Prepared:
    """p(y | x) = sum_j w_j p(y | prompt_j, x). Source: Qin and Eisner 2021, arXiv 2104.06599, equation 1.

    y is a class or a token, x the text or all tokens before. The weights are equal at first, the prompts are random
    tokens. A classifier's head is trained with them.
    """
    import torch

    from mergekit_lfm.artifacts.attachment import PROMPTS, Attachment, AttachmentInfo
    from mergekit_lfm.runtime.prompts import Mixture
    from mergekit_lfm.tune.work import Prepared

    if work.task == "embedding":
        raise PlanError("mixture averages predictions of classes or tokens, which embedding has not; choose `prompt`")
    head = work.head if work.task in HEADED else frozenset()
    for name, x in work.model.named_parameters():
        x.requires_grad_(name in head)
    count, tokens = work.integer("prompts"), work.integer("tokens")
    values = torch.stack([first_values(work) for _ in range(count)])
    mixed = Mixture(work.model, values, torch.zeros(count, device=values.device))

    def take() -> Attachment:
        own = {"values": mixed.values, "weights": mixed.weights}
        heads = {name: x for name, x in work.model.named_parameters() if name in head}
        config = {"task": work.task, "prompts": count, "tokens": tokens}
        info = AttachmentInfo("mixture", PROMPTS, config, replaced=tuple(heads))
        return Attachment(info, {name: x.detach().contiguous() for name, x in {**own, **heads}.items()})

    def facts() -> dict[str, Any]:
        return {"weights": [round(share, 4) for share in mixed.weights.softmax(0).tolist()]}

    return Prepared(mixed, attachment=take, virtual=tokens, facts=facts)


METHODS = (
    TuneMethod(
        "mixture",
        "Qin and Eisner 2021, arXiv 2104.06599",
        "several prompts, and weights for the predictions behind them",
        "mixture",
        mixture,
        1e-2,
        (TOKENS, Parameter("prompts", 4, kind="int", minimum=2, doc="number of prompts")),
    ),
)
