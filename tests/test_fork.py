"""A process that forks goes on hearing from its stores."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import sys
from pathlib import Path

import fsspec
import fsspec.asyn
import pytest

import lightning_resume._fork
from tests.servers import Store

pytest_plugins = ["tests.servers"]


def listened_to() -> list[int]:
    """The descriptors that this process's event loops wait for, as the kernel has them."""
    infos = [info.read_text() for info in Path("/proc/self/fdinfo").iterdir() if info.exists()]
    return sorted(int(fd) for info in infos for fd in re.findall(r"^tfd:\s+(\d+)", info, re.MULTILINE))


async def collect_in_the_event_loop() -> None:
    """Collects what was inherited here, as any request may; only here s3fs closes its connections."""
    gc.collect()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def forked(store: Store, *, keep: bool) -> None:
    """A worker that reads from the same store, to its end."""
    gc.disable()  # in the child, so that no allocation decides where it collects
    child = os.fork()
    if child == 0:
        try:
            if not keep:
                lightning_resume._fork._kept.clear()
            filesystem, root = fsspec.url_to_fs(store.url, **store.storage_options)
            assert filesystem.cat_file(f"{root}/a") == b"content"
            fsspec.asyn.sync(filesystem.loop, collect_in_the_event_loop)
            os._exit(0)
        finally:
            os._exit(1)
    gc.enable()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
def test_a_fork_leaves_the_parents_connections_to_its_event_loop(store: Store) -> None:
    if store.name != "s3-s3rver":
        pytest.skip("s3fs is the one that closes what was inherited, and this server the one that keeps connections")
    filesystem, root = fsspec.url_to_fs(store.url, **store.storage_options)
    filesystem.pipe_file(f"{root}/a", b"content")
    filesystem.cat_file(f"{root}/a")
    del filesystem
    before = listened_to()
    forked(store, keep=True)
    assert listened_to() == before
    forked(store, keep=False)
    assert set(listened_to()) < set(before), "fsspec and s3fs close nothing any more: _fork.py can go"


def test_nothing_is_kept_in_the_parent() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert lightning_resume._fork._kept == []
