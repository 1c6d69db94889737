"""Which tensor of its checkpoint each parameter of a model is.

A name alone is no proof: transformers adds and removes prefixes, renames layers, and a model may have been trained
since it was loaded. So a parameter is the tensor of a checkpoint only if it holds the same values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping

import torch
import xxhash
from torch import Tensor, nn

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec


def located(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], frozenset[str]]:
    """The tensor of every parameter that has one, by the names of parameters; and those that may be one of several.

    Raises FormatError where a parameter is not what the tensor of its name is, or none is found.
    """
    names = dict(module.named_parameters(remove_duplicate=False))
    changes = _changes(list(names), checkpoint)
    found: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, parameter in names.items():
        candidates = [added + name.removeprefix(removed) for removed, added in changes if name.startswith(removed)]
        candidates = [tensor for tensor in candidates if tensor in checkpoint]
        for tensor in candidates:
            if _agree(parameter, checkpoint, tensor):
                found[name] = tensor
                break
        else:
            if candidates:
                wrong[name] = candidates[0]
    known = {id(names[name]) for name in found} | {id(names[name]) for name in wrong}
    waiting = {name: x.detach() for name, x in module.named_parameters() if id(x) not in known}
    unclear = _find_by_content(waiting, checkpoint, found)
    if wrong or not found:
        lines = [f"{name}: not what {tensor} is" for name, tensor in sorted(wrong.items())]
        raise FormatError(
            f"{checkpoint.path} is not the checkpoint of this model:\n  "
            + "\n  ".join(lines or ["none of its tensors is a parameter of the model"])
            + "\nWas the model changed since it was loaded? Save it, and give the checkpoint that it was saved to"
        )
    return found, unclear


def _find_by_content(waiting: Mapping[str, Tensor], checkpoint: Checkpoint, found: dict[str, str]) -> frozenset[str]:
    """Adds to `found` the tensors that hold what parameters do; which parameters may be one of several is returned.

    Values that occur twice, or that are all the same, as those of a new LayerNorm, are told apart by names: a bias lies
    beside its weight, and what is called the same in the block of the same number is the same. Order is no help: files
    are sorted by name.
    """
    alike = _alike(waiting, checkpoint, set(found.values()))
    for names, tensors in alike:
        if len(names) == len(tensors) == 1 and _varied(waiting[names[0]]):
            found[names[0]] = tensors[0]
    homes = {name.rpartition(".")[0]: tensor.rpartition(".")[0] for name, tensor in found.items()}
    taken = set(found.values())
    for names, tensors in alike:
        for name in [name for name in names if name not in found]:
            home, _, last = name.rpartition(".")
            beside = f"{homes[home]}.{last}".removeprefix(".") if home in homes else None
            if beside in tensors and beside not in taken:
                found[name] = beside
                taken.add(beside)
    unclear: set[str] = set()
    for names, tensors in alike:
        names, tensors = [n for n in names if n not in found], [t for t in tensors if t not in taken]
        endings = Counter(map(_ending, names))
        for name in names:
            same = [tensor for tensor in tensors if _ending(tensor) == _ending(name)]
            if len(same) == endings[_ending(name)] == 1:
                found[name] = same[0]
            elif len(tensors) > 1:
                unclear.add(name)
    return frozenset(unclear)


def _alike(
    waiting: Mapping[str, Tensor], checkpoint: Checkpoint, taken: Container[str]
) -> list[tuple[list[str], list[str]]]:
    """The parameters and the tensors, not taken, that hold the same, bit for bit in the dtype of the parameters."""
    groups: dict[tuple[tuple[int, ...], torch.dtype, str], tuple[list[str], list[str]]] = {}
    for name, x in waiting.items():
        groups.setdefault((tuple(x.shape), x.dtype, _digest(x.cpu())), ([], []))[0].append(name)
    dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}
    for shape, dtype, _ in groups:
        dtypes.setdefault(shape, set()).add(dtype)
    for tensor, spec in checkpoint.items():
        for dtype in dtypes.get(spec.shape, ()) if tensor not in taken else ():
            group = groups.get((spec.shape, dtype, _digest(checkpoint.read(tensor).to(dtype))))
            if group is not None:
                group[1].append(tensor)
    return list(groups.values())


def _digest(x: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_of(x.contiguous()))


def _varied(x: Tensor) -> bool:
    """Whether x has more than one value."""
    flat = x.reshape(-1)
    return bool((flat != flat[:1]).any())


def _ending(name: str) -> tuple[tuple[str, ...], ...]:
    """The numbers in a name, which are those of blocks, and its last two parts: module and parameter."""
    parts = name.split(".")
    return tuple(part for part in parts if part.isdecimal()), tuple(parts[-2:])


def _changes(names: list[str], checkpoint: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """(prefix to remove, prefix to add) that lead from names to tensors: none, then those that suit most names."""
    suits: Counter[tuple[str, str]] = Counter()
    for name in names:
        suits.update((name[:i], "") for i in _tails(name) if name[i:] in checkpoint)
    inside = set(names)
    for tensor in checkpoint:
        suits.update(("", tensor[:i]) for i in _tails(tensor) if tensor[i:] in inside)
    return [("", ""), *(change for change, _ in suits.most_common())]


def _tails(name: str) -> Iterator[int]:
    """Where the parts of a dotted name begin, but for the first."""
    return (i + 1 for i, letter in enumerate(name) if letter == ".")


def _agree(parameter: Tensor, checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the tensor, in the dtype of the parameter, is the parameter, bit for bit."""
    if checkpoint[tensor].shape != tuple(parameter.shape):
        return False
    stored = checkpoint.read(tensor).to(parameter.dtype)
    held = parameter.detach().cpu().reshape(-1)
    return torch.equal(stored.view(torch.uint8), held.view(torch.uint8))
