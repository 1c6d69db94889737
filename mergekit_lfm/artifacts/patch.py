"""The patch file: what changes in a model, and nothing else. Edits leave one, applying one leaves another to undo it.

One safetensors file. A tensor of the model that is replaced lies there under its own name, a dense change as NAME.add,
a change of low rank as NAME.left and NAME.right, float32, whose product has the orientation in which the checkpoint
stores the tensor. The metadata say of which model the patch is and how it was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint, save_tensors
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import FLOATS, read_header

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "1"
Kind = Literal["replace", "add", "low_rank"]
# What a patch holds for a tensor, by the kind of its change: the ends of the names.
PARTS: Mapping[Kind, tuple[str, ...]] = {"replace": ("",), "add": (".add",), "low_rank": (".left", ".right")}


@dataclass(frozen=True, slots=True)
class Changed:
    """What a patch does to one tensor of a model, of this shape and dtype there.

    axis: that along which a layer's inputs run, 1 for a Linear [out, in], 0 for a Conv1D [in, out]; None where the
    tensor is no layer's weight. digest: the xxh3-128 of the bytes that the patch was made for, None where unknown.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    axis: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class PatchFacts:
    """All that a patch says about itself.

    base: the content digest (`Checkpoint.content`) of the model it was made for, None where unknown. options: every
    constant that the changes depend on. facts: what the edit was to teach, as `FactsFile.as_data` has it, or {}.
    """

    method: str
    tensors: Mapping[str, Changed]
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """The facts as a safetensors header holds them."""
        parts = {f"lfm.{name}": json.dumps(value, sort_keys=True) for name, value in asdict(self).items()}
        return {"format": "pt", "lfm.kind": "patch", "lfm.format": FORMAT, **parts}


@dataclass(frozen=True)
class Patch:
    """Changes to the tensors of a model. tensors: the parts of each change, by the names they have in a file."""

    facts: PatchFacts
    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Patch({self.facts.method}, {len(self.facts.tensors)} tensors)"

    @classmethod
    def low_rank(
        cls,
        method: str,
        changes: Mapping[str, tuple[Tensor, Tensor, Changed]],
        *,
        options: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Patch:
        """A patch of products: by weight (left [rows, n], right [n, columns], what it changes), as stored."""
        tensors = {}
        for name, (left, right, _) in changes.items():
            tensors[f"{name}.left"], tensors[f"{name}.right"] = left, right
        changed = {name: change for name, (_, _, change) in changes.items()}
        said = PatchFacts(method, changed, options=options or {}, facts=facts or {}, versions=versions(), notes=notes)
        return cls(said, tensors)

    def made_for(self, base: str | None, digests: Mapping[str, str]) -> Patch:
        """This patch with what is known of the model it is for: its content, and the digests of tensors by name."""
        changed = {name: replace(was, digest=digests.get(name)) for name, was in self.facts.tensors.items()}
        return replace(self, facts=replace(self.facts, base=base, tensors=changed))

    def parts(self, name: str) -> tuple[Tensor, ...]:
        """What the patch holds for a tensor: (new,), (added,) or (left, right)."""
        return tuple(self.tensors[name + end] for end in PARTS[self.facts.tensors[name].kind])

    def change(self, name: str) -> Tensor:
        """What is added to a tensor, in its shape. PlanError for one that is replaced."""
        parts = self.parts(name)
        if self.facts.tensors[name].kind == "replace":
            raise PlanError(f"{name} is replaced by this patch, and has no difference; read it with `parts`")
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def delta(self, layer: str | int) -> Tensor:
        """What is added to a layer's weight, [out, in] however it is stored.

        layer: the name of the weight, that of its module, or the layer's number where one tensor alone has it. KeyError
        where the patch has no such layer.
        """
        name = self._name_of(layer)
        change = self.change(name)
        return change.mT if self.facts.tensors[name].axis == 0 else change

    def _name_of(self, layer: str | int) -> str:
        known = self.facts.tensors
        if isinstance(layer, int):
            found = [name for name in known if str(layer) in name.split(".")]
        else:
            found = [name for name in known if name in (layer, f"{layer}.weight")]
        if len(found) == 1:
            return found[0]
        count = "several" if found else "none"
        raise KeyError(f"the patch changes {', '.join(known)}; {layer!r} is {count} of them")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a file; what is added is float32 there."""
        exact = {name for name, was in self.facts.tensors.items() if was.kind == "replace"}
        held = {name: x if name in exact else x.float() for name, x in self.tensors.items()}
        save_tensors(Path(path), [spec_of(n, x) for n, x in held.items()], held.__getitem__, self.facts.metadata())


def versions() -> dict[str, str]:
    """The versions that a patch's numbers depend on."""
    from importlib.metadata import version

    from mergekit_lfm.version import __version__

    return {"mergekit_lfm": __version__, "torch": version("torch")}


def read_patch_facts(path: Path) -> PatchFacts:
    """The facts in a patch file's header. FormatError where it is none."""
    metadata = read_header(path).metadata
    if metadata.get("lfm.kind") != "patch":
        raise FormatError(f"{path} is no patch file; make one with `mergekit-lfm edit`")
    if metadata.get("lfm.format") != FORMAT:
        raise FormatError(f"{path} holds a patch of another version; make it again")
    try:
        facts = {name: json.loads(metadata[f"lfm.{name}"]) for name in PatchFacts.__dataclass_fields__}
        tensors = {
            name: Changed(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in facts["tensors"].items()
        }
        return PatchFacts(**{**facts, "tensors": tensors, "notes": tuple(facts["notes"])})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path} has damaged metadata ({error!r}); make the patch again") from None


def open_patch(path: str | os.PathLike[str]) -> Patch:
    """The patch in a file. FormatError where it holds none, FileNotFoundError where it is not there."""
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"no such patch file: {place}")
    facts = read_patch_facts(place)
    stored = open_checkpoint(place)
    wanted = {name + end for name, was in facts.tensors.items() for end in PARTS.get(was.kind, ("?",))}
    if differ := sorted(wanted ^ stored.keys()):
        raise FormatError(f"{place}: {differ[0]} is not both in its metadata and in its data; make the patch again")
    patch = Patch(facts, {name: stored.read(name).view(spec.shape) for name, spec in stored.items()})
    if problems := [problem for name in facts.tensors for problem in _misfits(patch, name)]:
        raise FormatError(f"{place}: {'; '.join(problems)}; make the patch again")
    return patch


def _misfits(patch: Patch, name: str) -> list[str]:
    """What of a tensor's parts does not have the shape or type that the patch says of it, or is not finite."""
    was, parts = patch.facts.tensors[name], patch.parts(name)
    if not was.shape:
        return [f"{name} is a single number, which no patch changes"]
    if was.kind == "replace":
        (new,) = parts
        good = tuple(new.shape) == was.shape and str(new.dtype) == f"torch.{was.dtype}"
        return [] if good else [f"{name} is {new.dtype} {list(new.shape)}, not {was.dtype} {list(was.shape)}"]
    problems = [f"what is added to {name} is not finite" for x in parts if not bool(x.isfinite().all())][:1]
    if was.dtype not in FLOATS or was.dtype.startswith("float8"):
        problems.append(f"{name} is {was.dtype}, to which nothing can be added")
    if was.kind == "low_rank":
        left, right = parts
        shapes = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        shape: tuple[int, ...] = (left.shape[0], right.shape[1]) if shapes else ()
    else:
        shape = tuple(parts[0].shape)
    if shape != was.shape:
        problems.append(f"the change of {name} is {[list(x.shape) for x in parts]}, the tensor {list(was.shape)}")
    return problems
