"""Checkpoints made from others while they are read: tensors of those under any name, or new ones, panel by panel.

The bytes of a tensor do not depend on the range that is read: a panel has the same rows each time. Costs add up: a view
of a view takes the memory of both.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.store.checkpoint import Checkpoint, Cost, Layout
from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Source = tuple[int, str]  # (index of one of the checkpoints that a view reads, name of a tensor there)
ReadRows = Callable[[Source, int, int], "Tensor"]  # rows of a tensor, from the first up to the last


class Maker(Protocol):
    """Makes a tensor of a view while it is read: panels of its rows, from rows of the tensors that it reads.

    scratch: bytes that it holds at most besides the memory of its sources; its input and its result count. whole: True
    to make the tensor at once. A tensor without axes has one row.
    """

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def sources(self) -> Sequence[Source]: ...
    @property
    def panels(self) -> Sequence[tuple[int, int]]: ...
    @property
    def scratch(self) -> int: ...
    @property
    def whole(self) -> bool: ...
    def rows(self, first: int, last: int, read: ReadRows, /) -> Tensor: ...


class View(Checkpoint):
    """A checkpoint made from others, `inners`, while it is read. Its heirs are final.

    specs: its tensors. key: identifies what it does to the others. held: bytes that it holds itself as long as it is
    open. path: by default that of the first of `inners`.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        inners: Sequence[Checkpoint],
        key: Mapping[str, Any],
        path: Path | None = None,
    ) -> None:
        self.inners, self.key = tuple(inners), key
        self.path = self.inners[0].path if path is None else path
        self._specs = specs
        self._kept = threading.local()  # each thread's last panel, which neighbouring ranges share

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _kept=threading.local())

    @abstractmethod
    def maker(self, name: str) -> Maker | None:
        """The maker of the tensor; None if it is its `source` as it is."""

    def source(self, name: str) -> Source:
        """The tensor in whose place it stands."""
        return 0, name

    def offset(self, name: str) -> int:  # noqa: ARG002
        """The first element of its source that is one of the tensor's."""
        return 0

    @property
    def held(self) -> int:
        return 0

    @property
    def dropped(self) -> dict[str, str]:
        return {name: why for inner in self.inners for name, why in inner.dropped.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """That of the checkpoint below, unless the view is in another folder."""
        below = self.inners[0] if self.inners else None
        return below.config if below is not None and below.path == self.path else super().config

    def stored_dtype(self, name: str) -> str:
        index, source = self.source(name)
        below = self.inners[index] if self.inners else None
        same = below is not None and source in below and below[source].dtype == self[name].dtype
        return below.stored_dtype(source) if below is not None and same else self[name].dtype

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys([self.path, *(folder for inner in self.inners for folder in inner.folders)]))

    def fetch(self, progress: Progress = SILENCE) -> None:
        for inner in self.inners:
            inner.fetch(progress)

    def stream(self, most: int, readers: int) -> None:
        for inner in self.inners:
            inner.stream(most, readers)

    @property
    def absent(self) -> dict[str, int]:
        one = len(self.inners) == 1
        files = [(inner, file, nbytes) for inner in self.inners for file, nbytes in inner.absent.items()]
        return {file if one else f"{inner.snapshot}/{file}": nbytes for inner, file, nbytes in files}

    def name_in_files(self, name: str) -> str:
        index, source = self.source(name)
        return self.inners[index].name_in_files(source) if self.inners else name

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return tuple(file for inner in self.inners for file in inner.files)

    @property
    def resident(self) -> int:
        return self.held + sum(inner.resident for inner in self.inners)

    @cached_property
    def identity(self) -> list[dict[str, Any]]:
        return [{"view": dict(self.key)}, *(entry for inner in self.inners for entry in inner.identity)]

    @property
    def states(self) -> list[Any]:
        return [*(state for inner in self.inners for state in inner.states), dict(self.key)]

    @property
    def layout(self) -> tuple[Layout, ...]:
        if len(self.inners) != 1:
            return ()
        names = {self.source(name)[1]: name for name in self}
        return tuple(
            Layout(part.file, part.data_start, {names[old]: x for old, x in part.dtypes.items() if old in names})
            for part in self.inners[0].layout
        )

    def in_folder(self, path: Path) -> Self:
        """The same tensors, with the config and the other files of another folder."""
        view = copy(self)
        view.path = path
        view.__dict__.pop("config", None)
        return view

    def cost(self, name: str) -> Cost:
        maker = self.maker(name)
        if maker is None:
            return self._cost_of(self.source(name))
        below = [self._cost_of(source) for source in maker.sources]  # read one after the other
        scratch = maker.scratch + max((cost.scratch for cost in below), default=0)
        return Cost(scratch, maker.whole or any(cost.at_once for cost in below))

    def _cost_of(self, source: Source) -> Cost:
        return self.inners[source[0]].cost(source[1])

    def location(self, name: str) -> tuple[int, int] | None:
        if self.maker(name) is not None:
            return None
        index, source = self.source(name)
        place = self.inners[index].location(source)
        return place and (place[0], place[1] + self.offset(name) * ITEMSIZE[self[name].dtype])

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        maker = self.maker(name)
        if maker is None:
            index, source = self.source(name)
            self.inners[index].read_into(source, self.offset(name) + start, into)
        elif into:
            _fill(into, start * ITEMSIZE[maker.spec.dtype], maker, self._panel)

    def _panel(self, maker: Maker, first: int, last: int) -> Tensor:
        key = maker.spec.name, first
        if getattr(self._kept, "key", None) != key:
            self._kept.key = self._kept.panel = None  # freed before the next one is made
            self._kept.panel = maker.rows(first, last, self._read)
            self._kept.key = key
        kept: Tensor = self._kept.panel
        return kept

    def _read(self, source: Source, first: int, last: int) -> Tensor:
        import torch

        inner, name = self.inners[source[0]], source[1]
        spec = inner[name]
        rows = torch.empty((last - first, *spec.shape[1:]) if spec.shape else (), dtype=getattr(torch, spec.dtype))
        if rows.numel():
            inner.read_into(name, first * (rows.numel() // (last - first)), bytes_of(rows))
        return rows


def _fill(into: memoryview, start: int, maker: Maker, panel: Callable[[Maker, int, int], Tensor]) -> None:
    """Fill `into` with the bytes of a tensor from byte `start` on, from its panels."""
    row = maker.spec.nbytes // row_count(maker.spec)
    at = bisect_right(maker.panels, start // row, key=itemgetter(0)) - 1
    for first, last in maker.panels[at:]:
        begin = first * row
        if begin >= start + len(into):
            break
        lower, upper = max(start, begin), min(start + len(into), last * row)
        data = bytes_of(panel(maker, first, last))
        into[lower - start : upper - start] = data[lower - begin : upper - begin]


def row_count(spec: TensorSpec) -> int:
    """The number of a tensor's rows, at least one: a tensor without axes, or an empty one, counts as a row."""
    return max(1, spec.shape[0]) if spec.shape else 1
