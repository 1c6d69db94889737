"""The result of a tuning: written as a model, a patch, an adapter or a bottleneck adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.api.tune_plans import PlannedTuning
from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange
from mergekit_lfm.errors import FormatError, PlanError, shorten
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.output.save import save_checkpoint
from mergekit_lfm.output.trained_adapter import save_adapter, stand_in_adapter
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.runtime.subject import Subject
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.tune.work import Prepared
from mergekit_lfm.version import versions
from mergekit_lfm.views.adapted import adapt


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result of a tuning. makes: "checkpoint", "patch", "adapter", "attachment", "prompt", "mixture" or
    "template".

    steps: those done, fewer than planned where the development set ended it. trained: how many numbers were trained;
    parameters: the model's. loss: the mean over the last tenth of the steps. dev_loss, best_step: the least on the
    development set, whose state was kept; None without one. facts: more about the result, as the words of `pez`.
    held_out: the losses `before` and `after` on each cluster of data that was held out.
    """

    makes: str
    steps: int
    trained: int
    parameters: int
    loss: float
    dev_loss: float | None = None
    best_step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_result(
    planned: PlannedTuning,
    prepared: Prepared,
    subject: Subject,
    tuned: Tuned,
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> list[str]:
    """Write the result; returns findings. more: files for the folder of a checkpoint, or of an adapter."""
    facts = {name: getattr(tuned, name) for name in Tuned.__dataclass_fields__}
    planned.check_unchanged()
    if prepared.adapter is not None:
        made = prepared.adapter()
        parts = {folder: (part.config, part.tensors) for folder, part in made.parts.items()}
        save_adapter(planned.out, made.config, made.tensors, planned.answer, facts, parts, more)
        return []
    options = {"request": planned.answer.digest, "recipe": planned.answer.public, "result": facts}
    if prepared.attachment is not None:
        attachment = prepared.attachment().made_for(planned.source.content, options, versions("torch"))
        planned.out.parent.mkdir(parents=True, exist_ok=True)
        attachment.save(planned.out)
        return []
    prepared.fold()
    changed = changes_of(subject, planned.source)
    if planned.recipe.declaration.makes == "checkpoint":
        return save_tuned(planned, planned.source, changed, tuned, more)
    source = planned.source
    tensors = {
        name: TensorChange("replace", source[name].shape, source[name].dtype, digest=source.digest_of(name))
        for name in changed
    }
    info = PatchInfo(planned.recipe.method, tensors, source.content, options, {}, versions("torch"))
    planned.out.parent.mkdir(parents=True, exist_ok=True)
    Patch(info, changed).save(planned.out)
    return [] if changed else ["no tensor has another value in its dtype; train longer, or at a higher learning rate"]


def save_tuned(
    planned: PlannedTuning,
    source: Checkpoint,
    changed: Mapping[str, Tensor],
    tuned: Tuned,
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> list[str]:
    """Write the tensors of a checkpoint, with those that were changed, as the result; returns findings."""
    facts = {name: getattr(tuned, name) for name in Tuned.__dataclass_fields__}
    documents = {"tune.json": (json.dumps(planned.answer.public, indent=2) + "\n").encode(), **more}
    request = planned.answer
    left = save_checkpoint(
        source,
        planned.out,
        changed,
        documents,
        lock=lambda files, headers, tensors: {request.lock_file: request.lock(files, headers, tensors, facts)},
    )
    return [f"{name} is left behind: {why}" for name, why in left.items()]


def changes_of(subject: Subject, source: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint that a model, which was loaded from it, has changed, rounded to their dtypes.

    Raises PlanError for numbers that their dtype cannot hold.
    """
    changed, infinite = dict[str, Tensor](), list[str]()
    for parameter in subject.module.parameters():
        for tensor in subject.tensors_of(parameter):
            stored = source.read(tensor).view(source[tensor].shape)
            new = round_once(parameter.detach().cpu(), stored.dtype).contiguous()
            if not torch.equal(new.reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8)):
                changed[tensor] = new
                infinite += [] if bool(new.isfinite().all()) else [f"{tensor}, {source[tensor].dtype}"]
    if infinite:
        raise PlanError(f"the trained numbers are too large for {shorten(infinite, 3)}; give a model in float32")
    return changed


def check_adapter(planned: PlannedTuning, prepared: Prepared) -> None:
    """Raise PlanError if an adapter would not go onto its model as its file holds it: tied heads, other names."""
    if prepared.adapter is None or planned.recipe.declaration.makes == "prompt":
        return
    made = prepared.adapter()
    with TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        stand_in_adapter(folder, made.config, made.tensors)
        try:
            adapt(planned.source, (AdapterRef(planned.out.name, folder, 1.0),), planned.recipe.model)
        except (PlanError, FormatError) as error:
            method = planned.recipe.method
            raise PlanError(
                f"the adapter that {method} makes would not go onto {planned.recipe.model}: {error}\n"
                "Choose other targets, or a method that makes a model or a patch"
            ) from None


def check_places(prepared: Prepared, subject: Subject, source: Checkpoint) -> None:
    """Raise PlanError if no tensor of the checkpoint holds a parameter that will change, as of joined experts."""
    if prepared.adapter is not None or prepared.attachment is not None:
        return
    changing = prepared.changed or tuple(x for x in subject.module.parameters() if x.requires_grad)
    lost = [f"{subject.names[id(x)][0]} ({subject.why_unknown(x)})" for x in changing if not subject.tensors_of(x)]
    if lost:
        found = f"this method trains parameters that no tensor of {source.path} holds: {shorten(lost, 5)}"
        raise PlanError(f"{found}; choose a method that makes an adapter")
