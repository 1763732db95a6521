"""What `ShardedDataset` makes of unusual arguments, paths and files, and what it says of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from lightning_resume import Mixture, Packing, ShardedDataset, StreamMixture, dispatched, make_resumable, stream_of

KINDS = ("parquet", "jsonl")


def write(folder: Path, *files: list[int], kind: str = "parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ids in enumerate(files):
        file = folder / f"{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"i": pa.array(ids, pa.int64())}), file)
        else:
            file.write_text("".join(json.dumps({"i": i}) + "\n" for i in ids))
    return folder


def make(path: Any, kind: str = "parquet", **options: Any) -> Any:
    return ShardedDataset.create_dataloader(path, format=kind, **options)[0]


def ids(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch["i"].tolist()]


# -- files


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_passes_over_empty_parquet_files(tmp_path: Path, shuffle: bool) -> None:
    loader = make(write(tmp_path, [], [1, 2], []), shuffle=shuffle, filter=bool)
    assert sorted(ids(loader)) == [1, 2]


def test_a_folder_of_empty_files_has_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples"):
        len(make(write(tmp_path, [], [])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_may_hold_brackets(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "run[1]", [1, 2], [3], kind=kind)
    write(tmp_path / "run1", [4], kind=kind)
    question = (folder / f"1.{kind}").rename(folder / f"?.{kind}")
    assert ids(make(folder, kind)) == [1, 2, 3]
    assert ids(make(str(question), kind)) == [3]
    assert ids(make([question, folder / f"0.{kind}"], kind)) == [3, 1, 2]
    assert ids(make(f"{folder}/[0-9].{kind}", kind)) == [1, 2]
    assert ids(make(f"{tmp_path}/run[1-2]/*.{kind}", kind)) == [4]


@pytest.mark.parametrize("options", [{}, {"filter": bool}])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, options: Any) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet: .*Write it again"):
        next(iter(make(tmp_path, **options)))
    lines = write(tmp_path / "lines", [1], kind="jsonl") / "0.jsonl"
    with pytest.raises(ValueError, match=r"0.jsonl cannot be read as parquet: .*`format=`"):
        next(iter(make(lines, **options)))


@pytest.mark.parametrize("options", [{}, {"filter": bool}])
def test_a_damaged_page_is_named_by_its_file(tmp_path: Path, options: Any) -> None:
    file = write(tmp_path, list(range(5000))) / "0.parquet"
    content = bytearray(file.read_bytes())
    content[1000:3000] = bytes(2000)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"0.parquet cannot be read as parquet"):
        next(iter(make(tmp_path, **options)))


# -- arguments


def test_without_batches_rows_are_rows(tmp_path: Path) -> None:
    loader = make(write(tmp_path, [1, 2]), batch_size=None)
    assert list(loader) == [{"i": 1}, {"i": 2}]
    with pytest.raises(ValueError, match=r"batch_size is None; a stream makes batches"):
        make(tmp_path, batch_size=None, filter=bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world_size"), [(5, 5), (-1, 2), (0, 0)])
def test_a_rank_that_is_none_is_refused(tmp_path: Path, kind: str, rank: int, world_size: int) -> None:
    share = {"rank": rank, "world_size": world_size}
    for made in (
        lambda: make(write(tmp_path, [1], kind=kind), kind, **share),
        lambda: stream_of([1, 2], **share),
        lambda: StreamMixture([[1, 2]]).create_dataloader(**share),
        lambda: make_resumable(DataLoader([1, 2]), shared=True, **share),
    ):
        with pytest.raises(ValueError, match=f"rank is {rank} and world_size is {world_size}; pass"):
            made()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_any_iterable_of_names_but_text(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [1, 2], kind=kind)
    assert ids(make(tmp_path, kind, columns=(name for name in "i"))) == [1, 2]
    with pytest.raises(ValueError, match=r"columns is 'text'; pass a list of names"):
        make(tmp_path, kind, columns="text")
    with pytest.raises(ValueError, match=r"columns names 'i' twice"):
        make(tmp_path, kind, columns=["i", "i"])


def test_rows_are_counted_from_the_end_too(tmp_path: Path) -> None:
    dataset: Any = ShardedDataset.from_path(write(tmp_path, [1, 2], [3]))
    assert [dataset[-1], dataset[-3]] == [{"i": 3}, {"i": 1}]
    assert [row["i"] for row in dataset] == [1, 2, 3]
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"row {row} is outside a dataset of 3 rows"):
            dataset[row]


def test_a_process_keeps_the_row_groups_of_its_own_lane_only(tmp_path: Path) -> None:
    pq.write_table(pa.table({"i": list(range(1600))}), tmp_path / "0.parquet", row_group_size=10)
    loader = make(tmp_path, batch_size=5, shuffle=True, rank=3, world_size=16)
    kept = [len(loader.dataset._reader._units) for _ in loader]
    assert len(kept) == 20
    assert max(kept) <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("state", "said"), [(None, "None"), ("x", "'x'"), ([], r"\[\]"), ([None], r"\[None\]")])
def test_what_is_no_state_is_refused(tmp_path: Path, kind: str, state: Any, said: str) -> None:
    loader = make(write(tmp_path, [1], kind=kind), kind)
    with pytest.raises(TypeError, match=f"load_state_dict was given {said}; pass"):
        loader.dataset.load_state_dict(state)
    with pytest.raises(TypeError, match=r"load_state_dict was given .*; pass"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_state_is_refused_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    loader = make(write(tmp_path, [1, 2], kind=kind), kind)
    next(iter(loader))
    state = loader.state_dict()
    for name in set(state) - {"counts", "batches"}:  # which states of earlier versions do without
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=rf"not whole: it has no '{name}'|not the same order"):
            loader.load_state_dict(part)
    assert loader.state_dict() == state


def test_packing_dicts_asks_for_their_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0.parquet: a sample is a dict with \['i'\]; pass Packing the `key`"):
        next(iter(make(write(tmp_path, [1]), group=Packing(4))))


def test_a_group_is_a_group(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="group is 3; pass a Packing or a BatchByLength"):
        make(write(tmp_path, [1]), group=3)


def test_mixtures_say_what_they_take(tmp_path: Path) -> None:
    stream = make(write(tmp_path, [1], kind="jsonl"), "jsonl").dataset
    parquet = ShardedDataset.from_path(write(tmp_path, [1]))
    with pytest.raises(TypeError, match=r"Dataset 0 of the mixture is a StreamedDataset.*`StreamMixture`"):
        Mixture([stream])
    for kind in (Mixture, StreamMixture):
        with pytest.raises(TypeError, match=r"takes a list of datasets, not a IndexedDataset"):
            kind(parquet)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"read as streams: use `ShardedDataset.create_dataloader`"):
        ShardedDataset.from_path(tmp_path, format="jsonl")


def test_what_is_no_loader_is_refused() -> None:
    for nothing in (5, None):
        with pytest.raises(TypeError, match=f"{nothing} is no loader: pass a DataLoader"):
            make_resumable(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="None is no loader"):
        dispatched(lambda: None).state_dict()  # type: ignore[arg-type,return-value]


def test_a_tail_may_be_named() -> None:
    assert len(make_resumable(DataLoader([1, 2, 3], batch_size=2), tail="drop")) == 1


# -- what is said of wrong uses


def test_paths_are_no_datasets_to_mix() -> None:
    for mixture in (Mixture, StreamMixture):
        with pytest.raises(TypeError, match=r"Dataset 0 of the mixture is the path 'books/'.*from_path\('books/'\)"):
            mixture(["books/"], [1.0])


def test_a_dataset_is_not_made_of_a_path_alone() -> None:
    with pytest.raises(TypeError, match=r"create_dataloader\('corpus/', ...\)"):
        ShardedDataset("corpus/")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There are no files.*nowhere/'. Pass a folder, a glob, or a list"):
        make(f"{tmp_path}/nowhere/", kind)


def test_text_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    with pytest.raises(ValueError, match=r"a\.txt: a sample to pack is text; make it tokens in `transform`"):
        list(make(tmp_path, "text", group=Packing(4)))
