"""Streams mixed by weight: which of them gives the next record of a lane is a function of the lane and the position."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch.utils.data import IterableDataset

from lightning_resume.data.mixture import Blocks, listed, shares_of
from lightning_resume.data.randomness import keyed_seed
from lightning_resume.data.sharded.create_streamed import StreamedDataset, file_source
from lightning_resume.data.sharded.dataset import Output, share_of
from lightning_resume.data.sharded.formats.rows import ParquetRows
from lightning_resume.data.sharded.grouping import Group
from lightning_resume.data.sharded.indexed import IndexedDataset
from lightning_resume.data.sharded.lane_source import LaneSource
from lightning_resume.data.sharded.lanes import Cursor, Lane
from lightning_resume.data.sharded.mapped import MapSource
from lightning_resume.data.sharded.records import Found, LaneReader, Where
from lightning_resume.data.sharded.streamed import StreamedLoader
from lightning_resume.errors import CheckpointMismatchError

_BLOCK = 1000


class Stop(str, enum.Enum):
    """When an epoch of a mixture ends, in each lane for itself."""

    FIRST_EXHAUSTED = "first_exhausted"
    ALL_EXHAUSTED = "all_exhausted"
    NEVER = "never"


@final
class StreamMixture(IterableDataset[Any]):
    """Streams mixed by weight: ``StreamMixture([books, web], [0.3, 0.7]).create_dataloader(batch_size=32)``.

    In every lane, each thousand records (or what suits the weights) hold the exact number of each dataset, at places
    that are shuffled. The state is a position in each dataset for each lane. Datasets may be of any streamed format,
    parquet, or map-style; each keeps its own columns, filter and transform.

    Args:
        datasets: Those that ``ShardedDataset.create_dataloader`` or ``from_path`` return, or map-style datasets.
        weights: One number of at least 0 for each, of any sum; by default equal. They count records before filters.
        shuffle: Whether each dataset is shuffled.
        seed: Key of the order and of the random numbers.
        stop: When an epoch ends: when the ``"first_exhausted"`` dataset is (default), when ``"all_exhausted"`` are at
            least once, or ``"never"``. Until then one that is exhausted begins again in another order. Each lane ends
            for itself. A dataset that has nothing in some lane, having fewer files than there are lanes, is left out
            there: split it into more files, or have fewer lanes.

    Raises:
        ValueError: There is not one weight for each dataset, or none above 0.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        stop: Stop | str = Stop.FIRST_EXHAUSTED,
    ) -> None:
        self.datasets, self.shuffle, self.seed, self.stop = listed(datasets), shuffle, seed, Stop(stop)
        self.weights = [1.0] * len(self.datasets) if weights is None else list(weights)
        self.blocks = Blocks(shares_of(self.weights, [1] * len(self.datasets)), None, length=_BLOCK)

    def __iter__(self) -> Any:
        raise TypeError("A mixture of streams is read by its loader: iterate over that of `create_dataloader`.")

    def create_dataloader(
        self,
        *,
        batch_size: int = 1,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        group: Group | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        output: Output | str = Output.TORCH,
        drop_last: bool = False,
        lanes: int | None = None,
        **dataloader_options: Any,
    ) -> StreamedLoader:
        """Returns a loader over the mixture; the arguments are those of ``ShardedDataset.create_dataloader``."""
        return StreamedLoader(
            self,
            source=MixtureSource(self),
            group=group,
            seed=self.seed,
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
class MixtureSource(LaneSource):
    """The lanes of a mixture: lane l has lane l of every dataset."""

    def __init__(self, mixture: StreamMixture) -> None:
        self._parts = [_source(part, mixture, number) for number, part in enumerate(mixture.datasets)]
        self._facts = {
            "seed": mixture.seed,
            "stop": mixture.stop.value,
            "weights": [str(share) for share in mixture.blocks.shares],
            "datasets": [f"{part.kind}, {dict(part.facts())}" for part in self._parts],
        }
        self.kind = "mixture of streams"
        self.resume_cost = "; ".join(dict.fromkeys(part.resume_cost for part in self._parts))
        self.reader = MixtureReader(self._parts, mixture.blocks, mixture.stop, mixture.seed)

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def data(self) -> Mapping[str, str]:
        parts = enumerate(self._parts)
        return {f"{name} of dataset {number}": text for number, part in parts for name, text in part.data().items()}

    def agree(self, *, fresh: bool) -> None:
        for part in self._parts:
            part.agree(fresh=fresh)

    def lane(self, lane: Lane, lanes: int, cursor: Cursor) -> MixtureLane:
        return MixtureLane(lane.epoch, lane.number, lanes)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def check(self, state: Mapping[str, Any]) -> None:
        for number, (part, saved) in enumerate(zip(self._parts, state["parts"], strict=True)):
            try:
                part.check(saved)
            except CheckpointMismatchError as error:
                raise CheckpointMismatchError(
                    "loader",
                    f"{error.field} of dataset {number} of the mixture",
                    saved=error.saved,
                    current=error.current,
                    advice="Use the datasets that the run was started with.",
                ) from error

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class MixtureLane(NamedTuple):
    """A lane of a mixture."""

    epoch: int
    number: int
    lanes: int


@dataclasses.dataclass
class _Part:
    """One dataset in one lane: how often it was exhausted, where it is, and what comes."""

    passes: int
    where: Where
    records: Iterator[Found]
    absent: bool = False


@final
class MixtureReader(LaneReader):
    """Reads lanes of a mixture.

    Where reading goes on is the position in the lane, and for each dataset the number of times that it was exhausted,
    the length of what follows, and where its own reading goes on.
    """

    def __init__(self, parts: Sequence[LaneSource], blocks: Blocks, stop: Stop, seed: int) -> None:
        self._sources, self._blocks, self._stop, self._seed = parts, blocks, stop, seed
        self.draws = any(part.reader.draws for part in parts)

    def records(self, lane: MixtureLane, where: Where) -> Iterator[Found]:
        position, parts = self._opened(lane, where)
        key = keyed_seed("mixture of streams", self._seed, lane.epoch, lane.number)
        before = where or _where(position, parts)
        known, datasets = -1, None
        while not all(part.absent for part in parts):
            block, place = divmod(position, self._blocks.size)
            if datasets is None or block != known:
                known, datasets = block, self._blocks.datasets(key, block)
            number = int(datasets[place])
            found = self._next(lane, parts, number)
            if found is None:
                return
            position += 1
            if found is _ABSENT:
                continue
            parts[number].where = found.after
            after = _where(position, parts)
            yield found._replace(before=before, after=after)
            before = after

    def _opened(self, lane: MixtureLane, where: Where) -> tuple[int, list[_Part]]:
        numbers = iter(where or (0, *(0 for _ in self._sources for _ in range(2))))
        position = next(numbers)
        parts = []
        for number, share in enumerate(self._blocks.shares):
            passes, length = next(numbers), next(numbers)
            own = tuple(next(numbers) for _ in range(length))
            parts.append(_Part(passes, own, self._read(lane, number, passes, own), absent=not share))
        return position, parts

    def _read(self, lane: MixtureLane, number: int, passes: int, where: Where) -> Iterator[Found]:
        # the passes of one epoch of the mixture come in orders of their own, which no other epoch has
        source, own = self._sources[number], Lane((passes << 32) + lane.epoch, lane.number)
        return source.reader.records(source.lane(own, lane.lanes, Cursor(0, where)), where)

    def _next(self, lane: MixtureLane, parts: list[_Part], number: int) -> Any:
        """The next record of a dataset, ``_ABSENT`` where it has none in this lane, None where the lane ends."""
        part = parts[number]
        while not part.absent:
            found = next(part.records, None)
            if found is not None:
                return found
            if not part.where:
                part.absent = True
                break
            part.passes, part.where = part.passes + 1, ()
            done = [one.absent or one.passes > 0 for one in parts]
            if self._stop is Stop.FIRST_EXHAUSTED or (self._stop is Stop.ALL_EXHAUSTED and all(done)):
                return None
            part.records = self._read(lane, number, part.passes, ())
        return _ABSENT


_ABSENT: Any = object()


def _where(position: int, parts: Sequence[_Part]) -> Where:
    return (position, *(number for part in parts for number in (part.passes, len(part.where), *part.where)))


def _source(dataset: Any, mixture: StreamMixture, number: int) -> LaneSource:
    seed = keyed_seed("mixture", mixture.seed, number)
    if isinstance(dataset, (StreamedDataset, IndexedDataset)):
        options = dataclasses.replace(dataset.options, shuffle=mixture.shuffle, seed=seed, append_files=False)
        streamed = isinstance(dataset, StreamedDataset)
        reads = dataset.format if streamed else ParquetRows(options.columns)
        return file_source(dataset.files, options, reads)  # type: ignore[arg-type]
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"Dataset {number} of the mixture is a {type(dataset).__name__}, which is neither map-style nor a"
            " ShardedDataset. Pass the dataset that `ShardedDataset.create_dataloader` returns."
        )
    return MapSource(dataset, shuffle=mixture.shuffle, seed=seed)
