"""A model that few steps of descent edit: editable networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.losses import MetaLoss
from mergekit_lfm.train.examples import IGNORED, Batch
from mergekit_lfm.train.losses import SCORES


@dataclass(frozen=True, eq=False)
class Edits(Episodes):
    """Episodes whose support set is of the first data set, answers to change to, and whose query set is of another."""

    @property
    def digest(self) -> str:
        return f"edits {super().digest}"

    def _draw(self, number: int, *, hard: bool) -> tuple[list[int], list[int]]:  # noqa: ARG002
        """The data set of the query set, and the examples: the support set, then the query set."""
        edits, *others = self._pools.values()
        generator = self._generator(number)
        place = int(torch.randint(len(others), (1,), generator=generator))
        chosen = list[int]()
        for pool, count in ((edits, self.shots), (others[place], self.queries)):
            chosen += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]
        return [place + 1], chosen

    def _check(self) -> None:
        """Raise PlanError for data sets with too few examples."""
        edits, *others = self._pools.values()
        if not others:
            raise PlanError(
                "found one file; expected one with answers to change to, and others with what is to stay. Give more"
            )
        for name, pool, count in (("edits", edits, self.shots), *(("other data", x, self.queries) for x in others)):
            if len(pool) < count:
                raise PlanError(
                    f"found {len(pool)} examples of {name}; expected {count} or more for an episode. Give more, or set "
                    "fewer shots or queries"
                )


class Editable(MetaLoss):
    """Editable training: a task's loss, and that of a model which a few steps change in some answers and no other.

    The loss is that of the query set, plus edit_weight times how far the support set is from right after the steps, by
    max(0, the largest other score - the answer's), plus locality_weight times the divergence KL of the answers to the
    query set after the steps from those before. The steps are plain descent on the support set. Source: Sinitsin et al.
    2020, arXiv 2004.00345, equations 3 to 5.
    """

    def loss_of(self, start: Parameters, support: Batch, query: Batch) -> Tensor:
        found = self.adapted(start, support, self.inner)
        own, edited = self.number("edit_weight"), margins(*self.scores(found, support))
        before, targets = self.scores(start, query)
        after, _ = self.scores(found, query)
        stays, counted = self.number("locality_weight"), (targets != IGNORED).to(before.dtype)
        apart = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
        local = (apart * counted).sum() / counted.sum().clamp_min(1)
        return self.objective(start, query) + own * edited + stays * local

    def scores(self, parameters: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scores of answers [..., classes], and the right ones [...]."""
        model: nn.Module = self.objective.model.at(parameters)
        return SCORES[self.objective.task](model, batch)

    def score(self, found: Parameters, support: Batch, query: Batch) -> Tensor:
        """The share of answers that are as they should be, of the changed ones times of the others; or both losses."""
        changed, others = (self.objective.score(found, side) for side in (support, query))
        return changed * others if self.objective.counts_right else changed + others


def margins(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets [...] that count of how much the largest other score exceeds theirs; 0 where none does."""
    counted = targets != IGNORED
    places = targets.clamp_min(0)[..., None]
    own = scores.gather(-1, places).squeeze(-1)
    others = scores.scatter(-1, places, -torch.inf).amax(-1)
    above = torch.where(counted, (others - own).clamp_min(0), 0.0)
    return above.sum() / counted.sum().clamp_min(1)
