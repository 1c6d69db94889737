"""Encoded examples, and which of them make the batch of a step: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
import xxhash
from torch import Tensor

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.formats import bytes_of

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

IGNORED = -100  # a label that no loss counts, by torch's convention

Batch = Mapping[str, Tensor]
Change = Callable[[Mapping[str, Tensor], torch.Generator], Mapping[str, Tensor]]  # an example, made anew at random


class Batches(Protocol):
    """Data that `fit` trains on: `Examples`, or episodes. A batch is a function of the seed and the step alone.

    digest: of all that decides the batches; pad: as of `Examples`. step: the numbers of a step's members; batch: these,
    as inputs of the loss; in_order: all once.
    """

    @property
    def digest(self) -> str: ...
    @property
    def pad(self) -> Mapping[str, int]: ...
    def step(self, step: int, size: int, seed: int, /) -> list[int]: ...
    def batch(self, numbers: Sequence[int], draw: int = 0, /) -> Mapping[str, Tensor]: ...
    def in_order(self, size: int, /) -> Iterator[Mapping[str, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples, each the inputs of a model by name and perhaps `labels`, without the axis of examples.

    pad: for inputs whose first axis may differ between examples the value that lengthens the shorter ones. A batch with
    such an input has an `attention_mask` of it, named with its prefix: `positive_input_ids` has
    `positive_attention_mask`. parts: of how many examples each data set is, in order, and how many of them one time
    round has, drawn anew for each: a small set beside a large one is then seen as often as that allows. By default one.
    forms: how many items of each data set, one after the other, are forms of one example; one time round has one of
    them, drawn anew. By default one. change: makes the example that a batch has of each, with random numbers of its
    own; its repr says all about it. rows: inputs with one row or more in each example, as images are, and the shape
    of a row: a batch has the rows of all examples, one after the other.
    """

    items: Sequence[Mapping[str, Tensor]]
    pad: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[tuple[int, int], ...] = ()
    forms: tuple[int, ...] = ()
    change: Change | None = None
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise PlanError without examples, or where they differ in their inputs."""
        if not self.items:
            raise PlanError("the data hold no example; give at least one")
        first = self.items[0]
        for number, item in enumerate(self.items):
            if item.keys() != first.keys():
                names = [", ".join(each) for each in (item, first)]
                raise PlanError(f"example {number} has {names[0]}; expected {names[1]}, as the first one has")

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the examples, in hex."""
        whole = xxhash.xxh3_128(
            repr((sorted(self.pad.items()), self.parts, self.forms, sorted(self.rows.items()))).encode()
        )
        whole.update(b"" if self.change is None else repr(self.change).encode())
        for item in self.items:
            for name, x in sorted(item.items()):
                whole.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
                whole.update(bytes_of(x.contiguous()))
        return whole.hexdigest()

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:
        """The examples of these numbers, each input with a first axis of examples.

        draw: the random numbers of an example depend on this and its number, whatever batch it is in.
        """
        chosen = [self._changed(number, draw) for number in numbers]
        batch: dict[str, Tensor] = {}
        for name in chosen[0]:
            rows = [item[name] for item in chosen]
            if name in self.pad:
                batch[name] = _pad(rows, self.pad[name])
                if name.endswith("input_ids"):
                    mask = _pad([torch.ones_like(row) for row in rows], 0)
                    batch[name.removesuffix("input_ids") + "attention_mask"] = mask
            else:
                batch[name] = torch.cat(rows) if name in self.rows else torch.stack(rows)
        return batch

    def _changed(self, number: int, draw: int) -> Mapping[str, Tensor]:
        item = self.items[number]
        if self.change is None:
            return item
        return self.change(item, torch.Generator().manual_seed(seed_of(draw, number)))

    def step(self, step: int, size: int, seed: int) -> list[int]:
        """The numbers of a step's examples: the next `size` of all, in an order of its own for each time round."""
        parts, forms = self._sets
        numbers, round_ = list[int](), sum(most for _, most in parts)
        while len(numbers) < size:
            epoch, start = divmod(step * size + len(numbers), round_)
            numbers += _order(parts, forms, seed, epoch)[start : start + size - len(numbers)]
        return numbers

    @property
    def _sets(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """The data sets: examples and how many of them are used, and the forms of each example."""
        count = len(self) // (self.forms or (1,))[0]
        parts = self.parts or ((count, count),)
        return parts, self.forms or (1,) * len(parts)

    def in_order(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All examples once, in batches of up to `size`."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(len(self), start + size)))


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=value)


@lru_cache(maxsize=2)
def _order(parts: tuple[tuple[int, int], ...], forms: tuple[int, ...], seed: int, epoch: int) -> list[int]:
    """The numbers of the examples of one time round, in order."""
    generator, chosen, first = torch.Generator().manual_seed(seed_of(seed, "order", epoch)), list[Tensor](), 0
    for (count, most), kinds in zip(parts, forms, strict=True):
        part = torch.randperm(count, generator=generator)[:most]
        if kinds > 1:
            part = part * kinds + torch.randint(kinds, part.shape, generator=generator)
        chosen.append(first + part)
        first += count * kinds
    numbers = torch.cat(chosen)
    order: list[int] = numbers[torch.randperm(len(numbers), generator=generator)].tolist()
    return order


def join(sets: Sequence[Examples], most: Sequence[int | None]) -> Examples:
    """Several data sets as one; `most` of each are used in one time round, None for all.

    Raises PlanError for data sets that differ in their inputs, or in the shapes of their `rows`.
    """
    for number, each in enumerate(sets):
        if dict(each.rows) != dict(sets[0].rows):
            raise PlanError(
                f"data set {number} has {_describe(each.rows)}; expected {_describe(sets[0].rows)}, as the first one "
                "has, as a batch holds both. Give images of one shape"
            )
    items = [item for each in sets for item in each.items]
    parts, forms = list[tuple[int, int]](), list[int]()
    for each, limit in zip(sets, most, strict=True):
        ((count, _),), own = each._sets
        parts.append((count, min(count, limit or count)))
        forms += own
    return replace(sets[0], items=items, parts=tuple(parts), forms=tuple(forms))


def _describe(rows: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of {list(shape)}" for name, shape in rows.items()) or "no such rows"


def split(sets: Sequence[Examples], share: float, seed: int) -> tuple[list[Examples], Examples]:
    """The data sets without a share of each one's examples, chosen by the seed; and these as a development set."""
    kept, chosen = list[Examples](), list[Mapping[str, Tensor]]()
    for number, each in enumerate(sets):
        ((count, _),), (kinds,) = each._sets
        generator = torch.Generator().manual_seed(seed_of(seed, "dev", number))
        held = {*torch.randperm(count, generator=generator)[: round(share * count)].tolist()}
        chosen += [item for i, item in enumerate(each.items) if i // kinds in held]
        kept.append(replace(each, items=[item for i, item in enumerate(each.items) if i // kinds not in held]))
    if not chosen:
        raise PlanError(f"dev is {share:g} of {sum(map(len, sets))} examples, less than one; give more data, or a file")
    return kept, replace(sets[0], items=chosen, forms=())


def padding_of(tokenizer: Tokenizer) -> int:
    """The token that lengthens a row; no result depends on which it is, as a mask hides it."""
    return int(tokenizer.pad_token_id or 0)


def seed_of(*facts: object) -> int:
    """A seed for a random generator that is another one for other facts."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, facts)).encode()) >> 1
