"""Ways to read the same rows and to go on after a stop: ours, and those that people use today.

A :class:`Way` is one line of the benchmark's table; to add one, add it to :func:`ways`. Everything a way imports beyond
what we need ourselves is imported inside it, so that a way whose package is missing is left out.
"""

from __future__ import annotations

import abc
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rows import Data, write_json_lines, write_tar, write_text
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_resume import ShardedDataset, make_resumable

SEED = 5


class Way(abc.ABC):
    """One way to read an epoch in batches, to save the position, and to go on from it."""

    name: str
    package: str | None = None
    """What has to be installed."""
    remark = ""

    @property
    def is_installed(self) -> bool:
        # the first part alone is looked for: with dots in it find_spec imports, and fails where there is nothing
        return self.package is None or importlib.util.find_spec(self.package.split(".")[0]) is not None

    def prepare(self, data: Data) -> None:
        """Writes the rows in the format of this way; not measured."""

    @abc.abstractmethod
    def open(self, data: Data, state: Any = None) -> Any:
        """A loader, which goes on from ``state``; all that this takes is measured."""

    def state(self, loader: Any, batches: int) -> Any:
        """The position after so many batches."""
        return loader.state_dict()

    def ids(self, batch: Any) -> list[int]:
        return list(batch["id"].tolist())


def loaded(loader: Any, state: Any) -> Any:
    if state is not None:
        loader.load_state_dict(state)
    return loader


# -- ours


class Sharded(Way):
    """Our dataset of parquet files, shuffled."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"ShardedDataset, parquet, {workers} workers"

    def open(self, data: Data, state: Any = None) -> Any:
        loader, _ = ShardedDataset.create_dataloader(
            str(data.parquet), batch_size=data.batch_size, shuffle=True, seed=SEED, num_workers=self.workers
        )
        return loaded(loader, state)


class Streamed(Way):
    """Our dataset of files that do not say how many rows they hold, shuffled in windows."""

    def __init__(self, format: str, workers: int) -> None:
        self.format, self.workers = format, workers
        self.name = f"ShardedDataset, {format}, {workers} workers"

    def folder(self, data: Data) -> Path:
        return data.folder / self.format

    def prepare(self, data: Data) -> None:
        write = {"jsonl": write_json_lines, "text": write_text, "tar": write_tar}[self.format]
        write(self.folder(data), data)

    def open(self, data: Data, state: Any = None) -> Any:
        options: dict[str, Any] = {"format": self.format, "seed": SEED, "num_workers": self.workers}
        loader, _ = ShardedDataset.create_dataloader(
            str(self.folder(data)), batch_size=data.batch_size, shuffle=True, **options
        )
        return loaded(loader, state)

    def ids(self, batch: Any) -> list[int]:
        if self.format == "text":
            return [int(text, 16) for text in batch]
        return list(map(int, batch["__key__"])) if self.format == "tar" else super().ids(batch)


class Elastic(Way):
    """Our order of a map-style dataset."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"make_resumable, map-style, {workers} workers"

    def open(self, data: Data, state: Any = None) -> Any:
        loader = DataLoader(MapRows(data), data.batch_size, shuffle=True, num_workers=self.workers)
        return loaded(make_resumable(loader, seed=SEED), state)


# -- what torch and torchdata offer


class MapRows(Dataset[Any]):
    """Rows by number, from a memory-mapped file."""

    def __init__(self, data: Data) -> None:
        self.path, self.rows = str(data.arrow), data.rows
        self._table: Any = None

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(self.path)).read_all()
        return list(self._table.take(pa.array(rows)).to_pylist())

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]


class StreamRows(IterableDataset[Any]):
    """Rows as they come from the parquet files, which are divided among workers; without a state."""

    def __init__(self, data: Data) -> None:
        self.files = data.files

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for file in self.files if worker is None else self.files[worker.id :: worker.num_workers]:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


class Skipping(Way):
    """What one does without any help: the batches are read again and thrown away."""

    name = "DataLoader + skipping, map-style, 0 workers"

    def open(self, data: Data, state: Any = None) -> Any:
        loader = DataLoader(MapRows(data), data.batch_size, shuffle=True, generator=seeded())
        return itertools.islice(loader, state or 0, None)

    def state(self, loader: Any, batches: int) -> Any:
        return batches


class StatefulMap(Way):
    package = "torchdata"

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"StatefulDataLoader, map-style, {workers} workers"

    def open(self, data: Data, state: Any = None) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        options: dict[str, Any] = {"num_workers": self.workers, "shuffle": True, "generator": seeded()}
        return loaded(StatefulDataLoader(MapRows(data), data.batch_size, **options), state)


class StatefulStream(Way):
    package = "torchdata"
    remark = "not shuffled"

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"StatefulDataLoader, stateless iterable, {workers} workers"

    def open(self, data: Data, state: Any = None) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return loaded(StatefulDataLoader(StreamRows(data), data.batch_size, num_workers=self.workers), state)


