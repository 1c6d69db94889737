"""Libraries that come with the package's extras, and are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(name: str, doing: str, extra: str) -> Any:
    """The library of this name. Raises an ImportError that says which extra has it. doing: what needs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'{doing} needs {name}: pip install "mergekit_lfm[{extra}]"', name=name) from error
