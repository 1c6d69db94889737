"""A file of tensors made from stored ones, panel by panel, as they are read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import TensorSpec


class RowRewriter(Protocol):
    """Makes a tensor while it is read: panels of rows of the new tensor, from rows of the stored one.

    old, spec: the stored and the new tensor. idle: True if they are the same. whole: True to make the tensor at once.
    """

    old: TensorSpec
    spec: TensorSpec
    idle: bool
    whole: bool

    @property
    def panels(self) -> list[tuple[int, int]]: ...
    @property
    def scratch(self) -> int: ...
    def apply(self, x: Tensor, /) -> Tensor: ...
    def rows(self, first: int, last: int, read: Callable[[int, int], Tensor], /) -> Tensor: ...


class RewrittenFile(WeightFile):
    """A file of tensors that are rewritten as they are read. A tensor left as it is stays a byte range of the file.

    held: gives the bytes that all rewriters hold. kept: each thread's last panel in any file of the checkpoint, which
    neighbouring ranges share.
    """

    inner: WeightFile

    def __init__(
        self,
        inner: WeightFile,
        rewriters: Mapping[str, RowRewriter],
        held: Callable[[], int],
        kept: threading.local,
    ) -> None:
        self.inner, self.rewriters, self._held, self._kept = inner, rewriters, held, kept
        self.path, self.data_start = inner.path, inner.data_start
        self.nbytes, self.stamp, self.snapshot = inner.nbytes, inner.stamp, inner.snapshot
        self.fallback = inner.fallback
        self.tensors = {name: (rewriters[name].spec, offset) for name, (_, offset) in inner.tensors.items()}

    @property
    def resident(self) -> int:
        return self._held()

    def fileno(self) -> int:
        return self.inner.fileno()

    def offset(self, name: str) -> int | None:
        return self.inner.offset(name) if self.rewriters[name].idle else None

    def scratch(self, name: str) -> int:
        return self.rewriters[name].scratch

    def at_once(self, name: str) -> bool:
        rewriter = self.rewriters[name]
        return rewriter.whole and not rewriter.idle

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the rewritten tensor's bytes from byte `start` on; both are whole elements."""
        rewriter = self.rewriters[name]
        if rewriter.idle:
            self.inner.read_into(name, start, into)
            return
        spec = rewriter.spec
        row = spec.nbytes // max(1, spec.shape[0])
        at = bisect_right(rewriter.panels, start // row, key=itemgetter(0)) - 1
        for first, last in rewriter.panels[at:]:
            begin = first * row
            if begin >= start + len(into):
                break
            lower, upper = max(start, begin), min(start + len(into), last * row)
            data = bytes_of(self._panel(name, first, last))
            into[lower - start : upper - start] = data[lower - begin : upper - begin]

    def _panel(self, name: str, first: int, last: int) -> Tensor:
        if getattr(self._kept, "key", None) != (name, first):
            self._kept.key = self._kept.panel = None  # freed before the next one is made
            rewriter = self.rewriters[name]
            if rewriter.whole:
                panel = rewriter.apply(self._read(name, 0, rewriter.old.shape[0]))
            else:
                panel = rewriter.rows(first, last, lambda a, b: self._read(name, a, b))
            self._kept.key, self._kept.panel = (name, first), panel
        kept: Tensor = self._kept.panel
        return kept

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the tensor as it is stored."""
        spec = self.rewriters[name].old
        rows = torch.empty(last - first, *spec.shape[1:], dtype=getattr(torch, spec.dtype))
        row_nbytes = rows.nbytes // max(1, last - first)
        self.inner.read_into(name, first * row_nbytes, bytes_of(rows))
        return rows
