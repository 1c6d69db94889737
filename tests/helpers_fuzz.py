"""Damaged and hostile inputs from seeds, by class, and what the readers make of each: read right, or refused.

An input is a good file of its class with a few changes: bits and bytes, pieces that are cut or doubled, and words that
have a meaning in the format.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from helpers_stats import write_fisher
from helpers_views import GROUPS, TABLE, make_patch, save_plain
from models import files_of
from safetensors import deserialize
from safetensors.torch import save

from mergekit_lfm import open_checkpoint
from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch.table import read_table
from mergekit_lfm.artifacts.facts import read_facts_file
from mergekit_lfm.artifacts.patch import open_patch
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.artifacts.transform import open_transform
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.journal import JOURNAL, Receipt
from mergekit_lfm.output.lock import LOCK, verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.folder import read_config
from mergekit_lfm.store.places import partial_of
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.store.tensors import UNFINISHED

SECONDS = 10.0  # the longest time for one input
RECIPE = """\
merge_method: ties
base_model: org/base
models:
  - model: &m org/a
    parameters: {weight: 0.6, density: [0.4, 0.5]}
  - {model: org/b, parameters: &p {weight: 1, density: 1}}
dtype: bfloat16
seed: 3
"""
FACTS = """\
facts:
  - prompt: "{} speaks"
    subject: Mia
    target_new: Danish
    paraphrase_prompts: [ "In her home {} says" ]
unedited: [{prompt: a, target: b}]
"""
WORDS = [b"9223372036854775808", b"-1", b"true", b"null", b"1e999", b"NaN", b"\\ud800", b"\xff", b"\0", b'""', b"\r"]
WORDS += [b"__metadata__", b"../../x", b"/dev/zero", b"\t", b": ", b"'", b"1:1:1", b"2024-13-45", b"!!binary ", b"{}"]
WORDS += [b"[" * 200, b"{" * 200, b'{"a":' * 2000, b"- " * 2000, b"*m", b"*p", b"<<: *p", b"&p [*p]", b"? ", b"!!int "]
WORDS += [b"9" * 5000, b"!!set ", b"[]", b"!!float ", b"!!omap ", b"!!timestamp ", b"0x" + b"f" * 5000]
CODES = [b"2" * 50, b"q\0h\0\x86" * 50, b"r\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 1 << 50), b"(", b"e", b"u"]
CODES += [b"s", b"R", b"b", b"Q", b"t", b"\x81", b"\x85", b"]", b"}", b")", b"ctorch\nFloatStorage\n", b"0", b"."]
CODES += [
    b"cbuiltins\nbytearray\n",
    b"ctorch\nSize\n",
    b"ctorch\ndevice\n",
    b"K\xff",
    b"J\xff\xff\xff\x7f",
    b"N",
    b"\x88",
]


@cache
def _good(name: str) -> bytes:
    """A good file of a class."""
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}
    if name == "header":
        return save(tensors, {"format": "pt"})
    if name in ("archive", "legacy"):
        file = io.BytesIO()
        torch.save(tensors, file, _use_new_zipfile_serialization=name == "archive")
        return file.getvalue()
    if name == "pickle":
        with zipfile.ZipFile(io.BytesIO(_good("archive"))) as archive:
            return archive.read("archive/data.pkl")
    if name == "index":
        return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}).encode()
    if name == "config":
        return json.dumps({"model_type": "llama", "layers": [{"n": 1}, 2.5], "dtype": "float32"}).encode()
    if name == "facts in JSON":
        return json.dumps([{"prompt": "{} speaks", "subject": "Mia", "target_new": "Danish"}]).encode()
    return {"recipe": RECIPE, "facts": FACTS}[name].encode()


def change(data: bytes, random: Random, words: list[bytes]) -> bytes:
    """The data with one to four changes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at, end = sorted(random.randint(0, len(changed)) for _ in range(2))
        kind = random.choice((0, 0, 0, 1, 2, 3, 4))
        if kind == 0 and changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at : min(end, at + 8)] = random.randbytes(random.randrange(5))
        elif kind == 2:
            changed[at:at] = changed[at:end][: random.choice((4, 60))]
        elif kind == 3:
            del changed[at : random.choice((at + 1, at + 1, at + 6, end))]
        else:
            changed[at : at + random.choice((0, 0, 1, 4))] = random.choice(words)
    return bytes(changed)


