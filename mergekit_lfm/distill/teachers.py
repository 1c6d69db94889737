"""Teachers: their answers about examples, given in each step, or before the training and kept in files.

An example goes through a teacher alone, without padding, so that the answer does not depend on others: both ways give
the same bytes. A file of a teacher holds its answers about a part of the examples, by their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor, nn

from mergekit_lfm.artifacts.header import Kind, save_tensors
from mergekit_lfm.distill.course import Wanted
from mergekit_lfm.distill.watch import PLACES, SCORES, Part, Seen, join_parts, watch
from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.machine.resources import free_space
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import read_header
from mergekit_lfm.train.examples import Batch, Examples

ANSWERS = Kind("answers of a teacher", "mergekit-lfm distill", "remove it, and it is made again")
FILE = "answers-{}.safetensors"  # by a digest of the numbers, so that runs side by side write files of their own
PATTERN = "answers-*.safetensors"
LARGEST = 64_000_000  # bytes of a file, about
OPEN = 32  # files at a time
FIRST = 8  # examples by which the size of all is estimated
IDS = "ids"
NUMBER = "example_ids"  # the name in a batch of the examples' numbers


class Teacher(Protocol):
    """Says something about the examples of a batch, on its device."""

    def about(self, batch: Batch) -> Seen: ...


@dataclass(frozen=True)
class Reading:
    """How a teacher is asked. top_k: so many of its scores at `temperature` are read, and the share of the rest.

    width: the first scores alone are read, those that the student has, too; None for all.
    """

    task: str
    wanted: Wanted
    top_k: int | None = None
    temperature: float = 1.0
    width: int | None = None

    @torch.no_grad()
    def ask(self, model: nn.Module, row: Batch) -> dict[str, Part]:
        """The answer of a model about one example, a batch of one."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            _, seen = watch(model, self.task, row, self.wanted)
        if SCORES in seen:
            counts = seen[SCORES].counts
            seen[SCORES] = Part(seen[SCORES].values[:, : self.width], counts)
        if self.top_k is not None and SCORES in seen:
            values, ids = largest(seen[SCORES].values, self.top_k, self.temperature)
            seen |= {SCORES: Part(values, counts), IDS: Part(ids, counts)}
        return seen


