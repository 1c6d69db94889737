"""The patch file: the changes to a model, and nothing else. Edits write one; applying it writes one to undo it.

It is one safetensors file. It stores the new value of a replaced tensor under the tensor's own name, a dense change as
NAME.add, and a low-rank change as NAME.left and NAME.right, float32, whose product has the orientation in which the
checkpoint stores the tensor. The metadata say which model the patch is for and how it was made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lfm.artifacts.header import Kind, save_tensors
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import FLOATS, read_header
from mergekit_lfm.version import versions

if TYPE_CHECKING:
    from torch import Tensor

PATCH = Kind("patch", "mergekit-lfm edit", "make the patch again")
ChangeKind = Literal["replace", "add", "low_rank"]
# The name endings of the patch's tensors for one changed tensor, by the kind of its change.
PARTS: Mapping[ChangeKind, tuple[str, ...]] = {"replace": ("",), "add": (".add",), "low_rank": (".left", ".right")}


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A patch's change to one tensor. shape, dtype: the tensor's in the model.

    axis: of a layer's inputs, 1 for a Linear [out, in], 0 for a Conv1D [in, out]; None if the tensor is not a layer's
    weight. digest: the xxh3-128 of the bytes that the patch was made for, None if unknown.
    """

    kind: ChangeKind
    shape: tuple[int, ...]
    dtype: str
    axis: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class PatchInfo:
    """A patch's metadata.

    base: the content digest (`Checkpoint.content`) of the model it was made for, None if unknown. options: every
    constant that the changes depend on. facts: the facts to teach, as from `FactsFile.as_data`, or {}.
    """

    method: str
    tensors: Mapping[str, TensorChange]
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """The metadata of the safetensors header."""
        return PATCH.encode(asdict(self))


@dataclass(frozen=True)
class Patch:
    """Changes to the tensors of a model. tensors: the parts of each change, by their names in a file."""

    info: PatchInfo
    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Patch({self.info.method}, {len(self.info.tensors)} tensors)"

    @classmethod
    def low_rank(
        cls,
        method: str,
        changes: Mapping[str, tuple[Tensor, Tensor, TensorChange]],
        *,
        options: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Patch:
        """A patch of products: by weight (left [rows, n], right [n, columns], the changed tensor), as stored."""
        tensors = {}
        for name, (left, right, _) in changes.items():
            tensors[f"{name}.left"], tensors[f"{name}.right"] = left, right
        changed = {name: change for name, (_, _, change) in changes.items()}
        metadata = PatchInfo(
            method, changed, options=options or {}, facts=facts or {}, versions=versions("torch"), notes=notes
        )
        return cls(metadata, tensors)

    def made_for(self, base: str | None, digests: Mapping[str, str]) -> Patch:
        """This patch, tied to its model: the model's content digest, and its tensors' digests by name."""
        changed = {name: replace(was, digest=digests.get(name)) for name, was in self.info.tensors.items()}
        return replace(self, info=replace(self.info, base=base, tensors=changed))

    def parts(self, name: str) -> tuple[Tensor, ...]:
        """The patch's tensors for one changed tensor: (new,), (added,) or (left, right)."""
        return tuple(self.tensors[name + end] for end in PARTS[self.info.tensors[name].kind])

    def change(self, name: str) -> Tensor:
        """The change that is added to a tensor, in its shape. Raises PlanError for a replaced tensor."""
        parts = self.parts(name)
        if self.info.tensors[name].kind == "replace":
            raise PlanError(
                f"this patch replaces {name} and holds no difference to it; read the new tensor with `parts`"
            )
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def delta(self, layer: str | int) -> Tensor:
        """The change that is added to a layer's weight, [out, in] however it is stored.

        layer: the name of the weight or its module, or the layer's number if only one changed tensor has it. Raises
        KeyError if the patch has no such layer.
        """
        name = self._name_of(layer)
        change = self.change(name)
        return change.mT if self.info.tensors[name].axis == 0 else change

    def _name_of(self, layer: str | int) -> str:
        changed = self.info.tensors
        if isinstance(layer, int):
            matches = [name for name in changed if str(layer) in name.split(".")]
        else:
            matches = [name for name in changed if name in (layer, f"{layer}.weight")]
        if len(matches) == 1:
            return matches[0]
        count = "several" if matches else "none"
        raise KeyError(f"the patch changes {', '.join(changed)}; {layer!r} names {count} of them")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a file, with added changes in float32."""
        exact = {name for name, was in self.info.tensors.items() if was.kind == "replace"}
        stored = {name: x if name in exact else x.float() for name, x in self.tensors.items()}
        save_tensors(Path(path), [spec_of(n, x) for n, x in stored.items()], stored.__getitem__, self.info.metadata())


def read_patch_info(path: Path) -> PatchInfo:
    """The metadata in a patch file's header. Raises FormatError for any other file."""

    def build(facts: dict[str, Any]) -> PatchInfo:
        tensors = {
            name: TensorChange(**{**fields, "shape": tuple(fields["shape"])})
            for name, fields in facts["tensors"].items()
        }
        return PatchInfo(**{**facts, "tensors": tensors, "notes": tuple(facts["notes"])})

    return PATCH.decode(read_header(path).metadata, PatchInfo.__dataclass_fields__, build, path)


def open_patch(path: str | os.PathLike[str]) -> Patch:
    """The patch in a file. Raises FormatError if it holds no patch, FileNotFoundError if it does not exist."""
    file = PATCH.find(path)
    facts = read_patch_info(file)
    stored = open_checkpoint(file)
    wanted = {name + end for name, was in facts.tensors.items() for end in PARTS.get(was.kind, ("?",))}
    if differ := sorted(wanted ^ stored.keys()):
        raise FormatError(f"{file}: {differ[0]} is in its metadata or its data, but not in both; make the patch again")
    patch = Patch(facts, {name: stored.read(name).view(spec.shape) for name, spec in stored.items()})
    if problems := [problem for name in facts.tensors for problem in _misfits(patch, name)]:
        raise FormatError(f"{file}: {'; '.join(problems)}; make the patch again")
    return patch


def _misfits(patch: Patch, name: str) -> list[str]:
    """The problems of a tensor's parts: shapes or types other than in the metadata, or numbers that are not finite."""
    was, parts = patch.info.tensors[name], patch.parts(name)
    if not was.shape:
        return [f"{name} is a single number, which a patch cannot change"]
    if was.kind == "replace":
        (new,) = parts
        fits = tuple(new.shape) == was.shape and str(new.dtype) == f"torch.{was.dtype}"
        return [] if fits else [f"{name} is {new.dtype} {list(new.shape)}, not {was.dtype} {list(was.shape)}"]
    problems = [f"the change of {name} is not finite" for x in parts if not bool(x.isfinite().all())][:1]
    if was.dtype not in FLOATS or was.dtype.startswith("float8"):
        problems.append(f"{name} is {was.dtype}, which takes no additions")
    if was.kind == "low_rank":
        left, right = parts
        shapes = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        shape: tuple[int, ...] = (left.shape[0], right.shape[1]) if shapes else ()
    else:
        shape = tuple(parts[0].shape)
    if shape != was.shape:
        problems.append(f"the change of {name} is {[list(x.shape) for x in parts]}, the tensor {list(was.shape)}")
    return problems
