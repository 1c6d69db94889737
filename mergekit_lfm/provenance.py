"""What goes beside the weights: index, config, tokenizer files, model card, and the lock that says how it all came
about.

The lock (merge.lock.json) holds the normalised recipe, the identity of every input, versions, and per tensor the method
and the xxh3-128 of its bytes: enough to verify the output, and to see what it was made of. It has no time of day and no
absolute path, so that the same merge gives the same lock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import xxhash
import yaml

from mergekit_lfm import __version__
from mergekit_lfm.checkpoint import Checkpoint
from mergekit_lfm.errors import FormatError
from mergekit_lfm.plan import Plan
from mergekit_lfm.tensors import FLOATS, read_exactly
from mergekit_lfm.writer import LOCK, Receipt, lock_of

INDEX = "model.safetensors.index.json"
CARD = "README.md"
DTYPE_KEYS = ("dtype", "torch_dtype")


def documents(plan: Plan, receipts: Mapping[tuple[str, int], Receipt]) -> dict[str, bytes]:
    """Every file of the output but the shards, by name; the lock covers the others."""
    folder = plan.models[plan.template].path
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in plan.files}
    if "config.json" in files:
        files["config.json"] = _config(files["config.json"], plan)
    if len(plan.shards) > 1:
        files[INDEX] = _index(plan)
    files[CARD] = _card(plan).encode()
    files[LOCK] = _lock(plan, receipts, files)
    return files


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _config(raw: bytes, plan: Plan) -> bytes:
    """The template's config with the dtype that most output tensors have; its bytes where nothing changes."""
    floats = Counter(job.dtype for job in plan.tensors if job.dtype in FLOATS)
    if not floats:
        return raw
    dtype = floats.most_common(1)[0][0]
    config = json.loads(raw)
    before = json.dumps(config)
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({key: dtype for key in DTYPE_KEYS if key in part})
    return raw if json.dumps(config) == before else _json(config)


def _index(plan: Plan) -> bytes:
    numbers = sum(job.spec.numel for job in plan.tensors)
    return _json(
        {
            "metadata": {"total_parameters": numbers, "total_size": plan.bytes_written},
            "weight_map": {spec.name: shard.name for shard in plan.shards for spec in shard.tensors},
        }
    )


def public(reference: str) -> str:
    """A model reference without the folders of this machine: the name alone where it is an absolute path."""
    path = PurePath(reference)
    return path.name if path.is_absolute() or reference.startswith("~") else reference


def _public_recipe(plan: Plan) -> dict[str, Any]:
    recipe = plan.recipe.normalised()
    models = [{**entry, "model": public(entry["model"])} for entry in recipe["models"]]
    base = recipe["base_model"]
    return {**recipe, "models": models, "base_model": base and public(base)}


def _lock(plan: Plan, receipts: Mapping[tuple[str, int], Receipt], files: Mapping[str, bytes]) -> bytes:
    shards = {spec.name: shard.name for shard in plan.shards for spec in shard.tensors}
    digests = {job.name: [receipts[job.name, s] for s in range(job.segments)] for job in plan.tensors}
    nonfinite = sorted({where for held in digests.values() for receipt in held for where in receipt.nonfinite})
    return _json(
        {
            "format": 1,
            "plan": plan.digest,
            "versions": {"mergekit_lfm": __version__, "torch": version("torch")},
            "recipe": _public_recipe(plan),
            "inputs": [
                {"model": public(label), "files": model.identity}
                for label, model in zip(plan.labels, plan.models, strict=True)
            ],
            "tensors": {
                job.name: {
                    "method": job.method,
                    "dtype": job.dtype,
                    "shape": list(job.shape),
                    "file": shards[job.name],
                    "xxh3": [receipt.xxh3 for receipt in digests[job.name]],
                }
                for job in plan.tensors
            },
            "segments": {job.name: job.segment_numel for job in plan.tensors if job.segments > 1},
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(files.items())},
            "dropped": [{"model": public(m), "tensor": t, "reason": why} for m, t, why in plan.dropped],
            "nonfinite": nonfinite,
        }
    )


def _card(plan: Plan) -> str:
    """The model card: a front matter as the Hub reads it, the sources, the recipe."""
    method = plan.recipe.method
    lines = "\n".join(
        f"- {public(label)}{' (base)' if i == 0 and plan.recipe.base else ''}" for i, label in enumerate(plan.labels)
    )
    front = yaml.safe_dump({"library_name": "transformers", "tags": ["merge", "mergekit_lfm"]}, sort_keys=False)
    recipe = {key: value for key, value in _public_recipe(plan).items() if value not in (None, {}, [])}
    for entry in recipe["models"]:
        if not entry["parameters"]:
            del entry["parameters"]
    dtypes = ", ".join(sorted({job.dtype for job in plan.tensors}))
    return (
        f"---\n{front}---\n\n# Merged model\n\n"
        f"Made with mergekit_lfm {__version__} by `{method.name}` ({method.source}).\n\n"
        f"{len(plan.tensors)} tensors, {sum(job.spec.numel for job in plan.tensors):,} numbers, {dtypes}.\n\n"
        f"## Models\n\n{lines}\n\n"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n\n"
        f"`{LOCK}` has the identity of every input and a digest of every tensor; `mergekit-lfm verify` checks them.\n"
    )


def verify(out: Path, progress: Callable[[int], None] | None = None) -> list[str]:
    """What differs between the output folder and its lock, one line each; nothing where all is as it was written.

    Re-reads every byte. progress is called with each number of bytes read. FormatError where there is no lock.
    """
    lock = lock_of(out)
    if lock.get("format") != 1:
        raise FormatError(f"{out} has no {LOCK} of format 1: it is no output of `merge`, or of another version")
    problems = [
        f"{name} {'is missing' if not (out / name).exists() else 'was changed'}"
        for name, digest in lock["files"].items()
        if not (out / name).exists() or xxhash.xxh3_128_hexdigest((out / name).read_bytes()) != digest
    ]
    try:
        checkpoint = Checkpoint(out)
    except (FormatError, OSError) as error:
        return [*problems, str(error)]
    problems += [f"{name} is not in the lock" for name in checkpoint if name not in lock["tensors"]]
    for name, entry in lock["tensors"].items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif [checkpoint[name].dtype, list(checkpoint[name].shape)] != [entry["dtype"], entry["shape"]]:
            problems.append(f"{name} is {checkpoint[name]}, the lock says {entry['shape']} {entry['dtype']}")
        elif not _as_locked(checkpoint, name, entry["xxh3"], lock["segments"].get(name), progress or (lambda _: None)):
            problems.append(f"{name} was changed")
    return problems


def _as_locked(
    checkpoint: Checkpoint, name: str, digests: list[str], segment: int | None, progress: Callable[[int], None]
) -> bool:
    """Whether the tensor's bytes have the digests, one for each segment of so many elements."""
    spec, file = checkpoint[name], checkpoint.file_of(name)
    offset = file.offset(name) or 0
    step = spec.nbytes if segment is None else segment * (spec.nbytes // spec.numel)
    buffer = memoryview(bytearray(min(1 << 20, spec.nbytes)))
    for start, digest in zip(range(0, max(1, spec.nbytes), max(1, step)), digests, strict=False):
        found, end = xxhash.xxh3_128(), min(spec.nbytes, start + step)
        for at in range(start, end, len(buffer) or 1):
            part = buffer[: min(len(buffer), end - at)]
            read_exactly(file.fileno(), offset + at, part, file.path)
            found.update(part)
            progress(len(part))
        if found.hexdigest() != digest:
            return False
    return True
