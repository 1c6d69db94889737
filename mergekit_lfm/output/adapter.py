"""Write an adapter as PEFT does: a folder with its factors, its config and a model card; complete, or not there.

The change of a module's weight, as [out, in], is b @ a: all factors are written at the scale 1. They go to the disk as
they come, in any order and from any thread, and are put in order at the end.
Source: peft 0.21, utils/save_and_load.py; tuners/lora/layer.py, ParamWrapper.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedRandom
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import xxhash
import yaml

from mergekit_lfm.arch.experts import ORDER
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.output.adapter_config import HEADS, find_task, in_order, make_config, modules_of
from mergekit_lfm.output.card import CARD, LONGEST, as_markdown, bound, code_block
from mergekit_lfm.output.lock import ADAPTER_LOCK
from mergekit_lfm.output.request import Request
from mergekit_lfm.output.save import make_folder
from mergekit_lfm.store.durable import replace_file, sync_folder
from mergekit_lfm.store.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header, read_exactly
from mergekit_lfm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
WRAPPER = ".base_layer"
SPOOL = "factors.unfinished"  # the tensors in the order in which they came
METADATA = {"format": "pt"}
WORDS = {  # of a card, for a kind
    "LORA": "An adapter (LoRA)",
    "PROMPT_TUNING": "A prompt of virtual tokens",
    "P_TUNING": "A prompt of virtual tokens",
    "PREFIX_TUNING": "A prompt of keys and values",
}
COPIED_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True)
class AdapterOutput:
    """The facts in the files of an adapter besides its tensors.

    names: those of all tensors of the model, as it has them when it runs; not complete if they are unknown but for the
    changed ones, so that modules are selected by whole names. base: the model's name or path, for the config.
    architecture: its class in transformers; labels: their number if it is a classifier. task: PEFT's name of its task,
    if that is not to follow from the class. fan_in_fan_out: True if the wrapped layers are Conv1D. tied: an embedding
    and the head that has its weight; changes of the one are then changes of the other. repo: the model on the Hub,
    license: its entries in a card, about: Markdown, all three for the card. kind: PEFT's name of its kind.
    """

    names: Collection[str]
    complete: bool = True
    base: str | None = None
    architecture: str | None = None
    task: str | None = None
    labels: int | None = None
    fan_in_fan_out: bool = False
    tied: tuple[str, str] | None = None
    repo: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    kind: str = "LORA"


class NewAdapter:
    """An adapter that is being written, by the names that modules and tensors have in the running model.

    spool: the file that takes the tensors; None for a stand-in, whose tensors have no data.
    """

    def __init__(self, output: AdapterOutput, spool: BufferedRandom | None) -> None:
        self._output, self._spool, self._lock = output, spool, Lock()
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        self._digests: dict[str, str] = {}
        self._ranks: dict[str, int] = {}
        self._parameters: dict[str, int] = {}
        self._saved: set[str] = set()
        self._is_tied = False
        self.about = output.about
        self.result: Mapping[str, Any] = {}  # for the lock

    def add(self, module: str, a: Tensor, b: Tensor, *, embedding: bool = False) -> None:
        """Change a module's weight by b @ a: a [rank, in], b [out, rank]; an embedding's in is its rows.

        The factors of a convolution have four axes: [rank, in, height, width] and [out, rank, 1, 1].
        """
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        assert a.shape[0] == b.shape[1] > 0
        self._ranks[module] = a.shape[0]
        for end, x in zip(ends, (a, b), strict=True):
            self._write(f"{module}.{end}", x)
        if self._head_of(module):
            self._is_tied = True
            self.add(self._head_of(module), b.T, a.T)

    def add_experts(self, name: str, a: Tensor, b: Tensor) -> None:
        """Change a tensor of all experts: by b[e] @ a[e], with a [experts, rank, in] and b [experts, out, rank]."""
        self._parameters[name] = a.shape[1]
        self._write(f"{name} lora_A.weight", a.flatten(0, 1))
        self._write(f"{name} lora_B.weight", b.permute(1, 2, 0).flatten(1))  # rank by rank, and in it the experts

    def save(self, name: str, x: Tensor) -> None:
        """Put a tensor in place of the model's: a bias, or one of a module whose tensors all are saved."""
        self._saved.add(name)
        self._write(name, x)
        if self._head_of(name.removesuffix(".weight")):
            self._is_tied = True
            self.save(f"{self._head_of(name.removesuffix('.weight'))}.weight", x)

    def _head_of(self, module: str) -> str:
        """The head that is tied to an embedding, "" for any other module. PEFT has tensors of both."""
        tied = self._output.tied
        return tied[1] if tied and tied[0] == module else ""

    def _write(self, name: str, x: Tensor) -> None:
        spec = TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
        assert name not in self._places
        if self._spool is None:
            self._places[name] = spec, 0
            return
        data = bytes_of(x.detach().cpu().contiguous())
        digest = xxhash.xxh3_128_hexdigest(data)
        with self._lock:
            self._places[name], self._digests[name] = (spec, self._spool.tell()), digest
            self._spool.write(data)

    def finish(self, folder: Path, title: str, request: Request) -> None:
        """Write the files into a folder, the lock last. title: of the model card."""
        files, specs = self._documents(title), self._specs()
        header, _ = encode_header(specs.values(), METADATA)
        replace_file(folder / ADAPTER_WEIGHTS[0], self._content(header, specs))
        tensors = [(spec, ADAPTER_WEIGHTS[0], self._digests[own]) for own, spec in specs.items()]
        files |= {ADAPTER_LOCK: request.lock(files, {ADAPTER_WEIGHTS[0]: header}, tensors, self.result)}
        for name, data in files.items():
            replace_file(folder / name, data)
        sync_folder(folder)

    def stand_in(self, folder: Path) -> None:
        """Write the files into a folder, without data, which take no space on the disk, and without a lock."""
        folder.mkdir()
        for name, data in self._documents(folder.name).items():
            (folder / name).write_bytes(data)
        specs = [*self._specs().values()]
        write_empty(folder / ADAPTER_WEIGHTS[0], encode_header(specs, METADATA)[0], specs)

    def _documents(self, title: str) -> dict[str, bytes]:
        """The config and the model card."""
        output = self._output
        modules = self._saved_modules()
        config = make_config(
            ranks=self._ranks,
            parameters=self._parameters,
            saved=modules,
            bias=any(modules.isdisjoint(_parents(name)) for name in self._saved),
            names=self._names,
            complete=output.complete,
            task=output.task or find_task(output.architecture, modules, modules_of(self._names)),
            base=output.base,
            fan_in_fan_out=output.fan_in_fan_out,
            tied=self._is_tied,
        )
        card = adapter_card(title, replace(output, about=self.about))
        return {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(), CARD: card.encode()}

    @property
    def _names(self) -> set[str]:
        """The names of all tensors of the model, those of a tied head among them."""
        tied = self._output.tied
        return {*self._output.names, *([f"{tied[1]}.weight"] if tied else [])}

    def _saved_modules(self) -> set[str]:
        """The modules whose tensors all are saved: those of a head together, others by themselves.

        A bias whose weight is not saved needs none. Raises PlanError for any other tensor without one.
        """
        held = Counter(module for name in self._names for module in _parents(name))
        found = Counter(module for name in self._saved for module in _parents(name))
        modules, problems = set[str](), list[str]()
        for name in sorted(self._saved):
            module = name.rpartition(".")[0]
            heads = [parent for parent in _parents(name) if parent.rpartition(".")[2] in HEADS]
            whole = next((each for each in (*heads, module) if each and found[each] == held[each]), None)
            if whole is not None:
                modules.add(whole)
            elif not name.endswith(".bias") or f"{module}.weight" in self._saved:
                problems.append(f"{name} without the other tensors of {module or 'the model'}")
        if problems:
            raise PlanError(several("PEFT saves whole modules, and none can be saved of", problems) + "; exclude it")
        return modules

    def _specs(self) -> dict[str, TensorSpec]:
        """The tensors with PEFT's names, in the order of these, by our names."""
        specs = {own: replace(spec, name=PREFIX + self._name(own)) for own, (spec, _) in self._places.items()}
        return dict(sorted(specs.items(), key=lambda item: in_order(item[1].name)))

    def _content(self, header: bytes, specs: Mapping[str, TensorSpec]) -> Iterator[bytes | memoryview]:
        yield header
        assert self._spool is not None
        self._spool.flush()
        buffer = memoryview(bytearray(COPIED_AT_ONCE))
        for own, spec in specs.items():
            for start in range(0, spec.nbytes, COPIED_AT_ONCE):
                part = buffer[: spec.nbytes - start]
                read_exactly(self._spool.fileno(), self._places[own][1] + start, part, Path(self._spool.name))
                yield part

    def _name(self, own: str) -> str:
        """PEFT's name of a tensor. It wraps a module once for each of its parameters, the first of them innermost."""
        name, _, factor = own.partition(" ")
        module, _, leaf = name.rpartition(".")
        if factor:
            others = [each.rpartition(".") for each in self._parameters]
            depth = sum(home == module and ORDER.index(other) > ORDER.index(leaf) for home, _, other in others)
            return f"{module}{WRAPPER * depth}.{factor}"
        return f"{module}{WRAPPER}.{leaf}" if own in self._saved and module in self._ranks else own


