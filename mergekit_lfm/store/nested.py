"""The state dict in what torch.save wrote: all of it, the only dictionary of tensors in it, or the one at an address.

An address is the keys on the way to it, joined by dots. The rest of the file, such as the optimizer and the epoch, is
listed and not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.tensors import METADATA

WRAPPERS = ("state_dict", "model", "module")
# Keys of a training's state, whose dictionaries of tensors are not a model.
TRAINING = re.compile(r"optim|sched|scaler|rng|random_state|callbacks|loops|param_groups", re.IGNORECASE)
SHOWN = 5  # addresses that a message names

Keys = tuple[object, ...]


@dataclass(frozen=True)
class StateDict:
    """Tensors by name. address: "" for all of the file; beside: the addresses of what else the file holds."""

    tensors: dict[str, Any]
    address: str = ""
    beside: tuple[str, ...] = ()


def find_state_dict(loaded: Any, path: Path, kind: type[Any], address: str = "") -> StateDict:
    """The state dict in a loaded file; its tensors are instances of `kind`. Raises FormatError unless there is one."""
    keys = _keys_of(loaded, path, kind, address)
    found, beside = loaded, list[str]()
    for depth, key in enumerate(keys):
        beside += [_address((*keys[:depth], other)) for other in found if other != key]
        found = found[key]
    if not isinstance(found, Mapping):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected a state dict of names and tensors")
    others = [str(key) for key, value in found.items() if not isinstance(value, kind)]
    if others:
        raise FormatError(f"{path}: {', '.join(others[:5])} are not tensors; save only the model's state_dict()")
    tensors = {str(key): value for key, value in found.items()}
    if METADATA in tensors or len(tensors) < len(found):
        raise FormatError(f"{path}: two tensors have one name, or one is named {METADATA}; rename it and save anew")
    return StateDict(tensors, _address(keys), tuple(beside))


def _address(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _keys_of(loaded: Any, path: Path, kind: type[Any], address: str) -> Keys:
    """The keys on the way to the state dict: those of the address, or of the only dictionary of tensors."""
    found = list(_dictionaries(loaded, kind))
    if address:
        if keys := _follow(loaded, address):
            return keys
        raise FormatError(f"{path} holds no {address!r}, expected {_list_addresses(path, found) or 'an address in it'}")
    if len(found) > 1:
        raise FormatError(
            f"{path} holds {len(found)} dictionaries of tensors; name the model's: {_list_addresses(path, found)}"
        )
    if found:
        return found[0]
    wrapped = isinstance(loaded, Mapping)
    return next(((key,) for key in WRAPPERS if wrapped and isinstance(loaded.get(key), Mapping)), ())


def _list_addresses(path: Path, found: list[Keys]) -> str:
    names = [f"{path.name}#{_address(keys)}" if keys else path.name for keys in found]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _dictionaries(loaded: Any, kind: type[Any]) -> Iterator[Keys]:
    """The keys on the way to each dictionary that holds tensors, but for those of a training's state.

    Single numbers, such as the best accuracy beside a state dict, make no dictionary of tensors of what holds it.
    """
    waiting: list[tuple[Keys, Any]] = [((), loaded)]
    seen = set[int]()  # a pickle may put a dictionary in several places, and into itself
    while waiting:
        keys, part = waiting.pop(0)
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        inner = [(key, value) for key, value in part.items() if isinstance(value, Mapping)]
        tensors = [value for value in part.values() if isinstance(value, kind)]
        if any(prod(value.shape) != 1 for value in tensors) or (tensors and not inner):
            yield keys
        waiting += [((*keys, key), value) for key, value in inner if isinstance(key, str) and not TRAINING.search(key)]


def _follow(part: Any, address: str) -> Keys:
    """The keys of an address; () if nothing is there. A key may have dots in it."""
    for key, value in part.items() if isinstance(part, Mapping) else ():
        if str(key) == address:
            return (key,)
        if address.startswith(f"{key}.") and (rest := _follow(value, address.removeprefix(f"{key}."))):
            return (key, *rest)
    return ()
