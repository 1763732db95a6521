"""The names of files and folders in the format, version 1; nothing here looks into a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from lightning_resume.checkpoint.paths import AnyPath

MANIFEST_NAME = "manifest.json"
METADATA_NAME = ".metadata"
META_NAME = "meta.pt"
INDEX_NAME = ".index"
BESIDE_SHARDS = frozenset({METADATA_NAME, META_NAME, INDEX_NAME})
"""The files of a checkpoint beside its shards and its manifest."""
UNFINISHED_NAME = ".unfinished"
"""Lies in a remote folder while it is filled or emptied: without a manifest beside it, nothing in there counts."""
ATTEMPTS_NAME = "attempts.json"
"""Lies in a run folder."""
LEAF_PREFIX = "resume."

_STEP = re.compile(r"step-(\d{8,})")
_REPLACING = re.compile(r"save-[0-9a-f]{16}")
_DATA = re.compile(r"__\d+_\d+\.distcp")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<stage>tmp|old)-[0-9a-f]{16}")


def step_name(step: int) -> str:
    """Returns the folder name of ``step``, for example ``step-00000500``; more than 8 digits where needed."""
    if step < 0:
        raise ValueError(f"A step is counted from 0, got {step}.")
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    return _STEP.fullmatch(name) is not None


def data_name(rank: int, part: int = 0) -> str:
    return f"__{rank}_{part}.distcp"


def is_data_name(name: str) -> bool:
    return _DATA.fullmatch(name) is not None


def replacing_name() -> str:
    """Returns a fresh name for the folder, within a remote checkpoint, of a save that replaces what is there."""
    return f"save-{uuid4().hex[:16]}"


def is_replacing_name(name: str) -> bool:
    return _REPLACING.fullmatch(name) is not None


def staged_path(target: Path) -> Path:
    """Returns a fresh sibling of ``target`` to write into; it is renamed to ``target`` once it is whole."""
    return target.with_name(f".{target.name}.tmp-{uuid4().hex[:16]}")


def retired_path(target: Path) -> Path:
    """Returns a fresh sibling of ``target`` for the older checkpoint while the newer one takes its place."""
    return target.with_name(f".{target.name}.old-{uuid4().hex[:16]}")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """What an unfinished save left beside a checkpoint: ``of`` is that checkpoint's own path."""

    path: Path
    of: Path
    retired: bool


def as_leftover(path: Path) -> Leftover | None:
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return None
    return Leftover(path=path, of=path.with_name(match["name"]), retired=match["stage"] == "old")


def is_leftover_name(name: str) -> bool:
    return _LEFTOVER.fullmatch(name) is not None


def is_staged(path: AnyPath) -> bool:
    """Says whether ``path`` is a folder that a save was still filling, or a delete was emptying."""
    leftover = as_leftover(path) if isinstance(path, Path) else None
    return leftover is not None and not leftover.retired


def find_leftovers(root: Path) -> Iterator[Leftover]:
    """Yields everything in the folder ``root`` that an unfinished save left there, in order of name."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    for name in names:
        leftover = as_leftover(root / name)
        if leftover is not None:
            yield leftover


def resolve(path: AnyPath) -> AnyPath:
    """Returns where the checkpoint ``path`` really lies.

    A crash between the two renames of an overwriting save (on filesystems that cannot exchange two names at once)
    leaves the older checkpoint, whole, under its retired name; that name is returned then.
    """
    if not isinstance(path, Path) or os.path.lexists(path):
        return path
    retired = [left.path for left in find_leftovers(path.parent) if left.retired and left.of == path]
    return max(retired, key=lambda old: old.lstat().st_mtime_ns, default=path)
