"""Terms by which a student follows a teacher, as pure functions: a number for each row, or one for a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.divergences import kd_divergence
from mergekit_lfm.distill.teachers import share_of_rest
from mergekit_lfm.train.losses import widen

LEAST = 1e-6  # of a variance, as a share of 1


def kd_of_largest(mine: Tensor, theirs: Tensor, ids: Tensor, temperature: float, kind: str) -> Tensor:
    """`kd_divergence` by the teacher's largest scores, and all others as one class.

    theirs: ln p [rows, k + 1] at the temperature, the last of the rest; ids [rows, k]: the classes of the others.
    """
    logs = (mine / temperature).log_softmax(-1)
    own = torch.cat([logs.gather(-1, ids), share_of_rest(logs, ids)], -1)
    return temperature**2 * kd_divergence(own, theirs, 1.0, kind)


def uld(mine: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """The Wasserstein distance of two predictions where each class is as far from any other: [rows].

    It is the sum of |q - p| over the sorted probabilities of scores [rows, classes], the fewer ones followed by zeros.
    Which class is which has no part, so that the two may have other classes. Source: Boizard et al. 2024, arXiv
    2402.12030, section 3; as theirs without a factor for the temperature, which the paper leaves at 1.
    """
    q, p = ((x / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True).values for x in (mine, theirs))
    width = max(q.shape[-1], p.shape[-1])
    longer = [nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p)]
    return (longer[0] - longer[1]).abs().sum(-1)


def squares(mine: Tensor, theirs: Tensor) -> Tensor:
    """The mean squared difference of each row: [rows]."""
    return (mine - theirs).square().mean(-1)


def shared_information(means: Tensor, theirs: Tensor, spread: Tensor) -> Tensor:
    """-ln of a normal density of the teacher's states by the student's, its mean over the units, a constant apart.

    means, theirs: [rows, d]; spread [d], from which the variances are softplus(spread) + 1e-6. Its negative bounds the
    information that both share from below. Source: Ahn et al. 2019, arXiv 1904.05835, equations 5 and 6.
    """
    variances = nn.functional.softplus(spread) + LEAST
    return (variances.log() / 2 + (theirs - means).square() / (2 * variances)).mean(-1)


def attention(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL(p, q) of two distributions in each row, p the teacher's: [rows]. Places where p is 0 have no part."""
    smallest = torch.finfo(mine.dtype).tiny
    terms = theirs * (theirs.clamp(min=smallest).log() - mine.clamp(min=smallest).log())
    return torch.where(theirs > 0, terms, 0).sum(-1)


def embed(mine: Tensor, theirs: Tensor) -> Tensor:
    """The squared distance of two vectors of length 1 in each row: 2 - 2 cos, [rows]."""
    return (_unit(mine) - _unit(theirs)).square().sum(-1)


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """Huber loss of the distances between all rows, each relative to their mean; a scalar, the mean over the pairs.

    Source: Park et al. 2019, arXiv 1904.05068, equations 4 to 6.
    """
    first, second = (_relative(x) for x in (mine, theirs))
    return nn.functional.smooth_l1_loss(first, second)


def _relative(x: Tensor) -> Tensor:
    """The distances of all pairs [pairs], relative to their mean."""
    distances = _distances(x)
    pairs = distances[tuple(torch.triu_indices(len(x), len(x), 1, device=x.device))]
    return pairs / pairs.mean().clamp(min=torch.finfo(x.dtype).tiny)


def _distances(x: Tensor) -> Tensor:
    """The distance of each row from each other one: [rows, rows]. Its gradient is 0 where they are equal."""
    squared = (x[:, None] - x[None]).square().sum(-1)
    return torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)


def angle(mine: Tensor, theirs: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles at each row between two others; a scalar, the mean over the triplets.

    Source: Park et al. 2019, arXiv 1904.05068, equations 7 to 9.
    """
    first, second = (_cosines(x) for x in (mine, theirs))
    return nn.functional.smooth_l1_loss(first, second)


def _cosines(x: Tensor) -> Tensor:
    """The cosine of the angle at j between i and k, for all that differ: [triplets]."""
    sides = _unit(x[None] - x[:, None])  # [j, i, d]: from j to i
    cosines = torch.einsum("jid,jkd->jik", sides, sides)
    return cosines[_triplets(len(x), x.device)]


def _triplets(count: int, device: torch.device) -> Tensor:
    """Which (j, i, k) differ, each pair i, k once: a mask [count, count, count]."""
    i = torch.arange(count, device=device)
    j, i, k = i[:, None, None], i[None, :, None], i[None, None]
    return (i < k) & (i != j) & (k != j)


def triplet(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL(p, q) of p the teacher's chance that j is nearer to i than to k; a scalar, the mean over the triplets.

    The chance is sigmoid(d(j, k) - d(j, i)), of distances relative to their mean. Over all triplets of a batch, where
    the paper takes those that are hard for the student. Source: Ye, Lu, Zhan 2022, arXiv 2205.01915, section 3.
    """
    own, wanted = (_margins(x) for x in (mine, theirs))
    p = wanted.sigmoid()
    cross = nn.functional.binary_cross_entropy_with_logits(own, p, reduction="none")
    entropy = nn.functional.binary_cross_entropy_with_logits(wanted, p, reduction="none")
    return (cross - entropy).mean()


def _margins(x: Tensor) -> Tensor:
    """How much farther k is from j than i is, relative to the mean distance: [triplets]."""
    distances = _distances(x)
    off = distances.sum() / max(1, len(x) * (len(x) - 1))
    distances = distances / off.clamp(min=torch.finfo(x.dtype).tiny)
    return (distances[:, None] - distances[:, :, None])[_triplets(len(x), x.device)]


def local(scores: Tensor, theirs: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p, q), p from the teacher's vectors and the means of each label's, q the student's for these labels.

    scores: the student's [rows, classes]; theirs: vectors [rows, d], of length 1 for this; labels [rows]. p is the
    softmax of the cosines to the means, q that of the scores, at the temperature. Summed over the rows. Source: Ye, Lu,
    Zhan 2022, arXiv 2205.01915, section 3, the local classifier.
    """
    vectors = _unit(theirs)
    present, own = torch.unique(labels, return_inverse=True)
    shares = nn.functional.one_hot(own, len(present)).to(vectors)  # [rows, labels]
    means = _unit(shares.T @ vectors)
    nearness = vectors @ means.T * math.sqrt(vectors.shape[-1])
    return kd_divergence(widen(scores)[:, present], nearness, temperature, "forward")
