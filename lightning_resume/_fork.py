"""Keeps connections to remote stores alive in a process that forks, as a DataLoader does for each of its workers."""

from __future__ import annotations

import os
from typing import Any

from fsspec.spec import AbstractFileSystem

_kept: list[Any] = []
_registered = False


def keep_filesystems() -> None:
    """Has every later fork leave the parent's filesystems uncollected in the child; calling it again changes nothing.

    In a forked child fsspec drops all filesystems. Where they are collected in the child's event loop, as by chance of
    when the collector runs, s3fs closes their connections, and with that takes the sockets out of the epoll that child
    and parent share: the parent never hears the answer to its next request, and tries again when its time limit is over
    (fsspec and s3fs 2026.9: 15 s for each).
    """
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):  # Windows has no fork
        _registered = True
        os.register_at_fork(before=_keep, after_in_parent=_kept.clear)


def _keep() -> None:
    classes: list[Any] = [AbstractFileSystem]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        _kept.extend(cls._cache.values())
