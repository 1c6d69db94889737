"""Classifiers of images as black boxes: images in, probabilities out, nothing else; and slopes by asking alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.passes import scores_in_parts

ASKED_AT_ONCE = 512  # images of a request, at most
DISTANCE = 0.01  # of a pixel's whole range: how far a direction is tried; the authors' code has 0.005 of about 4


class BlackBox:
    """A classifier that can only be asked. calls: images that were asked about, and requests, [2], counted in place.

    The probabilities have no gradient, whatever the images have.
    """

    def __init__(self, model: nn.Module, calls: Tensor) -> None:
        self._model, self.calls = model, calls

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """The probabilities of classes for images, [n, classes]."""
        requests = math.ceil(len(images) / ASKED_AT_ONCE)
        self.calls += torch.tensor([len(images), requests], device=self.calls.device)
        return scores_in_parts(self._model, images.detach(), ASKED_AT_ONCE).softmax(-1)


@torch.no_grad()
def zero_order_gradient(
    ask: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    base: Tensor,
    directions: int,
    distance: float,
    generator: torch.Generator,
) -> Tensor:
    """The gradient of each image's loss [n] in its pixels, from values of the loss alone, [n, ...].

    ask: from up to ASKED_AT_ONCE images to answers; loss: from the answers for all images, moved in one direction after
    the other, to the loss of each; base: that of the images themselves. The forward difference over `distance` is taken
    along as many random directions, or as many as there are pixels, which are orthonormal and the same for all images.
    In expectation over directions it is the gradient, up to the difference quotient; with all directions always.
    Source: Hu et al. 2023, arXiv 2305.18413, the zero-order estimator (d / q) sum u (l(x + mu u) - l(x)) / mu, whose
    directions are independent there.
    """
    flat = images.flatten(1)  # [n, d]
    count, pixels = flat.shape
    directions = min(directions, pixels)
    normal = torch.randn(pixels, directions, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q.T.to(flat.device, flat.dtype)  # [q, d]
    answers = list[Tensor]()
    for numbers in torch.arange(directions * count, device=flat.device).split(ASKED_AT_ONCE):  # type: ignore[no-untyped-call]
        moved = flat[numbers % count] + distance * basis[numbers // count]
        answers.append(ask(moved.reshape(-1, *images.shape[1:])))
    rises = loss(torch.cat(answers)).reshape(directions, count) - base  # [q, n]
    slope = torch.einsum("qn,qd->nd", rises / distance, basis)
    return (slope * (pixels / directions)).reshape(images.shape)
