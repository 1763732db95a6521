"""Parts of stored shards on their way into tensors: cut into pieces, and fetched by several threads or ranks."""

from __future__ import annotations

import collections
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

import torch
import xxhash

from lightning_resume._distributed import Carrier, local_world_size
from lightning_resume.checkpoint.archive import memory_of
from lightning_resume.checkpoint.index_form import Box, Placed
from lightning_resume.checkpoint.items import ItemSource


@final
class Read:
    """One part of one stored shard on its way into ``target``."""

    def __init__(
        self,
        source: ItemSource,
        file: str,
        placed: Placed,
        part: Box,
        target: torch.Tensor,
        dtype: torch.dtype,
        what: str,
    ) -> None:
        self.placed, self.dtype = placed, dtype
        self.source, self.file, self.what = source, file, what
        self._target = target
        sizes = placed.box[1]
        self._strides = [math.prod(sizes[d + 1 :]) * dtype.itemsize for d in range(len(sizes))]
        self._offsets, self._lengths = part
        self.start = sum(offset * stride for offset, stride in zip(self._offsets, self._strides, strict=True))

    def pieces(self, size: int) -> Iterator[Piece]:
        """What is to be read, in pieces of about ``size`` bytes."""
        if self._target.numel() == 0:
            return
        if self._is_one_range() and self._is_plain():
            memory, total = memory_of(self._target), self._target.nbytes
            # a piece ends where a block does, so that none is read twice
            edges = [self.start, *range((self.start // size + 1) * size, self.start + total, size), self.start + total]
            for first, end in itertools.pairwise(edges):
                yield Piece(self, first, end, into=memory[first - self.start : end - self.start])
        else:
            yield from self._slabs(self._target, self._offsets, 0, size)

    def _slabs(self, target: torch.Tensor, offsets: Sequence[int], dimension: int, size: int) -> Iterator[Piece]:
        """What does not lie in one range, or not as it is wanted: by way of buffers of about ``size`` bytes."""
        lengths = target.shape
        start = sum(offset * stride for offset, stride in zip(offsets, self._strides, strict=True))
        last = sum((length - 1) * stride for length, stride in zip(lengths, self._strides, strict=True))
        span = last + self.dtype.itemsize
        if span > size and dimension < target.ndim:
            if lengths[dimension] == 1:
                yield from self._slabs(target, offsets, dimension + 1, size)
                return
            rows = max(1, size // self._strides[dimension])
            for row in range(0, lengths[dimension], rows):
                inner = list(offsets)
                inner[dimension] += row
                count = min(rows, lengths[dimension] - row)
                yield from self._slabs(target.narrow(dimension, row, count), inner, dimension + (count == 1), size)
            return
        strides = [stride // self.dtype.itemsize for stride in self._strides]
        yield Piece(self, start, start + span, place=lambda buffer: target.copy_(buffer.as_strided(lengths, strides)))

    def _is_one_range(self) -> bool:
        """Whether what is wanted lies in one piece: whole rows, or a part of one."""
        sizes, is_whole = self.placed.box[1], True
        for length, size in zip(reversed(self._lengths), reversed(sizes), strict=True):
            if not is_whole and length != 1:
                return False
            is_whole = is_whole and length == size
        return True

    def _is_plain(self) -> bool:
        target = self._target
        return (
            target.device.type == "cpu"
            and target.dtype == self.dtype
            and target.is_contiguous()
            and not target.is_conj()
            and not target.is_neg()
        )


@final
class Piece:
    """The data of a shard from byte ``start`` to ``stop``: read ``into`` where it is wanted, or to be put there."""

    def __init__(
        self,
        read: Read,
        start: int,
        stop: int,
        *,
        into: memoryview | None = None,
        place: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        self._read, self._start, self._stop = read, start, stop
        self._into, self._place = into, place

    @property
    def key(self) -> str:
        """The same on every rank that wants these bytes."""
        return f"{self._read.file} {self._read.placed.item.offset} {self._start} {self._stop}"

    def room(self) -> torch.Tensor:
        """Where the bytes are read to."""
        if self._into is None:
            return torch.empty(self._stop - self._start, dtype=torch.uint8)
        return torch.frombuffer(self._into, dtype=torch.uint8)

    def fetch(self, room: torch.Tensor) -> None:
        """Reads the bytes and verifies them."""
        read = self._read
        read.source.read_into(read.file, read.placed.item, self._start, self._stop, memory_of(room), read.what)

    def check(self, room: torch.Tensor) -> None:
        """Verifies bytes that another rank has read."""
        read = self._read
        read.source.check(read.file, read.placed.item, self._start, self._stop, memory_of(room), read.what)

    def settle(self, room: torch.Tensor) -> None:
        """Puts the bytes where they are wanted."""
        if self._place is not None:
            self._place(room.view(self._read.dtype))

    def run(self) -> None:
        room = self.room()
        self.fetch(room)
        self.settle(room)


def digest_of(pieces: Sequence[Piece]) -> str:
    """The same where the same bytes are wanted in the same pieces."""
    return xxhash.xxh3_128_hexdigest("\n".join(piece.key for piece in pieces).encode())


def fetch_all(pieces: Sequence[Piece], readers: int) -> None:
    """Reads all of ``pieces``, several at once."""
    if readers == 1 or len(pieces) < 2:
        for piece in pieces:
            piece.run()
        return
    with _pool(readers, len(pieces)) as pool:
        running = [pool.submit(piece.run) for piece in pieces]
        try:
            for future in running:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fetch_shared(pieces: Sequence[Piece], readers: int, carrier: Carrier) -> None:
    """Reads what all ranks want alike, each rank a part of it, and gives every piece to all. A collective.

    What cannot be read ends it on all ranks, but raises only on the one that failed.
    """
    mine = collections.deque(pieces[carrier.rank :: carrier.world_size])
    ahead: collections.deque[tuple[torch.Tensor, Future[None]]] = collections.deque()
    failed: BaseException | None = None
    with _pool(readers, len(mine) or 1) as pool:
        try:
            for number, piece in enumerate(pieces):
                while mine and len(ahead) < readers:
                    coming = mine.popleft()
                    room = coming.room()
                    ahead.append((room, pool.submit(coming.fetch, room)))
                owner = number % carrier.world_size
                is_mine = owner == carrier.rank
                if is_mine:
                    room, reading = ahead.popleft()
                    failed = failed or reading.exception()
                else:
                    room = piece.room()
                if not carrier.goes_on(failed is None, owner):
                    break
                carrier.send(room, owner)
                failed = failed or _arrived(piece, room, is_checked=is_mine)
        finally:
            pool.shutdown(cancel_futures=True)
    if failed is not None:
        raise failed


def _arrived(piece: Piece, room: torch.Tensor, *, is_checked: bool) -> Exception | None:
    """Puts the piece where it is wanted; returns what failed, for the other ranks are still at it."""
    try:
        if not is_checked:
            piece.check(room)
        piece.settle(room)
    except Exception as error:
        return error
    return None


def _pool(readers: int, pieces: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(readers, pieces), thread_name_prefix="lightning-resume-read")


def local_readers() -> int:
    """Threads that read at once: what this machine has for each of its ranks, up to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // local_world_size()))
