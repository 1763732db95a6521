"""`ShardedDataset` over parquet: what it gives, that it goes on exactly, and what it says when files have changed."""

from __future__ import annotations

import io
import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_resume import CheckpointMismatchError, ShardedDataset, Tail, make_resumable
from lightning_resume.data.sharded.files import Shard
from lightning_resume.data.sharded.order import ShardedOrder
from lightning_resume.data.sharded.table import Table
from tests.toy_shards import GROUP, SIZES, TOTAL, add_noise, table, write_parquet
from tests.toy_trainer import trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("shards"))


def make(path: Any, **options: Any) -> tuple[Any, ShardedDataset]:
    return ShardedDataset.create_dataloader(path, **{"batch_size": 4, "shuffle": True, "seed": 42, **options})


def stored(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def ids(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch["id"].tolist()]


# -- what it gives


def test_a_batch_is_a_dict_of_columns(folder: Path) -> None:
    loader, _ = make(folder, shuffle=False, batch_size=3)
    batch = next(iter(loader))
    assert torch.equal(batch["id"], torch.tensor([0, 1, 2]))
    assert torch.equal(batch["half"], torch.tensor([0.0, 0.5, 1.0]))
    assert batch["text"] == ["row 0", "row 1", "row 2"]
    assert torch.equal(batch["pair"], torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32))
    assert [part.tolist() for part in batch["some"]] == [[], [1], [2, 2]]
    assert batch["maybe"] == [None, 1, 2]
    assert torch.equal(batch["even"], torch.tensor([True, False, True]))


def test_the_batch_may_be_written_to(folder: Path) -> None:
    loader, _ = make(folder, columns=["id"])
    for batch in loader:
        batch["id"].zero_()
    assert sorted(ids(loader)) == list(range(TOTAL))


@pytest.mark.parametrize(("output", "kind"), [("numpy", np.ndarray), ("python", list), ("arrow", pa.ChunkedArray)])
def test_columns_come_as_asked_for(folder: Path, output: str, kind: type) -> None:
    loader, _ = make(folder, shuffle=False, output=output)
    batch = next(iter(loader))
    assert isinstance(batch["id"], kind)
    assert [int(str(i)) for i in batch["id"]] == [0, 1, 2, 3]


def test_only_the_columns_asked_for_are_read(folder: Path) -> None:
    loader, _ = make(folder, columns=["text", "id"])
    assert list(next(iter(loader))) == ["text", "id"]


def test_a_transform_gets_a_dict_and_collate_fn_a_list(folder: Path) -> None:
    loader, _ = make(folder, shuffle=False, transform=lambda row: row["id"] * 10, collate_fn=list)
    assert next(iter(loader)) == [0, 10, 20, 30]


