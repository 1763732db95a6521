"""How the bytes of one item lie in its file, and the hashes that a part of it can be verified by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

DIGEST_BYTES = 16
_LEAST_BLOCK = 2**16
_MOST_BLOCK = 2**20
_BLOCKS = 64  # about so many in an item, so that reading a part of it reads little beside


def block_bytes(length: int) -> int:
    """How many bytes of data of ``length`` bytes are hashed together: a power of two from 64 KiB to 1 MiB."""
    wanted = max(1, -(-length // _BLOCKS))
    return min(max(_LEAST_BLOCK, 1 << (wanted - 1).bit_length()), _MOST_BLOCK)


def block_count(length: int) -> int:
    return -(-length // block_bytes(length))


def blocks_of(length: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """The number, start and end of every block of data of ``length`` bytes that ``start`` to ``stop`` reaches into."""
    step, stop = block_bytes(length), length if stop is None else stop
    numbers = range(start // step, -(-stop // step) if stop > start else 0)
    return ((number, number * step, min((number + 1) * step, length)) for number in numbers)


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """One item in its file: ``head`` bytes, ``data`` bytes, and what follows up to ``length``.

    Attributes:
        offset: Where it begins in the file (bytes).
        length: All of it (bytes).
        head: Bytes before the data.
        data: Bytes of data: a tensor's elements in their order, or an object's whole archive, with ``head`` 0.
        digests: xxh3-128 of the head, of every block of the data (:func:`blocks_of`) and of the tail, 16 bytes each.
    """

    offset: int
    length: int
    head: int
    data: int
    digests: bytes

    @property
    def hash(self) -> str:
        """xxh3-128 over ``digests`` (hex): that of the whole item, from one look at each of its bytes."""
        return xxhash.xxh3_128_hexdigest(self.digests)


def hash_of_items(digests: Iterable[bytes]) -> str:
    """The hash of a file that consists of items with these ``digests``, in their order (hex)."""
    whole = xxhash.xxh3_128()
    for of_item in digests:
        whole.update(xxhash.xxh3_128_digest(of_item))
    return whole.hexdigest()
