"""Damage: no load returns anything but what was saved, and to verify finds each bit, byte and file that is not.

``python -m tests.test_corruption`` flips 1,000 bits and prints how many were found in which kind of file.

What is shown holds for the folders that lightning-resume writes. A single file of ``torch.save`` has no hashes: what
damage does to it is up to the CRC-32 of its zip records.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.stored import block_count
from lightning_resume.errors import ResumeError
from tests.attacks import read_all, restored, save, save_as_two_ranks
from tests.checkpoint_worker import launch
from tests.simulated_ranks import bits

FLIPS = 300
ALL_FLIPS = 1000
SEED = 20240607


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, which has every kind of file."""
    return saved_by_two_ranks(tmp_path_factory.mktemp("corruption"))


def saved_by_two_ranks(folder: Path) -> Path:
    launch(save_as_two_ranks, 2, folder)
    read_all(folder / "c")
    return folder / "c"


class Intact:
    """What a checkpoint holds, to compare with what is read of it once it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        state, leaves, meta, reader = read_all(path)
        self.values = bits((state, leaves, meta))
        index = reader._content._index
        self.items = {name: [item for _, item in index.of_file(n)] for n, name in enumerate(index.files)}

    def miss(self, name: str, at: int | None = None) -> str | None:
        """What is wrong with how damage in the file ``name``, at the byte ``at``, is found; None if it is right.

        To verify must always find it and name the file. To load may not see what it does not read, but then what it
        returns must be what was saved.
        """
        verified = error_of(lambda: CheckpointReader(self.path).verify())
        if name not in (verified or "") or ("manifest" not in name and "damaged: file" not in str(verified)):
            return f"verify: {verified}"
        if name in self.items and at is not None and f"file {name}, item '" not in str(verified):
            return f"verify names no item: {verified}"
        found: list[Any] = []
        loaded = error_of(lambda: found.append(bits(read_all(self.path)[:3])))
        if found:
            return None if found == [self.values] and not self.is_read(name, at) else f"a load returned {found}"
        if name in self.items and at is not None and f"file {name}, item '" not in str(loaded):
            return f"the load names no item: {loaded}"
        return None if name in str(loaded) else f"load: {loaded}"

    def is_read(self, name: str, at: int | None) -> bool:
        """Whether a whole load reads the byte ``at``, or, without one, the length of the file."""
        if name == ".metadata":
            return False
        if name not in self.items or at is None:
            return True
        return any(0 <= at - item.offset - item.head < item.data for item in self.items[name])


def flip_bits(path: Path, count: int) -> tuple[Counter[str], list[str]]:
    """Flips single bits at random places, as many in each file; returns how many in which, and what was missed."""
    places, intact = random.Random(SEED), Intact(path)
    names = sorted(file.name for file in path.iterdir())
    whole = {name: (path / name).read_bytes() for name in names}
    tried: Counter[str] = Counter()
    missed = []
    for flip in range(count):
        name = names[flip % len(names)]
        bit = places.randrange(len(whole[name]) * 8)
        data = bytearray(whole[name])
        data[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(data)
        tried[name] += 1
        wrong = intact.miss(name, bit // 8)
        if wrong is not None:
            missed.append(f"bit {bit} of {name}: {wrong}")
        (path / name).write_bytes(whole[name])
    return tried, missed


def error_of(act: Callable[[], object]) -> str | None:
    """The text of the error of ours that it raises; None if it returns."""
    try:
        act()
    except ResumeError as error:
        return str(error)
    return None


def test_a_flipped_bit_at_any_of_many_random_places_is_found_and_its_file_named(ranks: Path) -> None:
    tried, missed = flip_bits(ranks, FLIPS)
    assert missed == []
    assert set(tried) == {".index", ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"}


def test_every_byte_of_a_shard_belongs_to_an_item_that_is_hashed(ranks: Path) -> None:
    items = Intact(ranks).items
    assert sorted(items) == ["__0_0.distcp", "__1_0.distcp"]
    for name, of_file in items.items():
        ends = [item.offset + item.length for item in of_file]
        assert [item.offset for item in of_file] == [0, *ends[:-1]]
        assert ends[-1] == (ranks / name).stat().st_size
        assert all(len(item.digests) == 16 * (2 + block_count(item.data)) for item in of_file)


def test_all_data_is_read_by_a_whole_load(ranks: Path) -> None:
    intact = Intact(ranks)
    for name, of_file in intact.items.items():
        for item in of_file:
            for at in {item.head, item.head + item.data - 1} if item.data else ():
                with restored(ranks):
                    data = bytearray((ranks / name).read_bytes())
                    data[item.offset + at] ^= 1
                    (ranks / name).write_bytes(data)
                    assert f"file {name}, item '" in str(error_of(lambda: read_all(ranks)))


def test_a_file_cut_at_any_4_kib_or_by_two_bytes_is_found(ranks: Path) -> None:
    intact = Intact(ranks)
    for name in sorted(os.listdir(ranks)):
        size = (ranks / name).stat().st_size
        # the last byte of the manifest is a line feed, without which it says the same
        for length in {*range(0, size, 4096), size - 2}:
            with restored(ranks):
                os.truncate(ranks / name, length)
                assert intact.miss(name) is None, f"{name} cut to {length} of {size} bytes"


def test_a_manifest_cut_at_any_byte_is_found(ranks: Path) -> None:
    whole = (ranks / "manifest.json").read_bytes()
    end = len(whole) - 1  # without the line feed at its end it says the same
    with restored(ranks):
        for length in range(0, end, 1 + end // 400):
            (ranks / "manifest.json").write_bytes(whole[:length])
            assert "manifest.json" in str(error_of(lambda: read_all(ranks)))


@pytest.mark.parametrize("name", [".index", ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"])
def test_a_missing_file_is_named(ranks: Path, name: str) -> None:
    intact = Intact(ranks)
    with restored(ranks):
        (ranks / name).unlink()
        if name == "manifest.json":
            assert "manifest" in str(error_of(lambda: read_all(ranks)))
        else:
            assert intact.miss(name) is None
            expected = f"file {name}: expected the file, found nothing"
            assert expected in str(error_of(lambda: CheckpointReader(ranks).verify()))


@pytest.mark.parametrize(
    ("one", "other"), [("__0_0.distcp", "__1_0.distcp"), (".metadata", "meta.pt"), (".index", ".metadata")]
)
def test_exchanged_files_are_named_even_if_their_sizes_are_the_same(ranks: Path, one: str, other: str) -> None:
    with restored(ranks):
        data = (ranks / one).read_bytes()
        (ranks / one).write_bytes((ranks / other).read_bytes())
        (ranks / other).write_bytes(data)
        for look in (lambda: read_all(ranks), lambda: CheckpointReader(ranks).verify()):
            found = str(error_of(look))
            assert one in found or other in found


@pytest.mark.parametrize("name", [".index", ".metadata", "__0_0.distcp", "meta.pt", "manifest.json"])
def test_a_file_of_another_checkpoint_of_the_same_state_is_found(tmp_path: Path, name: str) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", add=1)
    same = (one / name).read_bytes() == (other / name).read_bytes()
    shutil.copy(other / name, one / name)
    found = error_of(lambda: CheckpointReader(one).verify())
    assert (found is None) is same, "what is equal, bit by bit, is no damage"
    assert same or name == ".metadata" or error_of(lambda: read_all(one)) is not None


def test_the_error_names_file_item_expected_and_found(tmp_path: Path) -> None:
    path, other = save(tmp_path / "one"), save(tmp_path / "other", add=1)
    assert (path / "__0_0.distcp").stat().st_size == (other / "__0_0.distcp").stat().st_size
    shutil.copy(other / "__0_0.distcp", path)
    with pytest.raises(
        ResumeError, match=r"file __0_0\.distcp, item 'model\.weight': expected xxh3-128 \w{32}, found \w{32}"
    ):
        CheckpointReader(path).read()


def test_a_file_that_the_manifest_does_not_name_is_not_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    before = read_all(path)[1:3]
    for name in ("__7_0.distcp", "extra.pt"):
        os.mkfifo(path / name)  # whoever opens it waits until the test's time is up
    assert read_all(path)[1:3] == before


def test_a_link_in_place_of_a_file_is_checked_like_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    (tmp_path / "secret").write_bytes(b"x" * (path / "meta.pt").stat().st_size)
    (path / "meta.pt").unlink()
    (path / "meta.pt").symlink_to(tmp_path / "secret")
    assert "file meta.pt: expected xxh3-128" in str(error_of(lambda: read_all(path)))


def main(count: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tried, missed = flip_bits(saved_by_two_ranks(Path(folder)), count)
    print(json.dumps({"flipped": dict(tried), "found": tried.total() - len(missed), "missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ALL_FLIPS))
