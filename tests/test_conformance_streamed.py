"""The conformance suite over the formats that are read as streams, and over what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_resume.data.order import Tail
from lightning_resume.data.position import Resumable
from tests import simulated_ranks, streams
from tests.conformance import LoaderConformance
from tests.local_peers import LocalRanks
from tests.simulated_ranks import Topology


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


class TestParquetRows(StreamConformance):
    format = "parquet"