class Arrow(Way):
    """Nothing but pyarrow: how fast rows can come; it cannot go on."""

    name = "pyarrow iter_batches"
    remark = "not shuffled, cannot resume"

    def open(self, data: Data, state: Any = None) -> Any:
        if state is not None:
            raise NotImplementedError
        return (batch for file in data.files for batch in pq.ParquetFile(file).iter_batches(batch_size=data.batch_size))

    def state(self, loader: Any, batches: int) -> Any:
        return None

    def ids(self, batch: Any) -> list[int]:
        return list(batch.column("id").to_pylist())


# -- packages that read files of their own, or parquet


class HuggingFace(Way):
    """``datasets``, streaming from the same parquet files, in torch's DataLoader."""

    package = "datasets"

    def __init__(self, *, shuffle: bool) -> None:
        self.shuffle = shuffle
        self.name = f"Hugging Face iterable{', shuffle()' if shuffle else ''}, 0 workers"
        self.remark = "" if shuffle else "not shuffled"

    def open(self, data: Data, state: Any = None) -> Any:
        import datasets

        cache = str(data.folder / "huggingface")
        rows = datasets.load_dataset(
            "parquet", data_files=data.files, split="train", streaming=True, cache_dir=cache
        ).select_columns(["id", "text"])
        if self.shuffle:
            rows = rows.shuffle(seed=SEED, buffer_size=1000)
        return DataLoader(loaded(rows, state), data.batch_size)

    def state(self, loader: Any, batches: int) -> Any:
        return loader.dataset.state_dict()


class Mosaic(Way):
    package = "streaming"
    name = "MosaicML Streaming, 0 workers"
    remark = "rows in its own format"

    def folder(self, data: Data) -> Path:
        return data.folder / "mosaic"

    def prepare(self, data: Data) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(self.folder(data)), columns={"id": "int", "text": "str"}) as writer:
            for row in StreamRows(data):
                writer.write(row)

    def open(self, data: Data, state: Any = None) -> Any:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        rows = StreamingDataset(
            local=str(self.folder(data)), shuffle=True, shuffle_seed=SEED, batch_size=data.batch_size
        )
        return loaded(StreamingDataLoader(rows, batch_size=data.batch_size), state)


class LitData(Way):
    package = "litdata"
    name = "LitData, 0 workers"
    remark = "rows in its own format"

    def folder(self, data: Data) -> Path:
        return data.folder / "litdata"

    def prepare(self, data: Data) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.folder(data)), chunk_bytes=16 << 20)
        for number, row in enumerate(StreamRows(data)):
            writer[number] = row
        writer.done()
        writer.merge()

    def open(self, data: Data, state: Any = None) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        rows = StreamingDataset(str(self.folder(data)), shuffle=True, seed=SEED)
        return loaded(StreamingDataLoader(rows, batch_size=data.batch_size), state)


class Energon(Way):
    package = "megatron.energon"
    name = "Megatron-Energon, 0 workers"
    remark = "rows in tar files"

    def folder(self, data: Data) -> Path:
        return data.folder / "tar"

    def prepare(self, data: Data) -> None:
        from megatron.energon.flavors import BaseWebdatasetFactory

        folder = self.folder(data)
        write_tar(folder, data)
        (folder / ".nv-meta").mkdir()
        shards = sorted(file.name for file in folder.glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=2)
        kind = {"__module__": "megatron.energon", "__class__": "TextWebdataset", "field_map": {"text": "txt"}}
        (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(kind))  # JSON is YAML, too

    def open(self, data: Data, state: Any = None) -> Any:
        from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        options: dict[str, Any] = {"shuffle_buffer_size": None, "max_samples_per_sequence": 100, "repeat": False}
        rows = get_train_dataset(self.folder(data), worker_config=config, batch_size=data.batch_size, **options)
        loader = get_savable_loader(rows, worker_config=config)
        if state is not None:
            loader.restore_state_rank(state)
        return loader

    def state(self, loader: Any, batches: int) -> Any:
        return loader.save_state_rank()

    def ids(self, batch: Any) -> list[int]:
        return [int(key.rsplit("/", 1)[-1]) for key in batch.__key__]


def ways() -> list[Way]:
    """All lines of the table; the first is what the others are compared with."""
    return [
        Sharded(0),
        Sharded(2),
        *(Streamed(format, workers) for format in ("jsonl", "text", "tar") for workers in (0, 2)),
        Elastic(0),
        Skipping(),
        StatefulMap(0),
        StatefulMap(2),
        StatefulStream(0),
        StatefulStream(2),
        HuggingFace(shuffle=False),
        HuggingFace(shuffle=True),
        Mosaic(),
        LitData(),
        Energon(),
        Arrow(),
    ]
