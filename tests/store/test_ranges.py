"""Files elsewhere are read by ranges: right, ahead of the reader, and in bounded memory."""

from __future__ import annotations

import pickle
import random
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.store import ranges
from mergekit_lfm.store.ranges import RangeReader
from mergekit_lfm.store.snapshot import Snapshot

FILES = {f"{i}.bin": random.Random(i).randbytes(n) for i, n in enumerate((100, 0, 4_000, 6_400, 20_011))}
LOCK = Lock()


class Memory(Snapshot):
    """Files in memory. fails: the numbers of requests that do. asked: the ranges."""

    def __init__(self, fails: Collection[int] = ()) -> None:
        self.folder, self.commit, self.repo, self.listed = Path("nowhere"), "1", None, True
        self.sizes = {name: len(data) for name, data in FILES.items()}
        self.fails, self.asked = fails, list[tuple[str, int, int]]()

    @property
    def cache(self) -> tuple[str, Path, str]:
        raise AssertionError("nothing is downloaded")

    def fetch(self, names: Collection[str], progress: Progress = SILENCE) -> None:  # noqa: ARG002
        raise AssertionError("nothing is downloaded")

    def read_start(self, name: str, nbytes: int) -> bytes:
        return FILES[name][:nbytes]

    def read_range(self, name: str, start: int, stop: int) -> memoryview:
        with LOCK:
            self.asked.append((name, start, stop))
            if len(self.asked) in self.fails:
                raise ConnectionError("cut")
        return memoryview(FILES[name])[start:stop]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "LARGEST", 512)
    monkeypatch.setattr(ranges, "SMALLEST", 128)


def read(reader: RangeReader, name: str, start: int, stop: int) -> bytes:
    into = bytearray(stop - start)
    reader.read_into(name, start, memoryview(into))
    return bytes(into)


def test_any_range_has_the_bytes_of_the_file() -> None:
    reader, draw = RangeReader(Memory(), FILES, 16 * 512, readers=4), random.Random(1)

    def look(_: int) -> bool:
        name = draw.choice(list(FILES))
        start, stop = sorted(draw.randrange(len(FILES[name]) + 1) for _ in range(2))
        return read(reader, name, start, stop) == FILES[name][start:stop]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(500)))
    assert len(reader._chunks) <= 16
    assert reader.resident == 16 * 512
    assert all(read(reader, name, 0, len(data)) == data for name, data in FILES.items())


def test_a_file_that_is_read_on_is_requested_ahead_each_chunk_once() -> None:
    memory = Memory()
    reader = RangeReader(memory, FILES, 32 * 512)
    parts = [(start, min(start + 100, 20_011)) for start in range(0, 20_011, 100)]
    assert b"".join(read(reader, "4.bin", *part) for part in parts) == FILES["4.bin"]
    assert sorted(memory.asked) == [("4.bin", start, min(start + 512, 20_011)) for start in range(0, 20_011, 512)]


@pytest.mark.parametrize("most", [0, 4_000, 30_000])
def test_many_readers_ask_for_little_twice(most: int) -> None:
    """Each reads its own part on, in pieces smaller than a chunk, by turns."""
    memory = Memory()
    reader = RangeReader(memory, FILES, most, readers=8)
    starts = range(0, 20_000, 2_500)
    for step in range(0, 2_500, 50):
        for start in starts:
            assert read(reader, "4.bin", start + step, start + step + 50) == FILES["4.bin"][start + step :][:50]
    assert len(memory.asked) <= 1.5 * len({*memory.asked})  # twice where one reader's part ends and another's begins
    assert reader.resident <= max(most, 26 * reader.chunk)


def test_a_reader_runs_on_into_the_next_file() -> None:
    memory = Memory()
    reader = RangeReader(memory, FILES, 32 * 512)
    read(reader, "2.bin", 0, 4_000)
    assert ("3.bin", 0, 512) in memory.asked


def test_a_jump_asks_for_little() -> None:
    memory = Memory()
    reader = RangeReader(memory, FILES, 32 * 512)
    for start in (19_000, 3_000, 11_000):
        read(reader, "4.bin", start, start + 10)
    assert len(memory.asked) == 3


def test_a_failure_is_told_and_forgotten() -> None:
    reader = RangeReader(Memory(fails=[1]), FILES, 0)
    with pytest.raises(ConnectionError, match="cut"):
        read(reader, "3.bin", 0, 6_400)
    assert read(reader, "3.bin", 0, 6_400) == FILES["3.bin"]


def test_a_closed_reader_asks_for_nothing_more() -> None:
    memory = Memory()
    reader = RangeReader(memory, FILES, 32 * 512)
    read(reader, "4.bin", 0, 2_000)
    reader.close()
    asked = len(memory.asked)
    assert not reader._chunks
    assert read(reader, "3.bin", 0, 10) == FILES["3.bin"][:10] and len(memory.asked) == asked + 1


def test_a_copy_begins_anew() -> None:
    reader = RangeReader(Memory(), FILES, 0)
    read(reader, "3.bin", 0, 600)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._chunks
    assert read(copy, "3.bin", 600, 1_700) == FILES["3.bin"][600:1_700]
