"""Images that stand for the data of classifiers: trained beside a model, and drawn as episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.episodes import CLASSES, QUERY, SUPPORT, EpisodeSource
from mergekit_lfm.train.examples import seed_of

NUMBER, TEACHER, MIXED = "number", "teacher", -1


class Pool(nn.Module):
    """Images of the classes of teachers, as many of each class. low, high: the range of pixels.

    The images of teacher t are a parameter [classes * count, channels, h, w]; of its class c those from c * count on.
    A pixel is low + (high - low) * sigmoid of its number, so that it stays in range. At the start it is noise.
    """

    def __init__(
        self,
        teachers: int,
        classes: int,
        count: int,
        shape: tuple[int, ...],
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.count, self.low, self.high = classes, count, low, high
        generator = torch.Generator().manual_seed(seed_of(seed, "pool"))
        size = (classes * count, *shape)
        self.raw = nn.ParameterList(torch.randn(size, generator=generator) for _ in range(teachers))

    def images(self, teacher: int) -> Tensor:
        """The images of a teacher, with gradients."""
        made: Tensor = self.low + (self.high - self.low) * self.raw[teacher].sigmoid()
        return made

    @property
    def targets(self) -> Tensor:
        """The classes of a teacher's images, [classes * count]."""
        return torch.arange(self.classes, device=self.raw[0].device).repeat_interleave(self.count)


@dataclass(frozen=True, eq=False)
class PoolEpisodes(EpisodeSource):
    """Episodes of the images of a pool, by their numbers.

    Image i of class c of teacher t has the number (t * classes + c) * count + i. shots, queries: images of a class to
    adapt on, and to judge by. teachers, classes, count: of the pool. alone: every other episode has the classes of one
    teacher, in turn; its support set is of the first half of their images, and its query set of the second. All others
    have any classes of all teachers. A batch has `teacher`, that of each episode or -1, and `classes`, of all teachers.
    """

    teachers: int
    classes: int
    count: int
    shots: int
    queries: int
    alone: bool = False

    @property
    def digest(self) -> str:
        """A digest of all that decides the episodes."""
        numbers = (self.teachers, self.classes, self.count, self.shots, self.queries)
        return f"pool {numbers} {self.alone} {self.seed}"

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """The episodes of these numbers."""
        drawn = [self._draw(number) for number in numbers]
        whole = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
        for side, count in ((SUPPORT, self.shots), (QUERY, self.queries)):
            whole[f"{side}labels"] = torch.arange(self.classes).repeat_interleave(count).repeat(len(drawn), 1)
        return whole

    def _draw(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "episode", number))
        teacher = number // 2 % self.teachers if self.alone and number % 2 == 0 else MIXED
        if teacher == MIXED:
            classes = torch.randperm(self.teachers * self.classes, generator=generator)[: self.classes]
        else:
            classes = teacher * self.classes + torch.randperm(self.classes, generator=generator)
        half = self.count // 2
        support, query = list[Tensor](), list[Tensor]()
        for place in (classes * self.count).tolist():
            if teacher == MIXED:
                order = torch.randperm(self.count, generator=generator)
                mine, theirs = order[: self.shots], order[self.shots : self.shots + self.queries]
            else:
                mine = torch.randperm(half, generator=generator)[: self.shots]
                theirs = half + torch.randperm(self.count - half, generator=generator)[: self.queries]
            support.append(place + mine)
            query.append(place + theirs)
        found: Mapping[str, Any] = {CLASSES: classes, TEACHER: torch.tensor(teacher)}
        return {f"{SUPPORT}{NUMBER}": torch.cat(support), f"{QUERY}{NUMBER}": torch.cat(query), **found}
