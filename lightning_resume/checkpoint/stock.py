"""Reads a checkpoint that stock Lightning or torch.distributed.checkpoint wrote: item by item, as its metadata says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, final

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from lightning_resume.checkpoint._dcp import ObjectPath, StorageInfo, local_target
from lightning_resume.checkpoint.catalog import Catalog, TensorInfo
from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.names import METADATA_NAME
from lightning_resume.checkpoint.safe import load_tensor

_READERS = 8  # at once, of a remote store
_AHEAD_BYTES = 2**28  # at most so much is read before it is used, or one item


class StockContent:
    """What a stock checkpoint holds; there is nothing to verify it with.

    Args:
        source: Its files.

    Raises:
        UnsafeCheckpointError: ``.metadata`` could run code.
        CheckpointCorruptError: ``.metadata`` is missing or damaged.
    """

    def __init__(self, source: ItemSource) -> None:
        self._source = source
        self._catalog = Catalog(source.whole(METADATA_NAME), source=str(source.folder / METADATA_NAME))

    @property
    def keys(self) -> Mapping[str, TensorInfo | None]:
        """Every key: the shape and dtype of a tensor, None for any other object."""
        return self._catalog.keys

    @property
    def mappings(self) -> Mapping[str, ObjectPath]:
        """The path of every key in the nested state."""
        return self._catalog.mappings

    @property
    def leaves(self) -> list[str]:
        """Those of a checkpoint of ours that has lost its manifest."""
        return self._catalog.leaves

    def check_covered(self, key: str) -> None:
        """Checks that the stored shards make up the whole tensor.

        Raises:
            CheckpointIncompleteError: They do not.
        """
        self._catalog.check_covered(key)

    def fill(self, flat: dict[str, Any], decode: Callable[[str, bytes], Any]) -> StockFilling:
        """Finds what the tensors of ``flat`` want, which :meth:`StockFilling.run` copies into them.

        Args:
            flat: Tensors, DTensors and ShardedTensors by key; any value for what is none.
            decode: Makes an object of its key and its bytes.
        """
        for key in flat:
            self._catalog.check_covered(key)
        return StockFilling(partial(self._filled, flat, decode))

    def _filled(self, flat: dict[str, Any], decode: Callable[[str, bytes], Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for requests, data in self._items(self._requests(flat)):
            index = requests[0].storage_index
            if requests[0].type == LoadItemType.BYTE_IO:
                values[index.fqn] = decode(index.fqn, data)
            else:
                self._copy(flat, self._as_tensor(index, data), requests)
        return values

    def _items(self, wanted: Iterator[tuple[StorageInfo, list[ReadItem]]]) -> Iterator[tuple[list[ReadItem], bytes]]:
        """Yields the bytes of each stored item; those of a remote store are read ahead, in parallel."""
        if not self._source.is_remote:
            for info, requests in wanted:
                yield requests, self._bytes(info)
            return
        ahead: deque[tuple[list[ReadItem], int, Future[bytes]]] = deque()
        pending = 0
        with ThreadPoolExecutor(_READERS) as readers:
            try:
                for info, requests in wanted:
                    future = readers.submit(self._bytes, info)
                    ahead.append((requests, info.length, future))
                    pending += info.length
                    while pending > _AHEAD_BYTES or len(ahead) > 2 * _READERS:
                        first, length, future = ahead.popleft()
                        pending -= length
                        yield first, future.result()
                while ahead:
                    first, _, future = ahead.popleft()
                    yield first, future.result()
            finally:
                readers.shutdown(cancel_futures=True)

    def _bytes(self, info: StorageInfo) -> bytes:
        self._source.checked_size(info.relative_path)
        return self._source.part(info.relative_path, info.offset, info.length)

    def _requests(self, flat: dict[str, Any]) -> Iterator[tuple[StorageInfo, list[ReadItem]]]:
        """Yields each stored item that ``flat`` needs, once and in the order of the files, with all that is wanted."""
        plan = create_default_local_load_plan(flat, self._catalog.metadata, True)
        placed = [(self._catalog.where(item.storage_index), item) for item in plan.items]
        placed.sort(key=lambda pair: _place(pair[0]))
        for _, group in groupby(placed, key=lambda pair: _place(pair[0])):
            pairs = list(group)
            yield pairs[0][0], [item for _, item in pairs]

    def _copy(self, flat: dict[str, Any], tensor: torch.Tensor, requests: Sequence[ReadItem]) -> None:
        for request in requests:
            target = _narrow(local_target(flat, request.dest_index), request.dest_offsets, request.lengths)
            target.copy_(_narrow(tensor, request.storage_offsets, request.lengths))

    def _as_tensor(self, index: MetadataIndex, data: bytes) -> torch.Tensor:
        tensor = load_tensor(data, name=f"{self._source.folder}: item {index.fqn!r}")
        self._catalog.check_item(index, tensor)
        return tensor


@final
class StockFilling:
    """What is to be copied into tensors; :meth:`run` does it, and returns the values that are no tensors by key."""

    def __init__(self, run: Callable[[], dict[str, Any]]) -> None:
        self.run = run

    def share(self) -> None:
        """Each rank reads for itself."""


def _place(info: StorageInfo) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor
