"""The stores of tests/servers.py do what plain fsspec asks of them."""

from __future__ import annotations

import os
import subprocess
import sys

import fsspec
import pytest

from tests.servers import Fault, FaultyProxy, Store

pytest_plugins = ["tests.servers"]

TWENTY_MB = 20 << 20  # more than one part of any store's multipart upload


def test_a_large_file_comes_back_whole_and_in_ranges(store: Store) -> None:
    filesystem, path, data = store.filesystem(), f"{store.url}/large", os.urandom(TWENTY_MB)
    with filesystem.open(path, "wb", block_size=5 << 20) as file:
        file.write(data)
    assert filesystem.info(path)["size"] == TWENTY_MB
    with filesystem.open(path, "rb") as file:
        file.seek(TWENTY_MB // 2)
        assert file.read(1000) == data[TWENTY_MB // 2 :][:1000]
    assert filesystem.cat_file(path, start=10, end=20) == data[10:20]


def test_a_small_file_is_listed_overwritten_and_deleted(store: Store) -> None:
    filesystem = store.filesystem()
    path = filesystem._strip_protocol(f"{store.url}/small")  # rm_file of fsspec's SFTP takes no URL
    filesystem.pipe_file(path, b"one")
    filesystem.pipe_file(path, b"two")
    assert filesystem.cat_file(path) == b"two"
    assert [name.rpartition("/")[2] for name in filesystem.ls(store.url, detail=False)] == ["small"]
    filesystem.rm_file(path)
    assert not filesystem.exists(path)


def test_the_url_alone_is_enough_after_configure(store: Store) -> None:
    with store.configure(), fsspec.open(f"{store.url}/file", "wb") as file:
        file.write(b"data")
    assert store.filesystem().cat_file(f"{store.url}/file") == b"data"


def test_the_url_alone_is_enough_in_a_child_process(store: Store) -> None:
    write = "import sys, fsspec\nwith fsspec.open(sys.argv[1], 'wb') as file: file.write(b'data')"
    command = [sys.executable, "-c", write, f"{store.url}/file"]
    subprocess.run(command, env=os.environ | store.environment(), check=True, timeout=60)
    assert store.filesystem().cat_file(f"{store.url}/file") == b"data"


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET, Fault.CUT, Fault.LOST_REPLY])
def test_a_request_that_fails_once_is_tried_again(store: Store, fault: Fault) -> None:
    if store.protocol == "sftp":
        pytest.skip("FaultyProxy speaks HTTP")
    with FaultyProxy(store.port) as proxy:
        path, filesystem = f"{store.url}/file", store.through(proxy.port).filesystem()
        proxy.fail(fault, times=1, method="PUT")
        filesystem.pipe_file(path, b"data")
        assert sum(request.startswith("PUT") for request in proxy.requests) == 2
    assert store.filesystem().cat_file(path) == b"data"
