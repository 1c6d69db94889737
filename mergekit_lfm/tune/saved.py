"""Adapters as PEFT saves them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_lfm.tune.work import TuneWork


def as_saved(config: Any, work: TuneWork) -> dict[str, Any]:
    """A config of PEFT's as its file has it, for the model of the work."""
    return {
        **config.to_dict(),
        "inference_mode": True,
        "revision": None,
        "base_model_name_or_path": work.reference,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that PEFT causes in the libraries that it calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
