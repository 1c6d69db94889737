"""Write an adapter that PEFT has trained: its config and its names as they are, in a folder with a card and a lock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.output.adapter import METADATA, AdapterOutput, adapter_card, write_empty
from mergekit_lfm.output.adapter_config import in_order
from mergekit_lfm.output.card import CARD
from mergekit_lfm.output.lock import ADAPTER_LOCK
from mergekit_lfm.output.request import Request
from mergekit_lfm.output.save import make_folder
from mergekit_lfm.store.durable import replace_file, sync_folder
from mergekit_lfm.store.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.hub import hub_name
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header

if TYPE_CHECKING:
    from torch import Tensor


Parts = Mapping[str, tuple[Mapping[str, Any], Mapping[str, "Tensor"]]]  # configs and tensors by folders in OUT


def save_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    request: Request,
    result: Mapping[str, Any],
    parts: Parts = MappingProxyType({}),
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write an adapter that PEFT has made, with its config and names. result: facts for the lock.

    parts: further adapters, in folders of OUT. more: files of OUT beside these. Replaces OUT: call
    `request.is_answered` first.
    """
    _ = request.digest
    specs, header = _lay_out(tensors)
    data = {spec.name: bytes_of(tensors[spec.name].cpu().contiguous()) for spec in specs}
    files = {**_documents(out.resolve().name, config), **more}
    for folder, (own, held) in parts.items():
        files |= {f"{folder}/{name}": content for name, content in _documents(folder, own).items()}
        files[f"{folder}/{ADAPTER_WEIGHTS[0]}"] = _encode(held)
    with make_folder(out) as partial:
        replace_file(partial / ADAPTER_WEIGHTS[0], chain([header], data.values()))
        locked = [(spec, ADAPTER_WEIGHTS[0], xxhash.xxh3_128_hexdigest(data[spec.name])) for spec in specs]
        files[ADAPTER_LOCK] = request.lock(files, {ADAPTER_WEIGHTS[0]: header}, locked, result)
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(partial / name, content)
        sync_folder(partial)


def stand_in_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the files of `save_adapter` into a folder, without data, which take no space on the disk, or a lock."""
    folder.mkdir()
    for name, content in _documents(folder.name, config).items():
        (folder / name).write_bytes(content)
    specs, header = _lay_out(tensors)
    write_empty(folder / ADAPTER_WEIGHTS[0], header, specs)


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file with these tensors."""
    specs, header = _lay_out(tensors)
    return b"".join([header, *(bytes_of(tensors[spec.name].cpu().contiguous()) for spec in specs)])


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[list[TensorSpec], bytes]:
    """The tensors in the order of the file, and its header."""
    specs = [spec_of(name, tensors[name]) for name in sorted(tensors, key=in_order)]
    return specs, encode_header(specs, METADATA)[0]


def _documents(title: str, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The config as PEFT has it, and the model card."""
    base = config.get("base_model_name_or_path")
    repo = base if isinstance(base, str) and hub_name(base) and not Path(base).exists() else None
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets have no order
    return {
        ADAPTER_CONFIG: f"{text}\n".encode(),
        CARD: adapter_card(title, AdapterOutput((), base=base, repo=repo, kind=str(config["peft_type"]))).encode(),
    }
