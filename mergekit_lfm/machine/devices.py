"""The device of the arithmetic: the processor, or a GPU. Each function imports torch only when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError, reason

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1, ..., or "auto", the first GPU, or cpu without one.

    Raises PlanError if it does not exist, or if torch was built without it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (AssertionError, ImportError, RuntimeError) as error:  # the class depends on how torch was built
        raise PlanError(
            f"the device {name!r} cannot be used here ({reason(error)}); expected one like cpu, cuda, cuda:1 or auto. "
            "Choose one that this machine has and this torch supports"
        ) from None
    if device.type == "meta":
        raise PlanError(
            "the device 'meta' computes nothing; expected one like cpu, cuda, cuda:1 or auto. Choose another"
        )
    return device


def find_gpu(name: str) -> torch.device | None:
    """The GPU of that name, None for the processor. Raises PlanError for other devices, whose arithmetic differs."""
    device = find_device(name)
    if device.type != "cpu" and not can_merge_on(device):
        raise PlanError(
            f"the device {name!r} is a {device.type}, whose results are not known to be exact; expected cpu, cuda, "
            "cuda:1 or auto. Choose one of these"
        )
    return None if device.type == "cpu" else device


def can_merge_on(device: torch.device) -> bool:
    """True if merges can be computed on this device: if it is a CUDA GPU."""
    return device.type == "cuda"
