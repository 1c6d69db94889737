"""Apply patches to tensors as a checkpoint is read; or give a patch's changes alone.

Changes are computed in float64 from the patch's float32 factors, summed over all patches in order, and rounded once to
the stored dtype. The panels of rows for this do not depend on the range that is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import xxhash

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.artifacts.transform import PANEL
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import ReadRows, Source, View, row_count

if TYPE_CHECKING:
    from torch import Tensor


class Patcher:
    """Applies patches, which all change it, to one tensor; with base False the sum of the changes alone, float64."""

    def __init__(self, patches: Sequence[Patch], spec: TensorSpec, *, base: bool = True) -> None:
        self.old, self.base = spec, base
        self.spec = spec if base else TensorSpec(spec.name, spec.shape, "float64")
        kinds = [(patch.info.tensors[spec.name].kind, patch.parts(spec.name)) for patch in patches]
        last = max((i for i, (kind, _) in enumerate(kinds) if kind == "replace"), default=-1)
        self.new = kinds[last][1][0] if last >= 0 else None  # replaces everything before it
        self.added = [parts for _, parts in kinds[last + 1 :]]
        self.whole = len(spec.shape) < 2

    @property
    def sources(self) -> tuple[Source, ...]:
        return ((0, self.old.name),) if self.base and self.new is None else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the patches' parts for this tensor."""
        replacement = [self.new] if self.new is not None else []
        return sum(x.nbytes for x in (*replacement, *(x for parts in self.added for x in parts)))

    @property
    def scratch(self) -> int:
        """Bytes that patching holds, its input and result included.

        Six float64 panels, most of them to round, and half as much that the allocator keeps of freed ones: resident
        memory grows by 18.5 MB for a panel of 2.1 MB (torch 2.13, glibc 2.36).
        """
        rows = max(last - first for first, last in self.panels)
        factors = max((rows * x[0].shape[1] + x[1].numel() for x in self.added if len(x) == 2), default=0)
        return 8 * (9 * rows * (self.old.numel // row_count(self.old)) + factors)

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of each panel."""
        rows = row_count(self.old)
        step = rows if self.whole else max(1, PANEL // max(1, self.old.numel // rows))
        return list(pairwise([*range(0, rows, step), rows]))

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        """Patch one panel of rows. read: returns rows of the stored tensor."""
        import torch

        rows = slice(None) if self.whole else slice(first, last)
        stored = read(self.sources[0], first, last) if self.sources else None
        if self.base and self.new is not None:
            stored = self.new[rows] if self.new.ndim else self.new
        if not self.added:
            assert stored is not None
            return stored.contiguous()
        total = None if stored is None else stored.double()
        for x in self.added:
            part = x[0][rows].double() if len(x) == 1 else x[0][rows].double() @ x[1].double()
            total = part if total is None else total + part
        assert total is not None
        return round_once(total, getattr(torch, self.spec.dtype)).contiguous()


@final
class Patched(View):
    """The checkpoint with the patches, which fit it, applied. key: identifies them in digests. infos: their headers.

    files: of the patches, by the names that a user gave them, where they are read with the model.
    """

    def __init__(
        self,
        inner: Checkpoint,
        patches: Sequence[Patch],
        key: Mapping[str, Any],
        files: Mapping[str, Checkpoint] = MappingProxyType({}),
    ) -> None:
        super().__init__(inner, (inner, *files.values()), key)
        self.named = tuple(files)
        self.infos = tuple(patch.info for patch in patches)
        self._patchers = make_patchers(patches, inner, base=True)

    @property
    def held(self) -> int:
        return sum(patcher.nbytes for patcher in self._patchers.values())

    def maker(self, name: str) -> Patcher | None:
        return self._patchers.get(name)


@final
class Changes(View):
    """The patches' changes, float64, of the tensors that they change. path: of their file. infos: their headers."""

    def __init__(self, patches: Sequence[Patch], specs: Mapping[str, TensorSpec], path: Path) -> None:
        self.infos = tuple(patch.info for patch in patches)
        self._patchers = make_patchers(patches, specs, base=False)
        new = {name: patcher.spec for name, patcher in self._patchers.items()}
        super().__init__(new, (), {"added": [*map(digest_of, patches)]}, path)

    @property
    def held(self) -> int:
        return sum(patcher.nbytes for patcher in self._patchers.values())

    def maker(self, name: str) -> Patcher:
        return self._patchers[name]


def make_patchers(patches: Sequence[Patch], specs: Mapping[str, TensorSpec], *, base: bool) -> dict[str, Patcher]:
    """The patchers of all tensors that the patches change, by name, in the order of the patches."""
    changes: dict[str, list[Patch]] = {}
    for patch in patches:
        for name in patch.info.tensors:
            changes.setdefault(name, []).append(patch)
    return {name: Patcher(chosen, specs[name], base=base) for name, chosen in changes.items()}


def patched_view(
    checkpoint: Checkpoint,
    *patches: Patch,
    any_base: bool = False,
    files: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> Checkpoint:
    """The checkpoint with the patches applied, read like any other. Tensors that they do not change stay as they are.

    Raises PlanError naming all tensors that are missing, of another shape or dtype, or, unless any_base, of other bytes
    than those that a patch was made for: the checkpoint's, or what the patches before it give.
    """
    check_base(checkpoint, patches, any_base=any_base)
    return Patched(checkpoint, patches, {"patches": [*map(digest_of, patches)]}, files)


def check_base(checkpoint: Checkpoint, patches: Sequence[Patch], *, any_base: bool = False) -> None:
    """Raise the PlanError of `patched_view` if the patches do not fit the checkpoint."""
    problems: list[str] = []
    before: dict[str, list[Patch]] = {}
    for patch in patches:
        for name, was in patch.info.tensors.items():
            spec = checkpoint.get(name)
            if spec is None:
                problems.append(f"there is no {name}")
            elif spec.shape != was.shape:
                problems.append(f"{spec} is {list(was.shape)} in the patch")
            elif spec.dtype != was.dtype and (not any_base or was.kind == "replace"):
                problems.append(f"{spec} is {was.dtype} in the patch")
            elif not any_base and not _has_values(checkpoint, name, was.digest, before.get(name, ())):
                problems.append(f"{name} has other values than those the patch was made for")
            else:
                before.setdefault(name, []).append(patch)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise PlanError(
            f"the patch does not fit {checkpoint.path}:\n  "
            + "\n  ".join(problems[:10])
            + f"{more}\nGive the model that it was made for. If tensors differ in values or dtype only, --any-base "
            "(any_base=True) applies it anyway"
        )


def _has_values(checkpoint: Checkpoint, name: str, digest: str | None, before: Sequence[Patch]) -> bool:
    """True if the digest is that of the tensor, or of it with the first or more patches applied; also for no digest."""
    if digest in (None, checkpoint.digest_of(name)):
        return True
    alone = [replace(patch, info=replace(patch.info, tensors={name: patch.info.tensors[name]})) for patch in before]
    return any(digest == Patched(checkpoint, alone[: n + 1], {}).digest_of(name) for n in range(len(alone)))


def summed_changes(patches: Sequence[Patch], specs: Mapping[str, TensorSpec], path: Path) -> Changes:
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
    return Changes(patches, specs, path)


def digest_of(patch: Patch) -> str:
    """xxh3-128 of everything that applying the patch depends on, in hex."""
    digest = xxhash.xxh3_128()
    for name, x in sorted(patch.tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(bytes_of(x.detach().cpu().contiguous()))
    return digest.hexdigest()
