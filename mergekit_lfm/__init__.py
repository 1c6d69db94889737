"""Make new models out of saved ones: merge checkpoints by streaming their tensors, in bounded memory.

Importing this package imports no torch; its functions do when they are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit_lfm.version import __version__

__all__ = [
    "__version__",
    "align_models",
    "apply_patches",
    "collect_stats",
    "merge",
    "merge_tensors",
    "open_checkpoint",
    "open_patch",
    "open_statistics",
    "open_transform",
    "push",
    "undo_patches",
]

if TYPE_CHECKING:
    from mergekit_lfm.align import align_models
    from mergekit_lfm.api.merge import merge
    from mergekit_lfm.api.patches import apply_patches, undo_patches
    from mergekit_lfm.api.tensors import merge_tensors
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.artifacts.statistics import open_statistics
    from mergekit_lfm.artifacts.transform import open_transform
    from mergekit_lfm.collect import collect_stats
    from mergekit_lfm.output.push import push
    from mergekit_lfm.store.checkpoint import open_checkpoint

_HOMES = {
    "align_models": "align",
    "apply_patches": "api.patches",
    "collect_stats": "collect",
    "merge": "api.merge",
    "merge_tensors": "api.tensors",
    "open_checkpoint": "store.checkpoint",
    "open_patch": "artifacts.patch",
    "open_statistics": "artifacts.statistics",
    "open_transform": "artifacts.transform",
    "push": "output.push",
    "undo_patches": "api.patches",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
