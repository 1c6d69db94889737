"""The student of images without data: which tensor holds each of its numbers, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lfm.api.synthesise_plans import PlannedImages
from mergekit_lfm.api.tune_results import changes_of
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.output.save import save_checkpoint
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.load import Loaded
from mergekit_lfm.runtime.subject import Subject, make_subject

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.store.checkpoint import Checkpoint


class ImageStudent:
    """A model that will be trained, and the tensor of its checkpoint for each parameter and buffer.

    Raises PlanError, before the training, if some of them would be lost because no tensor holds them.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.source = loaded, loaded.checkpoint
        self.subject = make_subject(loaded.model, loaded.checkpoint)
        self.buffers = _buffer_tensors(self.subject, self.source)
        statistics = {f"{name}.{x}" for name in batchnorms(loaded.model) for x in ("running_mean", "running_var")}
        lost = [names[0] for names in self.subject.names.values() if not {*names} & self.subject.tensors.keys()]
        lost += sorted(statistics - self.buffers.keys())
        if lost:
            raise PlanError(
                f"no tensor of {self.source.path} is known to hold {shorten(lost, 5)} of the student; expected one for "
                "each, where it goes after the training. Save the model again by transformers, and give that"
            )

    def changes(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint with other values by now: parameters, and all buffers that it holds."""
        values, changed = dict(self.loaded.model.named_buffers()), changes_of(self.subject, self.source)
        for name, tensor in self.buffers.items():
            changed[tensor] = values[name].detach().cpu().to(getattr(torch, self.source[tensor].dtype))
        return changed

    def write(self, planned: PlannedImages, facts: Mapping[str, Any]) -> list[str]:
        """Write the student with its new parameters and BatchNorm's new statistics; returns findings."""
        assert planned.student is not None
        request = planned.request.request
        left = save_checkpoint(
            self.source,
            planned.student[1],
            self.changes(),
            {"synthesise.json": (json.dumps(request.public, indent=2) + "\n").encode()},
            lock=lambda files, headers, tensors: {request.lock_file: request.lock(files, headers, tensors, facts)},
        )
        return [f"{name} is left behind: {why}" for name, why in left.items()]


def _buffer_tensors(subject: Subject, source: Checkpoint) -> dict[str, str]:
    """The tensor of each buffer that the checkpoint holds: beside that of a parameter of the same module."""
    homes = {name.rpartition(".")[0]: tensor.rpartition(".")[0] for name, tensor in subject.tensors.items()}
    found = dict[str, str]()
    for name, _ in subject.module.named_buffers():
        home, _, last = name.rpartition(".")
        tensor = f"{homes[home]}.{last}" if home in homes else name
        if tensor in source:
            found[name] = tensor
    return found
