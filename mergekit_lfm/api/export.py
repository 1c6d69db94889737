"""`export_patches`: patches as an adapter, which does to a model that PEFT loads what they do to its files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.extraction_plans import output_of
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.engine.extraction import add_product
from mergekit_lfm.errors import PlanError, several, shorten
from mergekit_lfm.kernels.low_rank import approximate
from mergekit_lfm.output.adapter import AdapterOutput, NewAdapter, new_adapter
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput, result_of
from mergekit_lfm.plan.extraction import Extraction, plan_extraction
from mergekit_lfm.plan.groups import Group, Piece, Selection
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.hub import hub_name
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.patched import patched_view
from mergekit_lfm.views.quantisation import dequantise

EXPERT = "PEFT has one product for all experts of a layer"
LEAST = 1e-7  # of the largest singular value; float32 does not resolve those below


@dataclass(frozen=True, slots=True)
class ExportedTensor:
    """A tensor in the adapter: the rank of its product, None if it is whole. dense: whether it stands for more.

    kept: the share of the energy of dense changes that it keeps.
    """

    name: str
    rank: int | None
    kept: float = 1.0
    dense: bool = False


def export_patches(
    patches: Sequence[StrPath],
    out: StrPath,
    *,
    base: StrPath | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Outcome[tuple[ExportedTensor, ...]]:
    """Write patches as one adapter: products at their rank, dense changes by their best product.

    base: the model that they are for. Its names and config go into the adapter, which can then hold tensors whole, with
    the others of their module: replaced ones, and changes of norms and the like. Without it names stay as they are.
    rank: of the products for dense changes, by default as high as they need. Raises PlanError for changes that no
    adapter can hold.
    """
    started, target, files = time.monotonic(), expand(out), [expand(path, "patch") for path in patches]
    if rank is not None and rank < 1:
        raise PlanError(f"found rank {rank}, expected 1 or more; choose another")
    opened = [open_patch(path) for path in files]
    model = None if base is None else dequantise(open_model(base))
    request = _request(files, opened, base, model, rank)
    if request.is_answered(target, overwrite=overwrite):
        there = tuple(ExportedTensor(**each) for each in result_of(target)["tensors"])
        return Outcome(target, there, request.digest, True, seconds=time.monotonic() - started)
    contents = _changes_alone(opened) if model is None else _changes_in(opened, model, str(base))
    about = f"Made from {len(files)} patch{'' if len(files) == 1 else 'es'} of weights."
    with new_adapter(target, replace(contents.output, about=about), request) as adapter:
        tensors = [_add(adapter, group, opened, rank) for group in contents.groups]
        tensors += [ExportedTensor(name, None) for name in contents.save(adapter)]
        adapter.result = {"tensors": [asdict(each) for each in tensors]}
    most = {group.names[0]: group.most for group in contents.groups}
    full = [each.name for each in tensors if rank is None and each.dense and each.rank == most[each.name]]
    findings = [f"{shorten(full, 3)}: products of full rank, as the changes have it; --rank bounds it"] if full else []
    return Outcome(target, tuple(tensors), request.digest, False, warn_of(findings), time.monotonic() - started)


def _request(
    files: Sequence[Path], patches: Sequence[Patch], base: StrPath | None, model: Checkpoint | None, rank: int | None
) -> Request:
    """The request that the adapter answers."""
    inputs = [
        RequestInput(str(file), open_checkpoint(file), patch.info.metadata())
        for file, patch in zip(files, patches, strict=True)
    ]
    if model is not None:
        inputs.append(RequestInput(str(base), model, model.config))
    names = public_names(source.label for source in inputs)

    def recipe(name: Callable[[str], str]) -> dict[str, Any]:
        data: dict[str, Any] = {"job": "export", "patches": [name(str(file)) for file in files]}
        data |= {} if base is None else {"base_model": name(str(base))}
        return data | ({} if rank is None else {"rank": rank})

    return Request(recipe(str), recipe(names.__getitem__), tuple(inputs))


@dataclass(frozen=True)
class _Contents:
    """The adapter's groups and facts, and the tensors that it has whole: those of the planned model by these names."""

    groups: list[Group]
    output: AdapterOutput
    saved: Sequence[str] = ()
    plan: Extraction | None = None

    def save(self, adapter: NewAdapter) -> Sequence[str]:
        """Save the whole tensors; their names."""
        for name in self.saved if self.plan is not None else ():
            assert self.plan is not None
            adapter.save(self.plan.names[name], self.plan.model.read(name).view(self.plan.model[name].shape))
        return self.saved


