"""Whether two models give the same outputs, within rounding."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_lfm.artifacts.transform import Transform
from mergekit_lfm.runtime.load import Loaded, load_as_saved, load_model
from mergekit_lfm.runtime.probe import all_outputs, outputs_of, probe, relative_distance
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.maps import only_moves

# Equal models differ by 2e-6 if sums have another order; a transform that is wrong makes differences of about 1.
SAME_WITHIN = 1e-4

MARGIN = 4  # random transforms of random Llamas, rounded to 16 bits, made 0.5 to 1.8 times the difference of such noise


def compare_outputs(
    model: str | Path | Checkpoint, rewritten: str | Path | Checkpoint, transform: Transform
) -> tuple[float, float]:
    """The `difference` between a model and its rewritten copy, and how much of it rounding explains.

    Both run in float32. An order changes only the order of sums. Products are rounded to the stored dtype: the effect
    of such noise in all parameters on the outputs is measured. Encoders are compared with the head that they were saved
    with: without it, the transform shows in their hidden states.
    """
    checkpoint, copied = (x if isinstance(x, Checkpoint) else open_model(x) for x in (model, rewritten))
    task = _task_of(checkpoint)
    with_head = task == "embedding" and bool(checkpoint.config.get("architectures"))
    first, second = (_with_head(x) if with_head else load_model(x, task) for x in (checkpoint, copied))
    compared = all_outputs if with_head else outputs_of
    inputs = probe(first)
    before = compared(first, inputs)
    distance = relative_distance(before.double(), compared(second, inputs).double())
    if only_moves(transform):
        return distance, SAME_WITHIN
    del second
    kinds = {getattr(torch, spec.dtype) for spec in checkpoint.values()}
    coarsest = max(torch.finfo(kind).eps for kind in kinds | {torch.float32} if kind.is_floating_point)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for x in first.model.parameters():
            x.mul_(1 + coarsest * (torch.rand(x.shape, generator=draw) - 0.5))  # at most half a step
    return distance, max(SAME_WITHIN, MARGIN * relative_distance(before.double(), compared(first, inputs).double()))


def _with_head(checkpoint: Checkpoint) -> Loaded:
    """The model of the class that its config names, in float32."""
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}
    return load_as_saved(
        checkpoint.path, {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    )


def _task_of(checkpoint: Checkpoint) -> str:
    """The task of a saved model, by the name of its class: "lm", "classification", else "embedding"."""
    names = " ".join(checkpoint.config.get("architectures") or [])
    if "ForCausalLM" in names or "LMHeadModel" in names:
        return "lm"
    return "classification" if "Classification" in names and "Token" not in names else "embedding"
