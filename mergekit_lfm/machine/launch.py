"""The processes that torchrun starts: their numbers, from the environment. No torch."""

from __future__ import annotations

import os

LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun alone; RANK may be of a scheduler


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return LAUNCHED in os.environ


def rank() -> int:
    """The number of this process among all that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_device(name: str) -> str:
    """The device of a process on its machine: each of several has a GPU of its own if the name says no number."""
    return f"{name}:{os.environ['LOCAL_RANK']}" if is_launched() and name == "cuda" else name
