"""Losses of meta-learning from classifiers without their data, for which images stand that are trained with the model.

These are a part of the model's state, as all that is learned beside it, so that a run that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.image_terms import weigh
from mergekit_lfm.distill.passes import Observer, Pass
from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.black_box import DISTANCE, BlackBox, zero_order_gradient
from mergekit_lfm.meta.episodes import CLASSES, QUERY, SUPPORT
from mergekit_lfm.meta.losses import Inner, MetaLoss, over_tasks
from mergekit_lfm.meta.objective import TaskObjective
from mergekit_lfm.meta.pool import MIXED, NUMBER, TEACHER, Pool
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.load import logits
from mergekit_lfm.train.examples import Batch, seed_of
from mergekit_lfm.train.losses import SCORES, Terms

SMOOTH: Mapping[str, float] = {"total_variation": 3.0, "l2": 0.03}  # terms of pixels alone
PATIENCE = 6  # steps without a better share of right answers until episodes are made harder; the authors' code's
AGREED = 1e-12  # the least probability in a logarithm


class SoftObjective(TaskObjective):
    """The mean cross-entropy of labels that are probabilities [n, classes]: the KL divergence, but for a constant."""

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """The loss, a scalar."""
        return nn.functional.cross_entropy(*SCORES[self.task](self.model.at(parameters), batch))


class _FromPool(MetaLoss):
    """A loss over episodes of a pool's images. image: the name of the model's input.

    first: steps in which images alone change, those of all teachers, before the model learns from them.
    """

    def __init__(self, model: nn.Module, inner: Inner, pool: Pool, image: str, first: int) -> None:
        self.pool, self.image, self.first = pool, image, first
        self.steps = torch.zeros(1, dtype=torch.long)
        pool.register_buffer("steps", self.steps)
        super().__init__(model, "classification", ALGORITHMS["maml"], inner)

    def build(self) -> nn.Module:
        return self.pool

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:  # noqa: ARG002
        """The loss of the images in the first steps, and then the sum of the episodes' losses, with that for images."""
        is_first = int(self.steps) < self.first
        self.steps += 1
        if is_first:
            return Terms(self.recover(), 1)
        return self.learn(batch)

    def recover(self) -> Tensor:
        """The loss of all images, a scalar."""
        raise NotImplementedError

    def learn(self, batch: Batch) -> Terms:
        """The sum of the episodes' losses; its gradient in the images is that of their own loss, too."""
        raise NotImplementedError

    def episodes(self, images: Tensor, batch: Batch, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with images [n, ...] in place of their numbers. labels: of both sides."""
        return {
            name: x
            for side in (SUPPORT, QUERY)
            for name, x in (
                (f"{side}{self.image}", images[batch[f"{side}{NUMBER}"]]),
                (f"{side}labels", labels[side]),
            )
        }


class Purer(_FromPool):
    """PURER's curriculum of inversions: images of all classes lie where their teachers know them, and become harder.

    Their loss is the inversion's; if the share of right answers in the queries was not better than the best for six
    steps, the next step takes from it the loss of the episodes, times `curriculum`. Source: Hu et al. 2023, arXiv
    2303.11183; the switch and its patience are the authors' code's.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Inner,
        teachers: Sequence[nn.Module],
        pool: Pool,
        image: str,
        *,
        curriculum: float,
        first: int = 0,
    ) -> None:
        super().__init__(model, inner, pool, image, first)
        self.curriculum = curriculum
        norms = [{"bn": 1.0} if batchnorms(each) else {} for each in teachers]
        self.terms = [{"one_hot": 1.0, **SMOOTH, **norm} for norm in norms]
        self.observers = [Observer(each, frozenset(own)) for each, own in zip(teachers, self.terms, strict=True)]
        self.best, self.waited = (torch.zeros(1, device=pool.raw[0].device) for _ in range(2))
        pool.register_buffer("best", self.best)
        pool.register_buffer("waited", self.waited)

    def recover(self) -> Tensor:
        return self.inversion(torch.cat([self.pool.images(t) for t in range(len(self.observers))]))

    def learn(self, batch: Batch) -> Terms:
        images = torch.cat([self.pool.images(t) for t in range(len(self.observers))])
        harder = int(self.waited) >= PATIENCE
        shown = _against(images, self.curriculum) if harder else images.detach()
        start, labels = self.start(), {side: batch[f"{side}labels"] for side in (SUPPORT, QUERY)}

        def one(support: Batch, query: Batch) -> tuple[Tensor, Tensor]:
            found = self.adapted(start, support, self.inner)
            return self.objective(found, query), self.objective.score(found, query)

        losses, right = over_tasks(one, self.episodes(shown, batch, labels))
        self._feed_back(right.mean().detach(), harder=harder)
        pull = self.inversion(images) * len(losses)
        return Terms(losses.sum() + pull - pull.detach(), len(losses))

    def inversion(self, images: Tensor) -> Tensor:
        """The sum over teachers of the loss of their images, [teachers * n, ...]."""
        parts, losses = torch.split(images, len(self.pool.targets)), list[Tensor]()
        for observer, terms, part in zip(self.observers, self.terms, parts, strict=True):
            losses.append(weigh(terms, observer.see(part, targets=self.pool.targets))[0])
        return torch.stack(losses).sum()

    def _feed_back(self, right: Tensor, *, harder: bool) -> None:
        """Count the steps without a better share of right answers; harder episodes begin the count anew."""
        if harder or bool(right > self.best):
            self.best.copy_(torch.zeros_like(self.best) if harder else right.expand_as(self.best))
            self.waited.zero_()
        else:
            self.waited += 1


