"""What the writer and the reader of the index share: the form of its rows, and what they are of."""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lightning_resume.checkpoint.stored import StoredItem

MAGIC = b"LRindex1"
PREAMBLE = struct.Struct("<8sQ")
ROW = np.dtype(
    [("file", "<u4"), ("head", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("data", "<u8"), ("digest", "<u8")]
)
INTEGER = np.dtype("<i8")
_OF_RANK = re.compile(r"(.+)\.rank_([0-9]{5,18})", re.DOTALL)

Array: TypeAlias = np.ndarray[Any, Any]
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: where it begins and its sizes, in elements along each dimension."""


class Placed(NamedTuple):
    """One stored item: its file by number, where it lies there, and, of a tensor, which part it is."""

    # no dataclass: a save of 1024 ranks makes a million of them, each in a third of the time
    file: int
    item: StoredItem
    box: Box = ((), ())


def name_of_rank(name: str, rank: int) -> str:
    return f"{name}.rank_{rank:05d}"


def of_rank(key: str) -> tuple[str, int] | None:
    """The name of a leaf without its rank, and the rank; None of a leaf that is no rank's."""
    match = _OF_RANK.fullmatch(key)
    return (match[1], int(match[2])) if match and key == name_of_rank(match[1], int(match[2])) else None
