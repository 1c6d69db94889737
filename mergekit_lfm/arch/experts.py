"""How models hold the experts of a layer: each with matrices of its own, or all of them in two tensors.

A line of LAYOUTS is the names of the two tensors, of gate with up and of down; and behind the colon what the names of
one expert's matrices begin with, `{e}` being its number, and end with: gate, up, down. Source: conversion_mapping.py of
transformers 5.24, which holds all experts in two tensors, and saves each by its own, as most checkpoints have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mergekit_lfm.store.tensors import FLOATS, TensorSpec, promote

LAYOUTS = """
mlp.experts.gate_up_proj mlp.experts.down_proj: mlp.experts.{e}. gate_proj.weight up_proj.weight down_proj.weight
mlp.experts.gate_up_proj mlp.experts.down_proj: block_sparse_moe.experts.{e}. w1.weight w3.weight w2.weight
block_sparse_moe.experts.gate_up_proj block_sparse_moe.experts.down_proj: block_sparse_moe.experts.{e}. w1.weight w3.weight w2.weight
feed_forward.experts.gate_up_proj feed_forward.experts.down_proj: feed_forward.experts.{e}. gate_proj.weight up_proj.weight down_proj.weight
feed_forward.experts.gate_up_proj feed_forward.experts.down_proj: feed_forward.experts.{e}. w1.weight w3.weight w2.weight
"""  # noqa: E501

Specs = Mapping[str, TensorSpec]
# One tensor for each matrix of each expert; all in [experts, out, in]; all in [experts, in, out].
Form = Literal["apart", "together", "turned"]

ORDER = ("gate_up_proj", "down_proj")  # of the tensors with all experts, in the module that has them
PART = "experts."  # of the names of all lines
APART = re.compile(r"(^|[._])experts\.\d+\.")
TOGETHER = re.compile(r"(^|[._])experts\.(?!\d)")


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer: their number, and the shape [out, in] of each one's gate and up, and of its down.

    before: what all their names begin with. dtype: of all of them.
    """

    before: str
    form: Form
    count: int
    wide: tuple[int, int]
    dtype: str

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """The shapes [out, in] of gate, up and down."""
        return self.wide, self.wide, self.wide[::-1]


class Layout(NamedTuple):
    """A line of LAYOUTS. apart: the names of one expert's gate, up and down."""

    gate_up: str
    down: str
    apart: tuple[str, str, str]

    def find(self, tensors: Specs) -> list[Experts]:
        """All experts whose names and shapes are as the line says, layer by layer."""
        return [*self._find_together(tensors), *self._find_apart(tensors)]

    def name(self, experts: Experts, e: int, matrix: int) -> str:
        """The name of one matrix of an expert: 0 for gate, 1 for up, 2 for down."""
        return experts.before + self.apart[matrix].format(e=e)

    def together(self, experts: Experts) -> tuple[str, str]:
        """The names of the tensors with all experts of a layer."""
        return experts.before + self.gate_up, experts.before + self.down

    def names(self, experts: Experts) -> list[str]:
        """The names of all tensors of a layer's experts."""
        if experts.form != "apart":
            return [*self.together(experts)]
        return [self.name(experts, e, matrix) for e in range(experts.count) for matrix in range(3)]

    def _find_together(self, tensors: Specs) -> Iterator[Experts]:
        for before in _beginnings(self.gate_up, tensors):
            wide, down = tensors[before + self.gate_up], tensors.get(before + self.down)
            interleaved = f"{wide.name}_bias" in tensors  # as gpt-oss has gate and up
            if down is None or interleaved or not len(wide.shape) == len(down.shape) == 3 or wide.dtype != down.dtype:
                continue
            (count, rows, columns), turned = wide.shape, down.shape[::2] + down.shape[1:2]
            if down.shape == (count, columns, rows // 2) and rows % 2 == 0:
                yield Experts(before, "together", count, (rows // 2, columns), wide.dtype)
            elif turned == (count, rows, columns // 2) and columns % 2 == 0:
                yield Experts(before, "turned", count, (columns // 2, rows), wide.dtype)

    def _find_apart(self, tensors: Specs) -> Iterator[Experts]:
        for before in _beginnings(self.apart[0].format(e=0), tensors):
            first = tensors[before + self.apart[0].format(e=0)]
            inner = before + self.apart[0].partition("{e}")[0]
            numbers = {name[len(inner) :].partition(".")[0] for name in tensors if name.startswith(inner)}
            if len(first.shape) != 2:
                continue
            count = sum(map(str.isdecimal, numbers))
            experts = Experts(before, "apart", count, (first.shape[0], first.shape[1]), first.dtype)
            held = [tensors.get(name) for name in self.names(experts)]
            dtypes = {spec.dtype for spec in held if spec is not None}
            alike = len(dtypes) == 1 or dtypes <= {*FLOATS}  # an adapter may have changed one expert alone
            if alike and [spec and spec.shape for spec in held] == [*experts.matrices] * experts.count:
                yield replace(experts, dtype=promote(dtypes))


def layouts() -> list[Layout]:
    """The lines of LAYOUTS."""
    found = []
    for line in LAYOUTS.strip().splitlines():
        (gate_up, down), (start, gate, up, one_down) = (part.split() for part in line.split(": "))
        found.append(Layout(gate_up, down, (start + gate, start + up, start + one_down)))
    return found


def _beginnings(ending: str, tensors: Specs) -> list[str]:
    """The text before the ending, in the names of all tensors that have it."""
    starts = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    return [start for start in starts if not start or start.endswith(".")]
