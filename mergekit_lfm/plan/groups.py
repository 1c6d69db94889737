"""Groups of matrices that become products in an adapter: the weights of layers, embeddings and experts.

Nothing but names and shapes says what a tensor is: conventions of transformers' classes, which all checkpoints follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mergekit_lfm.arch.experts import ORDER, PART, layouts
from mergekit_lfm.arch.heads import HEAD
from mergekit_lfm.output.adapter_config import modules_of
from mergekit_lfm.store.tensors import FLOATS, TensorSpec
from mergekit_lfm.views.adapters.experts import TURNED
from mergekit_lfm.views.adapters.names import is_conv1d

# Embeddings of words, which PEFT can wrap; those of positions have classes of their own.
WORDS = re.compile(r"(^|\.)(embed_tokens|word_embeddings?|wte|shared|tok_embeddings|embed_in)$")
EMBEDDINGS = re.compile(r"(^|\.)(\w*embeddings?|embed_\w+|wte|wpe|shared|relative_attention_bias)$")
ROUTER = re.compile(r"(^|\.)(gate|router)$")

Kind = Literal["layer", "embedding", "experts"]


class Piece(NamedTuple):
    """Rows of a matrix in the files: [rows, columns] elements of a tensor from `start` on."""

    name: str
    start: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Group:
    """Matrices that get one rank: that of a layer, or those of all experts.

    module: PEFT's name of the layer, or of the tensor of all experts. members: the pieces of each matrix. out, columns:
    its shape once it is turned, if it is stored as [in, out]. kernel: the sizes of a convolution's.
    """

    module: str
    kind: Kind
    members: tuple[tuple[Piece, ...], ...]
    out: int
    columns: int
    turned: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the tensor in reports."""
        return self.module if self.kind == "experts" else f"{self.module}.weight"

    @property
    def names(self) -> list[str]:
        """Its tensors in the files."""
        return list(dict.fromkeys(piece.name for member in self.members for piece in member))

    @property
    def width(self) -> int:
        """The numbers that one rank takes."""
        return len(self.members) * (self.out + self.columns)

    @property
    def most(self) -> int:
        """The largest rank."""
        return min(self.out, self.columns)


@dataclass(frozen=True)
class Selection:
    """Which tensors an adapter may change, and how: those with one of `include` in their names, and none of `exclude`.

    Texts are regular expressions. save: those of modules to save whole. embed_lora: whether embeddings and heads are
    products.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    save: Sequence[str] = ()
    embed_lora: bool = False

    def takes(self, name: str) -> bool:
        wanted = not self.include or any(re.search(text, name) for text in self.include)
        return wanted and not any(re.search(text, name) for text in self.exclude)

    def saves(self, module: str) -> bool:
        return any(re.search(text, module) for text in self.save)


def find_groups(specs: Mapping[str, TensorSpec], kind: str, selection: Selection) -> Iterator[Group]:
    """The groups of all tensors that can be products. specs: by running names. kind: the model type."""
    apart = [*_experts_apart(specs)]
    yield from apart
    placed = {name for group in apart for name in group.names}
    modules = modules_of(specs)
    for running, spec in specs.items():
        if spec.name in placed or spec.dtype not in FLOATS or 0 in spec.shape:
            continue
        module, _, leaf = running.rpartition(".")
        if len(spec.shape) == 3 and leaf in ORDER and module.rpartition(".")[2] == "experts":
            yield _experts_together(spec, running, kind)
        elif leaf == "weight" and module and len(spec.shape) > 1 and not selection.saves(module):
            is_router = ROUTER.search(module) and f"{module.rpartition('.')[0]}.experts" in modules
            group = None if is_router else _layer(spec, running, module, kind, selection)
            if group is not None:
                yield group


def _layer(spec: TensorSpec, running: str, module: str, kind: str, selection: Selection) -> Group | None:
    """The group of one layer's weight; None for those that are saved whole."""
    rows, columns, *kernel = spec.shape
    whole: tuple[Piece, ...] = (Piece(spec.name, 0, rows, spec.numel // rows),)
    if EMBEDDINGS.search(module) and not kernel:
        known = selection.embed_lora and WORDS.search(module)
        return Group(module, "embedding", (whole,), columns, rows, turned=True) if known else None
    if HEAD.search(running) and not (selection.embed_lora and is_vocabulary(running)):
        return None
    if kernel:  # each output of a depthwise convolution has its own input, and PEFT's factors know no such layer
        return Group(module, "layer", (whole,), rows, spec.numel // rows, kernel=(*kernel,)) if columns > 1 else None
    if is_conv1d(module, kind, stated=False):
        return Group(module, "layer", (whole,), columns, rows, turned=True)
    return Group(module, "layer", (whole,), rows, columns)


def _experts_together(spec: TensorSpec, running: str, kind: str) -> Group:
    """The group of a tensor of all experts."""
    count, rows, columns = spec.shape
    members = tuple((Piece(spec.name, e * rows * columns, rows, columns),) for e in range(count))
    out, into = (columns, rows) if kind in TURNED else (rows, columns)
    return Group(running, "experts", members, out, into, turned=kind in TURNED)


def _experts_apart(specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    """The groups of experts that the files have one by one, as the running model has them: in two tensors."""
    own = {spec.name: spec for spec in specs.values() if f".{PART}" in spec.name}
    placed = set[str]()
    for layout in layouts():
        for layer in layout.find(own):
            names = layout.names(layer)
            if layer.form != "apart" or not placed.isdisjoint(names):
                continue
            placed.update(names)
            for together, matrices in zip(layout.together(layer), ((0, 1), (2,)), strict=True):
                members = tuple(
                    tuple(Piece(layout.name(layer, e, i), 0, *layer.matrices[i]) for i in matrices)
                    for e in range(layer.count)
                )
                rows = sum(piece.rows for piece in members[0])
                yield Group(together, "experts", members, rows, members[0][0].columns)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of a head has a row for each word."""
    return name.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out", "decoder")
