"""Calls of libraries without the warnings that they cause in one another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, such as those that PEFT causes in the libraries that it calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
