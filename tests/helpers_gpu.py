"""Helpers for tests of GPUs: the engine's GPU path on the processor, and the real GPU if present."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from mergekit_lfm.machine.accelerators import Gpu

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")


def stand_in() -> Gpu:
    """The real GPU if there is one, else the processor, which the engine treats like a GPU."""
    return Gpu("cuda" if CUDA else "cpu")
