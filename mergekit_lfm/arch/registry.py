"""The symmetry tables by the config's `model_type`. A new one is a file beside this one, and no other change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from mergekit_lfm.arch.declare import Symmetries, check_fit
from mergekit_lfm.checkpoint import Checkpoint
from mergekit_lfm.errors import PlanError

Build = Callable[[Mapping[str, Any], Iterable[str]], Symmetries]  # from the config and the tensors' names


def _collect() -> dict[str, Build]:
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{m.name}") for m in iter_modules(import_module(package).__path__)]
    return {kind: module.symmetries for module in modules for kind in getattr(module, "MODEL_TYPES", ())}


ARCHITECTURES = MappingProxyType(_collect())


def find_symmetries(checkpoint: Checkpoint, label: object | None = None) -> Symmetries:
    """The symmetry table of a checkpoint, by the model_type of its config. PlanError where there is none that fits."""
    label = checkpoint.path if label is None else label
    kind = checkpoint.config.get("model_type")
    build = ARCHITECTURES.get(kind or "")
    if build is None:
        raise PlanError(
            f"{label} is of model_type {kind!r}, for which there is no symmetry table; there are tables of "
            f"{', '.join(sorted(ARCHITECTURES))}. Choose such a model, or give a table in Python (`symmetries=`)"
        )
    try:
        found = build(checkpoint.config, checkpoint)
    except KeyError as error:
        raise PlanError(f"{label}: config.json has no {error}, which the table of {kind} needs") from None
    check_fit(found, checkpoint, label)
    return found
