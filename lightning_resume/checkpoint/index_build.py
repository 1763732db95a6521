"""Writes the index (``index.py``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_resume.checkpoint._dcp import ObjectPath
from lightning_resume.checkpoint.index_form import INTEGER, MAGIC, PREAMBLE, ROW, Placed, name_of_rank, of_rank
from lightning_resume.checkpoint.stored import DIGEST_BYTES


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key: where it belongs in the nested state, the dtype and shape of a tensor, and its items."""

    path: ObjectPath
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    items: Sequence[Placed]


def build_index(files: Sequence[str], entries: Mapping[str, Entry], leaves: Mapping[str, Placed]) -> bytes:
    """The bytes of the index over ``entries`` and over the opaque ``leaves``, both by key."""
    table = _Table()
    keys = [
        [key, list(entry.path), _name_of(entry.dtype), entry.shape, *table.add(entry.items, len(entry.shape))]
        for key, entry in entries.items()
    ]
    grouped = []
    for leaf, placed in _grouped(leaves):
        table.add(placed, 0)
        grouped.append(leaf)
    head = {"files": list(files), "keys": keys, "leaves": grouped}
    return _joined(head, [table.rows(), table.dimensions(), table.digests()])


def _name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _joined(head: Mapping[str, Any], sections: Sequence[bytes]) -> bytes:
    text = json.dumps({**head, "sections": [len(section) for section in sections]}, separators=(",", ":")).encode()
    return b"".join([PREAMBLE.pack(MAGIC, len(text)), text, *sections])


class _Table:
    """The rows of all items so far."""

    def __init__(self) -> None:
        self._items: list[Placed] = []
        self._boxes: list[bytes] = []

    def add(self, items: Sequence[Placed], ndim: int) -> list[int]:
        """Adds the items of one key; returns their number, the dimension along which they are sorted, and the largest
        size along it.
        """
        boxes = np.array([placed.box for placed in items], INTEGER).reshape(len(items), 2, ndim)
        if ndim == 0 or not items:
            self._items += items
            return [len(items), 0, 0]
        begins = boxes[:, 0]
        along = max(range(ndim), key=lambda dimension: np.unique(begins[:, dimension]).size)
        order = np.lexsort((*begins.T[::-1], begins[:, along]))  # the last one counts first
        self._items += [items[number] for number in order.tolist()]
        self._boxes.append(boxes[order].tobytes())
        return [len(items), along, int(boxes[:, 1, along].max())]

    def rows(self) -> bytes:
        items = [placed.item for placed in self._items]
        rows = np.empty(len(items), ROW)
        rows["file"] = [placed.file for placed in self._items]
        rows["head"] = [item.head for item in items]
        rows["offset"] = [item.offset for item in items]
        rows["length"] = [item.length for item in items]
        rows["data"] = [item.data for item in items]
        counts = np.array([len(item.digests) // DIGEST_BYTES for item in items], "<u8")
        rows["digest"] = np.cumsum(counts) - counts
        return rows.tobytes()

    def dimensions(self) -> bytes:
        return b"".join(self._boxes)

    def digests(self) -> bytes:
        return b"".join([placed.item.digests for placed in self._items])


def _grouped(leaves: Mapping[str, Placed]) -> Iterator[tuple[tuple[str, int | None], list[Placed]]]:
    """Leaves by name: of what every rank has, all together and how many; of anything else one by one."""
    of_ranks: dict[str, dict[int, Placed]] = {}
    for key, placed in leaves.items():
        match = of_rank(key)
        if match is None:
            yield (key, None), [placed]
        else:
            of_ranks.setdefault(match[0], {})[match[1]] = placed
    for name, by_rank in of_ranks.items():
        if name not in leaves and sorted(by_rank) == list(range(len(by_rank))):
            yield (name, len(by_rank)), [by_rank[rank] for rank in range(len(by_rank))]
        else:
            yield from (((name_of_rank(name, rank), None), [placed]) for rank, placed in by_rank.items())
