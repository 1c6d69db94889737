"""What a recipe asks for before its merge: alignments, each of which leaves a transform file.

The files are kept, by the contents of both models and all options, so that a merge that was interrupted, or is made
again with other weights, finds them there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import xxhash

from mergekit_lfm import __version__
from mergekit_lfm.align import align_models
from mergekit_lfm.alignments import AlignRequest
from mergekit_lfm.checkpoint import Checkpoint
from mergekit_lfm.errors import FormatError
from mergekit_lfm.machine import cache_folder
from mergekit_lfm.plan import Plan
from mergekit_lfm.rewriting import rewritten
from mergekit_lfm.stats import open_statistics
from mergekit_lfm.transforms import Transform, open_transform


def prepare(plan: Plan, notice: Callable[[str], None]) -> Plan:
    """The plan with every alignment found, and nothing else changed. notice is called with a line for each."""
    models = list(plan.models)
    for i, (model, checkpoint) in enumerate(zip(plan.recipe.all_models, plan.models, strict=True)):
        if isinstance(model.align, AlignRequest) and model in plan.pending:
            source = checkpoint.as_stored()
            to = plan.models[plan.labels.index(model.align.to)]
            notice(f"aligning {model.label} to {model.align.to} by {model.align.method}")
            models[i] = rewritten(source, _found(source, to, model.align), checkpoint.view or {})
    return replace(plan, cast=replace(plan.cast, models=tuple(models)))


def _found(source: Checkpoint, to: Checkpoint, request: AlignRequest) -> Transform:
    """The transform that was asked for, from an earlier run or found now."""

    def find() -> Transform:
        statistics = None if request.stats is None else open_statistics(request.stats.path)
        options: dict[str, Any] = dict(request.options)
        return align_models(source, to, request.method, statistics=statistics, **options)

    return kept_or_made(cache_folder("transforms") / f"{_key(source, to, request)}.safetensors", find, open_transform)


class Saved(Protocol):
    """What can be written to a file."""

    def save(self, path: Path, /) -> None: ...


T = TypeVar("T", bound=Saved)


def kept_or_made(kept: Path, make: Callable[[], T], opened: Callable[[Path], T]) -> T:
    """What a file of the cache holds; where it is not there, or damaged, what is made, as a file then holds it."""
    try:
        return opened(kept)
    except (FileNotFoundError, FormatError):
        pass
    made = make()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        ours = kept.with_name(f"{kept.stem}.{os.getpid()}.safetensors")  # other merges may make the same one now
        made.save(ours)
        ours.rename(kept)
    except OSError:  # without it the next run makes it again
        with TemporaryDirectory() as folder:  # what is used is what a file holds, here as there
            made.save(Path(folder) / kept.name)
            return opened(Path(folder) / kept.name)
    return opened(kept)


def _key(source: Checkpoint, to: Checkpoint, request: AlignRequest) -> str:
    stats = None if request.stats is None else xxhash.xxh3_128_hexdigest(request.stats.path.read_bytes())
    versions = {"mergekit_lfm": __version__, **{name: version(name) for name in ("torch", "numpy", "scipy", "pot")}}
    asked = [source.content, to.content, stats, request.method, request.options, versions]
    return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())
