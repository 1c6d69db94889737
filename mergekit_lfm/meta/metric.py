"""Classes by comparing vectors: prototypes, and a relation that is learned. No step of adapting is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.losses import Inner, MetaLoss
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.vectors import head_of

HIDDEN = 64  # of the relation


class Prototypes(MetaLoss):
    """Classes by the nearest mean of the vectors of their support examples: what the head of a classifier reads.

    Source: Snell et al. 2017, arXiv 1703.05175, equations 1 and 2, with the squared distance.
    """

    def adapted(self, start: Parameters, support: Batch, inner: Inner) -> Parameters:  # noqa: ARG002
        return start

    def scores(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        """The scores of the query examples, [n, classes]."""
        means, vectors = self.prototypes(start, support), self.vectors(start, query)
        return -(vectors[:, None] - means[None]).square().sum(-1)

    def prototypes(self, start: Parameters, support: Batch) -> Tensor:
        """The mean vector of each class, [classes, d]. Labels are 0 to classes - 1, each as often as the others."""
        vectors, labels = self.vectors(start, support), support["labels"]
        ways = torch.arange(self.ways, device=labels.device)
        own = (labels[None] == ways[:, None]).to(vectors.dtype)  # [classes, n]
        return own @ vectors / own.sum(1, keepdim=True)

    def build(self) -> nn.Module | None:
        head = head_of(self.model)
        assert isinstance(head, nn.Linear)
        self.head, self.ways = head, head.out_features  # as many classes as an episode has
        return None

    def loss_of(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.scores(start, support, query), query["labels"])

    def score(self, found: Parameters, support: Batch, query: Batch) -> Tensor:
        return (self.scores(found, support, query).argmax(-1) == query["labels"]).float().mean()

    def vectors(self, start: Parameters, batch: Batch) -> Tensor:
        """The vectors that the head reads, one for each example, [n, d]: of a decoder, its last token's."""
        heard = list[Tensor]()
        handle = self.head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        try:
            self.objective.model.at(start)(**{name: x for name, x in batch.items() if name != "labels"})
        finally:
            handle.remove()
        (vectors,) = heard
        if vectors.ndim == 3:
            mask = batch["attention_mask"]
            last = mask.sum(1) - 1 + vectors.shape[1] - mask.shape[1]  # behind the tokens of a prompt
            return vectors.gather(1, last[:, None, None].expand(-1, 1, vectors.shape[-1])).squeeze(1)
        return vectors.flatten(1)


class Relation(Prototypes):
    """Classes by a learned comparison of a vector with the mean of a class's: a number from 0 to 1, by least squares.

    Source: Sung et al. 2017, arXiv 1711.06025, equations 1 and 3, with a normalisation, as BatchNorm is there, and two
    linear layers for the comparison.
    """

    def build(self) -> nn.Module:
        super().build()
        width = 2 * self.head.in_features
        compare = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        return compare.to(self.head.weight.device, self.head.weight.dtype)

    def scores(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        means, vectors = self.prototypes(start, support), self.vectors(start, query)
        shape = (len(vectors), len(means), vectors.shape[-1])
        pairs = torch.cat([means[None].expand(shape), vectors[:, None].expand(shape)], -1)
        assert self.beside is not None
        scores: Tensor = self.beside(pairs).squeeze(-1)
        return scores

    def loss_of(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        found = self.scores(start, support, query).sigmoid()
        return (found - nn.functional.one_hot(query["labels"], found.shape[-1])).square().mean()
