"""Where arithmetic runs: the processor, or a GPU. torch is imported when a device is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError, reason

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1, ..., or what "auto" is: the first GPU where there is one, else cpu.

    PlanError where it is not there, or torch was built without it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (AssertionError, ImportError, RuntimeError) as error:  # what torch raises depends on how it was built
        raise PlanError(
            f"the device {name!r} cannot be used here ({reason(error)}); expected one like cpu, cuda, cuda:1 or auto. "
            "Choose one that this machine and this torch have"
        ) from None
    if device.type == "meta":
        raise PlanError(
            "the device 'meta' computes nothing; expected one like cpu, cuda, cuda:1 or auto. Choose another"
        )
    return device


def find_gpu(name: str) -> torch.device | None:
    """The GPU of that name, None for the processor. PlanError for devices of other kinds, whose arithmetic differs."""
    device = find_device(name)
    if device.type != "cpu" and not merges(device):
        raise PlanError(
            f"the device {name!r} is a {device.type}, on which results are not known to be exact; expected cpu, cuda, "
            "cuda:1 or auto. Choose one of these"
        )
    return None if device.type == "cpu" else device


def merges(device: torch.device) -> bool:
    """Whether merges are computed on such a device, if tensors lie there: whether it is a GPU of CUDA."""
    return device.type == "cuda"