def _names_of(patches: Sequence[Patch]) -> list[str]:
    return list(dict.fromkeys(name for patch in patches for name in patch.info.tensors))


def _kinds_of(patches: Sequence[Patch], name: str) -> set[str]:
    return {patch.info.tensors[name].kind for patch in patches if name in patch.info.tensors}


def _changes_alone(patches: Sequence[Patch]) -> _Contents:
    """The changes by what the patches say of them. Raises PlanError for those of others than layers' weights."""
    groups, problems = list[Group](), list[str]()
    for name in _names_of(patches):
        was = next(patch.info.tensors[name] for patch in patches if name in patch.info.tensors)
        module = name.removesuffix(".weight")
        if (
            "replace" in _kinds_of(patches, name)
            or len(was.shape) != 2
            or not name.endswith(".weight")
            or was.axis is None
        ):
            problems.append(f"{name} {list(was.shape)}, {' and '.join(sorted(_kinds_of(patches, name)))}")
            continue
        rows, columns = was.shape
        out, into = (rows, columns) if was.axis == 1 else (columns, rows)
        groups.append(Group(module, "layer", ((Piece(name, 0, rows, columns),),), out, into, was.axis == 0))
    if problems:
        found = several("an adapter cannot hold these changes without the other tensors of their modules", problems)
        raise PlanError(f"{found}\nGive the model that the patches are for, with --base")
    turned = any(group.turned for group in groups)
    return _Contents(groups, AdapterOutput(_names_of(patches), complete=False, fan_in_fan_out=turned))


def _all_of(patches: Sequence[Patch]) -> Selection:
    """Everything, with modules whole whose weights are replaced."""
    replaced = [name for name in _names_of(patches) if "replace" in _kinds_of(patches, name)]
    whole = [rf"(^|\.){re.escape(name.removesuffix('.weight'))}$" for name in replaced if name.endswith(".weight")]
    return Selection(save=whole, embed_lora=True)


def _changes_in(patches: Sequence[Patch], model: Checkpoint, label: str) -> _Contents:
    """The changes to a model. Raises PlanError for those that no adapter can hold."""
    view = patched_view(model, *patches, any_base=True)
    plan = plan_extraction(view, model, (f"the patched {label}", label), _all_of(patches))
    changed = {*_names_of(patches)}
    groups = [group for group in plan.groups if len(group.names) == len(group.members) == 1]
    groups = [group for group in groups if changed.issuperset(group.names)]
    modules = plan.save_with([module for module, own in plan.modules.items() if not changed.isdisjoint(own)])
    saved = [name for name in plan.biases if name in changed]
    saved += [name for module, own in plan.modules.items() if module in modules for name in own]
    held = {*saved, *(name for group in groups for name in group.names)}
    if lost := [f"{name}: {plan.lost.get(name, EXPERT)}" for name in changed - held]:
        raise PlanError(several("an adapter cannot hold these changes", sorted(lost)) + "; apply the patches instead")
    name = None if Path(label).expanduser().exists() else hub_name(label)
    return _Contents(groups, output_of(plan, label, None if name is None else name.repo), saved, plan)


def _add(adapter: NewAdapter, group: Group, patches: Sequence[Patch], rank: int | None) -> ExportedTensor:
    """Add all changes of a weight to the adapter, one beside the other."""
    (name,) = group.names
    parts = [_factors(patch, name, group, rank) for patch in patches if name in patch.info.tensors]
    a, b = torch.cat([a for a, _, _ in parts]), torch.cat([b for _, b, _ in parts], 1)
    add_product(adapter, group, a, b)
    return ExportedTensor(name, len(a), min(kept for _, _, kept in parts), "add" in _kinds_of(patches, name))


def _factors(patch: Patch, name: str, group: Group, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A patch's change of a weight as A [rank, in] and B [out, rank], and the share of it that they keep."""
    parts = [part.float() for part in patch.parts(name)]
    if len(parts) == 2:
        left, right = parts
        return (left.T, right.T, 1.0) if group.turned else (right, left, 1.0)
    change = parts[0].flatten(1)
    near = approximate(change.T if group.turned else change, min(rank or group.most, group.most), 0, exact=True)
    needed = max(1, int((near.energies > near.energies[:1] * LEAST**2).sum()))
    return *near.factors(needed), float(near.energies[:needed].sum()) / near.total if near.total else 1.0
