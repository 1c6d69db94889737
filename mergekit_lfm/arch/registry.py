"""The symmetry tables by the config's `model_type`. To add one, put a file beside this one; nothing else changes.

Without a model_type, the tensors themselves may form a chain of layers, which gives a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from mergekit_lfm.arch.chain import chain_table
from mergekit_lfm.arch.table import Symmetries, check_fit
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import Checkpoint

Build = Callable[[Mapping[str, Any], Iterable[str]], Symmetries]  # from the config and the tensors' names


def _collect() -> dict[str, Build]:
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{m.name}") for m in iter_modules(import_module(package).__path__)]
    return {kind: module.symmetries for module in modules for kind in getattr(module, "MODEL_TYPES", ())}


ARCHITECTURES = MappingProxyType(_collect())


def find_symmetries(checkpoint: Checkpoint, label: object | None = None) -> Symmetries:
    """The symmetry table of a checkpoint, by the model_type of its config; without one, that of a chain of layers.

    Raises PlanError if no table fits.
    """
    label = checkpoint.path if label is None else label
    kind = checkpoint.config.get("model_type")
    known = (
        f"there are tables of model_type {', '.join(sorted(ARCHITECTURES))}, and of chains of layers without a config. "
        "Choose such a model, or give a table in Python (`symmetries=`)"
    )
    if kind is None:
        try:
            return chain_table(checkpoint)
        except PlanError as error:
            raise PlanError(f"{label} has no config.json with a model_type, and {error}; {known}") from None
    build = ARCHITECTURES.get(kind)
    if build is None:
        raise PlanError(f"{label} has model_type {kind!r}, which has no symmetry table; {known}")
    try:
        symmetries = build(checkpoint.config, checkpoint)
    except KeyError as error:
        raise PlanError(f"{label}: config.json has no {error}, which the table of {kind} needs") from None
    check_fit(symmetries, checkpoint, label)
    return symmetries
