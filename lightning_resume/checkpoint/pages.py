"""A file that is read and verified by the page."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from lightning_resume.checkpoint.index_form import PAGE_BYTES

_PAGES = 64  # of the last that were used are kept
_PIECES = 4  # of those read at once, since a load goes through three sections side by side


class Pages:
    """A file that is read by pages, each verified before it is used; the last ones are kept.

    Args:
        read: Returns so many bytes from an offset.
        check: Is given the number of a page and its bytes; raises where they are not what was saved.
        size: Bytes of the file.
        at_once: Pages that are asked for at once. Those that nobody uses are not verified.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], check: Callable[[int, bytes], None], size: int, *, at_once: int = 1
    ) -> None:
        self._read, self._check, self._size, self._at_once = read, check, size, at_once
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        with self._lock:
            parts = [self._page(number) for number in range(first, last + 1)]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * PAGE_BYTES
        return whole[start : start + length]

    def _page(self, number: int) -> bytes:
        if number not in self._kept:
            page = self._read_page(number)
            self._check(number, page)
            self._kept[number] = page
            if len(self._kept) > _PAGES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return self._kept[number]

    def _read_page(self, number: int) -> bytes:
        piece, place = divmod(number, self._at_once)
        if piece not in self._ahead:
            start, length = piece * self._at_once * PAGE_BYTES, self._at_once * PAGE_BYTES
            self._ahead[piece] = self._read(start, min(length, self._size - start))
            if len(self._ahead) > _PIECES:
                self._ahead.popitem(last=False)
        return self._ahead[piece][place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
