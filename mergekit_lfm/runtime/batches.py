"""Batches of examples of equal length, the same ones in the same order every time.

Nothing is ever padded: texts are grouped by their number of tokens instead, so that a mean over tokens or examples
counts real ones only and no result depends on an example's neighbours. A digest identifies the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any

import xxhash
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.formats import bytes_of


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of one shape, as the model takes them.

    indices: the examples' numbers in the data, one per row of every tensor. args, kwargs: the model's inputs by
    position and by name, first axis = examples. labels: int64 classes [n], never given to the model.
    """

    indices: tuple[int, ...]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, model: nn.Module) -> Batch:
        """The batch on the model's device, its floating-point inputs in the model's dtype."""
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if like is None:
            return self

        def move(x: Tensor) -> Tensor:
            return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)

        labels = None if self.labels is None else self.labels.to(like.device)
        return replace(
            self,
            args=tuple(map(move, self.args)),
            kwargs={name: move(x) for name, x in self.kwargs.items()},
            labels=labels,
        )


def digest_of(batches: Iterable[Batch]) -> str:
    """xxh3-128 of the examples' numbers and of their tensors (names, dtypes, shapes, bytes), in hex, in this order."""
    digests = batches.digests if isinstance(batches, _Reread) else [_digest(batch) for batch in batches]
    return xxhash.xxh3_128_hexdigest("".join(digests).encode())


def _digest(batch: Batch) -> str:
    digest = xxhash.xxh3_128(repr(batch.indices).encode())
    for name, x in (*enumerate(batch.args), *sorted(batch.kwargs.items()), ("", batch.labels)):
        if x is not None:
            digest.update(f"{name!r} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(bytes_of(x.detach().cpu().contiguous()))
    return digest.hexdigest()


def as_batches(data: Iterable[Any]) -> Sequence[Batch]:
    """Batches from a list, or from any object that yields the same batches on every iteration.

    Each item is one batch, first axis = examples, all of one length: a Tensor, (inputs, labels), a dictionary of the
    model's keyword inputs with or without "labels", or a Batch. inputs are a Tensor, a tuple of Tensors or such a
    dictionary. Items are read anew on every pass, so that a DataLoader need not fit into memory; the second pass
    detects one that shuffles. Raises PlanError for any other item, for padding, and for data without examples.
    """
    readable = hasattr(data, "__iter__") or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))
    if not readable or isinstance(data, Batch | Tensor | Mapping | tuple | str):
        raise PlanError(
            f"data is one {type(data).__name__}; expected a sequence of batches. Put a single batch in a list: [batch]"
        )
    if hasattr(data, "__next__"):
        raise PlanError(
            "data is an iterator, which can be read only once; expected data that can be read again, because there may "
            "be several passes. Give the list, or the DataLoader itself"
        )
    if isinstance(data, list) and all(isinstance(item, Batch) for item in data):
        batches: Sequence[Batch] = [_check(batch, f"batch {i}") for i, batch in enumerate(data)]
        numbers = [i for batch in batches for i in batch.indices]
        if len(set(numbers)) < len(numbers):
            raise PlanError(
                "batches share the numbers of examples (`indices`); expected each number once, because random draws "
                "depend on it. Number the examples consecutively"
            )
    else:
        batches = _Reread(data)
    if not batches:
        raise PlanError("the data hold no batch; expected at least one example. Give some")
    return batches


class _Reread(Sequence[Batch]):
    """Batches made from the items of a source on every pass, and compared with those of the first pass."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.digests = [_digest(batch) for batch in self._read()]

    def _read(self) -> Iterator[Batch]:
        # without __iter__ Python would index until an IndexError, which a data set need not raise
        bounded = hasattr(self.source, "__iter__")
        items = self.source if bounded else (self.source[i] for i in range(len(self.source)))
        start = 0
        for number, item in enumerate(items):
            batch = _batch(item, start, f"batch {number}")
            start += len(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[Batch]:
        for number, (batch, digest) in enumerate(zip_longest(self._read(), self.digests)):
            if batch is None or _digest(batch) != digest:
                raise PlanError(
                    f"batch {number} of the data differs from the first time that it was read; expected the same "
                    "examples in the same order on every pass. Switch off shuffling and random transforms"
                )
            yield batch

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return next(islice(self, range(len(self))[index], None))


def _batch(item: Any, start: int, where: str) -> Batch:
    """An item of a user's data as a batch, its examples numbered from start."""
    if isinstance(item, Batch):
        return _check(item, where)
    inputs, labels = item, None
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, labels = item
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
        named = kwargs.pop("labels", None)
        labels = named if labels is None else labels
        args: tuple[Any, ...] = ()
    else:
        args, kwargs = inputs if isinstance(inputs, tuple) else (inputs,), {}
    first = next(iter((*args, *kwargs.values())), None)
    count = len(first) if isinstance(first, Tensor) and first.ndim else 0
    return _check(Batch(tuple(range(start, start + count)), args, kwargs, labels), where)


def _check(batch: Batch, where: str) -> Batch:
    """The batch, its labels as int64. Raises PlanError if it is not a valid batch."""
    named = {f"input {i}": x for i, x in enumerate(batch.args)} | batch.kwargs
    if batch.labels is not None:
        named["labels"] = batch.labels
    problems = [
        f"{name} is a {type(x).__name__}, not a Tensor"
        if not isinstance(x, Tensor)
        else f"{name} has shape {list(x.shape)}, other inputs have {len(batch)} examples"
        for name, x in named.items()
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != len(batch)
    ]
    if not problems and not len(batch):
        problems = ["it holds no example"]
    labels = batch.labels
    if not problems and labels is not None and (labels.ndim != 1 or labels.is_floating_point() or labels.is_complex()):
        problems = [f"labels are {labels.dtype} {list(labels.shape)}, not whole numbers [examples]"]
    if problems:
        raise PlanError(
            f"{where}: {'; '.join(problems)}. Expected tensors whose first axis is the examples of the batch, or "
            "(inputs, labels), or a dictionary of such tensors. A Dataset of single examples goes into a DataLoader"
        )
    mask = batch.kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise PlanError(
            f"{where}: its attention_mask has zeros, so it holds padding; expected examples of equal length, because "
            "means over tokens would count the padding. Group the examples by length, or take batches of one"
        )
    return batch if labels is None else replace(batch, labels=labels.long())