def _header(random: Random) -> bytes:
    """A safetensors file, usually with a length that fits its changed header."""
    raw = _good("header")
    length = int.from_bytes(raw[:8], "little")
    if random.random() < 0.2:
        return change(raw, random, WORDS)
    header = change(raw[8 : 8 + length].rstrip(), random, WORDS)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def _pickle(random: Random) -> bytes:
    """An archive whose pickle was changed, sometimes of another protocol."""
    program = change(_good("pickle"), random, CODES)
    if random.random() < 0.1:
        program = change(pickle.dumps({"x": [1, (2, "a"), b"b"]}, random.randrange(6)), random, CODES)
    file, kind = io.BytesIO(), random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("archive/data.pkl", program)
        for storage in range(2):
            archive.writestr(f"archive/data/{storage}", bytes(24))
    return file.getvalue()


@cache
def _artifact(name: str) -> bytes:
    """A good statistics, transform or patch file, or a lock or a journal."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "made"
        if name in ("lock", "journal"):
            plan, out = _small_plan(), Path(folder) / "out"
            execute(plan, out, threads=1)
            lock = (out / LOCK).read_bytes()
            return lock if name == "lock" else _journal(plan, json.loads(lock))
        model = save_plain(Path(folder) / "model")
        checkpoint = open_checkpoint(model)
        if name == "patch":
            make_patch(checkpoint, replaced=("up.bias",)).save(file)
        elif name == "transform":
            random_transform({}, read_table(TABLE, GROUPS, checkpoint), seed=2, kinds=["order", "scale"]).save(file)
        else:
            write_fisher(file, model, {"up.bias": torch.ones(301)})
        return file.read_bytes()


def _artifact_header(name: str) -> Callable[[Random], bytes]:
    """An artifact whose header was changed, with a length that fits."""

    def make(random: Random) -> bytes:
        raw = _artifact(name)
        length = int.from_bytes(raw[:8], "little")
        header = change(raw[8 : 8 + length].rstrip(), random, WORDS)
        return len(header).to_bytes(8, "little") + header + raw[8 + length :]

    return make


@cache
def _small_plan() -> Plan:
    """A merge of two small models, which stay until Python ends."""
    folder = TemporaryDirectory()
    _KEPT.append(folder)
    for model in ("a", "b"):
        Path(folder.name, f"{model}.safetensors").write_bytes(_good("header"))
    models = [{"model": str(Path(folder.name, f"{model}.safetensors"))} for model in ("a", "b")]
    return make_plan(Recipe.parse({"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}))


_KEPT: list[TemporaryDirectory[str]] = []


def _journal(plan: Plan, lock: dict[str, Any]) -> bytes:
    """The journal of a run that had written everything."""
    states = ({**asdict(state), "path": str(state.path)} for state in plan.inputs)
    tensors = lock["tensors"].items()
    receipts = (Receipt(name, 0, entry["xxh3"][0], (), tuple(entry.get("inputs", ()))) for name, entry in tensors)
    lines = [json.dumps(line) + "\n" for line in ({"plan": plan.digest}, *states)]
    return "".join([*lines, *(receipt.as_line() for receipt in receipts)]).encode()


def _resume(path: Path) -> None:
    """Go on with the work that a journal speaks of: whatever it says, the output is the same."""
    plan = _small_plan()
    with TemporaryDirectory() as folder:
        fresh, out = Path(folder) / "fresh" / "out", Path(folder) / "out"
        execute(plan, fresh, threads=1)
        partial_of(out).mkdir()
        for shard in plan.shards:
            data = (fresh / shard.name).read_bytes()
            (partial_of(out) / shard.name).write_bytes(UNFINISHED + data[8:])
        (partial_of(out) / JOURNAL).write_bytes(path.read_bytes())
        execute(plan, out, threads=1)
        assert files_of(out) == files_of(fresh)


def _read_all(path: Path) -> None:
    """Read a checkpoint as a merge does. Tensors that repeat few bytes without end are opened only."""
    opened = open_checkpoint(path)
    for name, spec in opened.items():
        if spec.nbytes < 1 << 20:
            assert opened.read(name).numel() == spec.numel


def _read_header(path: Path) -> None:
    """Read a file that the official reader then has to accept, too."""
    _read_all(path)
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    official = {name: entry["shape"] for name, entry in entries}
    assert official == {name: list(spec.shape) for name, spec in open_checkpoint(path).items()}


def _read_index(path: Path) -> None:
    (path.parent / "a.safetensors").write_bytes(_good("header"))
    sidecars_of(open_checkpoint(path.parent))


@dataclass(frozen=True)
class Kind:
    """A class of inputs: the name of the file, a maker, and a reader."""

    file: str
    make: Callable[[Random], bytes]
    read: Callable[[Path], object]


def _changed(name: str, words: list[bytes]) -> Callable[[Random], bytes]:
    return lambda random: change(_good(name), random, words)


KINDS = {
    "header": Kind("x.safetensors", _header, _read_header),
    "index": Kind("model.safetensors.index.json", _changed("index", WORDS), _read_index),
    "config": Kind("config.json", _changed("config", WORDS), lambda path: read_config(path.parent)),
    "archive": Kind("x.bin", _changed("archive", CODES), _read_all),
    "legacy": Kind("x.bin", _changed("legacy", CODES), _read_all),
    "pickle": Kind("x.bin", _pickle, _read_all),
    "recipe": Kind("x.yaml", _changed("recipe", WORDS), Recipe.load),
    "facts": Kind("x.yaml", _changed("facts", WORDS), read_facts_file),
    "facts in JSON": Kind("x.json", _changed("facts in JSON", WORDS), read_facts_file),
    "patch": Kind("x.safetensors", _artifact_header("patch"), open_patch),
    "transform": Kind("x.safetensors", _artifact_header("transform"), open_transform),
    "statistics": Kind("x.safetensors", _artifact_header("statistics"), open_statistics),
    "lock": Kind(LOCK, lambda random: change(_artifact("lock"), random, WORDS), lambda path: verify(path.parent)),
    "journal": Kind(JOURNAL, lambda random: change(_artifact("journal"), random, WORDS), _resume),
}


def outcome_of(name: str, seed: int, folder: Path) -> str:
    """Read an input in an empty folder: "right" or the name of our error; any other error passes, with the seed."""
    kind, result = KINDS[name], "right"
    path = folder / kind.file
    path.write_bytes(kind.make(Random(f"{name} {seed}")))
    started = time.monotonic()
    try:
        kind.read(path)
    except (FormatError, PlanError) as error:
        result = type(error).__name__
    except BaseException as error:
        error.add_note(f"the input {name} {seed}")
        raise
    if (taken := time.monotonic() - started) > SECONDS:
        raise TimeoutError(f"the input {name} {seed} took {taken:.1f} seconds")
    return result


def count_outcomes(count: int, folder: Path, first: int = 0) -> Counter[tuple[str, str]]:
    """Read `count` inputs of all classes in turn: how many there were of each class and outcome.

    folder: an empty one, in which each input gets a folder. Raises AssertionError for a file that a reader left.
    """
    outcomes: Counter[tuple[str, str]] = Counter()
    inner = folder / "inner"
    inner.mkdir()
    for number in range(first, first + count):
        name = list(KINDS)[number % len(KINDS)]
        outcomes[name, outcome_of(name, number, inner)] += 1
        names = {path.name for path in inner.iterdir()}
        assert names <= {KINDS[name].file, "a.safetensors"} and [*folder.iterdir()] == [inner], (name, number)
        for path in inner.iterdir():
            path.unlink()
    return outcomes