def test_without_a_collate_fn_what_the_transform_makes_is_put_together_as_torch_does(folder: Path) -> None:
    pairs, _ = make(folder, shuffle=False, transform=lambda row: (torch.tensor(row["half"]), row["text"]))
    halves, texts = next(iter(pairs))
    assert torch.equal(halves, torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert list(texts) == ["row 0", "row 1", "row 2", "row 3"]
    dicts, _ = make(folder, shuffle=False, transform=lambda row: {"x": row["id"] / 2, "length": [0] * row["id"]})
    batch = next(iter(dicts))
    assert torch.equal(batch["x"], torch.tensor([0, 0.5, 1, 1.5], dtype=batch["x"].dtype))
    assert [len(zeros) for zeros in batch["length"]] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_a_trainer_validates_tests_and_predicts_with_it(folder: Path, tmp_path: Path) -> None:
    class Lists(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += batch["id"].tolist()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += batch["id"].tolist()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += batch["id"].tolist()
            return batch_idx

    for run in ("validate", "test", "predict"):
        module = Lists()
        getattr(trainer(tmp_path), run)(module, make(folder)[0])
        assert sorted(module.seen) == list(range(TOTAL)), run


def test_a_collate_fn_alone_gets_rows(folder: Path) -> None:
    loader, _ = make(folder, shuffle=False, collate_fn=lambda rows: [row["text"] for row in rows])
    assert next(iter(loader)) == ["row 0", "row 1", "row 2", "row 3"]


def test_without_shuffle_rows_come_as_they_lie(folder: Path) -> None:
    for workers in (0, 2):
        assert ids(make(folder, shuffle=False, num_workers=workers)[0]) == list(range(TOTAL))


def test_length_is_that_of_torch(folder: Path) -> None:
    loader, dataset = make(folder)
    assert len(dataset) == TOTAL
    assert len(loader) == len(list(loader)) == -(-TOTAL // 4)
    assert len(make(folder, drop_last=True)[0]) == TOTAL // 4


def test_shuffling_mixes_files_row_groups_and_rows(folder: Path) -> None:
    loader, _ = make(folder)
    first, second = ids(loader), ids(loader)
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert first != second
    moved = sum(abs(a - b) != 1 for a, b in itertools.pairwise(first))
    assert moved > TOTAL // 2


def test_another_seed_is_another_order(folder: Path) -> None:
    assert ids(make(folder)[0]) != ids(make(folder, seed=43)[0])
    assert ids(make(folder)[0]) == ids(make(folder)[0])


def test_a_window_of_more_row_groups_mixes_more(tmp_path: Path) -> None:
    write_parquet(tmp_path, (GROUP * 30,))
    spread = lambda order: np.abs(np.diff(order)).mean()  # noqa: E731
    assert spread(ids(make(tmp_path, window=30)[0])) > 2 * spread(ids(make(tmp_path, window=1)[0]))


@pytest.mark.parametrize("form", ["folder", "text", "glob", "file", "list", "mixed list", "url"])
def test_a_path_is_a_folder_a_glob_a_file_or_a_list(folder: Path, form: str) -> None:
    one = folder / "part-000.parquet"
    paths: dict[str, tuple[Any, int]] = {
        "folder": (folder, TOTAL),
        "text": (f"{folder}/", TOTAL),
        "glob": (str(folder / "part-00[02].parquet"), SIZES[0] + SIZES[2]),
        "file": (one, SIZES[0]),
        "list": ([folder / "part-002.parquet", str(one)], SIZES[0] + SIZES[2]),
        "mixed list": ([str(folder / "*-001.parquet"), one], SIZES[0] + SIZES[1]),
        "url": (f"file://{folder}", TOTAL),
    }
    path, rows = paths[form]
    assert len(make(path)[1]) == rows


def test_a_list_keeps_its_order(folder: Path) -> None:
    loader, _ = make([folder / "part-002.parquet", folder / "part-000.parquet"], shuffle=False)
    assert ids(loader)[:3] == [18, 19, 20]


def test_files_that_are_no_data_are_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "year=2024", (5,))
    write_parquet(tmp_path / "_temporary", (5,), first=5)
    for name in ("_SUCCESS", ".part-000.parquet.crc", "notes.txt", "_metadata.parquet"):
        (tmp_path / name).write_text("nothing")
    assert sorted(ids(make(tmp_path)[0])) == list(range(5))


# -- what is refused


def test_no_files_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no files that end in .parquet or .pq at .*Pass a folder, a glob"):
        make(tmp_path)


def test_a_file_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="named 2 times"):
        make([folder, folder / "part-000.parquet"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format is 'csv'; pass one of"),
        ({"lanes": 0}, "lanes is 0; pass at least 1"),
        ({"window": -1}, "window is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 1}, "pass both or none"),
        ({"output": "pandas"}, "pandas"),
        ({"tail": "both"}, "both"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_an_unknown_column_is_named_with_those_that_there_are(folder: Path) -> None:
    loader, _ = make(folder, columns=["id", "label"])
    with pytest.raises(ValueError, match=r"no column 'label'; it has \['id', 'text'"):
        next(iter(loader))


def test_a_dataset_without_a_loader_says_where_the_position_is(folder: Path) -> None:
    dataset = pickle.loads(pickle.dumps(make(folder)[1]))
    with pytest.raises(RuntimeError, match="create_dataloader"):
        dataset.state_dict()


def test_fewer_rows_than_ranks_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, (2,))
    loader, _ = make(tmp_path, rank=0, world_size=3)
    with pytest.raises(ValueError, match="2 samples for 3 ranks"):
        next(iter(loader))


# -- going on

Step = tuple[int, int, int, int]
"""World size, workers, batch size, and number of steps."""


def serve(path: Path, state: Any, steps: list[Step], **options: Any) -> tuple[list[int], Any]:
    """The ids of all ranks in the order of steps, from ``state`` to the epoch's end at most, and the last state."""
    seen: list[int] = []
    ended = False
    for world_size, workers, batch_size, count in steps:
        ranks = [
            make(path, rank=rank, world_size=world_size, num_workers=workers, batch_size=batch_size, **options)
            for rank in range(world_size)
        ]
        for _, dataset in ranks:
            if state is not None:
                dataset.load_state_dict(state)
        iterators = [iter(loader) for loader, _ in ranks]
        for _ in range(count):
            batches = [next(iterator, None) for iterator in iterators]
            if batches[0] is None:
                assert batches == [None] * world_size  # no rank is left alone in a collective
                ended = True
                break
            seen += [i for batch in batches if batch for i in batch["id"].tolist()]
        states = [stored(dataset.state_dict()) for _, dataset in ranks]
        assert all(state == states[0] for state in states)
        state = states[0]
        if ended:
            break
    return seen, state


ALL = 10**6


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.tuples(st.integers(1, 4), st.just(0), st.integers(1, 9)),
    chain=st.lists(st.tuples(st.integers(1, 4), st.just(0), st.integers(1, 9), st.integers(0, 5)), max_size=4),
    last=st.tuples(st.integers(1, 4), st.just(0), st.integers(1, 9)),
    steps=st.integers(0, 6),
)
def test_any_chain_of_topologies_serves_the_uninterrupted_order(
    folder: Path, first: Any, chain: list[Step], last: Any, steps: int
) -> None:
    whole, _ = serve(folder, None, [(*first, ALL)])
    assert Counter(whole) == Counter(range(TOTAL))
    seen, _ = serve(folder, None, [(*first, steps), *chain, (*last, ALL)])
    assert seen == whole


def test_the_states_of_all_ranks_are_taken_as_a_list(folder: Path) -> None:
    whole, _ = serve(folder, None, [(2, 0, 4, ALL)])
    ranks = [make(folder, rank=rank, world_size=2) for rank in range(2)]
    seen = [
        i
        for batches in zip(*[iter(loader) for loader, _ in ranks], strict=True)
        for b in batches
        for i in b["id"].tolist()
    ][:8]
    ranks = [make(folder, rank=rank, world_size=2) for rank in range(2)]
    for loader, _ in ranks:
        next(iter(loader))
    states = stored([dataset.state_dict() for _, dataset in ranks])
    assert seen + serve(folder, states, [(1, 0, 5, ALL)])[0] == whole


def test_workers_may_change_too(folder: Path) -> None:
    whole, _ = serve(folder, None, [(2, 2, 4, ALL)])
    seen, _ = serve(folder, None, [(2, 2, 4, 2), (1, 1, 3, 3), (2, 0, 5, 2), (1, 2, 2, ALL)])
    assert seen == whole
    assert sorted(whole) == list(range(TOTAL))


@pytest.mark.parametrize("workers", [0, 2])
def test_it_resumes_exactly_from_every_batch_of_three_epochs(folder: Path, workers: int) -> None:
    options = {"transform": add_noise, "collate_fn": list, "num_workers": workers, "batch_size": 20}
    loader, dataset = make(folder, **options)
    batches, states = [], [(0, 0, stored(dataset.state_dict()))]
    for epoch in range(3):
        for batch in loader:
            batches.append(batch)
            states.append((len(batches), epoch, stored(dataset.state_dict())))
        states.append((len(batches), epoch + 1, stored(dataset.state_dict())))
    for taken, ended, state in states:
        loader, dataset = make(folder, **options)
        dataset.load_state_dict(state)
        assert [batch for _ in range(ended, 3) for batch in loader] == batches[taken:]


@pytest.mark.parametrize("tail", list(Tail))
def test_the_end_of_an_epoch_is_as_the_tail_says(folder: Path, tail: Tail) -> None:
    epochs, state = [], None
    for _ in range(3):
        seen, state = serve(folder, state, [(3, 0, 4, ALL)], tail=tail)
        epochs.append(seen)
    together = Counter(itertools.chain.from_iterable(epochs))
    if tail is Tail.EVEN:
        assert together == Counter(dict.fromkeys(range(TOTAL), 3))
    if tail is Tail.DROP:
        assert [len(epoch) for epoch in epochs] == [TOTAL // 12 * 12] * 3
    if tail is Tail.CARRY:
        assert all(len(epoch) % 12 == 0 for epoch in epochs)
        assert sum(map(len, epochs)) >= 3 * TOTAL
        assert set(together.values()) <= {3, 4}


def test_set_epoch_after_a_load_keeps_the_position(folder: Path) -> None:
    loader, dataset = make(folder)
    dataset.set_epoch(2)
    iterator = iter(loader)
    seen = [next(iterator)["id"].tolist() for _ in range(3)]
    state = stored(dataset.state_dict())
    rest = ids(iterator)
    loader, dataset = make(folder)
    dataset.load_state_dict(state)
    dataset.set_epoch(2)
    assert dataset.epoch == 2
    assert ids(loader) == rest
    assert sorted(list(itertools.chain.from_iterable(seen)) + rest) == list(range(TOTAL))


def test_the_loop_of_the_readme_goes_on(folder: Path) -> None:
    """As users write it: `set_epoch` at every epoch, the dataset's state beside the model's."""
    whole = []
    loader, dataset = make(folder)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        whole += [(epoch, batch["id"].tolist()) for batch in loader]
    seen = []
    loader, dataset = make(folder)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for step, batch in enumerate(loader):
            seen.append((epoch, batch["id"].tolist()))
            if (epoch, step) == (1, 4):
                state = stored(dataset.state_dict())
                break
    loader, dataset = make(folder, num_workers=1)
    dataset.load_state_dict(state)
    for epoch in range(dataset.epoch, 3):
        dataset.set_epoch(epoch)
        seen += [(epoch, batch["id"].tolist()) for batch in loader]
    assert seen == whole


def test_a_samples_random_numbers_do_not_depend_on_topology(folder: Path) -> None:
    def noise(**options: Any) -> dict[int, Any]:
        loader, _ = make(folder, transform=add_noise, collate_fn=list, **options)
        return {row["id"]: row["noise"] for batch in loader for row in batch}

    alone = noise()
    assert len({tuple(values) for values in alone.values()}) == TOTAL
    assert noise(num_workers=2, batch_size=9) == alone
    halves = [noise(rank=rank, world_size=2, batch_size=3) for rank in range(2)]
    assert {**halves[0], **halves[1]} == alone


def test_it_works_in_a_loader_of_the_users_own(folder: Path) -> None:
    dataset = ShardedDataset.from_path(folder)
    loader = make_resumable(DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=list), seed=42)
    seen = [row["id"] for batch in loader for row in batch]
    assert sorted(seen) == list(range(TOTAL))
    assert loader.capabilities.elastic


# -- other files


def saved_midway(path: Path) -> tuple[Any, list[int]]:
    loader, dataset = make(path)
    seen = [next(iter(loader))["id"].tolist()]
    return stored(dataset.state_dict()), seen[0]


def test_added_removed_and_resized_files_are_named_before_anything_changes(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    state, _ = saved_midway(tmp_path)
    (tmp_path / "part-001.parquet").unlink()
    write_parquet(tmp_path, (30,), name="part")
    write_parquet(tmp_path, (2,), first=500, name="new")
    _loader, dataset = make(tmp_path)
    before = stored(dataset.state_dict())
    with pytest.raises(CheckpointMismatchError) as caught:
        dataset.load_state_dict(state)
    for part in ("1 added (new-000.parquet)", "1 removed (part-001.parquet)", "1 resized (part-000.parquet)"):
        assert part in str(caught.value)
    assert "6 files" in str(caught.value)
    assert stored(dataset.state_dict()) == before


def test_files_that_were_added_are_read_from_the_next_epoch_on_if_asked_for(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    state, seen = saved_midway(tmp_path)
    write_parquet(tmp_path, (9, 3), first=TOTAL, name="a-first-by-name")
    with pytest.raises(CheckpointMismatchError, match="append_files=True"):
        make(tmp_path)[0].load_state_dict(state)
    loader, dataset = make(tmp_path, append_files=True)
    dataset.load_state_dict(state)
    assert sorted(seen + ids(loader)) == list(range(TOTAL))
    epoch = [next(iter(loader))["id"].tolist()]
    again = stored(dataset.state_dict())
    loader, dataset = make(tmp_path)
    dataset.load_state_dict(again)
    assert sorted(epoch[0] + ids(loader)) == list(range(TOTAL + 12))
    assert len(dataset) == TOTAL + 12
    assert sorted(ids(loader)) == list(range(TOTAL + 12))


def test_files_that_come_in_reach_persistent_workers(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    state, seen = saved_midway(tmp_path)
    write_parquet(tmp_path, (9,), first=TOTAL, name="more")
    loader, dataset = make(tmp_path, append_files=True, num_workers=2, persistent_workers=True)
    dataset.load_state_dict(state)
    assert sorted(seen + ids(loader)) == list(range(TOTAL))
    assert sorted(ids(loader)) == list(range(TOTAL + 9))


def test_samples_left_over_when_files_are_added_are_not_lost(tmp_path: Path) -> None:
    write_parquet(tmp_path, (7, 6))  # 13 rows: at 3 ranks of 4, one is left over and opens the next epoch
    first, state = serve(tmp_path, None, [(3, 0, 4, ALL)])
    assert len(first) == 13 or len(first) == 12
    write_parquet(tmp_path, (9,), first=13, name="more")
    second, _ = serve(tmp_path, state, [(3, 0, 4, ALL)], append_files=True)
    assert Counter(first + second) >= Counter(range(13)) + Counter(range(22)) - Counter()
    assert len(first + second) == 13 + 22


def test_a_folder_that_was_moved_is_the_same(tmp_path: Path) -> None:
    write_parquet(tmp_path / "here")
    state, seen = saved_midway(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    loader, dataset = make(tmp_path / "there")
    dataset.load_state_dict(state)
    assert sorted(seen + ids(loader)) == list(range(TOTAL))


def test_a_file_written_anew_with_other_row_groups_is_noticed(tmp_path: Path) -> None:
    write_parquet(tmp_path, (14,))
    state, _ = saved_midway(tmp_path)
    file = tmp_path / "part-000.parquet"
    size = file.stat().st_size
    pq.write_table(table(0, 14), file, row_group_size=14)
    with open(file, "r+b") as opened:  # of the same size as before: only the footer tells
        content = opened.read()
        opened.seek(0)
        opened.write(
            content[:4] + bytes(max(0, size - len(content))) + content[4:] if len(content) <= size else content
        )
    loader, dataset = make(tmp_path)
    if file.stat().st_size != size:
        with pytest.raises(CheckpointMismatchError, match="resized"):
            dataset.load_state_dict(state)
        return
    dataset.load_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match=r"row groups of .*part-000.parquet"):
        ids(loader)


def test_another_seed_or_shuffle_is_refused(folder: Path) -> None:
    state, _ = saved_midway(folder)
    with pytest.raises(CheckpointMismatchError, match="not the same seed"):
        make(folder, seed=7)[0].load_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match="not the same order"):
        make(folder, shuffle=False)[0].load_state_dict(state)


# -- the order, and the table


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 30), max_size=5), min_size=1, max_size=8),
    lanes=st.integers(1, 9),
    block=st.integers(1, 9),
    window=st.integers(1, 4),
    shuffle=st.booleans(),
    cuts=st.lists(st.integers(0, 600), max_size=3),
)
def test_the_order_is_a_permutation_with_random_access(
    rows: list[list[int]], lanes: int, block: int, window: int, shuffle: bool, cuts: list[int]
) -> None:
    made = Table([Shard(path=f"{i}", size=1) for i in range(len(rows))], rows)
    plan: dict[str, Any] = {"shards": len(rows), "lanes": lanes, "block": block, "window": window}
    order = ShardedOrder(made, **plan, seed=3, epoch=1, shuffle=shuffle)
    whole = order.take(0, len(order)).tolist()
    assert sorted(whole) == list(range(sum(map(sum, rows))))
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [order.take(a, b).tolist() for a, b in itertools.pairwise(edges)]
    assert list(itertools.chain.from_iterable(pieces)) == whole


def test_each_lane_keeps_to_files_of_its_own() -> None:
    """With a lane for each process that reads, and its batches as blocks, no two processes read the same unit."""
    made = Table([Shard(path=f"{i}", size=1) for i in range(8)], [[100] * 4] * 8)
    order = ShardedOrder(made, shards=8, lanes=4, block=10, window=1, seed=3, epoch=0, shuffle=True)
    units: dict[int, set[int]] = {lane: set() for lane in range(4)}
    for step in range(len(order) // 10):
        units[step % 4] |= set((order.take(step * 10, step * 10 + 10) // 100).tolist())
    assert sum(map(len, units.values())) == len(set().union(*units.values())) == 32


def test_a_table_of_many_files_is_small() -> None:
    made = Table(
        [Shard(path=f"year=2024/part-{i:05d}.parquet", size=10**8) for i in range(10_000)],
        [[10**5] * 99 + [7]] * 10_000,
    )
    data = made.to_bytes()
    assert len(data) < 100_000
    again = Table.from_bytes(data)
    assert (again.shards, again.rows) == (made.shards, made.rows)
    assert len(again) == 10_000 * (99 * 10**5 + 7)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"x\x9c\x03\x00\x00\x00\x00\x01"])
def test_a_damaged_table_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"table of files is damaged.*load another checkpoint"):
        Table.from_bytes(data)