def _parents(name: str) -> list[str]:
    """The modules that a tensor is in, from the model's own down."""
    return [name[:i] for i, char in enumerate(name) if char == "."]


@contextmanager
def new_adapter(out: Path, output: AdapterOutput, request: Request) -> Iterator[NewAdapter]:
    """An adapter to fill, which becomes the folder `out` if nothing fails.

    Replaces OUT: call `request.is_answered` first.
    """
    _ = request.digest  # of the inputs as they are before the work
    with make_folder(out) as partial:
        with (partial / SPOOL).open("w+b") as spool:
            adapter = NewAdapter(output, spool)
            yield adapter
            adapter.finish(partial, out.resolve().name, request)
        (partial / SPOOL).unlink()


def adapter_card(title: str, output: AdapterOutput) -> str:
    """The text of its model card."""
    front: dict[str, Any] = dict(output.license)
    front |= {"base_model": output.repo, "base_model_relation": "adapter"} if output.repo else {}
    front |= {"library_name": "peft", "tags": [output.kind.lower(), "mergekit_lfm"]}
    named = output.architecture
    kind = named if named and named.isidentifier() else "AutoModel"
    base = bound(output.repo or Path(output.base or "MODEL").name, LONGEST)  # no path of the machine that made it
    labels = "" if output.labels is None else f", num_labels={output.labels}"
    code = (
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f"model = {kind}.from_pretrained({base!r}{labels})\n"
        f"model = PeftModel.from_pretrained(model, {bound(title, LONGEST)!r})\n"
    )
    shown = as_markdown(base)
    link = f"[{shown}](https://huggingface.co/{output.repo})" if output.repo else shown
    named_kind = WORDS.get(output.kind, f"An adapter ({output.kind})")
    about = f"{output.about.strip()}\n\n" if output.about else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {as_markdown(title)}\n\n"
        f"{named_kind} for {link}, made with mergekit_lfm {__version__}.\n\n{about}"
        f"## To load it\n\n{code_block(code, 'python')}\n"
    )


def write_empty(weights: Path, header: bytes, specs: Collection[TensorSpec]) -> None:
    """Write a file of tensors without data, which takes no space on the disk."""
    weights.write_bytes(header)
    os.truncate(weights, len(header) + sum(spec.nbytes for spec in specs))
