"""What a resume over sharded files opens and reads, counted on disk and on real servers: of finished files none."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_resume import ShardedDataset
from tests.counting import Counted
from tests.servers import Store

pytest_plugins = ["tests.servers"]

FILES, GROUPS, ROWS = 6, 4, 50
FOOTER = 64 * 1024
"""What pyarrow reads from the end of a file at least."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of four row groups of 100 KB."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    for file in range(FILES):
        ids = np.arange(ROWS * GROUPS) + file * ROWS * GROUPS
        text = [random.bytes(1000).hex() for _ in ids]
        pq.write_table(pa.table({"id": ids, "text": text}), folder / f"{file}.parquet", row_group_size=ROWS)
    return folder


def group_bytes(folder: Path) -> int:
    """The largest row group."""
    groups = [m.row_group(g) for m in map(pq.read_metadata, folder.iterdir()) for g in range(m.num_row_groups)]
    return max(sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups)


def file_of(row: int) -> str:
    return f"{row // (ROWS * GROUPS)}.parquet"


def make(path: Any, **options: Any) -> tuple[Any, ShardedDataset]:
    return ShardedDataset.create_dataloader(path, **{"batch_size": 10, "shuffle": True, "seed": 42, **options})


def taken(loader: Any, steps: int) -> list[int]:
    return [i for batch in itertools.islice(loader, steps) for i in batch["id"].tolist()]


def finished(rows: list[int]) -> set[str]:
    """The files of which every row is among ``rows``."""
    counts = {f"{file}.parquet": 0 for file in range(FILES)}
    for row in rows:
        counts[file_of(row)] += 1
    return {name for name, count in counts.items() if count == ROWS * GROUPS}


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_opens_only_what_is_left_and_reads_a_row_group(
    folder: Path, tmp_path: Path, lanes: int, workers: int
) -> None:
    counted = Counted(tmp_path / "log")
    options = {"lanes": lanes, "num_workers": workers, "storage_options": counted.options}
    loader, dataset = make(counted.url(folder), **options)
    seen = taken(loader, 95)
    state = dataset.state_dict()
    done = finished(seen)
    assert len(done) >= 3
    del loader
    counted.clear()
    loader, dataset = make(counted.url(folder), **options)
    dataset.load_state_dict(state)
    batches = iter(loader)
    first = [i for _ in range(1 if workers == 0 else lanes) for i in next(batches)["id"].tolist()]
    if workers == 0:  # others fetch ahead
        [name] = {file_of(row) for row in first}
        assert counted.opens() == {name: 1}
        assert counted.bytes_read()[name] <= group_bytes(folder) + FOOTER + 100
    rest = first + [i for batch in batches for i in batch["id"].tolist()]
    assert sorted(seen + rest) == list(range(FILES * GROUPS * ROWS))
    assert counted.asked() & done == set()
    assert set(counted.opens()) == {file_of(row) for row in rest}


def test_each_process_reads_each_row_group_once_and_none_reads_anothers(folder: Path, tmp_path: Path) -> None:
    counted = Counted(tmp_path / "log")
    ranks = [
        make(counted.url(folder), rank=rank, world_size=2, num_workers=2, storage_options=counted.options)[0]
        for rank in range(2)
    ]
    for loader in ranks:
        len(loader)
    counted.clear()
    rows = [i for loader in ranks for i in taken(loader, 10**6)]
    assert sorted(rows) == list(range(FILES * GROUPS * ROWS))
    data = sum(file.stat().st_size for file in folder.iterdir())
    # each of 4 lanes begins in the middle of a file, of which two processes then read the footer and a row group
    assert sum(counted.bytes_read().values()) < 1.1 * data + 4 * (group_bytes(folder) + FOOTER) + FILES * FOOTER


def test_making_a_loader_and_loading_its_position_opens_nothing(folder: Path, tmp_path: Path) -> None:
    counted = Counted(tmp_path / "log")
    loader, dataset = make(counted.url(folder), storage_options=counted.options)
    taken(loader, 5)
    state = dataset.state_dict()
    counted.clear()
    loader, dataset = make(counted.url(folder), storage_options=counted.options)
    dataset.load_state_dict(state)
    assert len(loader) == FILES * GROUPS * ROWS // 10
    assert dataset.state_dict() == state
    assert counted.opens() == {}


def test_only_the_columns_asked_for_are_fetched(folder: Path, tmp_path: Path) -> None:
    counted = Counted(tmp_path / "log")
    loader, _ = make(counted.url(folder), columns=["id"], storage_options=counted.options)
    taken(loader, 10**6)
    data = sum(file.stat().st_size for file in folder.iterdir())
    assert sum(counted.bytes_read().values()) < 2 * FILES * FOOTER + data // 20


def upload(folder: Path, store: Store) -> None:
    filesystem, target = fsspec.url_to_fs(store.url + "/data", **store.storage_options)
    filesystem.makedirs(target, exist_ok=True)
    for file in folder.iterdir():
        filesystem.put_file(str(file), f"{target}/{file.name}")


@contextlib.contextmanager
def counted_requests(store: Store) -> Iterator[list[tuple[str, int]]]:
    """Every piece of a file that the store's client fetches in the block: the file's name, and how many bytes."""
    filesystem = store.filesystem()
    fetched: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(filesystem)}:
            stock = cls._open

            def opened(self: Any, path: str, *args: Any, stock: Any = stock, **options: Any) -> Any:
                file = stock(self, path, *args, **options)
                fetched.append((os.path.basename(path), 0))
                fetch = getattr(file, "cache", None)
                if fetch is not None:  # what really goes over the wire passes here
                    inner = fetch.fetcher

                    def fetcher(start: int, end: int) -> Any:
                        fetched.append((os.path.basename(path), end - start))
                        return inner(start, end)

                    fetch.fetcher = fetcher
                return file

            patch.setattr(cls, "_open", opened)
        yield fetched


def test_a_resume_from_a_store_reads_a_row_group_and_nothing_of_finished_files(folder: Path, store: Store) -> None:
    if store.protocol != "s3":
        pytest.skip("counted on S3; the others are read the same way, see test_remote_shards")
    upload(folder, store)
    options = {"lanes": 1, "storage_options": store.storage_options}
    loader, dataset = make(store.url + "/data", **options)
    seen = taken(loader, 95)
    state = dataset.state_dict()
    del loader, dataset
    with counted_requests(store) as fetched:
        loader, dataset = make(store.url + "/data", **options)
        dataset.load_state_dict(state)
        assert fetched == []
        batches = iter(loader)
        first = next(batches)["id"].tolist()
        [name] = {file_of(row) for row in first}
        assert {where for where, _ in fetched} == {name}
        assert sum(size for _, size in fetched) <= group_bytes(folder) + FOOTER + 100
        rest = first + [i for batch in batches for i in batch["id"].tolist()]
    assert sorted(seen + rest) == list(range(FILES * GROUPS * ROWS))
    assert {where for where, _ in fetched} & finished(seen) == set()


def test_remote_shards_are_read_by_workers_too(folder: Path, store: Store) -> None:
    upload(folder, store)
    loader, dataset = make(store.url + "/data", num_workers=2, storage_options=store.storage_options)
    seen = taken(loader, 7)
    state = dataset.state_dict()
    loader, dataset = make(store.url + "/data/*.parquet", num_workers=0, storage_options=store.storage_options)
    dataset.load_state_dict(state)
    assert sorted(seen + taken(loader, 10**6)) == list(range(FILES * GROUPS * ROWS))
