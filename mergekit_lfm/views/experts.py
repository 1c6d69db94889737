"""A mixture of experts with its tensors as another model has them: each expert's matrices apart, or all in one tensor.

A matrix of one expert is a range of the tensor with all of them; the other way they are read one expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mergekit_lfm.arch.experts import PART, Experts, Form, Layout, Specs, layouts
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.checkpoint import Layout as FileLayout
from mergekit_lfm.store.tensors import TensorSpec, promote
from mergekit_lfm.views.base import Maker, ReadRows, Source, View

if TYPE_CHECKING:
    from torch import Tensor

WORDS = {
    "apart": "one by one",
    "together": "together as [experts, out, in]",
    "turned": "together as [experts, in, out]",
}


def regroup(model: Checkpoint, template: Specs) -> Checkpoint:
    """The model with its experts in the form of the template's; itself if they are, or if no known layout has both."""
    mine, theirs = ({name: spec for name, spec in each.items() if PART in name} for each in (model, template))
    for layout in layouts() if mine and theirs else ():
        found, wanted = layout.find(mine), layout.find(theirs)
        forms = {experts.form for experts in wanted}
        if len(forms) == 1 and {experts.form for experts in found} - forms:
            return Regrouped(model, layout, found, next(iter(forms)))
    return model


def note_of(checkpoint: Checkpoint) -> str | None:
    """A line about the experts of a checkpoint, or of one below it, that are read in another form."""
    while isinstance(checkpoint, View) and checkpoint.inners:
        if isinstance(checkpoint, Regrouped):
            return checkpoint.note
        checkpoint = checkpoint.inners[0]
    return None


@final
class Regrouped(View):
    """The checkpoint with all experts of a layout in one form. note: a line about it."""

    def __init__(self, inner: Checkpoint, layout: Layout, found: Sequence[Experts], form: Form) -> None:
        self.form = form
        self._makers: dict[str, Maker] = {}
        self._ranges: dict[str, tuple[str, int]] = {}  # a tensor, and the first element of the range that it is
        moved = [experts for experts in found if experts.form != form]
        gone = {name for experts in moved for name in layout.names(experts)}
        specs = {name: spec for name, spec in inner.items() if name not in gone}
        made = [spec for experts in moved for spec in self._make(layout, experts)]
        stored, read = (WORDS[each] for each in (moved[0].form, form))
        first = layout.names(moved[0])[0]
        self.note = f"its experts are stored {stored}, such as {first}, and read {read}, such as {made[0].name}"
        specs |= {spec.name: spec for spec in made}
        super().__init__(specs, (inner,), {"experts": form})

    def _make(self, layout: Layout, experts: Experts) -> list[TensorSpec]:
        """The tensors of a layer's experts in the view's form."""
        together = layout.together(experts)
        if self.form == "apart":
            return [
                self._cut(layout.name(experts, e, matrix), together[matrix // 2], experts, e, matrix)
                for e in range(experts.count)
                for matrix in range(3)
            ]
        specs = []
        for name, matrices in zip(together, ((0, 1), (2,)), strict=True):
            rows, columns = len(matrices) * experts.matrices[matrices[0]][0], experts.matrices[matrices[0]][1]
            sources = [[layout.name(experts, e, matrix) for matrix in matrices] for e in range(experts.count)]
            parts = tuple(map(tuple, sources)) if experts.form == "apart" else ((name,),)
            shape = (rows, columns) if self.form == "together" else (columns, rows)
            spec = TensorSpec(name, (experts.count, *shape), experts.dtype)
            self._makers[name] = Joined(spec, parts, experts.form == "apart", self.form == "turned")
            specs.append(spec)
        return specs

    def _cut(self, name: str, source: str, experts: Experts, e: int, matrix: int) -> TensorSpec:
        """One expert's matrix, out of the tensor with all of them."""
        spec = TensorSpec(name, experts.matrices[matrix], experts.dtype)
        if experts.form == "turned":
            self._makers[name] = Turned(spec, source, e, spec.shape[0] if matrix == 1 else 0)
        else:
            self._ranges[name] = source, spec.numel * (e if matrix == 2 else 2 * e + matrix)
        return spec

    def maker(self, name: str) -> Maker | None:
        return self._makers.get(name)

    def source(self, name: str) -> Source:
        if name in self._makers:
            return self._makers[name].sources[0]
        return 0, self._ranges.get(name, (name, 0))[0]

    def stored_dtype(self, name: str) -> str:
        maker, inner = self._makers.get(name), self.inners[0]
        if maker is None:
            return super().stored_dtype(name)
        return promote({inner.stored_dtype(source) for _, source in maker.sources})

    def offset(self, name: str) -> int:
        return self._ranges.get(name, (name, 0))[1]

    @property
    def layout(self) -> tuple[FileLayout, ...]:
        return ()  # its tensors are not those of the files


@dataclass(frozen=True, slots=True)
class Joined:
    """All experts of a layer in one tensor, one expert a panel.

    parts: the names of each expert's matrices, which follow one another; or one tensor with all experts, to turn.
    apart: whether it is the former. turned: to write [in, out] of matrices apart.
    """

    spec: TensorSpec
    parts: tuple[tuple[str, ...], ...]
    apart: bool
    turned: bool
    whole: bool = False

    @property
    def sources(self) -> Sequence[Source]:
        return [(0, name) for names in self.parts for name in names]

    @property
    def panels(self) -> Sequence[tuple[int, int]]:
        return [(e, e + 1) for e in range(self.spec.shape[0])]

    @property
    def scratch(self) -> int:
        return 2 * self.spec.nbytes // max(1, self.spec.shape[0])  # one expert as read, and as written

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        import torch

        assert last == first + 1
        if not self.apart:
            return read((0, self.parts[0][0]), first, last).transpose(1, 2).contiguous()
        names = self.parts[first]
        length = (self.spec.shape[2] if self.turned else self.spec.shape[1]) // len(names)
        matrices = [read((0, name), 0, length).to(getattr(torch, self.spec.dtype)) for name in names]
        if self.turned:
            return torch.cat([matrix.T for matrix in matrices], 1)[None]
        return torch.cat(matrices)[None]


@dataclass(frozen=True, slots=True)
class Turned:
    """One expert's matrix [out, in] out of the tensor `held` of all experts, [experts, in, out], from a column on."""

    spec: TensorSpec
    held: str
    expert: int
    column: int
    whole: bool = True

    @property
    def sources(self) -> Sequence[Source]:
        return ((0, self.held),)

    @property
    def panels(self) -> Sequence[tuple[int, int]]:
        return ((0, self.spec.shape[0]),)

    @property
    def scratch(self) -> int:
        return 3 * self.spec.nbytes  # gate and up of the expert as read, and one of them as written

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        matrix = read((0, self.held), self.expert, self.expert + 1)[0]
        return matrix[:, self.column + first : self.column + last].T.contiguous()