class BiDf(_FromPool):
    """Bi-level meta distillation from black boxes, which are asked for probabilities, and nothing else.

    Every other episode is the task of one teacher, with its probabilities for labels in the inner steps and the outer
    one; the rest are of any classes of all teachers, with the classes that images were made for: the memory. Images
    are made by zero-order gradients in the steps that ask their teacher. Those of query sets are also to lie at the
    border: where the model and the teacher agree on the class their probabilities are to differ. Source: Hu et al.
    2023, arXiv 2305.18413, without a generator; classes are in a new order in each episode, which that has not.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Inner,
        teachers: Sequence[BlackBox],
        pool: Pool,
        image: str,
        *,
        directions: int,
        border: float = 1.0,
        first: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, inner, pool, image, first)
        self.teachers, self.directions, self.border, self.seed = teachers, directions, border, seed
        self.objective = SoftObjective(self.objective.model, "classification")
        pool.register_buffer("calls", teachers[0].calls)

    def recover(self) -> Tensor:
        return torch.stack([self._ask(teacher, at_border=False)[1] for teacher in range(len(self.teachers))]).sum()

    def learn(self, batch: Batch) -> Terms:
        labels, asked = self._soft_labels(batch), sorted({t for t in batch[TEACHER].tolist() if t != MIXED})
        answers = {teacher: self._ask(teacher) for teacher in asked}
        pull = sum((loss for _, loss in answers.values()), torch.zeros((), device=self.pool.raw[0].device))
        for row, teacher in enumerate(batch[TEACHER].tolist()):
            if teacher != MIXED:
                first = teacher * self.pool.classes
                order = batch[CLASSES][row] - first
                for side in (SUPPORT, QUERY):
                    places = batch[f"{side}{NUMBER}"][row] - first * self.pool.count
                    labels[side][row] = answers[teacher][0][places][:, order]
        with torch.no_grad():
            images = torch.cat([self.pool.images(t) for t in range(len(self.teachers))])
        start, whole = self.start(), self.episodes(images, batch, labels)
        losses: Tensor = over_tasks(lambda support, query: self.loss_of(start, support, query), whole)
        pull = pull * len(losses)
        return Terms(losses.sum() + pull - pull.detach(), len(losses))

    def _soft_labels(self, batch: Batch) -> dict[str, Tensor]:
        """The classes that images were made for, as probabilities [tasks, n, classes]."""
        classes = self.pool.classes
        return {side: nn.functional.one_hot(batch[f"{side}labels"], classes).float() for side in (SUPPORT, QUERY)}

    def _ask(self, teacher: int, *, at_border: bool = True) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for its images, and a scalar: their loss, with the zero-order gradient.

        at_border: whether those of query sets are to lie there, too.
        """
        images = self.pool.images(teacher)
        chances = self.teachers[teacher].scores(images)
        border = torch.arange(self.pool.count, device=images.device) >= self.pool.count // 2
        border = border.repeat(self.pool.classes)
        mine = self._chances(images.detach(), chances, ~border) if at_border else chances
        facts = partial(self._losses, self.pool.targets, border & at_border, mine)
        base = facts(chances)
        pull = (images * self._slope(teacher, images.detach(), facts, base)).sum() / len(images)
        return chances, base.mean() + pull - pull.detach() + _smoothness(images)

    def _slope(self, teacher: int, images: Tensor, facts: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
        """The zero-order gradient of the images' losses in their pixels. facts: from probabilities to losses."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "directions", int(self.steps), teacher))
        ask, distance = self.teachers[teacher].scores, DISTANCE * (self.pool.high - self.pool.low)
        return zero_order_gradient(ask, facts, images, base, self.directions, distance, generator)

    def _chances(self, images: Tensor, chances: Tensor, support: Tensor) -> Tensor:
        """The probabilities of the model once it has adapted to a teacher. support: which images are to learn on."""
        with torch.no_grad():
            start = {name: x.detach() for name, x in self.start().items()}
            task = {self.image: images[support], "labels": chances[support]}
            bound = self.objective.model.at(self.adapted(start, task, self.inner))
            return logits(bound(**{self.image: images})).softmax(-1)

    def _losses(self, targets: Tensor, at_border: Tensor, mine: Tensor, chances: Tensor) -> Tensor:
        """The loss of each image [n] by a teacher's probabilities [n, classes]; or of copies, one after the other."""
        copies = len(chances) // len(targets)
        targets, at_border, mine = (x.repeat(copies, *[1] * (x.ndim - 1)) for x in (targets, at_border, mine))
        losses = -chances.gather(1, targets[:, None])[:, 0].clamp(min=AGREED).log()
        agree = at_border & (chances.argmax(-1) == mine.argmax(-1))
        return losses - self.border * agree * (chances - mine).abs().sum(-1)


def _smoothness(images: Tensor) -> Tensor:
    """The terms of pixels alone, which ask nobody."""
    return weigh(SMOOTH, Pass(images, images.flatten(1)))[0]


def _against(x: Tensor, weight: float) -> Tensor:
    """The same numbers, whose gradient is taken times -weight: what lessens the loss of others makes it larger."""
    return (1 + weight) * x.detach() - weight * x
