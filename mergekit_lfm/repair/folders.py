"""Repair a merged model in a folder, and write the result to a new folder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.arch import Symmetries, find_symmetries
from mergekit_lfm.errors import FormatError
from mergekit_lfm.judge.ends import Alignment, load_end, module_of, open_aligned
from mergekit_lfm.judge.questions import Data, batches_of
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.save import check_out, save_checkpoint
from mergekit_lfm.repair.layers import HiddenLayer, LayerMoments, measure
from mergekit_lfm.repair.modules import Repaired, check_weights, combine, make_counter, plan_repair, repair_layers
from mergekit_lfm.runtime.batches import Batch, digest_of
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.subject import Subject, evaluation_mode, make_subject
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.version import __version__
from mergekit_lfm.views.adapted import open_model

FACTS = "repair.json"
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def repair(
    merged: str | Path,
    ends: tuple[str | Path, str | Path],
    data: Data,
    out: str | Path,
    *,
    task: str,
    weights: tuple[float, float] = (0.5, 0.5),
    transform: Alignment | None = None,
    symmetries: Symmetries | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Count | None = None,
) -> Repaired:
    """Apply `repair_module` to a merged model in a folder, and write the folder `out`; other tensors are copied.

    ends, weights: the two models that were merged, and how much of each. transform: rewrote the second before the
    merge. symmetries: the table of the merged model, by default that of its architecture. task: the task to load the
    models for. data: a file for `read_data`, or any input of `as_batches`. `out` also gets the merged model's other
    files (but not its lock, because the bytes differ), and repair.json, which records the repair and its inputs.
    Parameters keep their names and dtypes, and are measured as they are stored. Two models are in memory at a time.
    Raises PlanError if there is nothing to repair, if the weights do not fit, and if `out` exists without `overwrite`;
    FormatError if the merged model lacks running statistics that need a new estimate.
    """
    source, folder = open_model(merged), Path(out)
    shares = check_weights(weights, 2)
    inputs = [source, *map(open_model, ends)]
    check_out(folder, {str(path): path for model in inputs for path in model.folders}, overwrite=overwrite)
    table = find_symmetries(source) if symmetries is None else symmetries
    model = load_end(merged, task, device)
    module = module_of(model)
    batches = batches_of(model, data, task, window=window, batch_size=batch_size)
    subject = make_subject(module, source)
    with evaluation_mode(module):
        layers, left = plan_repair(subject, table, batches)
        statistics = _statistics(subject, source)
        count = make_counter(progress, len(layers), 2, batches)

        def moments(end: str | Path, alignment: Alignment | None) -> dict[str, LayerMoments]:
            opened = module_of(open_aligned(end, alignment, model, task, device))
            with evaluation_mode(opened):
                return measure(opened, layers, batches, count)

        measured = [moments(ends[0], None), moments(ends[1], transform)] if layers else [{}, {}]
        repaired = repair_layers(subject, layers, left, combine(measured, shares), batches, tell=count, stored=source)
    facts = _facts((merged, *ends), shares, transform is not None, task, batches) | asdict(repaired)
    changed = _parameters(layers, source) | {name: _as_stored(x, source, name) for name, x in statistics.items()}
    files_left = save_checkpoint(source, folder, changed, {FACTS: (json.dumps(facts, indent=2) + "\n").encode()})
    return replace(repaired, left={**repaired.left, **files_left})


def _statistics(subject: Subject, source: Checkpoint) -> dict[str, Tensor]:
    """The buffers of the BatchNorm layers by tensor name. Raises FormatError with all that the checkpoint lacks."""
    buffers: dict[str, Tensor] = {}
    absent = []
    for name, layer in batchnorms(subject.module).items():
        tensors = subject.tensors_of(layer.weight) if layer.affine else []
        prefix = tensors[0].rpartition(".")[0] if tensors else name
        own = {f"{prefix}.{kind}": x for kind in RUNNING_STATISTICS if isinstance(x := getattr(layer, kind), Tensor)}
        absent += [tensor for tensor in own if tensor not in source and not tensor.endswith(RUNNING_STATISTICS[-1])]
        buffers |= {tensor: x for tensor, x in own.items() if tensor in source}
    if absent:
        raise FormatError(
            f"{source.path} lacks {', '.join(absent)}, expected the running statistics of its BatchNorm layers; save "
            "the model with them"
        )
    return buffers


def _parameters(layers: Sequence[HiddenLayer], source: Checkpoint) -> dict[str, Tensor]:
    """The parameters of the layers by tensor name, in their stored dtypes."""
    parameters: dict[str, Tensor] = {}
    for layer in layers:
        for names, parameter in ((layer.weights, layer.module.weight), (layer.biases, layer.module.bias)):
            assert isinstance(parameter, Tensor)
            parameters |= {name: _as_stored(parameter, source, name) for name in names}
    return parameters


def _as_stored(x: Tensor, source: Checkpoint, name: str) -> Tensor:
    return round_once(x.detach().cpu(), getattr(torch, source[name].dtype))


def _facts(
    models: Sequence[str | Path],
    weights: tuple[float, ...],
    aligned: bool,
    task: str,
    batches: Sequence[Batch],
) -> dict[str, Any]:
    """The inputs of the repair, without absolute paths and times, so that equal repairs give equal files."""
    names = public_names(map(str, models))
    named = [{"model": names[str(path)], "content": open_model(path).content} for path in models]
    return {
        "merged": named[0],
        "ends": [{**entry, "weight": weight} for entry, weight in zip(named[1:], weights, strict=True)],
        "second_end_was_aligned": aligned,
        "task": task,
        "data": digest_of(batches),
        "versions": {"mergekit_lfm": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
