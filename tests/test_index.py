"""The index: what it says of any sharding is what brute force says, and no more of it is read than that takes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import strategies as st

from lightning_resume.checkpoint.index import Index
from lightning_resume.checkpoint.index_build import Entry, build_index
from lightning_resume.checkpoint.index_form import Box, Placed
from lightning_resume.checkpoint.manifest import read_manifest
from lightning_resume.checkpoint.pages import HASHES_AT_ONCE, PAGE_BYTES, Pages, hashes_of_pages
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.stored import DIGEST_BYTES, StoredItem, block_count
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointCorruptError
from tests.attacks import index_of, replace_file, save, write_index

FILES = ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
DTYPE = torch.float32


class Writer:
    """Gives items their places, one after the other in files that take turns."""

    def __init__(self, files: int = len(FILES)) -> None:
        self.files = [data_file(number) for number in range(files)]
        self.sizes = [0] * files
        self._count = 0

    def place(self, box: Box = ((), ()), data: int | None = None, file: int | None = None) -> Placed:
        file = self._count % len(self.files) if file is None else file
        data = math.prod(box[1]) * DTYPE.itemsize if data is None else data
        digests = b"".join(xxhash.xxh3_128_digest(b"%d %d" % (self._count, n)) for n in range(2 + block_count(data)))
        item = StoredItem(offset=self.sizes[file], length=data + 9, head=5, data=data, digests=digests)
        self.sizes[file] += item.length
        self._count += 1
        return Placed(file=file, item=item, box=box)

    def tensor(self, key: str, shape: tuple[int, ...], boxes: list[Box]) -> Entry:
        return Entry(path=(key,), dtype=DTYPE, shape=shape, items=[self.place(box) for box in boxes])

    def open(self, data: bytes) -> tuple[Index, Reads]:
        reads = Reads(data)
        sizes = dict(zip(self.files, self.sizes, strict=True))
        return Index(Pages(reads, reads.check, len(data)), len(data), sizes), reads


class Reads:
    """An index in memory that counts how often each of its pages is read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.pages = data, [0] * -(-len(data) // PAGE_BYTES)
        self.hashes = [xxhash.xxh3_128_digest(self.page(number)) for number in range(len(self.pages))]

    def page(self, number: int) -> bytes:
        return self.data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]

    def __call__(self, offset: int, length: int) -> bytes:
        for number in range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)):
            self.pages[number] += 1
        return self.data[offset : offset + length]

    def check(self, number: int, page: bytes) -> None:
        if xxhash.xxh3_128_digest(page) != self.hashes[number]:
            raise ValueError(f"page {number}")


def data_file(number: int) -> str:
    return f"__{number}_0.distcp"


def overlap(one: Box, other: Box) -> bool:
    ends = zip(*one, *other, strict=True)
    return all(start < start_2 + size_2 and start_2 < start + size for start, size, start_2, size_2 in ends)


def by_box(items: list[Placed]) -> list[Placed]:
    return sorted(items, key=lambda placed: (placed.box, placed.file, placed.item.offset))


# --- shardings ---


def grid(edges: list[list[int]]) -> list[Box]:
    """The boxes between ``edges`` along each dimension; equal edges make empty ones."""
    sides = [list(itertools.pairwise(along)) for along in edges]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*sides)]


