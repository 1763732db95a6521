"""Streamed formats on files as they are found: odd line ends, empty files, long lines, damage."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_resume import ShardedDataset
from lightning_resume.data.sharded import blocks
from lightning_resume.data.sharded.formats import format as formats
from tests.streams import frames, plain, zstd

pytestmark = pytest.mark.filterwarnings("ignore:.* lanes have nothing to read:UserWarning")  # one file, many lanes

BOM = b"\xef\xbb\xbf"


def samples(path: Path, format: str, **options: Any) -> list[Any]:
    """All samples, as they lie unless the options say otherwise."""
    settings = {"batch_size": 3, "collate_fn": list, **options}
    loader, _ = ShardedDataset.create_dataloader(path, format=format, **settings)
    return [sample for batch in loader for sample in batch]


def file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


COMPRESSIONS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstd,
    " in members.gz": lambda content: frames(content, gzip.compress, 7),
    " in frames.zst": lambda content: frames(content, zstd, 7),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one", ["one"]),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n\r\nthree", ["one", "two", "", "three"]),
        (b"\n\n\none\n", ["", "", "", "one"]),
        (BOM + b"one\n" + BOM + b"two\n", ["one", "\ufefftwo"]),
        ("héé\nüü\n日本\n".encode(), ["héé", "üü", "日本"]),
        (b"a\x00b\x0bc\x0cd\x1ce\n", ["a\x00b\x0bc\x0cd\x1ce"]),
        (b"x" * 1000 + b"\nend", ["x" * 1000, "end"]),
    ],
)
def test_lines_are_read_as_they_are(tmp_path: Path, compression: str, content: bytes, lines: list[str]) -> None:
    name = "file.txt" if not compression else f"file.txt{compression[-4:] if compression.endswith('.zst') else '.gz'}"
    packed = COMPRESSIONS[compression](content) if content or not compression else b""
    assert samples(file(tmp_path / "d", name, packed), "text") == lines


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_blocks_of_any_size_and_any_number_of_lanes_give_the_same_lines(
    tmp_path: Path, compression: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"FIRST_BLOCK": 5, "LARGEST_BLOCK": 11, "_LINE_END_BLOCK": 3, "_FED_AT_ONCE": 4}.items():
        monkeypatch.setattr(blocks, name, size)
    lines = ["", "a", "é" * 30, *(str(n) for n in range(40)), "", "日本語", "z" * 100]
    name = f"file.txt{'.gz' if 'gz' in compression else '.zst' if 'zst' in compression else ''}"
    path = file(tmp_path / "d", name, COMPRESSIONS[compression]("\n".join(lines).encode()))
    assert sorted(samples(path, "text", lanes=lanes, shuffle=True, window=4)) == sorted(lines)
    assert samples(path, "text", lanes=1) == lines


def test_a_file_is_split_where_there_are_more_lanes_than_files(tmp_path: Path) -> None:
    lines = [f"{n} {'x' * (n % 13)}" for n in range(500)]
    path = file(tmp_path / "d", "a.txt", "\n".join(lines).encode())
    loader, _ = ShardedDataset.create_dataloader(path, format="text", batch_size=4, lanes=8, collate_fn=list)
    first_turn = [batch for batch, _ in zip(loader, range(8), strict=False)]
    assert len({batch[0] for batch in first_turn}) == 8
    assert sorted(samples(path, "text", lanes=8)) == sorted(lines)


def test_json_lines_pass_over_empty_lines(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.jsonl", BOM + b'{"a": 1}\r\n\r\n  \n{"a": [2, null]}\n\n')
    assert samples(path, "jsonl") == [{"a": 1}, {"a": [2, None]}]


def test_a_folder_with_empty_files_is_read(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": b"", "b.jsonl": b'{"a": 1}', "c.jsonl": b"\n", "d.jsonl": b'{"a": 2}\n'}.items():
        file(tmp_path / "d", name, content)
    for lanes in (1, 2, 9):
        assert sorted(sample["a"] for sample in samples(tmp_path / "d", "jsonl", lanes=lanes)) == [1, 2]


def test_a_folder_of_nothing_but_empty_files_is_an_empty_epoch(tmp_path: Path) -> None:
    assert samples(file(tmp_path / "d", "a.jsonl", b""), "jsonl") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"d/a\.jsonl: the line that begins at byte 9 is not JSON .*Correct the line"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"byte 9 is not UTF-8"),
        (b'[\n{"a": 1},\n{"a": 2}\n]\n', r"byte 0 is not JSON .*one JSON document"),
        (b'{"a": 1}{"a": 2}\n', "Extra data"),
    ],
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples(file(tmp_path / "d", "a.jsonl", content), "jsonl")


def test_a_bad_line_in_a_worker_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.jsonl", b'{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="the line that begins at byte 9 is not JSON"):
        samples(path, "jsonl", num_workers=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzip.compress(b"one\n" * 1000, mtime=0)[:-9]),
        ("a.txt.gz", gzip.compress(b"one\n" * 1000, mtime=0)[:20]),
        ("a.txt.gz", b"not gzip at all"),
        ("a.txt.zst", zstd(b"one\n" * 1000)[:-3]),
        ("a.txt.zst", b"not zstd at all"),
        ("a.txt.zst", zstd(b"one\n") + b"garbage after it"),
    ],
)
def test_a_damaged_compressed_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.txt\.(gz|zst) (is damaged|ends in the middle)"):
        samples(file(tmp_path / "d", name, content), "text")


def test_padding_after_gzip_is_passed_over(tmp_path: Path) -> None:
    assert samples(file(tmp_path / "d", "a.txt.gz", gzip.compress(b"one\n", mtime=0) + b"\0" * 512), "text") == ["one"]


def test_a_file_that_shrank_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.txt", b"one\n" * 100)
    loader, _ = ShardedDataset.create_dataloader(path, format="text")
    path.write_bytes(b"one\n")
    with pytest.raises(ValueError, match=r"a\.txt ends at byte 4, but was listed with 400"):
        list(loader)


# -- tar


def tar(path: Path, members: Sequence[tuple[Any, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def kind(name: str, type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = type
    info.linkname = "elsewhere"
    return info


LONG = "folder/" + "very long name " * 15


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("lanes", [1, 2])
def test_files_of_one_name_are_a_sample(tmp_path: Path, format: int, lanes: int) -> None:
    long = "folder/long" if format == tarfile.USTAR_FORMAT else LONG
    path = tar(
        tmp_path / "d" / "a.tar",
        [
            (kind("folder", tarfile.DIRTYPE), b""),
            ("folder/0.JPG", b"j0"),
            ("folder/0.seg.png", b"s0"),
            (kind("folder/0.link", tarfile.SYMTYPE), b""),
            ("README", b"no sample"),
            (f"{long}.jpg", b"jl"),
            ("other.folder/0.jpg", b"o0"),
            (".hidden", b"no sample"),
            ("./ünï.txt", b""),
        ],
        format=format,
    )
    expected = [
        {"__key__": "folder/0", "jpg": b"j0", "seg.png": b"s0"},
        {"__key__": long, "jpg": b"jl"},
        {"__key__": "other.folder/0", "jpg": b"o0"},
        {"__key__": "./ünï", "txt": b""},
    ]
    assert samples(path, "tar", lanes=lanes) == expected
    packed = file(tmp_path / "e", "a.tgz", gzip.compress(path.read_bytes()))
    assert samples(packed, "webdataset", lanes=lanes) == expected


def test_the_same_name_in_two_files_is_two_samples(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "d" / name, [("0.txt", name.encode())])
    assert [sample["txt"] for sample in samples(tmp_path / "d", "tar")] == [b"a.tar", b"b.tar"]


def test_a_tar_without_its_end_blocks_is_read_and_an_empty_one_holds_nothing(tmp_path: Path) -> None:
    whole = tar(tmp_path / "d" / "a.tar", [("0.txt", b"0"), ("1.txt", b"1")]).read_bytes()
    assert len(samples(file(tmp_path / "e", "a.tar", whole[:2048]), "tar")) == 2
    assert samples(file(tmp_path / "f", "a.tar", b""), "tar") == []
    assert samples(tar(tmp_path / "g" / "a.tar", []), "tar") == []


def test_a_damaged_tar_is_an_error(tmp_path: Path) -> None:
    whole = tar(tmp_path / "d" / "a.tar", [("0.txt", b"0"), ("1.txt", b"1" * 600), ("2.txt", b"2")]).read_bytes()
    damaged = bytearray(whole)
    damaged[1024 + 10] ^= 255  # in the name of the second file, which a checksum covers
    for content in (bytes(damaged), whole[:1800], whole[: 1024 + 100], b"not tar at all" * 100):
        with pytest.raises(ValueError, match=r"a\.tar is damaged, or ends too early"):
            samples(file(tmp_path / "e", "a.tar", content), "tar")


def test_a_sample_with_two_files_of_a_kind_is_an_error(tmp_path: Path) -> None:
    path = tar(tmp_path / "d" / "a.tar", [("0.txt", b"0"), ("0.txt", b"1")])
    with pytest.raises(ValueError, match=r"a\.tar holds '0\.txt' twice"):
        samples(path, "tar")


def test_a_window_ends_where_it_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_WINDOW", 50)
    path = tar(tmp_path / "d" / "a.tar", [(f"{n:02}.bin", b"x" * 20) for n in range(30)])
    ordered = [sample["__key__"] for sample in samples(path, "tar", shuffle=True, window=1000)]
    assert sorted(ordered) == [f"{n:02}" for n in range(30)]
    assert all(abs(int(key) - place) < 3 for place, key in enumerate(ordered)), "windows of three records"
    assert ordered != sorted(ordered)


# -- batches


def batches(path: Path, format: str, **options: Any) -> list[Any]:
    loader, _ = ShardedDataset.create_dataloader(path, format=format, **{"batch_size": 2, **options})
    return list(loader)


def test_a_batch_of_json_lines_is_a_dict_of_columns(tmp_path: Path) -> None:
    rows = [
        {"n": 1, "x": 1, "flag": True, "text": "a", "same": [1, 2], "ragged": [1], "mixed": 1, "nested": {"a": 1}},
        {"n": 2, "x": 0.5, "flag": False, "text": "b", "same": [3, 4], "ragged": [], "mixed": "1", "big": 2**70},
    ]
    path = file(tmp_path / "d", "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    (batch,) = batches(path, "jsonl")
    assert plain(batch) == plain(
        {
            "n": torch.tensor([1, 2]),
            "x": torch.tensor([1, 0.5], dtype=torch.float64),
            "flag": torch.tensor([True, False]),
            "text": ["a", "b"],
            "same": torch.tensor([[1, 2], [3, 4]]),
            "ragged": [[1], []],
            "mixed": [1, "1"],
            "nested": [{"a": 1}, None],
            "big": [None, 2**70],
        }
    )
    (batch,) = batches(path, "jsonl", columns=["text", "n"], output="python")
    assert batch == {"text": ["a", "b"], "n": [1, 2]}
    (batch,) = batches(path, "jsonl", columns=["n"], output="numpy")
    assert (batch["n"].dtype.kind, batch["n"].tolist()) == ("i", [1, 2])
    (batch,) = batches(path, "jsonl", columns=["n", "text"], output="arrow")
    assert batch.equals(pa.table({"n": [1, 2], "text": ["a", "b"]}))


def test_a_batch_of_text_is_a_list_and_one_of_tar_a_dict_of_lists(tmp_path: Path) -> None:
    assert batches(file(tmp_path / "d", "a.txt", b"one\ntwo\n"), "text") == [["one", "two"]]
    path = tar(tmp_path / "e" / "a.tar", [("0.jpg", b"0"), ("0.cls", b"7"), ("1.jpg", b"1")])
    assert batches(path, "tar") == [{"__key__": ["0", "1"], "jpg": [b"0", b"1"], "cls": [b"7", None]}]


def test_what_a_transform_makes_is_stacked(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.jsonl", b'{"n": 1}\n{"n": 2}\n')
    (batch,) = batches(path, "jsonl", transform=lambda row: {"x": torch.full((2,), row["n"]), "n": row["n"]})
    assert plain(batch) == plain({"x": torch.tensor([[1, 1], [2, 2]]), "n": torch.tensor([1, 2])})


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.jsonl", b'{"n": 1}\n')
    with pytest.raises(ValueError, match="no column 'm'; it has \\['n'\\]"):
        batches(path, "jsonl", columns=["m"])
    pq.write_table(pa.table({"n": [1]}), tmp_path / "d" / "a.parquet")
    with pytest.raises(ValueError, match="no column 'm'; it has \\['n'\\]"):
        batches(tmp_path / "d" / "a.parquet", "parquet", columns=["m"], filter=bool)


def test_an_unknown_format_and_a_tail_that_streams_cannot_have_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path / "d", "a.txt", b"one\n")
    with pytest.raises(ValueError, match=r"format is 'csv'; pass one of .*jsonl"):
        samples(path, "csv")
    with pytest.raises(ValueError, match="tail is 'carry'"):
        samples(path, "text", tail="carry")
