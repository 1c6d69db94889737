"""What tests of GPUs share: the engine's path for them on the processor, and the real thing where there is one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from mergekit_lfm.machine.accelerators import Accelerator

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")


def stand_in() -> Accelerator:
    """The GPU where there is one, else the processor, of which the engine thinks as of a GPU."""
    return Accelerator(torch.device("cuda" if CUDA else "cpu"))
