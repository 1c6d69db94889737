"""Find the tensor of the checkpoint that each parameter of a model was loaded from.

A name alone proves nothing: transformers adds and removes prefixes, renames layers, and a model may have been trained
since it was loaded. So a parameter matches a tensor only if it holds the same values.
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


def locate_tensors(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], frozenset[str]]:
    """The tensor of every parameter that has one, by parameter names; and the parameters with several candidates.

    Raises FormatError if a parameter differs from the tensor of its name, or if no parameter has a tensor.
    """
    names = dict(module.named_parameters(remove_duplicate=False))
    changes = _changes(list(names), checkpoint)
    tensors: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, parameter in names.items():
        candidates = [added + name.removeprefix(removed) for removed, added in changes if name.startswith(removed)]
        candidates = [tensor for tensor in candidates if tensor in checkpoint]
        for tensor in candidates:
            if _agree(parameter, checkpoint, tensor):
                tensors[name] = tensor
                break
        else:
            if candidates:
                wrong[name] = candidates[0]
    known = {id(names[name]) for name in tensors} | {id(names[name]) for name in wrong}
    pending = {name: x.detach() for name, x in module.named_parameters() if id(x) not in known}
    unclear = _find_by_content(pending, checkpoint, tensors)
    if wrong or not tensors:
        lines = [f"{name}: differs from {tensor}" for name, tensor in sorted(wrong.items())]
        raise FormatError(
            f"{checkpoint.path} is not the checkpoint of this model:\n  "
            + "\n  ".join(lines or ["none of its tensors is a parameter of the model"])
            + "\nWas the model changed since it was loaded? Save it, and give that checkpoint"
        )
    return tensors, unclear


def _find_by_content(
    pending: Mapping[str, Tensor], checkpoint: Checkpoint, tensor_of: dict[str, str]
) -> frozenset[str]:
    """Add the tensors that hold the parameters' values to `tensor_of`; returns the parameters with several candidates.

    Names distinguish values that occur twice or are constant, like those of a new LayerNorm: a bias lies beside its
    weight, and equal module and parameter names in blocks of the same number match. Order does not help: files are
    sorted by name.
    """
    groups = _group_by_content(pending, checkpoint, set(tensor_of.values()))
    for names, tensors in groups:
        if len(names) == len(tensors) == 1 and _is_varied(pending[names[0]]):
            tensor_of[names[0]] = tensors[0]
    homes = {name.rpartition(".")[0]: tensor.rpartition(".")[0] for name, tensor in tensor_of.items()}
    taken = set(tensor_of.values())
    for names, tensors in groups:
        for name in [name for name in names if name not in tensor_of]:
            home, _, last = name.rpartition(".")
            sibling = f"{homes[home]}.{last}".removeprefix(".") if home in homes else None
            if sibling in tensors and sibling not in taken:
                tensor_of[name] = sibling
                taken.add(sibling)
    unclear: set[str] = set()
    for names, tensors in groups:
        names, tensors = [n for n in names if n not in tensor_of], [t for t in tensors if t not in taken]
        endings = Counter(map(_ending, names))
        for name in names:
            matches = [tensor for tensor in tensors if _ending(tensor) == _ending(name)]
            if len(matches) == endings[_ending(name)] == 1:
                tensor_of[name] = matches[0]
            elif len(tensors) > 1:
                unclear.add(name)
    return frozenset(unclear)


def _group_by_content(
    pending: Mapping[str, Tensor], checkpoint: Checkpoint, taken: Container[str]
) -> list[tuple[list[str], list[str]]]:
    """Groups of parameters and free tensors with the same values, bit for bit in the dtype of the parameters."""
    groups: dict[tuple[tuple[int, ...], torch.dtype, str], tuple[list[str], list[str]]] = {}
    for name, x in pending.items():
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


def _is_varied(x: Tensor) -> bool:
    """True if x has more than one value."""
    flat = x.reshape(-1)
    return bool((flat != flat[:1]).any())


def _ending(name: str) -> tuple[tuple[str, ...], ...]:
    """The numbers in a name, those of its blocks, and its last two parts: module and parameter."""
    parts = name.split(".")
    return tuple(part for part in parts if part.isdecimal()), tuple(parts[-2:])


def _changes(names: list[str], checkpoint: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """Pairs (prefix to remove, prefix to add) that turn names into tensors': first no change, then the most common."""
    suits: Counter[tuple[str, str]] = Counter()
    for name in names:
        suits.update((name[:i], "") for i in _tails(name) if name[i:] in checkpoint)
    inside = set(names)
    for tensor in checkpoint:
        suits.update(("", tensor[:i]) for i in _tails(tensor) if tensor[i:] in inside)
    return [("", ""), *(change for change, _ in suits.most_common())]


def _tails(name: str) -> Iterator[int]:
    """Where the second and later parts of a dotted name begin."""
    return (i + 1 for i, letter in enumerate(name) if letter == ".")


def _agree(parameter: Tensor, checkpoint: Checkpoint, tensor: str) -> bool:
    """True if the tensor, in the dtype of the parameter, equals the parameter bit for bit."""
    if checkpoint[tensor].shape != tuple(parameter.shape):
        return False
    stored = checkpoint.read(tensor).to(parameter.dtype)
    values = parameter.detach().cpu().reshape(-1)
    return torch.equal(stored.view(torch.uint8), values.view(torch.uint8))
