"""What a resumed stream reads: nothing of finished files, of an open one at most a window again; changes of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_resume.data.sharded import blocks
from lightning_resume.errors import CheckpointMismatchError
from tests.counting import Counted
from tests.servers import FaultyProxy, Store
from tests.streams import FORMATS, LENGTH, Ranks, make, number_of, plain, samples, stored, write

pytest_plugins = ["tests.servers"]

BIG = (400, 380, 420)
"""Records in each file: several blocks of these tests."""
WINDOW = 20


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"FIRST_BLOCK": 512, "LARGEST_BLOCK": 1024}.items():
        monkeypatch.setattr(blocks, name, size)


def taken(loader: Any, count: int) -> list[int]:
    batches = iter(loader)
    return [number_of(sample) for _ in range(count) for sample in next(batches)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("workers", [0, 1])
def test_finished_files_are_not_opened_and_the_open_one_once(tmp_path: Path, name: str, workers: int) -> None:
    folder = write(tmp_path / "data", name, (8, 8, 8))
    counted = Counted(tmp_path / "log")
    options = {"storage_options": counted.options, "lanes": 1, "num_workers": workers}
    loader = make(counted.url(folder), name, **options)
    order = taken(loader, 3)
    state = stored(loader.state_dict())
    again = make(counted.url(folder), name, **options)
    counted.clear()
    again.load_state_dict(state)
    assert counted.calls() == []
    order += [number_of(sample) for batch in again for sample in batch]
    assert sorted(order) == list(range(24))
    finished = f"shard-{order[0] // 8}{FORMATS[name][1]}"
    assert finished not in counted.asked()
    assert set(counted.opens().values()) == {1}
    assert len(counted.opens()) == 2


@pytest.mark.parametrize("name", ["jsonl", "text", "jsonl.zst, frames", "tar"])
@pytest.mark.parametrize("done", [0.1, 0.5, 0.9])
def test_of_an_open_file_at_most_a_window_is_read_again(tmp_path: Path, name: str, done: float) -> None:
    folder = write(tmp_path / "data", name, BIG)
    counted = Counted(tmp_path / "log")
    options = {"storage_options": counted.options, "lanes": 1, "window": WINDOW}
    loader = make(counted.url(folder), name, **options)
    batches = int(sum(BIG) * done / 4)
    before = taken(loader, batches)
    again = make(counted.url(folder), name, **options)
    again.load_state_dict(stored(loader.state_dict()))
    counted.clear()
    rest = [number_of(sample) for batch in again for sample in batch]
    assert sorted(before + rest) == list(range(sum(BIG)))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (first, *_), *_ = counted.ranges().items()
    begin = counted.ranges()[first][0][0]
    seen = {number for number in before if first.startswith(f"shard-{shard_of(number)}.")}
    assert begin > 0 or len(seen) < 2 * WINDOW
    left = 1 - (len(seen) - 2 * WINDOW) / BIG[int(first[6])]
    assert counted.bytes_read()[first] <= left * sizes[first] * 1.5 + 2048
    for start, end in counted.ranges()[first]:
        assert end - start <= 1024
    assert counted.opens()[first] == 1


def shard_of(number: int) -> int:
    return 0 if number < BIG[0] else 1 if number < BIG[0] + BIG[1] else 2


def test_a_whole_epoch_reads_each_byte_about_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", BIG)
    counted = Counted(tmp_path / "log")
    loader = make(counted.url(folder), storage_options=counted.options, lanes=3, window=WINDOW)
    assert sum(1 for _ in loader) == sum(BIG) / 4
    for name, count in counted.bytes_read().items():
        assert count <= 1.2 * (folder / name).stat().st_size + 2048


def test_of_a_store_the_rest_is_read_in_ranges(store: Store, tmp_path: Path) -> None:
    if not store.name.startswith("s3"):
        pytest.skip("of other stores other tests tell")
    folder = write(tmp_path / "data", "jsonl", BIG)
    filesystem, root = store.filesystem(), store.url.removeprefix("s3://")
    for path in folder.iterdir():
        filesystem.pipe_file(f"{root}/{path.name}", path.read_bytes())
    with FaultyProxy(store.port) as proxy:
        options = {"storage_options": store.through(proxy.port).storage_options, "lanes": 1, "window": WINDOW}
        loader = make(store.url, **options)
        before = taken(loader, 150)
        again = make(store.url, **options)
        again.load_state_dict(stored(loader.state_dict()))
        proxy.requests.clear()
        rest = [number_of(sample) for batch in again for sample in batch]
        requests = [request.split("?")[0] for request in proxy.requests]
    assert sorted(before + rest) == list(range(sum(BIG)))
    finished = [name for name in ("shard-0", "shard-1", "shard-2") if all(f"/{name}" not in one for one in requests)]
    assert len(finished) == 1
    assert {request.split()[0] for request in requests} == {"GET"}


# -- changes of the files


def saved(folder: Path, steps: int = 2, **options: Any) -> tuple[list[int], Any]:
    loader = make(folder, lanes=2, **options)
    return taken(loader, steps), stored(loader.state_dict())


def test_added_removed_and_resized_files_are_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    _, state = saved(folder)
    write(folder, "jsonl", [2], first=100, begin=7)
    (folder / "shard-1.jsonl").unlink()
    with (folder / "shard-2.jsonl").open("a") as file:
        file.write("{}\n")
    loader = make(folder, lanes=2)
    expected = taken(make(folder, lanes=2), 3)
    with pytest.raises(CheckpointMismatchError) as caught:
        loader.load_state_dict(state)
    text = str(caught.value)
    assert "4 files" in text
    assert "1 added (shard-7.jsonl); 1 removed (shard-1.jsonl); 1 resized (shard-2.jsonl)" in text
    assert "Put the files back" in text
    assert taken(loader, 3) == expected


def test_appended_files_are_refused_unless_they_are_expected(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    before, state = saved(folder)
    write(folder, "jsonl", [5], first=LENGTH, begin=4)
    with pytest.raises(CheckpointMismatchError, match="append_files=True"):
        make(folder, lanes=2).load_state_dict(state)
    loader = make(folder, append_files=True)
    loader.load_state_dict(state)
    epochs = [[number_of(sample) for batch in loader for sample in batch] for _ in range(2)]
    assert sorted(before + epochs[0]) == list(range(LENGTH))
    assert sorted(epochs[1]) == list(range(LENGTH + 5))


def test_a_file_that_comes_in_a_folder_of_its_own_is_an_appended_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "first", "jsonl")
    _, state = saved(folder)
    write(folder / "second", "jsonl", [5], first=LENGTH)
    loader = make(folder, append_files=True)
    loader.load_state_dict(state)
    again = make(f"{folder}/*/*.jsonl", append_files=True)
    again.load_state_dict(state)
    assert len({number_of(sample) for _ in range(2) for batch in loader for sample in batch}) == LENGTH + 5


def test_random_numbers_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    here, there = (make(write(tmp_path / name, "jsonl")) for name in ("here", "there"))
    assert [plain(batch) for batch in here] == [plain(batch) for batch in there]


def test_appended_files_stay_where_a_later_state_was_saved(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    _, state = saved(folder)
    write(folder, "jsonl", [5], first=LENGTH, begin=4)
    loader = make(folder, append_files=True)
    loader.load_state_dict(state)
    list(loader)
    second = taken(loader, 2)
    again = make(folder)
    again.load_state_dict(stored(loader.state_dict()))
    second += [number_of(sample) for batch in again for sample in batch]
    assert sorted(second) == list(range(LENGTH + 5))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"window": 5}, "window"),
        ({"shuffle": False}, "order"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_another_order_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    folder = write(tmp_path / "data", "jsonl")
    _, state = saved(folder)
    with pytest.raises(CheckpointMismatchError, match=f"not the same {field}"):
        make(folder, lanes=2, **change).load_state_dict(state)


def test_the_state_of_one_rank_is_not_enough_for_another_world_size(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    ranks = Ranks(lambda **options: make(folder, **options), 2)
    seen = samples([ranks.step() or []])
    states = ranks.states()
    with pytest.raises(CheckpointMismatchError, match="a list of the states of all ranks"):
        make(folder).load_state_dict(states[0])
    with pytest.raises(CheckpointMismatchError, match="a list of the states of all ranks"):
        make(folder, rank=1, world_size=2).load_state_dict(states[0])
    alone = make(folder)
    alone.load_state_dict(states)
    assert sorted(seen + [number_of(sample) for batch in alone for sample in batch]) == list(range(LENGTH))
    for rank, state in enumerate(states):
        make(folder, rank=rank, world_size=2).load_state_dict(state)


def test_a_damaged_list_of_files_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    _, state = saved(folder)
    state["source"]["files"] = state["source"]["files"][:-3]
    with pytest.raises(ValueError, match="saved list of files is damaged"):
        make(folder).load_state_dict(state)


def test_the_state_is_a_few_numbers_for_each_lane(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", BIG)
    loader = make(folder, lanes=4, window=400)
    taken(loader, 50)
    assert all(len(numbers) == 5 for numbers in loader.state_dict()["lanes"].values())
    assert len(repr(loader.state_dict())) < 1000


# -- what is left behind


def test_an_abandoned_iterator_leaves_no_descriptor_open(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl", BIG)
    before = open_files(folder)
    loader = make(folder, lanes=3)
    batches = iter(loader)
    next(batches)
    next(batches)
    assert open_files(folder) > before
    del batches
    assert open_files(folder) == before


def open_files(folder: Path) -> int:
    paths = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if name.isdigit() and os.path.lexists(f"/proc/self/fd/{name}")
    ]
    return sum(path.startswith(str(folder)) for path in paths)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_abandoned_iterator_leaves_no_worker(tmp_path: Path, persistent: bool) -> None:
    folder = write(tmp_path / "data", "jsonl", BIG)
    loader = make(folder, num_workers=2, persistent_workers=persistent)
    batches = iter(loader)
    next(batches)
    del batches, loader  # a fixture of conftest.py looks for children
