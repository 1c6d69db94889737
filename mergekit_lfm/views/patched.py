"""Apply patches to tensors as a checkpoint is read; or give a patch's changes alone.

Changes are computed in float64 from the patch's float32 factors, summed over all patches in order, and rounded once to
the stored dtype. The panels of rows for this do not depend on the range that is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.transform import PANEL
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import RewrittenFile


class Patcher:
    """Applies patches to one tensor. With base False the result is the sum of the changes alone, float64."""

    def __init__(self, patches: Sequence[Patch], spec: TensorSpec, *, base: bool = True) -> None:
        self.old, self.base = spec, base
        self.spec = spec if base else TensorSpec(spec.name, spec.shape, "float64")
        kinds = [(patch.info.tensors[spec.name].kind, patch.parts(spec.name)) for patch in self._select(patches)]
        last = max((i for i, (kind, _) in enumerate(kinds) if kind == "replace"), default=-1)
        self.new = kinds[last][1][0] if last >= 0 else None  # replaces everything before it
        self.added = [parts for _, parts in kinds[last + 1 :]]
        self.idle = not kinds
        self.whole = len(spec.shape) < 2

    def _select(self, patches: Sequence[Patch]) -> list[Patch]:
        return [patch for patch in patches if self.old.name in patch.info.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the patches' parts for this tensor."""
        replacement = [self.new] if self.new is not None else []
        return sum(x.nbytes for x in (*replacement, *(x for parts in self.added for x in parts)))

    @property
    def scratch(self) -> int:
        """Bytes that patching holds besides its input and result."""
        panel = max((last - first for first, last in self.panels), default=0)
        return 0 if self.idle else panel * (self.old.numel // max(1, self._rows)) * 8 * 3

    @property
    def _rows(self) -> int:
        return self.old.shape[0] if self.old.shape else 1

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of each panel."""
        step = self._rows if self.whole else max(1, PANEL // max(1, self.old.numel // max(1, self._rows)))
        return list(pairwise([*range(0, self._rows, max(1, step)), self._rows]))

    def apply(self, x: Tensor) -> Tensor:
        """Patch a tensor in memory."""
        if self.whole:
            return self._change_rows(x, slice(None))
        return torch.cat([self.rows(first, last, lambda a, b: x[a:b]) for first, last in self.panels])

    def rows(self, first: int, last: int, read: Callable[[int, int], Tensor]) -> Tensor:
        """Patch one panel of rows. read: returns rows of the stored tensor."""
        stored = read(first, last) if self.base and self.new is None else None
        return self._change_rows(stored, slice(first, last))

    def _change_rows(self, stored: Tensor | None, rows: slice) -> Tensor:
        if self.base and self.new is not None:
            stored = self.new[rows] if self.new.ndim else self.new
        if not self.added:
            assert stored is not None
            return stored.contiguous()
        parts = [x[0][rows].double() if len(x) == 1 else x[0][rows].double() @ x[1].double() for x in self.added]
        total = parts[0] if not self.base or stored is None else parts[0] + stored.double()
        for part in parts[1:]:
            total = total + part
        return round_once(total, getattr(torch, self.spec.dtype)).contiguous()


def patched_view(checkpoint: Checkpoint, *patches: Patch, any_base: bool = False) -> Checkpoint:
    """The checkpoint with the patches applied, read like any other. Tensors that they do not change stay as they are.

    Raises PlanError naming all tensors that are missing, of another shape or dtype, or, unless any_base, of other bytes
    than those that the first patch to change them was made for.
    """
    check_base(checkpoint, patches, any_base=any_base)
    patchers = {name: Patcher(patches, spec) for name, spec in checkpoint.items()}
    nbytes, kept = sum(patcher.nbytes for patcher in patchers.values()), threading.local()
    files = [RewrittenFile(file, patchers, lambda: nbytes, kept) for file in checkpoint.files]
    return Checkpoint(checkpoint.path, files, {**(checkpoint.view or {}), "patches": [*map(digest_of, patches)]})


def check_base(checkpoint: Checkpoint, patches: Sequence[Patch], *, any_base: bool = False) -> None:
    """Raise the PlanError of `patched_view` if the patches do not fit the checkpoint."""
    problems, seen = [], set[str]()
    for patch in patches:
        for name, was in patch.info.tensors.items():
            spec = checkpoint.get(name)
            if spec is None:
                problems.append(f"there is no {name}")
            elif spec.shape != was.shape:
                problems.append(f"{spec} is {list(was.shape)} in the patch")
            elif spec.dtype != was.dtype and (not any_base or was.kind == "replace"):
                problems.append(f"{spec} is {was.dtype} in the patch")
            elif not (any_base or name in seen or was.digest in (None, checkpoint.digest_of(name))):
                problems.append(f"{name} has other values than those the patch was made for")
            seen.add(name)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise PlanError(
            f"the patch does not fit {checkpoint.path}:\n  "
            + "\n  ".join(problems[:10])
            + f"{more}\nGive the model that it was made for. If tensors differ in values or dtype only, --any-base "
            "(any_base=True) applies it anyway"
        )


def summed_changes(patches: Sequence[Patch], specs: Mapping[str, TensorSpec], path: Path) -> Checkpoint:
    """The patches' changes, float64, as a checkpoint of the tensors that they change. path: of their file.

    specs: the tensors of the model that they are added to. Raises PlanError if one is missing, of another shape, or
    replaced.
    """
    problems = []
    for name, was in ((name, was) for patch in patches for name, was in patch.info.tensors.items()):
        spec = specs.get(name)
        if spec is None or spec.shape != was.shape:
            problems.append(f"the patch changes {name} {list(was.shape)}, the merge has {spec or 'no such tensor'}")
        elif was.kind == "replace":
            problems.append(
                f"the patch replaces {name}, which undoes the merge: give it beside a model, under `models`"
            )
    if problems:
        raise PlanError("the patches do not fit the merged tensors:\n  " + "\n  ".join(problems))
    names = dict.fromkeys(name for patch in patches for name in patch.info.tensors)
    patchers = {name: Patcher(patches, specs[name], base=False) for name in names}
    nbytes = sum(patcher.nbytes for patcher in patchers.values())
    inner = WeightFile(path, {name: (specs[name], 0) for name in names}, 0)
    return Checkpoint(path, [RewrittenFile(inner, patchers, lambda: nbytes, threading.local())], {"added": True})


def digest_of(patch: Patch) -> str:
    """xxh3-128 of everything that applying the patch depends on, in hex."""
    digest = xxhash.xxh3_128()
    for name, x in sorted(patch.tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(bytes_of(x.detach().cpu().contiguous()))
    return digest.hexdigest()
