"""A file that is read and verified by the page: small ones, since of each tensor a rank wants a few rows of the index.

The hashes of the pages lie behind them, in pieces of so many hashes, and the manifest has those of the pieces: what a
reader must know before it reads a page does not grow with the file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import final

import xxhash

PAGE_BYTES = 2**12
HASHES_AT_ONCE = 2**12
"""How many pages there are to a piece of their hashes."""
HASH_BYTES = 16
_KEPT_BYTES = 2**22  # of the pages that were used last
_PIECES = 4  # of those read at once that are kept, since a load goes through three sections side by side


def hashes_of_pages(data: bytes) -> list[bytes]:
    """What lies behind ``data``: the hashes of its pages, in pieces."""
    view, size = memoryview(data), HASHES_AT_ONCE * HASH_BYTES
    pages = (view[start : start + PAGE_BYTES] for start in range(0, len(data), PAGE_BYTES))
    hashes = b"".join(map(xxhash.xxh3_128_digest, pages))
    return [hashes[start : start + size] for start in range(0, len(hashes), size)]


@final
class Pages:
    """A file that is read by pages, each verified before it is used; the last ones are kept.

    Args:
        read: Returns so many bytes from an offset.
        check: Is given the number of a page and its bytes; raises where they are not what was saved.
        size: Bytes of all pages.
        at_once: Pages that are asked for at once. Those that nobody uses are not verified.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        check: Callable[[int, bytes], None],
        size: int,
        *,
        at_once: int = 1,
    ) -> None:
        self._read, self._check, self._size, self._at_once = read, check, size, at_once
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=_PIECES)
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        with self._lock:
            parts = self._verified(first, last)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * PAGE_BYTES
        return whole[start : start + length]

    def _verified(self, first: int, last: int) -> list[bytes]:
        """The pages from ``first`` to ``last``."""
        found = [self._kept.pop(number, b"") for number in range(first, last + 1)]
        missing = [place for place, page in enumerate(found) if not page]
        if missing:
            start, data = self._fetched(first + missing[0], first + missing[-1])
            for place in missing:
                begin = (first + place - start) * PAGE_BYTES
                found[place] = data[begin : begin + PAGE_BYTES]
                self._check(first + place, found[place])
        self._kept.update(enumerate(found, first))  # the last that were used come last
        while len(self._kept) * PAGE_BYTES > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _fetched(self, first: int, last: int) -> tuple[int, bytes]:
        """At least the pages from ``first`` to ``last``, not verified, and which page the bytes begin with."""
        for start, data in self._pieces:
            if start <= first and (last - start) * PAGE_BYTES < len(data):
                return start, data
        count = self._at_once
        start, stop = first // count * count, (last // count + 1) * count
        offset = start * PAGE_BYTES
        data = self._read(offset, min(stop * PAGE_BYTES, self._size) - offset)
        if count > 1 and stop - start <= 2 * count:  # else there is nothing beside what was asked for
            self._pieces.append((start, data))
        return start, data
