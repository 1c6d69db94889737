"""Compare tensors of checkpoints: byte by byte, or by value where their types differ."""

from __future__ import annotations

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import ITEMSIZE

STEP = 1 << 22  # bytes to read at a time


def have_same_bytes(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    """True if two tensors of one shape and type are equal, byte by byte."""
    nbytes, size = one[name].nbytes, ITEMSIZE[one[name].dtype]
    if one[name].shape != other[other_name].shape or one[name].dtype != other[other_name].dtype:
        return False
    sides = [(one, name, bytearray(min(STEP, nbytes))), (other, other_name, bytearray(min(STEP, nbytes)))]
    for start in range(0, nbytes, STEP):
        for checkpoint, tensor, buffer in sides:
            checkpoint.read_into(tensor, start // size, memoryview(buffer)[: nbytes - start])
        if sides[0][2] != sides[1][2]:
            return False
    return True


def are_equal(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    """True if two tensors of one shape are equal, after a cast to the type of the first where theirs differ."""
    if one[name].dtype == other[other_name].dtype:
        return have_same_bytes(one, name, other, other_name)
    step = STEP // 8
    for start in range(0, one[name].numel, step):
        stop = min(one[name].numel, start + step)
        values, others = one.read(name, start, stop), other.read(other_name, start, stop)
        if not bool((values.double() == others.double()).all()):
            return False
    return True
