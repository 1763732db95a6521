"""Map-style datasets as streams, for what cannot be counted beforehand: filters, packing, batches by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

from torch.utils.data import IterableDataset

from lightning_resume.data.fingerprint import fingerprint
from lightning_resume.data.order import Permutation
from lightning_resume.data.sharded.dataset import Output, share_of
from lightning_resume.data.sharded.grouping import Group
from lightning_resume.data.sharded.lane_source import LaneSource
from lightning_resume.data.sharded.lanes import Cursor, Lane
from lightning_resume.data.sharded.records import Found, LaneReader, Maker, Where
from lightning_resume.data.sharded.streamed import StreamedLoader
from lightning_resume.errors import CheckpointMismatchError

_CHUNK = 1024


def stream_of(
    dataset: Any,
    *,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    filter: Callable[[Any], bool] | None = None,
    transform: Callable[[Any], Any] | None = None,
    group: Group | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    output: Output | str = Output.TORCH,
    drop_last: bool = False,
    lanes: int | None = None,
    **dataloader_options: Any,
) -> StreamedLoader:
    """Returns a loader over a map-style ``dataset`` that can filter, pack and make batches by length.

    Every sample is asked for once an epoch, over all ranks; at any batch the position can be saved, and gone on with at
    another world size, number of workers and batch size. Where none of ``filter`` and ``group`` is needed, a
    ``DataLoader`` made resumable keeps the order of samples through such changes, too.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        batch_size: Samples (sequences) of one rank in one step.
        shuffle: Whether the samples come in permuted order.
        seed: Key of the order and of the samples' random numbers.
        num_workers: Worker processes of this rank.
        rank: This process's index among those that see different data; by default from the strategy or process group.
        world_size: Number of those processes; by default as for ``rank``.
        filter: Samples for which it is false are left out.
        transform: Applied to each sample that is kept.
        group: What makes samples of samples: :class:`Packing` or :class:`BatchByLength`.
        collate_fn: Makes a batch of a list of samples. By default a batch of dicts becomes a dict of columns.
        output: How those columns arrive.
        drop_last: Leave out the samples at the end of an epoch that fill no batch.
        lanes: Parts that the order is cut into, each read by one process at a time; fixed when a run starts, by default
            as many as there are processes that read.
        dataloader_options: Anything else that :class:`torch.utils.data.DataLoader` takes.
    """
    source = MapSource(dataset, shuffle=shuffle, seed=seed, filter=filter, transform=transform)
    return StreamedLoader(
        StreamOf(dataset),
        source=source,
        group=group,
        seed=seed,
        share=share_of(rank, world_size),
        lanes=lanes,
        output=Output(output),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        drop_last=drop_last,
        **dataloader_options,
    )


@final
class StreamOf(IterableDataset[Any]):
    """What such a loader has as its ``dataset``: Lightning is not to give it a sampler."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return (self.dataset[index] for index in range(len(self.dataset)))


class Slice(NamedTuple):
    """Positions ``[start, stop)`` of the order of an epoch."""

    epoch: int
    start: int
    stop: int


@final
class MapReader(LaneReader):
    """Reads lanes of a map-style dataset. Where reading goes on is a position."""

    def __init__(self, dataset: Any, maker: Maker, *, shuffle: bool, seed: int) -> None:
        self._length, self._maker, self._shuffle, self._seed = len(dataset), maker, shuffle, seed
        self.draws = maker.draws

    def records(self, lane: Slice, where: Where) -> Iterator[Found]:
        (position,) = where or (lane.start,)
        order = Permutation(self._length, seed=self._seed, epoch=lane.epoch) if self._shuffle and self._length else None
        while position < lane.stop:
            end = min(lane.stop, position + _CHUNK)
            indices = range(position, end) if order is None else order.take(position, end).tolist()
            for index in indices:
                yield Found(self._maker, index, (lane.epoch, "", index), "", (position,), (position + 1,))
                position += 1


@final
class MapSource(LaneSource):
    """The samples of a map-style dataset."""

    resume_cost = "O(1)"

    def __init__(
        self,
        dataset: Any,
        *,
        shuffle: bool,
        seed: int,
        filter: Callable[[Any], bool] | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        maker = Maker(Item(dataset), filter=filter, transform=transform, seed=seed, decode_draws=True)
        self._length, self._fingerprint, self._seed = len(dataset), fingerprint(dataset), seed
        self.kind = f"stream of samples, {'shuffled' if shuffle else 'sequential'}"
        self.reader = MapReader(dataset, maker, shuffle=shuffle, seed=seed)

    def facts(self) -> Mapping[str, Any]:
        return {"seed": self._seed}

    def data(self) -> Mapping[str, str]:
        return {"length of the dataset": str(self._length), "dataset": self._fingerprint}

    def lane(self, lane: Lane, lanes: int, cursor: Cursor) -> Slice:
        start, stop = (self._length * number // lanes for number in (lane.number, lane.number + 1))
        return Slice(lane.epoch, start, stop)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._length, "fingerprint": self._fingerprint}

    def check(self, state: Mapping[str, Any]) -> None:
        for field, current in self.state_dict().items():
            if state.get(field) != current:
                raise CheckpointMismatchError(
                    "loader",
                    field,
                    saved=state.get(field),
                    current=current,
                    advice="This is another dataset: use the one that the run was started with.",
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of it changes."""


@final
class Item:
    """A sample by its index; what decodes a record of a map-style dataset."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, content: int, path: str, key: int) -> Any:
        return self._dataset[content]
