"""SVF: the singular values of matrices alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.runtime.tasks import HEADED

if TYPE_CHECKING:
    from mergekit_lfm.tune.work import Prepared, TuneWork


def singular_values(work: TuneWork) -> Prepared:
    """W = U diag(s) V, with s trained. Source: Sun et al. 2022, arXiv 2206.06122, equation 2.

    Convolutions are matrices [out, in * height * width]. Embeddings and heads stay as they are, but for the head of a
    classifier, which is trained whole.
    """
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    from mergekit_lfm.tune.work import Prepared

    class Values(nn.Module):
        """A matrix by its singular values, which are its parameter."""

        left: torch.Tensor
        right: torch.Tensor

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            left, values, right = torch.linalg.svd(weight.detach().flatten(1).double(), full_matrices=False)
            self.register_buffer("left", left.to(weight.dtype), persistent=False)
            self.register_buffer("right", right.to(weight.dtype), persistent=False)
            self.values = nn.Parameter(values.to(weight.dtype))
            self.start = values.to(weight.dtype)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            change = (self.left * (self.values - self.start.to(weight.device))) @ self.right
            tuned: torch.Tensor = weight + change.view(weight.shape)
            return tuned

    head = work.head if work.task in HEADED else frozenset()
    work.train(work.names)
    chosen = [
        (name, module)
        for name, module in work.model.named_modules()
        if hasattr(module, "weight")
        and isinstance(module.weight, nn.Parameter)
        and module.weight.ndim > 1
        and not isinstance(module, nn.Embedding)
        and id(module.weight) not in work.embedded
        and f"{name}.weight" not in work.head
    ]
    changed = tuple(module.weight for _, module in chosen) + tuple(work.parameters(head))
    for _, module in chosen:
        parametrize.register_parametrization(module, "weight", Values(module.weight))
    for name, parameter in work.model.named_parameters():
        parameter.requires_grad_(name.endswith(".parametrizations.weight.0.values") or name in head)

    def fold() -> None:
        for _, module in chosen:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)

    return Prepared(work.model, decays=False, fold=fold, changed=changed)


METHODS = (
    TuneMethod(
        "svf",
        "Sun et al. 2022, arXiv 2206.06122",
        "the singular values of matrices alone; their singular vectors stay",
        "patch",
        singular_values,
        1e-3,
    ),
)
