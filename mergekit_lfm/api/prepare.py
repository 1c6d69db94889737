"""What a recipe asks for before its merge: alignments, each of which leaves a transform file.

The files are kept, by the contents of both models, all options and the kind of device, so that a merge that was
interrupted, or is made again with other weights, finds them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import xxhash

from mergekit_lfm.align import align_models
from mergekit_lfm.artifacts.cache import kept_or_made, key_of, kind_of
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.machine.resources import cache_folder
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.values import GivenFile
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.version import __version__
from mergekit_lfm.views.rewritten import rewritten


def noted(plan: Plan, device: str) -> Plan:
    """The plan in which what is still to be aligned or edited says on what kind of device, but for the CPU.

    What is found differs by rounding: no output is to hold tensors by the one and by the other. PlanError where the
    device is not there.
    """
    kind, waiting = kind_of(device), plan.pending
    if kind is None or not (waiting or plan.unedited):
        return plan
    asked = any(not isinstance(edit, GivenFile) for edit in plan.recipe.result_edits)
    models = tuple(
        Checkpoint(held.path, held.files, {**(held.view or {}), "device": kind}) if model in waiting else held
        for model, held in zip(plan.recipe.all_models, plan.models, strict=True)
    )
    return replace(plan, cast=replace(plan.cast, models=models), edited_on=kind if asked else "")


def prepare(plan: Plan, notice: Callable[[str], None], device: str = "cpu") -> Plan:
    """The plan with every alignment found, and no more changed than `noted` does. notice: called with a line for each.

    device: where matrices are multiplied, as of `align_models`.
    """
    plan = noted(plan, device)
    models = list(plan.models)
    for i, (model, checkpoint) in enumerate(zip(plan.recipe.all_models, plan.models, strict=True)):
        if isinstance(model.align, AlignRequest) and model in plan.pending:
            source = checkpoint.as_stored()
            to = plan.models[plan.labels.index(model.align.to)]
            notice(f"aligning {model.label} to {model.align.to} by {model.align.method}")
            models[i] = rewritten(source, _found(source, to, model.align, device), checkpoint.view or {})
    return replace(plan, cast=replace(plan.cast, models=tuple(models)))


def _found(source: Checkpoint, to: Checkpoint, request: AlignRequest, device: str) -> Transform:
    """The transform that was asked for, from an earlier run or found now."""

    def find() -> Transform:
        statistics = None if request.stats is None else open_statistics(request.stats.path)
        options: dict[str, Any] = dict(request.options)
        return align_models(source, to, request.method, statistics=statistics, device=device, **options)

    key = _key(source, to, request, device)
    return kept_or_made(cache_folder("transforms") / f"{key}.safetensors", find, open_transform)


def _key(source: Checkpoint, to: Checkpoint, request: AlignRequest, device: str) -> str:
    stats = None if request.stats is None else xxhash.xxh3_128_hexdigest(request.stats.path.read_bytes())
    versions = {"mergekit_lfm": __version__, **{name: version(name) for name in ("torch", "numpy", "scipy", "pot")}}
    asked = [source.content, to.content, stats, request.method, request.options, versions]
    return key_of(asked, device)
