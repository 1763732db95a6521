"""Damage: no load returns from a checkpoint of which one bit, one byte or one file is not what was saved.

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
from pathlib import Path

import pytest

from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.errors import ResumeError
from tests.attacks import read_all, restored, save, save_as_two_ranks
from tests.checkpoint_worker import launch

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


def flip_bits(path: Path, count: int) -> tuple[Counter[str], list[str]]:
    """Flips single bits at random places, as many in each file; returns how many in which, and what was missed."""
    places = random.Random(SEED)
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
        if name not in (error_of(path) or ""):
            missed.append(f"bit {bit} of {name}: {error_of(path)}")
        (path / name).write_bytes(whole[name])
    return tried, missed


def error_of(path: Path) -> str | None:
    """The text of the error that a whole load raises; None if it returns."""
    try:
        read_all(path)
    except ResumeError as error:
        return str(error)
    return None


def test_a_flipped_bit_at_any_of_many_random_places_is_found_and_its_file_named(ranks: Path) -> None:
    tried, missed = flip_bits(ranks, FLIPS)
    assert missed == []
    assert set(tried) == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"}


def test_every_byte_of_a_shard_belongs_to_an_item_that_a_whole_load_reads(ranks: Path) -> None:
    reader = read_all(ranks)[-1]
    for name, entry in reader.manifest.files.items():
        stored = {
            (info.offset, info.length)
            for info in reader._catalog.metadata.storage_data.values()
            if info.relative_path == name
        }
        assert stored == {(offset, length) for offset, length, _ in entry.items}
        assert not stored or sum(length for _, length in stored) == entry.bytes


def test_a_file_cut_at_any_4_kib_or_by_two_bytes_is_found(ranks: Path) -> None:
    for name in sorted(os.listdir(ranks)):
        size = (ranks / name).stat().st_size
        # the last byte of the manifest is a line feed, without which it says the same
        for length in {*range(0, size, 4096), size - 2}:
            with restored(ranks):
                os.truncate(ranks / name, length)
                assert name in str(error_of(ranks)), f"{name} cut to {length} of {size} bytes"


def test_a_manifest_cut_at_any_byte_is_found(ranks: Path) -> None:
    whole = (ranks / "manifest.json").read_bytes()
    end = len(whole) - 1  # without the line feed at its end it says the same
    with restored(ranks):
        for length in range(0, end, 1 + end // 400):
            (ranks / "manifest.json").write_bytes(whole[:length])
            assert "manifest.json" in str(error_of(ranks))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"])
def test_a_missing_file_is_named(ranks: Path, name: str) -> None:
    with restored(ranks):
        (ranks / name).unlink()
        expected = "manifest" if name == "manifest.json" else f"file {name}: expected the file, found nothing"
        assert expected in str(error_of(ranks))


@pytest.mark.parametrize(("one", "other"), [("__0_0.distcp", "__1_0.distcp"), (".metadata", "meta.pt")])
def test_exchanged_files_are_named_even_if_their_sizes_are_the_same(ranks: Path, one: str, other: str) -> None:
    with restored(ranks):
        data = (ranks / one).read_bytes()
        (ranks / one).write_bytes((ranks / other).read_bytes())
        (ranks / other).write_bytes(data)
        assert one in str(error_of(ranks)) or other in str(error_of(ranks))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "meta.pt", "manifest.json"])
def test_a_file_of_another_checkpoint_of_the_same_state_is_found(tmp_path: Path, name: str) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", add=1)
    same = (one / name).read_bytes() == (other / name).read_bytes()
    shutil.copy(other / name, one / name)
    assert (error_of(one) is None) is same, "what is equal, bit by bit, is no damage"


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
    assert "file meta.pt: expected xxh3-128" in str(error_of(path))


def main(count: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tried, missed = flip_bits(saved_by_two_ranks(Path(folder)), count)
    print(json.dumps({"flipped": dict(tried), "found": tried.total() - len(missed), "missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ALL_FLIPS))
