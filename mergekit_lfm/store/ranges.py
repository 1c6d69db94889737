"""Files that are elsewhere, read by ranges without a copy here: in chunks, several at a time, ahead of the reader.

A request takes long to begin and then little more for a thousand tensors than for one. So neighbouring ranges come
together, in chunks that all readers share and that are kept for a while; where a file is read on, the next chunks are
requested before they are needed. The chunks here are never more than a number that the memory allows.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from threading import Lock
from typing import Any

from mergekit_lfm.store.snapshot import Snapshot

LARGEST, SMALLEST = 8 << 20, 1 << 20  # bytes of a request
MOST = 32  # chunks that are kept, if readers do not need more
AT_ONCE = 16  # requests


class RangeReader:
    """Reads files of a snapshot by ranges. most: bytes of chunks to keep. readers: how many read at a time, as threads.

    Each reader has its own part of the files, and needs chunks of its own: so it keeps some for each in any case, but
    smaller ones where `most` is little. A pickled copy begins without chunks. Safe for several threads.
    """

    def __init__(self, snapshot: Snapshot, names: Iterable[str], most: int, readers: int = 1) -> None:
        self.snapshot, self.names, self.readers = snapshot, sorted(names), readers
        self.chunk = min(LARGEST, max(SMALLEST, most // (4 * readers)))
        self.kept = max(3 * readers + 2, min(MOST, most // self.chunk))
        self.ahead = min(self.kept // 4, self.kept // readers - 2)  # chunks, of each reader
        counts = [-(-snapshot.sizes[name] // self.chunk) for name in self.names]
        self._first = [0, *accumulate(counts)]  # the number of each file's first chunk, and of all
        self._begin()

    def _begin(self) -> None:
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._chunks = OrderedDict[int, Future[memoryview]]()  # by number, those used last at the end
        self._runs = dict[int, int]()  # by number, of those here: how many were read before it, one after another

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_pool", "_chunks", "_runs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def resident(self) -> int:
        """Bytes of the chunks that it keeps at most."""
        return min(self.kept, self._first[-1]) * self.chunk

    def close(self) -> None:
        """Ask for nothing more, and drop the chunks, once the requests on their way have ended."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._chunks.clear()
            self._runs.clear()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def read_into(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from the file at `offset`. Raises as `Snapshot.read_range` does."""
        first = self._first[self.names.index(name)]
        last, done = first + (offset + len(into) - 1) // self.chunk, 0
        while done < len(into):
            chunk, at = divmod(offset + done, self.chunk)
            data = self._chunk(first + chunk, last)[at : at + len(into) - done]
            into[done : done + len(data)] = data
            done += len(data)

    def _chunk(self, number: int, last: int) -> memoryview:
        """A chunk. last: the last one that this reader needs."""
        with self._lock:
            chunk = self._request(number)
            run = self._runs[number] = max(self._runs.get(number, 0), self._runs.get(number - 1, -1) + 1)
            ahead = min(self.ahead, max(last - number, 2**run if run else 0))
            for following in range(number + 1, min(number + ahead + 1, self._first[-1])):
                self._request(following)
        try:
            return chunk.result()
        except BaseException:
            with self._lock:  # the next reader asks again
                if self._chunks.get(number) is chunk:
                    self._drop(number)
            raise

    def _request(self, number: int) -> Future[memoryview]:
        """A chunk that is here, or comes."""
        if number in self._chunks:
            self._chunks.move_to_end(number)
            return self._chunks[number]
        self._make_room()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ranges")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        file = bisect_right(self._first, number) - 1
        name, start = self.names[file], (number - self._first[file]) * self.chunk
        stop = min(start + self.chunk, self.snapshot.sizes[name])
        self._chunks[number] = self._pool.submit(self.snapshot.read_range, name, start, stop)
        return self._chunks[number]

    def _make_room(self) -> None:
        """Drop the chunks used longest ago until one more may come; those that are still to come stay."""
        while len(self._chunks) >= self.kept:
            oldest = next((number for number, chunk in self._chunks.items() if chunk.done()), None)
            if oldest is None:
                return
            self._drop(oldest)

    def _drop(self, number: int) -> None:
        del self._chunks[number]
        self._runs.pop(number, None)
