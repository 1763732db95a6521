"""The conformance suite over the sharded formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lightning_resume import ShardedDataset
from lightning_resume.data.position import Resumable
from tests.conformance import LoaderConformance
from tests.toy_shards import add_noise, write_parquet

SIZES = (9, 1, 4)  # two row groups, one row, one group


class TestParquet(LoaderConformance):
    length = sum(SIZES)
    options: ClassVar[dict[str, Any]] = {"shuffle": True}

    def prepare(self, folder: Path) -> None:
        write_parquet(folder, SIZES)

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
        loader, _ = ShardedDataset.create_dataloader(
            folder,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            transform=add_noise,
            collate_fn=list,
            prefetch_factor=prefetch_factor,
            **self.options,
        )
        return loader

    def ids(self, batch: Any) -> list[int]:
        return [row["id"] for row in batch]

    def noise(self, batch: Any) -> list[Any]:
        return [row["noise"] for row in batch]


class TestParquetAsItLies(TestParquet):
    options: ClassVar[dict[str, Any]] = {"shuffle": False}


class TestParquetInLanesAndWindows(TestParquet):
    options: ClassVar[dict[str, Any]] = {"shuffle": True, "lanes": 3, "window": 2}
