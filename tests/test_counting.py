"""The counting filesystem counts."""

from __future__ import annotations

from pathlib import Path

import fsspec

from lightning_resume.data.sharded.files import list_files
from tests.counting import Counted


def test_opens_and_ranges_are_counted_and_listing_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(b"0123456789")
    counted = Counted(tmp_path / "log")
    files = list_files(counted.url(tmp_path / "data"), storage_options=counted.options)
    assert counted.opens() == {}
    counted.clear()
    with files.open(0) as file:
        file.seek(3)
        assert file.read(4) == b"3456"
    filesystem, _ = fsspec.url_to_fs(files.given, **files.storage_options)
    assert filesystem.cat_file(f"{files.root}/a.txt", start=8, end=10) == b"89"
    assert counted.opens() == {"a.txt": 2}
    assert counted.ranges() == {"a.txt": [(3, 7), (8, 10)]}
    assert counted.asked() == {"a.txt"}
