"""The conformance suite over the formats that are read as streams, and over what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_resume import BatchByLength, Packing, StreamMixture, stream_of
from lightning_resume.data.order import Tail
from lightning_resume.data.position import Resumable
from tests import simulated_ranks, streams
from tests.conformance import LoaderConformance
from tests.local_peers import LocalRanks
from tests.simulated_ranks import Topology
from tests.toy_data import Noisy


def tokens_of(sample: Any) -> list[int]:
    """Tokens that no other document has."""
    return [100 + 10 * int(sample["id"]) + token for token in range(int(sample["id"]) * 7 % 6)]


def number_of_digits(sample: Any) -> int:
    return len(str(sample[0]))


class AgreeingRanks(simulated_ranks.Ranks):
    """Ranks whose loaders agree on the end of the epoch, as those of a process group do."""

    def __init__(self, loaders: Sequence[Resumable]) -> None:
        super().__init__(loaders)
        self._group = LocalRanks(len(loaders))
        for rank, loader in enumerate(loaders):
            loader.peers = self._group.peers(rank)  # type: ignore[attr-defined]

    def _next(self) -> list[Any]:
        return self._group.run([lambda one=one: next(one, simulated_ranks.NOTHING) for one in self._open])  # type: ignore[misc]


class StreamConformance(LoaderConformance):
    format: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {"lanes": 3}
    shards: ClassVar[tuple[int, ...]] = (9, 1, 4)
    length = 14

    def prepare(self, folder: Path) -> None:
        streams.write(folder, self.format, self.shards)

    def make(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        batch_size: int = 4,
        seed: int = 3,
        folder: Path,
        prefetch_factor: int | None = None,
    ) -> Resumable:
        return streams.make(  # type: ignore[no-any-return]
            folder,
            self.format,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            batch_size=batch_size,
            seed=seed,
            prefetch_factor=prefetch_factor,
            **self.options,
        )

    def begun(self, topology: Topology, folder: Path) -> simulated_ranks.Ranks:
        return AgreeingRanks([self.loader(topology, folder, rank) for rank in range(topology.world_size)])

    def ids(self, batch: Any) -> list[int]:
        return [streams.number_of(sample) for sample in batch]

    def noise(self, batch: Any) -> list[Any]:
        return [sample["noise"] if isinstance(sample, dict) else sample[1] for sample in batch]


class TestJsonLines(StreamConformance):
    format = "jsonl"


class TestJsonLinesDropLast(StreamConformance):
    format = "jsonl"
    options: ClassVar[dict[str, Any]] = {"lanes": 3, "drop_last": True}
    tail = Tail.DROP


class TestZstdFrames(StreamConformance):
    format = "jsonl.zst, frames"


class TestTar(StreamConformance):
    format = "tar"


class InProcess(StreamConformance):
    """Of a format: how it is read is no different in workers, which take long to start."""

    workers = (0,)


class TestText(InProcess):
    format = "text"


class TestGzipMembers(InProcess):
    format = "jsonl.gz, members"


class TestTarGzip(InProcess):
    format = "tar.gz"


class TestParquetRows(StreamConformance):
    format = "parquet"


class TestBatchesByLength(StreamConformance):
    format = "text"
    options: ClassVar[dict[str, Any]] = {"lanes": 2, "group": BatchByLength(key=number_of_digits, window=6)}


class TestPacking(StreamConformance):
    """Of documents of 0 to 5 tokens, rows of 3, of which the last of a lane may be filled up."""

    format = "jsonl"
    options: ClassVar[dict[str, Any]] = {"lanes": 2, "group": Packing(3), "transform": tokens_of}
    piece = 3
    length = sum(len(tokens_of({"id": number})) for number in range(14))
    batch_sizes = (2, 1, 3)

    def ids(self, batch: Any) -> list[int]:
        return [int(token) for row in batch for token in row["input_ids"] if token]

    def noise(self, batch: Any) -> None:
        """A token is a number of its document."""


class Thirds(Noisy):
    """Of which a filter leaves 14."""

    def __init__(self) -> None:
        super().__init__(21)


def chosen(sample: Any) -> bool:
    return bool(sample[0] % 3)


class TestStreamOf(StreamConformance):
    def prepare(self, folder: Path) -> None:
        """There is nothing to write."""

    def make(self, *, folder: Path, **options: Any) -> Resumable:  # type: ignore[override]
        return stream_of(
            Thirds(),
            shuffle=True,
            filter=chosen,
            collate_fn=list,
            lanes=3,
            **{"seed": 3, "rank": 0, "world_size": 1, "batch_size": 4, **options},
        )

    def ids(self, batch: Any) -> list[int]:
        return [(index - 1) // 3 * 2 + (index - 1) % 3 for index, _ in batch]

    def noise(self, batch: Any) -> list[Any]:
        return [float(noise) for _, noise in batch]


class Numbered(Noisy):
    """Counts from ``first``."""

    def __init__(self, length: int, first: int) -> None:
        super().__init__(length)
        self.first = first

    def __getitem__(self, index: int) -> Any:
        _, noise = super().__getitem__(index)
        return self.first + index, noise


class TestStreamMixture(TestStreamOf):
    """Whose epochs end with the first of its datasets in each lane."""

    of_one_length = False

    def make(self, *, folder: Path, **options: Any) -> Resumable:  # type: ignore[override]
        settings = {"seed": 3, "rank": 0, "world_size": 1, "batch_size": 4, **options}
        mixture = StreamMixture([Numbered(12, 0), Numbered(30, 100)], [3, 1], seed=settings.pop("seed"))
        return mixture.create_dataloader(collate_fn=list, lanes=2, **settings)

    def ids(self, batch: Any) -> list[int]:
        return [index for index, _ in batch]
