"""Classes by comparing vectors with those of the classes' names: FILM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.adapt import Parameters, adapt
from mergekit_lfm.meta.episodes import CLASSES, QUERY, SUPPORT, Episodes
from mergekit_lfm.meta.losses import BESIDE, Inner
from mergekit_lfm.meta.metric import Prototypes
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import SCALE

TEXTS = "texts"  # the name in a batch of the vectors of the names of an episode's classes, [ways, d]
WIDTH, HIDDEN = 128, 64  # of the space that both vectors are mapped into, and of the comparison


@dataclass(frozen=True, eq=False)
class NamedEpisodes(Episodes):
    """Episodes with the vectors of the names of their classes. names: these, [d] each, by label."""

    names: Mapping[int, Tensor] = field(kw_only=True)

    @property
    def digest(self) -> str:
        return f"{super().digest} {[(label, x.tolist()) for label, x in self.names.items()]}"

    def _check(self) -> None:
        super()._check()
        nameless = sorted({*self._pools} - {*self.names})
        if nameless:
            some = ", ".join(map(str, nameless[:10]))
            raise PlanError(f"found no name of the classes {some}; expected one of each. Give them in texts.names")

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:
        """The episodes of these numbers, and for each the vectors of its classes' names, with both sets."""
        found = super().batch(numbers, draw)
        vectors = torch.stack([self.names[label] for label in self._pools])[found[CLASSES]]  # [episodes, ways, d]
        return found | {f"{side}{TEXTS}": vectors for side in (SUPPORT, QUERY)}


class Film(Prototypes):
    """FILM: a learned comparison of an example's vector with that of a class's name; it alone adapts to a task.

    Both vectors are mapped into one space and shortened to length 1; their product, number by number, is summed, which
    is the cosine, and a small network adds to that. The model, the maps and the network are learned by maml. A setting,
    text_width, says how many numbers the vector of a name has. Source: Jiang et al. 2023, arXiv 2307.04114; the sum
    beside the network is ours, so that it begins with the cosine.
    """

    def build(self) -> nn.Module:
        super().build()
        metric = Metric(self.head.in_features, int(self.number("text_width")))
        self.moves = frozenset(f"{BESIDE}.{name}" for name, _ in metric.named_parameters())
        return metric.to(self.head.weight.device, self.head.weight.dtype)

    def start(self) -> dict[str, Tensor]:
        assert self.beside is not None
        return super().start() | {f"{BESIDE}.{name}": x for name, x in self.beside.named_parameters()}

    def adapted(self, start: Parameters, support: Batch, inner: Inner) -> Parameters:
        assert inner.rate is not None
        vectors = self.own_vectors(start, support)  # the same at every step, since the metric alone moves

        def loss(found: Parameters, batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(self.compared(found, vectors, batch), batch["labels"])

        return adapt(loss, start, support, steps=inner.steps, rate=inner.rate, moves=self.moves)

    def loss_of(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        found = self.adapted(start, support, self.inner)
        scores = self.compared(found, self.own_vectors(found, query), query)
        return nn.functional.cross_entropy(scores, query["labels"])

    def score(self, found: Parameters, support: Batch, query: Batch) -> Tensor:  # noqa: ARG002
        scores = self.compared(found, self.own_vectors(found, query), query)
        return (scores.argmax(-1) == query["labels"]).float().mean()

    def own_vectors(self, start: Parameters, batch: Batch) -> Tensor:
        """The vectors of examples, [n, d]."""
        return self.vectors(start, {name: x for name, x in batch.items() if name != TEXTS})

    def compared(self, found: Parameters, vectors: Tensor, batch: Batch) -> Tensor:
        """The scores of classes by their names, [n, ways]."""
        assert self.beside is not None
        own = {name.removeprefix(f"{BESIDE}."): x for name, x in found.items() if name.startswith(f"{BESIDE}.")}
        scores: Tensor = torch.func.functional_call(self.beside, own, (vectors, batch[TEXTS]))
        return scores


class Metric(nn.Module):
    """A comparison of vectors [n, d] with those of texts [ways, e]: scores [n, ways]."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.visual, self.textual = nn.Linear(width, WIDTH), nn.Linear(text_width, WIDTH)
        self.compare = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """The scores: 20 times the cosine and what the network adds to it."""
        unit = partial(nn.functional.normalize, dim=-1)
        products = unit(self.visual(vectors))[:, None] * unit(self.textual(texts))[None]  # [n, ways, WIDTH]
        scores: Tensor = SCALE * (products.sum(-1) + self.compare(products).squeeze(-1))
        return scores
