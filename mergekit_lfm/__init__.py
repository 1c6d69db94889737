"""Make new models out of saved ones: merge checkpoints by streaming their tensors, in bounded memory.

Importing this package imports no torch; its functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "merge", "merge_tensors", "open_checkpoint"]

if TYPE_CHECKING:
    from mergekit_lfm.api import merge, merge_tensors
    from mergekit_lfm.checkpoint import open_checkpoint


def __getattr__(name: str) -> Any:
    if name in ("merge", "merge_tensors"):
        from mergekit_lfm import api

        return getattr(api, name)
    if name == "open_checkpoint":
        from mergekit_lfm.checkpoint import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