def largest(scores: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """ln p of the `count` most likely classes, most likely first, and of the rest together; and which classes they are.

    scores: [rows, classes], p their softmax at the temperature. At most all classes but one are apart, so that there is
    a rest. Returns [rows, count + 1] and [rows, count].
    """
    logs = (scores / temperature).log_softmax(-1)
    top = logs.topk(min(count, scores.shape[-1] - 1), -1)
    return torch.cat([top.values, share_of_rest(logs, top.indices)], -1), top.indices


def share_of_rest(logs: Tensor, ids: Tensor) -> Tensor:
    """ln of the sum of all p but those of some classes, [rows, 1]. logs: ln p [rows, classes]; ids: [rows, count]."""
    return logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Live:
    """A teacher in memory. examples: as it reads them itself; None where each batch has them made anew, as by masks."""

    model: nn.Module
    reading: Reading
    examples: Examples | None = None

    def about(self, batch: Batch) -> Seen:
        rows = rows_of(batch) if self.examples is None else own_rows(self.examples, batch[NUMBER])
        asked = [self.reading.ask(self.model, row) for row in rows]
        return {name: join_parts([each[name] for each in asked]) for name in asked[0]}


def own_rows(examples: Examples, numbers: Tensor) -> Iterator[Batch]:
    """The examples of these numbers, each as a batch of one on their device."""
    for number in numbers.tolist():
        yield {name: x.to(numbers.device) for name, x in examples.batch([number]).items()}


def rows_of(batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Each example of a batch without its padding, as a batch of one."""
    lengths = {name.removesuffix("attention_mask"): x.sum(1) for name, x in batch.items() if name.endswith("_mask")}
    longest = "decoder_" if "decoder_" in lengths else ""  # what the labels of a language model stand beside
    for row in range(len(next(iter(batch.values())))):
        cut = dict[str, Tensor]()
        for name, x in batch.items():
            start = name.removesuffix("attention_mask").removesuffix("input_ids")
            start = longest if name in ("labels", PLACES) and x.ndim == 2 else start
            part = x[row : row + 1]
            cut[name] = part[:, : int(lengths[start][row])] if start in lengths and x.ndim == 2 else part
        yield cut


@dataclass
class Kept:
    """The answers of a teacher about examples, in the files of a folder.

    key: of the teacher, the examples, and how it is asked; files of another key are not read.
    """

    folder: Path
    key: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def about(self, batch: Batch) -> Seen:
        numbers = batch[NUMBER].tolist()
        found = [self._read(number) for number in numbers]
        return {name: join_parts([each[name] for each in found]) for name in found[0]}

    def _read(self, number: int) -> dict[str, Part]:
        if number not in self._files:
            raise FormatError(f"{self.folder} has nothing about example {number} any more; run the same command again")
        tensors = self._open(self._files[number]).read(number)
        return {name: Part(x.to(self.device), (len(x),)) for name, x in tensors.items()}

    @cached_property
    def _files(self) -> dict[int, Path]:
        """The file of each example."""
        return {number: path for path, numbers in self._read_headers() for number in numbers}

    @cached_property
    def _open(self) -> Callable[[Path], Answers]:
        """Opens a file, and keeps some open."""
        return lru_cache(OPEN)(Answers)

    def _remove_damaged(self) -> None:
        """Remove files of this key whose content is not as it was written, so that it is made again."""
        for path, _ in [*self._read_headers()]:
            if not Answers(path).is_whole:
                path.unlink()

    def _read_headers(self) -> Iterator[tuple[Path, list[int]]]:
        """The files of this key, each with the numbers of its examples."""
        for path in sorted(self.folder.glob(PATTERN)):
            try:
                metadata = read_header(path).metadata
                facts = ANSWERS.decode(metadata, ("key", "numbers"), dict, path)
            except (FormatError, OSError):
                continue
            if facts["key"] == self.key:
                yield path, facts["numbers"]

    def fill(self, model: nn.Module, reading: Reading, examples: Examples, numbers: Sequence[int], tell: Count) -> None:
        """Ask a teacher about the examples of these numbers that no file has; a file is whole, or not there.

        Raises PlanError if the disk has no room for all.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                f"{self.folder} cannot be made ({reason(error)}); choose another folder for cache"
            ) from None
        self._remove_damaged()
        there = {number for _, some in self._read_headers() for number in some}
        left, count = [number for number in numbers if number not in there], len(numbers)
        tensors, size, whole, written, held = dict[str, Tensor](), 0, 0, 0, list[int]()
        for done, number in enumerate(left, 1):
            row = {name: x.to(self.device) for name, x in examples.batch([number]).items()}
            said = {f"{number}/{name}": part.values.cpu() for name, part in reading.ask(model, row).items()}
            tensors |= said
            held.append(number)
            own = sum(x.nbytes for x in said.values())
            size, whole = size + own, whole + own
            if done == min(FIRST, len(left)):
                self._check_room(whole * len(left) // done - written)
            if size >= LARGEST or done == len(left):
                self._save(tensors, held)
                tensors, size, written, held = {}, 0, written + size, []
            tell(count - len(left) + done, count)
        self.__dict__.pop("_files", None)

    def _check_room(self, wanted: int) -> None:
        free = free_space(self.folder)
        if wanted > free:
            raise PlanError(
                f"what the teacher says takes {format_size(wanted)}, and {self.folder} has {format_size(free)} free; "
                "set top_k, keep it elsewhere by cache, or set cache to false to ask the teacher in each step"
            )

    def _save(self, tensors: Mapping[str, Tensor], numbers: list[int]) -> None:
        place = self.folder / FILE.format(xxhash.xxh3_64_hexdigest(repr(numbers).encode()))
        specs = [spec_of(name, x) for name, x in tensors.items()]
        metadata = ANSWERS.encode({"key": self.key, "numbers": numbers, "digest": digest_of(tensors)})
        save_tensors(place, specs, tensors.__getitem__, metadata)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 of the bytes of tensors, in the order of their names."""
    whole = xxhash.xxh3_128()
    for _, x in sorted(tensors.items()):
        whole.update(bytes_of(x.contiguous()))
    return whole.hexdigest()


class Answers:
    """A file of answers, which is opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _stored(self) -> Checkpoint:
        return open_checkpoint(self.path)

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names = dict[int, list[str]]()
        for name in self._stored:
            names.setdefault(int(name.partition("/")[0]), []).append(name)
        return names

    @property
    def is_whole(self) -> bool:
        """Whether the content is as it was written."""
        try:
            facts = ANSWERS.decode(read_header(self.path).metadata, ("digest",), dict, self.path)
            return bool(facts["digest"] == digest_of({name: self._stored.read(name) for name in self._stored}))
        except (FormatError, OSError):
            return False

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of an example."""
        stored = self._stored
        return {name.partition("/")[2]: stored.read(name).view(stored[name].shape) for name in self._names[number]}
