"""Episodes: few-shot tasks, each a support set to adapt on and a query set to judge by; as batches for `fit`.

An episode is a function of the seed and its number alone, so that a training that was killed goes on with the same
ones. A batch of episodes has `support/NAME` and `query/NAME` for each input, with axes [tasks, examples, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import Batch, Examples, seed_of

SUPPORT, QUERY, CLASSES = "support/", "query/", "classes"


class Episode(NamedTuple):
    """A task: batches of the examples to adapt on, and of those to judge by."""

    support: Batch
    query: Batch


def sides(batch: Batch) -> Episode:
    """The two sets of a batch of episodes."""
    support, query = (
        {name.removeprefix(side): x for name, x in batch.items() if name.startswith(side)} for side in (SUPPORT, QUERY)
    )
    return Episode(support, query)


def _joined(episode: Episode) -> dict[str, Tensor]:
    named = zip((SUPPORT, QUERY), episode, strict=True)
    return {f"{side}{name}": x for side, batch in named for name, x in batch.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class EpisodeSource:
    """Episodes by their numbers. seed: decides what each of them is; tested: how many `in_order` has."""

    seed: int = 0
    tested: int = 100
    pad: ClassVar[Mapping[str, int]] = {}

    def __len__(self) -> int:
        return self.tested

    @property
    def digest(self) -> str:
        """A digest of all that decides the episodes."""
        raise NotImplementedError

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:
        """The episodes of these numbers."""
        raise NotImplementedError

    def step(self, step: int, size: int, seed: int) -> list[int]:  # noqa: ARG002
        """The numbers of a step's episodes; each comes once."""
        return [*range(step * size, (step + 1) * size)]

    def in_order(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The episodes to judge by, in batches of up to `size`."""
        for start in range(0, self.tested, size):
            yield self.batch(range(start, min(self.tested, start + size)))


@dataclass(frozen=True, eq=False)
class Episodes(EpisodeSource):
    """Episodes of labelled examples, or of data sets.

    ways: classes of an episode, drawn anew for each and numbered from 0; None for tasks that are the data sets of the
    examples, `parts`, each with labels as they are. shots: examples of the support set, for each class where there are
    ways; queries: of the query set. hardness: numbers by class, in order; the second half of a batch is drawn from the
    hardest half of the classes, or twice the ways, if these are more. Raises PlanError if a class, or a data set, has
    too few examples, and for fewer classes than ways.
    """

    examples: Examples
    ways: int | None
    shots: int
    queries: int
    hardness: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that there are enough examples."""
        self._check()

    def _check(self) -> None:
        """Raise PlanError for classes, or data sets, with too few examples, and for too few classes."""
        need = self.shots + self.queries
        few = [f"{name} has {len(found)}" for name, found in self._pools.items() if len(found) < need]
        kind = "data set" if self.ways is None else "class"
        if few:
            raise PlanError(
                f"an episode needs {self.shots} and {self.queries} other examples of each {kind}, together {need}; "
                f"{kind} {few[0]}. Give more, or set fewer shots or queries"
            )
        if self.ways is not None and len(self._pools) < self.ways:
            raise PlanError(
                f"found {len(self._pools)} classes in the data; expected {self.ways} or more, for episodes of as many "
                "ways. Give data of more classes, or set fewer ways"
            )

    @cached_property
    def _pools(self) -> dict[int, list[int]]:
        """The numbers of the examples of each class, or of each data set."""
        pools: dict[int, list[int]] = {}
        if self.ways is None:
            first = 0
            for number, (count, _) in enumerate(self.examples.parts or ((len(self.examples), 0),)):
                pools[number] = [*range(first, first + count)]
                first += count
            return pools
        for number, item in enumerate(self.examples.items):
            pools.setdefault(int(item["labels"]), []).append(number)
        return dict(sorted(pools.items()))

    @property
    def classes(self) -> int:
        """How many classes, or data sets, there are."""
        return len(self._pools)

    @property
    def digest(self) -> str:
        """A digest of all that decides the episodes."""
        return f"{self.examples.digest} {self.ways} {self.shots} {self.queries} {self.seed}"

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """The episodes of these numbers, and `classes`, the places of the classes of each, or of its data set.

        All episodes of a batch are as long as its longest example.
        """
        easy = len(numbers) if self.hardness is None else -(-len(numbers) // 2)
        drawn = [self._draw(number, hard=place >= easy) for place, number in enumerate(numbers)]
        whole = self.examples.batch([number for _, chosen in drawn for number in chosen])
        split = self.shots * (self.ways or 1)
        tasks = {name: x.reshape(len(drawn), -1, *x.shape[1:]) for name, x in whole.items()}
        parts = [{name: x[:, part] for name, x in tasks.items()} for part in (slice(split), slice(split, None))]
        if self.ways is not None:
            for batch, count in zip(parts, (self.shots, self.queries), strict=True):
                batch["labels"] = torch.arange(self.ways).repeat_interleave(count).repeat(len(drawn), 1)
        return {**_joined(Episode(*parts)), CLASSES: torch.tensor([places for places, _ in drawn])}

    def _draw(self, number: int, *, hard: bool) -> tuple[list[int], list[int]]:
        """The places of an episode's classes, and its examples: the support set, by class, then the query set."""
        generator, pools = self._generator(number, "examples"), [*self._pools.values()]
        support, query, chosen = list[int](), list[int](), self._places(number, hard=hard)
        for pool in (pools[place] for place in chosen):
            order = torch.randperm(len(pool), generator=generator)[: self.shots + self.queries]
            examples = [pool[i] for i in order.tolist()]
            support += examples[: self.shots]
            query += examples[self.shots :]
        return chosen, [*support, *query]

    def _places(self, number: int, *, hard: bool) -> list[int]:
        """The places of an episode's classes, or of its data set."""
        generator, ways = self._generator(number), self.ways or 1
        places = torch.randperm(self.classes, generator=generator)
        if hard and self.hardness is not None:
            order = self.hardness.argsort(descending=True, stable=True)[: max(2 * ways, self.classes // 2)]
            places = order[torch.randperm(len(order), generator=generator)]
        return places[:ways].tolist()

    def _generator(self, number: int, of: str = "episode") -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, of, number))


@dataclass(frozen=True, eq=False)
class DrawnEpisodes(EpisodeSource):
    """Episodes that a function draws by a generator: support sets of one shape, and query sets of one shape."""

    draw: Callable[[torch.Generator], Episode]
    name: str = "drawn"

    @property
    def digest(self) -> str:
        """A digest of all that decides the episodes, by the function's name."""
        return f"{self.name} {self.seed}"

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """The episodes of these numbers."""
        seeds = [seed_of(self.seed, "episode", number) for number in numbers]
        drawn = [_joined(self.draw(torch.Generator().manual_seed(seed))) for seed in seeds]
        return {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