@st.composite
def shardings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and shards of it in any order: a grid, even or not, of 0 to 3 dimensions; some are left out."""
    shape = draw(st.lists(st.integers(0, 12), max_size=3).map(tuple))
    edges = [[0, *sorted(draw(st.lists(st.integers(0, size), max_size=4))), size] for size in shape]
    boxes = draw(st.permutations(list(dict.fromkeys(grid(edges)))))
    return shape, list(boxes) if draw(st.booleans()) else list(boxes)[: draw(st.integers(0, len(boxes)))]


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    begins = [draw(st.integers(0, size)) for size in shape]
    return tuple(begins), tuple(draw(st.integers(0, size - begin)) for begin, size in zip(begins, shape, strict=True))


LEAF_NAMES = st.sampled_from(["resume.rng", "resume.loader", "resume.a.b", "resume.x.rank_1", "resume.\n.rank_000001"])


@st.composite
def leaf_keys(draw: st.DrawFn) -> list[str]:
    """Leaves that all have, that each rank has, and those of which some rank has none."""
    keys = draw(st.lists(LEAF_NAMES, unique=True))
    for name in draw(st.lists(st.sampled_from(["resume.rng", "resume.per", "resume.per.rank_00001"]), unique=True)):
        ranks = draw(st.sets(st.integers(0, 5)) | st.integers(0, 4).map(lambda n: set(range(n))))
        keys += [f"{name}.rank_{rank:05d}" for rank in sorted(ranks)]
    return draw(st.permutations(list(dict.fromkeys(keys))))


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_the_items_of_any_part_of_any_sharding_are_those_of_brute_force(data: st.DataObject) -> None:
    writer = Writer()
    shards = data.draw(st.lists(shardings(), min_size=1, max_size=4))
    entries = {f"key{n}": writer.tensor(f"key{n}", shape, boxes) for n, (shape, boxes) in enumerate(shards)}
    entries["object"] = Entry(path=("a", 3, "b"), dtype=None, shape=(), items=[writer.place(data=70_000)])
    leaves = {key: writer.place(data=3) for key in data.draw(leaf_keys())}
    writer.sizes[0] += sum(math.prod(shape) * DTYPE.itemsize for shape, _ in shards)  # for shards that were left out
    index, _ = writer.open(build_index(writer.files, entries, leaves))
    assert index.keys["object"].path == ("a", 3, "b")
    assert index.leaves == sorted(leaves)
    assert {key: index.leaf(key) for key in leaves} == leaves
    assert index.leaf("resume.nobody") is index.leaf("resume.rng.rank_00099") is None
    for key, entry in entries.items():
        assert by_box(index.items(key)) == by_box(list(entry.items))
        if entry.dtype is not None:
            box = data.draw(parts(entry.shape))
            expected = [placed for placed in entry.items if overlap(placed.box, box)]
            assert by_box(index.items(key, box)) == by_box(expected)
    whose = {key: list(entry.items) for key, entry in entries.items()} | {key: [leaf] for key, leaf in leaves.items()}
    for number in range(len(writer.files)):
        expected = [(key, placed.item) for key, items in whose.items() for placed in items if placed.file == number]
        assert index.of_file(number) == sorted(expected, key=lambda pair: pair[1].offset)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("widths", [[3], [1, 5, 2], [0, 4, 0, 40]], ids=["even", "uneven", "with empty ones"])
def test_a_tensor_of_many_shards_is_searched_and_not_read_through(along: int, widths: list[int]) -> None:
    count, writer = 12_000, Writer()
    edges = list(itertools.accumulate(itertools.islice(itertools.cycle(widths), count), initial=0))
    total = edges[-1]
    boxes = list(dict.fromkeys(grid([edges, [0, 2]] if along == 0 else [[0, 2], edges])))
    shape = (total, 2) if along == 0 else (2, total)
    index, reads = writer.open(build_index(writer.files, {"x": writer.tensor("x", shape, boxes)}, {}))
    opened = sum(reads.pages)
    for start in (0, 1, total // 2, total - 4):
        box: Box = ((start, 0), (4, 2)) if along == 0 else ((0, start), (2, 4))
        expected = [placed_box for placed_box in boxes if overlap(placed_box, box)]
        assert sorted(placed.box for placed in index.items("x", box)) == sorted(expected)
    assert len(reads.pages) > 20
    assert sum(reads.pages) - opened <= 28


def test_the_first_size_of_an_index_that_is_searched_does_not_change_what_is_found() -> None:
    for count in (4094, 4096, 4098, 8192):  # a row of a tensor of one dimension takes 16 bytes of two pages
        writer = Writer()
        index, _ = writer.open(
            build_index(writer.files, {"x": writer.tensor("x", (count,), grid([list(range(count + 1))]))}, {})
        )
        for start in (0, count // 2, count - 2):
            assert [placed.box[0] for placed in index.items("x", ((start,), (2,)))] == [(start,), (start + 1,)]


@pytest.mark.parametrize("count", [50, 20_000], ids=["read through", "searched"])
def test_rows_that_are_not_sorted_lead_to_too_few_items_and_to_no_wrong_ones(count: int) -> None:
    writer = Writer()
    entry = writer.tensor("x", (count,), grid([list(range(count + 1))]))
    data = bytearray(build_index(writer.files, {"x": entry}, {}))
    head = 16 + int.from_bytes(data[8:16], "little")
    boxes = np.frombuffer(data, "<i8", count=2 * count, offset=head + 40 * count)
    boxes[::2] = np.random.default_rng(0).permutation(count)
    index, _ = writer.open(bytes(data))
    for start, size in ((0, 1), (0, count), (count // 2, 3), (count - 1, 1)):
        assert all(start <= placed.box[0][0] < start + size for placed in index.items("x", ((start,), (size,))))


# --- pages ---


def three_pages() -> tuple[Writer, bytes]:
    writer = Writer()
    entries = {f"x{n}": writer.tensor(f"x{n}", (64,), grid([list(range(0, 65, 4))])) for n in range(200)}
    return writer, build_index(writer.files, entries, {"resume.rng": writer.place(data=3)})


def error_of(act: Callable[[], object]) -> str | None:
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


def test_a_changed_page_is_named_where_it_is_used_and_nowhere_else() -> None:
    writer, data = three_pages()
    pages = -(-len(data) // PAGE_BYTES)
    assert pages > 4
    _, reads = writer.open(data)
    of_head = reads.pages.index(0)
    named: set[str | None] = set()
    for number in range(of_head, pages):
        reads.pages = [0] * pages
        reads.data = data[: number * PAGE_BYTES + 9] + b"\xff" + data[number * PAGE_BYTES + 10 :]
        sizes = dict(zip(writer.files, writer.sizes, strict=True))
        index = Index(Pages(reads, reads.check, len(data)), len(data), sizes)
        for key in ("x0", "x100", "x199"):
            named |= {error_of(partial(index.items, key, ((8,), (4,))))} - {None}
        assert named <= {f"page {read}" for read in range(of_head, number + 1)}
        assert (f"page {number}" in named) == (reads.pages[number] > 0)
    assert 0 < len(named) < pages - of_head, "some pages are not read by any of these"


def test_a_page_is_read_once_while_it_is_in_use_and_pieces_are_read_at_once() -> None:
    writer, data = three_pages()
    index, reads = writer.open(data)
    for number in range(200):
        index.items(f"x{number}")
    assert max(reads.pages) == 1
    sizes = dict(zip(writer.files, writer.sizes, strict=True))
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return data[offset : offset + length]

    index = Index(Pages(read, reads.check, len(data), at_once=1024), len(data), sizes)
    for number in range(200):
        index.items(f"x{number}")
    assert asked == [(0, len(data))]


def test_a_piece_with_damage_in_a_page_that_nobody_uses_is_fine() -> None:
    writer, data = three_pages()
    _, reads = writer.open(data)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    pages = Pages(lambda offset, length: changed[offset : offset + length], reads.check, len(data), at_once=64)
    index = Index(pages, len(data), dict(zip(writer.files, writer.sizes, strict=True)))
    index.items("x0")
    with pytest.raises(ValueError, match="page"):
        index.leaf("resume.rng")


@pytest.mark.parametrize(
    ("hashes", "named"),
    [
        (lambda _: b"", "page 0: expected xxh3-128 none"),
        (lambda hashes: hashes[:-16], "page .: expected xxh3-128 none"),
        (lambda hashes: hashes[16:] + bytes(16), "page 0: expected xxh3-128"),
    ],
    ids=["none", "too few", "others"],
)
def test_hashes_of_pages_that_do_not_fit_are_found(
    hashes: Callable[[bytes], bytes], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, state={f"x{n}": torch.zeros(4) for n in range(40)}, leaves={}, meta={}, step=1)
    data = index_of(path)
    assert PAGE_BYTES < len(data) < 9 * PAGE_BYTES
    parts = [data, hashes(hashes_of_pages(data)[0])]
    items = [[0, len(data), "0" * 32], [len(data), len(parts[1]), xxhash.xxh3_128_hexdigest(parts[1])]]
    replace_file(path, ".index", b"".join(parts), items=items if parts[1] else items[:1])
    with pytest.raises(CheckpointCorruptError, match=rf"\.index, {named}"):
        CheckpointReader(path).read()


def test_the_hashes_of_pages_are_themselves_verified(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    data = (path / ".index").read_bytes()
    (path / ".index").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointCorruptError, match=r"\.index, piece 0 of the hashes of its pages: expected"):
        CheckpointReader(path)


def test_of_a_long_index_the_hashes_come_in_pieces(tmp_path: Path) -> None:
    path, count = save(tmp_path / "c"), 2 * HASHES_AT_ONCE + 3
    head = json.loads(index_of(path)[16:][: int.from_bytes(index_of(path)[8:16], "little")])
    padding = bytes(16) * (count * PAGE_BYTES // 16)  # hashes that no item has
    head["sections"][2] += len(padding)
    rest = index_of(path)[16 + int.from_bytes(index_of(path)[8:16], "little") :]
    write_index(path, json.dumps(head).encode(), rest + padding)
    assert [item[1] for item in read_manifest(path).files[".index"].items][1:-1] == [16 * HASHES_AT_ONCE] * 2
    index = CheckpointReader(path)._content._index
    assert index._read(index._digests + head["sections"][2] - 16, 16) == bytes(16)
    assert CheckpointReader(path).read().keys() == CheckpointReader(save(tmp_path / "other")).read().keys()


# --- many ranks ---


def of_ranks(ranks: int, tensors: int) -> tuple[Writer, bytes]:
    """FSDP: every rank has a slice of every tensor, and a leaf of its own."""
    writer = Writer(ranks)
    entries = {}
    for number in range(tensors):
        placed = [writer.place(((4 * rank, 0), (4, 8)), file=rank) for rank in range(ranks)]
        entries[f"layer{number}"] = Entry(path=(f"layer{number}",), dtype=DTYPE, shape=(4 * ranks, 8), items=placed)
    leaves = {f"resume.rng.rank_{rank:05d}": writer.place(data=3, file=rank) for rank in range(ranks)}
    return writer, build_index(writer.files, entries, leaves)


def pages_of_one_rank(ranks: int, tensors: int) -> int:
    """Pages that one rank in the middle reads, beside those of the head, to find its part of every tensor."""
    writer, data = of_ranks(ranks, tensors)
    index, reads = writer.open(data)
    of_head, rank = sum(reads.pages), ranks // 2
    for number in range(tensors):
        [placed] = index.items(f"layer{number}", ((4 * rank, 0), (4, 8)))
        assert (placed.file, placed.box) == (rank, ((4 * rank, 0), (4, 8)))
    leaf = index.leaf(f"resume.rng.rank_{rank:05d}")
    assert leaf is not None
    assert leaf.file == rank
    return sum(reads.pages) - of_head


def test_what_one_rank_reads_does_not_grow_with_the_ranks_whose_rows_it_does_not_need() -> None:
    """Of each rank a tensor has a row (40 bytes), a box (32) and three hashes (48): a rank wants its own of each."""
    tensors = 4
    few, many, most = (pages_of_one_rank(ranks, tensors) for ranks in (1024, 8192, 16384))
    assert few <= 4 * tensors, "a page of boxes, one of rows, one of hashes, and now and then the next one"
    assert many <= few + 2
    assert most <= few + 2


def test_the_head_does_not_grow_with_the_ranks_but_for_the_names_of_their_files() -> None:
    def head(ranks: int) -> int:
        writer, data = of_ranks(ranks, 20)
        return int.from_bytes(data[8:16], "little") - len(str(writer.files))

    assert head(1024) - head(64) < 400  # digits


def test_1024_ranks_fill_the_index_that_they_need() -> None:
    writer, data = of_ranks(1024, 10)
    rows = 1024 * 11
    head = 16 + int.from_bytes(data[8:16], "little")
    assert len(data) - head == rows * 40 + 1024 * 10 * 32 + rows * 3 * DIGEST_BYTES
    index, _ = writer.open(data)
    names = [key for key, _ in index.of_file(512)]
    assert names == [*(f"layer{number}" for number in range(10)), "resume.rng.rank_00512"]
