"""A merged model in a folder repaired, into a folder of its own that is complete or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.arch import Symmetries, find_symmetries
from mergekit_lfm.errors import FormatError
from mergekit_lfm.judge.ends import Alignment, Progress, module_of, open_aligned, open_model
from mergekit_lfm.judge.questions import Data, batches_of
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.save import check_out, save_checkpoint
from mergekit_lfm.repair.layers import HiddenLayer, Moments, measure
from mergekit_lfm.repair.modules import Repaired, check_weights, combine, plan_repair, repair_layers, telling
from mergekit_lfm.runtime.batches import Batch, digest_of
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.subject import Subject, evaluating, make_subject
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.version import __version__

FACTS = "repair.json"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
    progress: Progress | None = None,
) -> Repaired:
    """`repair_module` of a merged model in a folder, into the folder `out`; what is not repaired is copied.

    ends, weights: the two models that were merged, and how much of each. transform: by which the second was rewritten
    before. symmetries: the table of the merged model, by default that of its architecture. task: what the models are
    loaded for. data: a file for `read_data`, or what `as_batches` takes. Beside the weights lies what the merged model
    has (but its lock, as the bytes are others), and repair.json, which says what was repaired with what. Parameters
    keep their names and dtypes, and are measured as they are stored. Two models are in memory at a time. Raises
    PlanError where there is nothing to repair, for weights that do not fit, and where `out` exists and is not to be
    overwritten; FormatError where the merged model lacks statistics that are to be re-estimated.
    """
    source, place = open_checkpoint(merged), Path(out)
    shares = check_weights(weights, 2)
    check_out(place, {str(path): Path(path) for path in (merged, *ends)}, overwrite=overwrite)
    table = find_symmetries(source) if symmetries is None else symmetries
    model = open_model(source.path, task, device)
    module = module_of(model)
    batches = batches_of(model, data, task, window=window, batch_size=batch_size)
    subject = make_subject(module, source)
    with evaluating(module):
        layers, left = plan_repair(subject, table, batches)
        statistics = _statistics(subject, source)
        tell = telling(progress, len(layers), 2, batches)

        def moments(end: str | Path, alignment: Alignment | None) -> dict[str, Moments]:
            opened = module_of(open_aligned(end, alignment, model, task, device))
            with evaluating(opened):
                return measure(opened, layers, batches, tell)

        found = [moments(ends[0], None), moments(ends[1], transform)] if layers else [{}, {}]
        done = repair_layers(subject, layers, left, combine(found, shares), batches, tell=tell, stored=source)
    facts = _facts((merged, *ends), shares, transform is not None, task, batches) | asdict(done)
    changed = _repaired(layers, source) | {name: _stored(x, source, name) for name, x in statistics.items()}
    save_checkpoint(source, place, changed, {FACTS: (json.dumps(facts, indent=2) + "\n").encode()})
    return done


def _statistics(subject: Subject, source: Checkpoint) -> dict[str, Tensor]:
    """The buffers of the BatchNorm layers by the names of their tensors. FormatError about all that have none."""
    found: dict[str, Tensor] = {}
    absent = []
    for name, layer in batchnorms(subject.module).items():
        tensors = subject.tensors_of(layer.weight) if layer.affine else []
        home = tensors[0].rpartition(".")[0] if tensors else name
        held = {f"{home}.{part}": x for part in STATISTICS if isinstance(x := getattr(layer, part), Tensor)}
        absent += [tensor for tensor in held if tensor not in source and not tensor.endswith(STATISTICS[-1])]
        found |= {tensor: x for tensor, x in held.items() if tensor in source}
    if absent:
        raise FormatError(
            f"{source.path} lacks {', '.join(absent)}, expected the running statistics of its BatchNorm layers; save "
            "the model with them"
        )
    return found


def _repaired(layers: Sequence[HiddenLayer], source: Checkpoint) -> dict[str, Tensor]:
    """The parameters of the layers by the names of their tensors, as they are stored."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        for names, parameter in ((layer.weights, layer.module.weight), (layer.biases, layer.module.bias)):
            assert isinstance(parameter, Tensor)
            found |= {name: _stored(parameter, source, name) for name in names}
    return found


def _stored(x: Tensor, source: Checkpoint, name: str) -> Tensor:
    return round_once(x.detach().cpu(), getattr(torch, source[name].dtype))


def _facts(
    models: Sequence[str | Path],
    weights: tuple[float, ...],
    aligned: bool,
    task: str,
    batches: Sequence[Batch],
) -> dict[str, Any]:
    """What was repaired with what; no absolute path, no time of day."""
    names = public_names(map(str, models))
    named = [{"model": names[str(path)], "content": open_checkpoint(path).content} for path in models]
    return {
        "merged": named[0],
        "ends": [{**entry, "weight": weight} for entry, weight in zip(named[1:], weights, strict=True)],
        "second_end_was_aligned": aligned,
        "task": task,
        "data": digest_of(batches),
        "versions": {"mergekit_lfm": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
