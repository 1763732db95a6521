"""Folders of small data files whose rows tell who they are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (17, 1, 40, 0, 25, 8)
"""Rows of each file: more and fewer than a batch, one and none."""
TOTAL = sum(SIZES)
GROUP = 7
"""Rows of each row group but the last of a file."""


def table(first: int, rows: int) -> pa.Table:
    """``rows`` rows that are numbered from ``first`` on."""
    ids = list(range(first, first + rows))
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "text": pa.array([f"row {i}" for i in ids], pa.string()),
            "half": pa.array([i / 2 for i in ids], pa.float32()),
            "pair": pa.array([[i, i + 1] for i in ids], pa.list_(pa.int32())),
            "some": pa.array([[i] * (i % 3) for i in ids], pa.list_(pa.int64())),
            "maybe": pa.array([None if i % 5 == 0 else i for i in ids], pa.int64()),
            "even": pa.array([i % 2 == 0 for i in ids], pa.bool_()),
        }
    )


def write_parquet(folder: Path, sizes: tuple[int, ...] = SIZES, *, first: int = 0, name: str = "part") -> Path:
    """Files of ``sizes`` rows, in row groups of :data:`GROUP`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(sizes):
        pq.write_table(table(first, rows), folder / f"{name}-{number:03d}.parquet", row_group_size=GROUP)
        first += rows
    return folder


def add_noise(sample: dict[str, Any]) -> dict[str, Any]:
    """A transform that draws from each generator."""
    import numpy as np
    import torch

    return {**sample, "noise": [random.random(), float(np.random.rand()), float(torch.rand(()))]}
