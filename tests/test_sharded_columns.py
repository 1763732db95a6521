"""The columns of parquet files, by position and as streams: files that differ, parts of columns, and types."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_resume import BatchByLength, ShardedDataset, StreamMixture
from lightning_resume.data.sharded.formats.rows import Rows
from lightning_resume.data.sharded.table import Table
from tests.streams import plain, stored


def write(folder: Path, *tables: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / f"{number}.parquet")
    return folder


def make(path: Any, **options: Any) -> Any:
    return ShardedDataset.create_dataloader(path, **{"batch_size": 3, **options})[0]


def first(path: Any, **options: Any) -> Any:
    return next(iter(make(path, **options)))


# -- files that differ

INTS, LONGS = pa.array([1, 2], pa.int32()), pa.array([3, 2**40], pa.int64())


def test_the_types_of_files_become_one_that_holds_all(tmp_path: Path) -> None:
    write(tmp_path, {"a": INTS, "b": pa.array([None, None])}, {"b": ["x", "y"], "a": LONGS})
    batches = list(make(tmp_path, batch_size=2))
    assert [batch["a"].dtype for batch in batches] == [torch.int64] * 2
    assert [batch["a"].tolist() for batch in batches] == [[1, 2], [3, 2**40]]
    assert [batch["b"] for batch in batches] == [[None, None], ["x", "y"]]
    assert [list(batch) for batch in batches] == [["a", "b"]] * 2


def test_a_column_that_a_file_lacks_is_none_there(tmp_path: Path) -> None:
    write(tmp_path, {"a": INTS}, {"c": ["x", "y"], "a": INTS})
    batch = first(tmp_path)
    assert batch["a"].tolist() == [1, 2, 1]
    assert batch["c"] == [None, None, "x"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["x"])),
        (pa.array([1], pa.uint64()), pa.array([1], pa.int64())),
        (pa.array([1], pa.int64()), pa.array([1.0])),
        (pa.array(["x"]), pa.array([b"x"])),
        (pa.array([[1]]), pa.array([[0.5]])),
        (pa.array([True]), pa.array([1])),
    ],
)
def test_types_that_none_holds_are_refused_at_the_start_with_both_files(tmp_path: Path, one: Any, other: Any) -> None:
    write(tmp_path, {"id": [1], "a": one}, {"id": [2], "a": one}, {"id": [3], "a": other})
    with pytest.raises(ValueError, match=r"Column 'a' is .* in .*0.parquet and .* in .*2.parquet.*`columns`"):
        len(make(tmp_path))
    assert first(tmp_path, columns=["id"])["id"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (pa.array([1], pa.int16()), pa.array([0.5], pa.float32()), pa.float32()),
        (pa.array([1], pa.uint32()), pa.array([-1], pa.int32()), pa.int64()),
        (pa.array(["x"]), pa.array(["y"], pa.large_string()), pa.large_string()),
        (pa.array(["x"]).dictionary_encode(), pa.array(["y"]), pa.string()),
        (pa.array([[1]], pa.list_(pa.int8())), pa.array([[2]]), pa.list_(pa.int64())),
        (pa.array([{"x": 1}]), pa.array([{"x": 2, "y": 3}]), pa.struct({"x": pa.int64(), "y": pa.int64()})),
        (pa.array([1], pa.timestamp("ms")), pa.array([1], pa.timestamp("us")), pa.timestamp("us")),
    ],
)
def test_no_value_changes_when_types_become_one(tmp_path: Path, one: Any, other: Any, expected: Any) -> None:
    write(tmp_path, {"a": one}, {"a": other})
    for options in ({}, {"filter": bool}):
        batch = first(tmp_path, output="arrow", **options)
        assert batch.schema.field("a").type == expected
        assert batch.column("a").to_pylist() == [*one.cast(expected).to_pylist(), *other.cast(expected).to_pylist()]


def test_a_resume_knows_the_types_of_finished_files(tmp_path: Path) -> None:
    write(tmp_path, {"a": LONGS, "b": [1, 2]}, {"a": INTS})
    loader = make(tmp_path, batch_size=2)
    whole = list(loader)
    loader.set_epoch(0)
    next(iter(loader))
    state = stored(loader.state_dict())
    loader = make(tmp_path, batch_size=2)
    loader.load_state_dict(state)
    assert plain(list(loader)) == plain(whole[1:])


def test_files_that_come_in_are_held_to_the_types_too(tmp_path: Path) -> None:
    write(tmp_path, {"a": INTS})
    loader = make(tmp_path, batch_size=2)
    next(iter(loader))
    state = stored(loader.state_dict())
    pq.write_table(pa.table({"a": LONGS}), tmp_path / "9.parquet")
    loader = make(tmp_path, batch_size=2, append_files=True)
    loader.load_state_dict(state)
    assert [batch["a"].dtype for batch in itertools.chain(loader, loader)] == [torch.int64] * 2
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "9.parquet")
    loader = make(tmp_path, batch_size=2, append_files=True)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"Column 'a' is int32 in the files before and string in .*9.parquet"):
        list(itertools.chain(loader, loader))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path, pa.table([[1], [2], [3]], names=["a", "a", "b"]))
    for options in ({}, {"filter": bool}):
        with pytest.raises(ValueError, match=r"0.parquet has 2 columns named 'a'"):
            first(tmp_path, **options)
        assert first(tmp_path, columns=["b"], **options)["b"].tolist() == [3]


# -- parts of columns


@pytest.mark.parametrize("options", [{}, {"filter": bool}, {"transform": dict}])
def test_a_part_of_a_struct_may_be_read(tmp_path: Path, options: Any) -> None:
    write(tmp_path, {"n": [{"x": 1, "y": 2}], "i": [3]}, {"i": [4], "n": [{"x": 5, "y": 6}]})
    batch = first(tmp_path, columns=["i", "n.x"], **options)
    assert list(batch) == ["i", "n"]
    assert batch["n"] == [{"x": 1}, {"x": 5}]


def test_parts_of_structs_become_of_one_type_too(tmp_path: Path) -> None:
    narrow, wide = (pa.array([[{"x": 1, "y": "a"}]], pa.list_(pa.struct({"x": x, "y": pa.string()}))) for x in XS)
    write(tmp_path, {"n": narrow}, {"n": wide})
    for options in ({}, {"filter": bool}):
        batch = first(tmp_path, columns=["n.list.element.x"], output="arrow", **options)
        assert batch.schema.field("n").type == pa.list_(pa.struct({"x": pa.int64()}))
        assert batch.column("n").to_pylist() == [[{"x": 1}], [{"x": 1}]]


XS = (pa.int32(), pa.int64())


@pytest.mark.parametrize("options", [{}, {"filter": bool}])
@pytest.mark.parametrize("column", ["n.zzz", "i.zzz", "zzz", "n.x.y"])
def test_a_part_that_is_not_there_is_named(tmp_path: Path, column: str, options: Any) -> None:
    write(tmp_path, {"n": [{"x": 1, "y": 2}], "i": [3]})
    with pytest.raises(ValueError, match=rf"0.parquet has no column '{column}'; it has \['n', 'i'\]"):
        first(tmp_path, columns=[column], **options)


# -- types in streams

EXACT = {
    "uint64": pa.array([1, 2**63 + 1, 3, 4], pa.uint64()),
    "float32": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()),
    "int8": pa.array([1, 2, 3, 4], pa.int8()),
    "some": pa.array([None, 2, 3, 4], pa.int16()),
    "lists": pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int32())),
    "text": ["a", "b", "c", "d"],
}


@pytest.mark.parametrize("output", ["torch", "numpy", "python"])
@pytest.mark.parametrize("group", [None, BatchByLength(key=lambda _: 1, shuffle=False)])
def test_a_filter_changes_no_type_and_no_value(tmp_path: Path, output: str, group: Any) -> None:
    write(tmp_path, EXACT, EXACT)
    by_position = plain(list(make(tmp_path, output=output)))
    assert plain(list(make(tmp_path, output=output, filter=bool, group=group))) == by_position


def test_a_stream_names_the_files_of_types_that_none_holds(tmp_path: Path) -> None:
    write(tmp_path, {"a": [1, 2]}, {"a": ["x"]})
    with pytest.raises(ValueError, match=r"Column 'a' is int64 in .*0.parquet and string in .*1.parquet"):
        first(tmp_path, filter=bool)


def test_rows_that_a_filter_keeps_come_as_they_lie(tmp_path: Path) -> None:
    write(tmp_path, {"i": list(range(50))}, {"i": list(range(50, 100))})
    loader = make(tmp_path, batch_size=7, filter=lambda row: row["i"] % 9 == 4)
    assert [i for batch in loader for i in batch["i"].tolist()] == list(range(4, 100, 9))


def test_rows_that_wait_for_a_batch_do_not_keep_their_row_group(tmp_path: Path) -> None:
    pq.write_table(pa.table({"i": list(range(1000))}), tmp_path / "0.parquet", row_group_size=100)
    loader = make(tmp_path, batch_size=50, filter=lambda row: row["i"] % 100 == 0, collate_fn=Sizes())
    [others] = loader
    assert len(others) == 10
    assert max(others) <= 1  # the last of its row group, which the filter had just seen


class Sizes:
    """How many rows of others each row keeps in memory."""

    def __call__(self, rows: Any) -> Any:
        return [len(one) - 1 for one in gc.get_objects() if type(one) is Rows and len(one)]


def test_rows_of_parquet_beside_others_in_a_mixture(tmp_path: Path) -> None:
    longs = write(tmp_path / "longs", {"a": LONGS})
    texts = write(tmp_path / "texts", {"a": ["x", "y"]})
    shorts = write(tmp_path / "shorts", {"a": INTS})
    of = [ShardedDataset.from_path(folder) for folder in (longs, texts, shorts)]
    mixed = next(iter(StreamMixture(of[:2], shuffle=False).create_dataloader(batch_size=4)))
    assert sorted(map(str, mixed["a"])) == sorted(map(str, [3, 2**40, "x", "y"]))
    together = next(iter(StreamMixture(of[::2], shuffle=False).create_dataloader(batch_size=4)))
    assert sorted(together["a"].tolist()) == [1, 2, 3, 2**40]


def test_large_numbers_of_json_lines_are_not_rounded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"i": 1, "f": 1e300}}\n{{"i": {2**63 + 1}, "f": 0.5}}\n{{"i": 2, "f": 3}}\n')
    batch = first(tmp_path, format="jsonl")
    assert batch["i"] == [1, 2**63 + 1, 2]
    assert batch["f"].tolist() == [1e300, 0.5, 3.0]


def test_a_damaged_schema_in_a_state_is_said_to_be_damaged(tmp_path: Path) -> None:
    loader = make(write(tmp_path, {"a": INTS}), batch_size=1)
    next(iter(loader))
    state = loader.state_dict()
    table = Table.from_bytes(state["source"]["table"])
    state["source"]["table"] = Table(table.shards, table.rows, schema=b"nonsense").to_bytes()
    loader = make(tmp_path, batch_size=1)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"table of files is damaged.*load another checkpoint"):
        next(iter(loader))


def test_a_state_of_before_schemas_goes_on(tmp_path: Path) -> None:
    loader = make(write(tmp_path, {"a": INTS}, {"a": INTS}), batch_size=2)
    next(iter(loader))
    state = loader.state_dict()
    table = Table.from_bytes(state["source"]["table"])
    state["source"]["table"] = Table(table.shards, table.rows).to_bytes()
    loader = make(tmp_path, batch_size=2)
    loader.load_state_dict(state)
    assert [batch["a"].tolist() for batch in loader] == [[1, 2]]


# -- Arrow until somebody wants Python rows


def test_rows_by_number_reach_the_collate_function_as_one_table(tmp_path: Path) -> None:
    loader = make(write(tmp_path, {"a": INTS, "b": ["x", "y"]}))
    assert isinstance(loader.dataset.fetch_keyed([0, 1], lambda _: None), pa.Table)
    with_rows = make(tmp_path, transform=lambda row: row["a"], collate_fn=list)
    assert with_rows.dataset.fetch_keyed([0, 1], lambda _: None) == [1, 2]


@pytest.mark.parametrize("options", [{"group": BatchByLength(window=2, key=len)}, {"filter": len}])
def test_streamed_rows_become_python_only_where_code_of_the_user_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    made: list[int] = []
    stock = Rows.sample
    monkeypatch.setattr(Rows, "sample", lambda rows, index: made.append(index) or stock(rows, index))
    numbers = {"a": list(range(7))}
    seen = [int(n) for batch in make(write(tmp_path, numbers), **options) for n in batch["a"]]
    assert sorted(seen) == numbers["a"]
    assert 7 <= len(made) < 14, "for the filter or the key, and not again for the batch"


def test_streamed_rows_that_nobody_looks_at_stay_in_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": list(range(7))})
    part = ShardedDataset.from_path(tmp_path)
    monkeypatch.setattr(Rows, "sample", lambda *_: pytest.fail("a row was made a Python object"))
    loader = StreamMixture([part], [1]).create_dataloader(batch_size=3)
    assert sorted(int(n) for batch in loader for n in batch["a"]) == list(range(7))
