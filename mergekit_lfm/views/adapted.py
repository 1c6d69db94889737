"""A checkpoint with adapters applied as it is read: each to what the ones before it leave.

Panels are computed in float32, in float64 if the tensor or the adapter is, and rounded once: at the end of a merge, or
to the checkpoint's dtype. The panels do not depend on the range that is read, and an adapter's matrices are read for
them, not held: memory does not grow with the model, nor with the adapter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.artifacts.adapter import Adapter, dropped_of, open_adapter
from mergekit_lfm.artifacts.patch import PATCH, open_patch
from mergekit_lfm.artifacts.transform import PANEL
from mergekit_lfm.errors import FormatError, PlanError, several
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, is_adapted
from mergekit_lfm.store.checkpoint import Checkpoint, Layout, open_checkpoint
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE, TensorSpec
from mergekit_lfm.views.adapters.change import Change, Panel, Partial, Replaced, scaled
from mergekit_lfm.views.adapters.find import Changes, find_changes
from mergekit_lfm.views.base import Maker, ReadRows, Source, View, row_count
from mergekit_lfm.views.patched import Patched, patched_view
from mergekit_lfm.views.quantisation import dequantise

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"
T = TypeVar("T")
Step = tuple[int, Change]  # the index of an adapter among the view's checkpoints, and what it does


@dataclass(frozen=True)
class Applied:
    """Makes a tensor from the model's and the changes to it. old: the model's. once: keeps results of passes."""

    spec: TensorSpec
    old: TensorSpec
    steps: tuple[Step, ...]
    once: Callable[[tuple[str, int], Callable[[], Tensor]], Tensor]

    @property
    def whole(self) -> bool:
        return len(self.old.shape) < 2

    @cached_property
    def sources(self) -> list[Source]:
        return [(0, self.old.name), *((i, part.name) for i, change in self.steps for part in change.parts)]

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of each panel."""
        rows = row_count(self.old)
        step = rows if self.whole else max(1, PANEL // max(1, self.old.numel // rows))
        return list(pairwise([*range(0, rows, step), rows]))

    @property
    def arithmetic(self) -> str:
        """The dtype of the arithmetic."""
        dtypes = {self.old.dtype, *(part.dtype for _, change in self.steps for part in change.parts)}
        return "float64" if "float64" in dtypes else "float32"

    @property
    def scratch(self) -> int:
        """Bytes of a panel as read, computed and rounded, and of the adapters' matrices as read and computed."""
        rows = max(last - first for first, last in self.panels)
        held = sum(part.numel for _, change in self.steps for part in change.parts)
        read = max(part.nbytes for _, change in self.steps for part in change.parts)
        scratch = max(change.scratch(rows) for _, change in self.steps)
        panel = rows * (self.old.numel // row_count(self.old))
        return ITEMSIZE[self.arithmetic] * (5 * panel + held + scratch) + read

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        import torch

        dtype = getattr(torch, self.arithmetic)
        x = self._after(len(self.steps), first, last, lambda source, *rows: read(source, *rows).to(dtype))
        return round_once(x, getattr(torch, self.spec.dtype)).reshape(-1, *self.spec.shape[1:]).contiguous()

    def _after(self, count: int, first: int, last: int, read: ReadRows) -> Tensor:
        """A panel after the first `count` changes, [rows, numbers in a row]."""
        x = read((0, self.old.name), first, last).reshape(last - first, -1)
        for k, (i, change) in enumerate(self.steps[:count]):
            part = partial(_whole, read, i)
            panels = partial(self._panels, k, read)
            panel = Panel(x, first, last, part, panels, partial(self.once, (self.spec.name, k)))
            x = change.apply(panel)
        return x

    def _panels(self, count: int, read: ReadRows) -> Iterator[Panel]:
        """All panels after the first `count` changes, for the next one."""
        i = self.steps[count][0]
        for first, last in self.panels:
            x = self._after(count, first, last, read)
            yield Panel(x, first, last, partial(_whole, read, i), partial(self._panels, count, read), _no_more)


def _no_more(make: Callable[[], Tensor]) -> Tensor:
    return make()


def _whole(read: ReadRows, i: int, spec: TensorSpec) -> Tensor:
    """A tensor of an adapter."""
    return read((i, spec.name), 0, row_count(spec)).reshape(spec.shape)


class _Passes:
    """Results of passes over a whole tensor, such as the norms of its columns, each made once. It pickles empty."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a pass may read a tensor that another one has changed
        self._made: dict[tuple[str, int], Tensor] = {}

    def __reduce__(self) -> tuple[type[_Passes], tuple[()]]:
        return _Passes, ()

    def once(self, key: tuple[str, int], make: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


@final
class Adapted(View):
    """The checkpoint with the adapters applied in turn, each to a share of what it does.

    adapters: with their shares and their changes, which fit the checkpoint. exact: True to leave the changed tensors in
    the dtype of the arithmetic, as a merge takes them. changed: the number of tensors that each adapter changes.
    """

    def __init__(self, inner: Checkpoint, adapters: Sequence[tuple[Adapter, float, Changes]], *, exact: bool) -> None:
        steps: dict[str, list[Step]] = {}
        for i, (_, scale, changes) in enumerate(adapters, 1):
            for name, own in changes.items():
                shares = own if scale == 1 else [scaled(change, scale) for change in own]
                steps.setdefault(name, []).extend((i, change) for change in shares)
        passes = _Passes()
        self._taken = {name: taken for name, own in steps.items() if (taken := _taken(inner[name], own))}
        self._makers = {
            name: _make(inner[name], tuple(own), passes, exact=exact)
            for name, own in steps.items()
            if name not in self._taken
        }
        specs = {name: self._makers[name].spec if name in self._makers else spec for name, spec in inner.items()}
        key = {"adapters": [[adapter.kind, adapter.key, scale] for adapter, scale, _ in adapters], "exact": exact}
        super().__init__(specs, (inner, *(adapter.tensors for adapter, _, _ in adapters)), key)
        self.adapters = tuple(adapter for adapter, _, _ in adapters)
        self.changed = tuple(len(changes) for _, _, changes in adapters)

    def maker(self, name: str) -> Applied | None:
        return self._makers.get(name)

    def source(self, name: str) -> Source:
        return self._taken.get(name, (0, name))

    def name_in_files(self, name: str) -> str:
        return self.inners[0].name_in_files(name)

    def stored_dtype(self, name: str) -> str:
        return self.inners[0].stored_dtype(name)

    @property
    def note(self) -> str | None:
        """A line about a head that changes with an embedding, since the model ties the two."""
        model = self.inners[0]
        runs = any(part in str(name) for name in model.config.get("architectures") or () for part in ("LM", "Generat"))
        if HEAD in model or not (runs and is_tied(model.config)):
            return None
        groups = tied_names([*model, HEAD])
        name = next((name for group in groups if HEAD in group for name in group if name in self._makers), None)
        return name and f"the adapter changes {name}, to which {HEAD} is tied: the head changes with it"

    @property
    def layout(self) -> tuple[Layout, ...]:
        return self.inners[0].layout

    @property
    def dropped(self) -> dict[str, str]:
        unused = {f"{a.label}: {name}": "not used by the adapter" for a in self.adapters for name in dropped_of(a)}
        return {**super().dropped, **unused}

    def _panel(self, maker: Maker, first: int, last: int) -> Tensor:
        if getattr(self._kept, "of", None) != maker.spec.name:
            self._kept.of, self._kept.parts = maker.spec.name, {}
        return super()._panel(maker, first, last)

    def _read(self, source: Source, first: int, last: int) -> Tensor:
        if not source[0]:
            return super()._read(source, first, last)
        parts: dict[Source, Tensor] = self._kept.parts  # whole, and the same for all panels of a tensor
        if source not in parts:
            parts[source] = super()._read(source, first, last)
        return parts[source]


def _taken(old: TensorSpec, steps: Sequence[Step]) -> Source | None:
    """The adapter's tensor that stands in place of the model's as it is; None for any other change.

    Of integers that is so for any share: there is no number between two of them.
    """
    i, change = steps[-1]
    if isinstance(change, Partial) and old.dtype not in FLOATS:
        change = change.change
    return (i, change.new.name) if isinstance(change, Replaced) and change.new.dtype == old.dtype else None


def _make(old: TensorSpec, steps: tuple[Step, ...], passes: _Passes, *, exact: bool) -> Applied:
    applied = Applied(old, old, steps, passes.once)
    spec = replace(old, dtype=applied.arithmetic) if exact else old
    return replace(applied, spec=spec)


def adapted_in(checkpoint: Checkpoint) -> Iterator[Adapted | Patched]:
    """The checkpoint, and those below it, that adapters or patches are read with, in the order of their work."""
    if isinstance(checkpoint, View) and checkpoint.inners:
        yield from adapted_in(checkpoint.inners[0])
    if isinstance(checkpoint, Adapted) or (isinstance(checkpoint, Patched) and checkpoint.named):
        yield checkpoint


def adapt(checkpoint: Checkpoint, refs: Sequence[AdapterRef], label: object, *, exact: bool = False) -> Checkpoint:
    """The checkpoint with the adapters and patches applied in turn; itself without any.

    label: of the model in messages. Raises one PlanError about all adapters that cannot be read or do not fit, or about
    patches of another model.
    """
    for are_patches, group in groupby(refs, lambda ref: PATCH.is_at(ref.source)):
        apply = _apply_patches if are_patches else partial(_apply_adapters, exact=exact)
        checkpoint = apply(checkpoint, [*group], label)
    return checkpoint


def _apply_adapters(checkpoint: Checkpoint, refs: Sequence[AdapterRef], label: object, *, exact: bool) -> Checkpoint:
    found, problems = list[tuple[Adapter, float, Changes]](), list[str]()
    for ref in refs:
        try:
            adapter = open_adapter(ref.source, ref.ref)
            found.append((adapter, ref.scale, find_changes(adapter, checkpoint, label)))
        except (FormatError, PlanError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("adapters do not fit their models", problems))
    return Adapted(checkpoint, found, exact=exact)


def _apply_patches(checkpoint: Checkpoint, refs: Sequence[AdapterRef], label: object) -> Checkpoint:
    shares = [f"{ref.scale:g}*{ref.ref}" for ref in refs if ref.scale != 1]
    if shares:
        raise PlanError(f"{label}: found {shares[0]}, a share of a patch; expected it as a whole. Leave the number out")
    files = {ref.ref: open_checkpoint(ref.source) for ref in refs}
    return patched_view(checkpoint, *(open_patch(file.path) for file in files.values()), files=files)


def with_adapters(model: T) -> T | Checkpoint:
    """The model that a text MODEL+ADAPTER names; anything else as it is."""
    return open_model(model) if isinstance(model, str | os.PathLike) and is_adapted(model) else model


def open_model(text: str | os.PathLike[str], *, where: Path | None = None) -> Checkpoint:
    """The model that a text names, MODEL or MODEL+ADAPTER, as `open_checkpoint` opens it; quantised ones as float32.

    where: the folder that paths are relative to, before the working directory.
    """
    if not is_adapted(text):
        return open_checkpoint(text)
    return open_found(find_reference(str(text), Where(where)))


def open_found(found: FoundModel) -> Checkpoint:
    """The model that a recipe names, with its adapters; a quantised one as float32."""
    return adapt(dequantise(open_checkpoint(found.source)), found.adapters, found.ref)
