"""A checkpoint with the vocabulary of another tokenizer: the row of each new id is one of its own, or of other models.

Rows are gathered panel by panel while they are read. Where ids follow each other in a model as in the output, they are
read at once, so that vocabularies with a common beginning cost a few reads, and unrelated ones a read for each row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, final

import xxhash

from mergekit_lfm.store.checkpoint import Checkpoint, Layout
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec
from mergekit_lfm.views.base import Maker, ReadRows, Source, View

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 1 << 18  # elements of a panel, about


class Run(NamedTuple):
    """The rows of `size` ids from `first` on: the mean of those of the donors, (checkpoint, first row); or zeros."""

    first: int
    size: int
    donors: tuple[tuple[int, int], ...]


def join_runs(rows: Sequence[tuple[tuple[int, int], ...]]) -> tuple[Run, ...]:
    """The donors of each new id, in order, as runs."""
    runs: list[Run] = []
    for number, donors in enumerate(rows):
        if runs:
            first, size, start = runs[-1]
            if donors == tuple((donor, row + size) for donor, row in start):
                runs[-1] = Run(first, size + 1, start)
                continue
        runs.append(Run(number, 1, donors))
    return tuple(runs)


@final
class Reindexed(View):
    """The checkpoint with the rows in `runs` in some tensors, and behind them so many rows with the mean of those.

    A run's donors are 0, the checkpoint itself, or 1 and more, one of `others`. names: by tensor its name in each of
    these. A tensor has the narrowest dtype that holds all of its rows.
    """

    def __init__(
        self,
        inner: Checkpoint,
        others: Sequence[Checkpoint],
        names: Mapping[str, Sequence[str]],
        runs: Sequence[Run],
        padding: int = 0,
    ) -> None:
        inners = (inner, *others)
        rows = runs[-1].first + runs[-1].size + padding
        specs = dict(inner)
        self._makers: dict[str, Gathered] = {}
        for name, own in names.items():
            sources = tuple(enumerate(own))
            dtypes = [inners[i][source].dtype for i, source in sources]
            specs[name] = TensorSpec(name, (rows, *inner[name].shape[1:]), _widest(dtypes))
            if len(runs) > 1 or runs[0].donors != ((0, 0),) or padding:
                read = max(ITEMSIZE[dtype] for dtype in dtypes)
                self._makers[name] = Gathered(specs[name], sources, tuple(runs), padding, read)
        digest = xxhash.xxh3_128_hexdigest(repr((sorted(names.items()), [*map(tuple, runs)])).encode())
        super().__init__(specs, inners, {"rows": rows, "vocabulary": digest, "padding": padding})

    def maker(self, name: str) -> Maker | None:
        return self._makers.get(name)

    @property
    def dropped(self) -> dict[str, str]:
        return self.inners[0].dropped

    @property
    def absent(self) -> dict[str, int]:
        """Those of the checkpoint itself: the others are models of the merge, too, and are fetched as such."""
        return self.inners[0].absent

    @property
    def layout(self) -> tuple[Layout, ...]:
        return self.inners[0].layout


def _widest(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that holds the values of all."""
    if {"float16", "bfloat16"} <= set(dtypes) and max(ITEMSIZE[dtype] for dtype in dtypes) == 2:
        return "float32"
    return max(dtypes, key=lambda dtype: ITEMSIZE[dtype])


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor of the vocabulary. padding: rows at its end with the mean. read: bytes of the largest number read."""

    spec: TensorSpec
    sources: tuple[Source, ...]
    runs: tuple[Run, ...]
    padding: int
    read: int
    whole: bool = False

    @property
    def panels(self) -> Sequence[tuple[int, int]]:
        tokens, rows = self._tokens, self.spec.shape[0]
        return [*self._token_panels, *([(tokens, rows)] if self.padding else [])]

    @property
    def _tokens(self) -> int:
        return self.spec.shape[0] - self.padding

    @property
    def _token_panels(self) -> Sequence[tuple[int, int]]:
        return [(first, min(self._tokens, first + self._step)) for first in range(0, self._tokens, self._step)]

    @property
    def _row(self) -> int:
        """Numbers of a row."""
        return max(1, self.spec.numel // max(1, self.spec.shape[0]))

    @property
    def _step(self) -> int:
        """Rows of a panel."""
        return max(1, min(self._tokens, PANEL // self._row))

    @property
    def scratch(self) -> int:
        size, averaged = ITEMSIZE[self.spec.dtype], any(len(run.donors) > 1 for run in self.runs)
        panel = self._step * self._row * (size + self.read + (40 if averaged else 0))  # means are rounded in float64
        if not self.padding:
            return panel
        return max(panel, self._step * self._row * (size + 8)) + self._row * (16 + size * (2 + self.padding))

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        import torch

        if first >= self._tokens:
            return self._mean(read).expand(last - first, *self.spec.shape[1:]).contiguous()
        rows = torch.zeros((last - first, *self.spec.shape[1:]), dtype=getattr(torch, self.spec.dtype))
        for begin, end, donors in self._runs_in(first, last):
            if donors:
                rows[begin - first : end - first] = self._average(donors, end - begin, read)
        return rows

    def _runs_in(self, first: int, last: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """The parts of runs from one row up to another, with the donors' rows at their beginning."""
        for run in self.runs[bisect_right(self.runs, first, key=attrgetter("first")) - 1 :]:
            if run.first >= last:
                break
            begin = max(first, run.first)
            end = min(last, run.first + run.size)
            yield begin, end, [(donor, row + begin - run.first) for donor, row in run.donors]

    def _average(self, donors: Sequence[tuple[int, int]], count: int, read: ReadRows) -> Tensor:
        """The mean of rows of the donors, rounded once; those of a single one as they are."""
        import torch

        from mergekit_lfm.kernels.sums import round_once

        if len(donors) == 1:
            ((donor, row),) = donors
            return read(self.sources[donor], row, row + count)
        total = torch.zeros((count, *self.spec.shape[1:]), dtype=torch.float64)
        for donor, row in donors:
            total += read(self.sources[donor], row, row + count)
        return round_once(total / len(donors), getattr(torch, self.spec.dtype))

    def _mean(self, read: ReadRows) -> Tensor:
        """The mean of all rows of tokens, rounded once. numpy adds in one order, whatever the number of threads."""
        import torch

        from mergekit_lfm.kernels.sums import round_once

        total = torch.zeros(self.spec.shape[1:], dtype=torch.float64)
        for first, last in self._token_panels:
            total += torch.from_numpy(self.rows(first, last, read).double().numpy().sum(0, keepdims=True))[0]
        return round_once(total / self._tokens, getattr(torch, self.spec.dtype))
