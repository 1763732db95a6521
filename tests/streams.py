"""Small streams of every format, and runs over them on any number of simulated ranks."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from lightning_resume import ShardedDataset
from tests.local_peers import LocalRanks
from tests.toy_data import draw, reseed

SHARDS = (7, 1, 11, 4)
"""Samples in each file."""
LENGTH = sum(SHARDS)
NOTHING = object()


def noisy(sample: Any) -> Any:
    """A transform that draws from every generator."""
    noise = draw()
    return {**sample, "noise": noise} if isinstance(sample, Mapping) else (sample, noise)


def number_of(sample: Any) -> int:
    """Which sample it is, in every format."""
    if isinstance(sample, tuple):
        return number_of(sample[0])
    if isinstance(sample, Mapping):
        return int(sample["id"])
    return int(str(sample).split()[0])


def line(number: int) -> bytes:
    return json.dumps({"id": number, "text": "é" * (number % 7)}).encode()


def text(number: int) -> bytes:
    return f"{number} {'ü' * (number % 5)}".encode()


def lines_file(make: Callable[[int], bytes], numbers: Sequence[int]) -> bytes:
    return b"".join(make(number) + b"\n" for number in numbers)


def tar_file(numbers: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in numbers:
            for kind, content in (("id", str(number).encode()), ("bin", b"\0" * (number * 40))):
                info = tarfile.TarInfo(f"folder/{number:04}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet_file(numbers: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(numbers)}), buffer, row_group_size=3)
    return buffer.getvalue()


def frames(content: bytes, compress: Callable[[bytes], bytes], size: int = 100) -> bytes:
    """``content`` compressed in several members or frames, which end anywhere."""
    return b"".join(compress(content[at : at + size]) for at in range(0, len(content), size))


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


FORMATS: dict[str, tuple[str, str, Callable[[Sequence[int]], bytes]]] = {
    "jsonl": ("jsonl", ".jsonl", lambda numbers: lines_file(line, numbers)),
    "jsonl.gz": ("jsonl", ".jsonl.gz", lambda numbers: gzip.compress(lines_file(line, numbers))),
    "jsonl.gz, members": ("jsonl", ".jsonl.gz", lambda numbers: frames(lines_file(line, numbers), gzip.compress)),
    "jsonl.zst": ("jsonl", ".jsonl.zst", lambda numbers: zstd(lines_file(line, numbers))),
    "jsonl.zst, frames": ("jsonl", ".jsonl.zst", lambda numbers: frames(lines_file(line, numbers), zstd)),
    "text": ("text", ".txt", lambda numbers: lines_file(text, numbers)),
    "tar": ("webdataset", ".tar", tar_file),
    "tar.gz": ("tar", ".tar.gz", lambda numbers: gzip.compress(tar_file(numbers))),
    "parquet": ("parquet", ".parquet", parquet_file),
}
WINDOWS = {"parquet": 1}


def write(folder: Path, name: str, shards: Sequence[int] = SHARDS, first: int = 0, begin: int = 0) -> Path:
    """Writes files whose samples are numbered."""
    _, suffix, make = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(shards, begin):
        (folder / f"shard-{shard}{suffix}").write_bytes(make(range(first, first + count)))
        first += count
    return folder


def always(_sample: Any) -> bool:
    return True


def make(folder: Any, name: str = "jsonl", *, num_workers: int = 0, **options: Any) -> Any:
    """A loader of samples with their noise; parquet is read as a stream, too."""
    reseed(random.getrandbits(31))
    settings = {
        "format": FORMATS[name][0],
        "batch_size": 4,
        "shuffle": True,
        "seed": 3,
        "transform": noisy,
        "filter": always if name == "parquet" else None,
        "collate_fn": list,
        "window": WINDOWS.get(name, 3),
        **options,
    }
    return ShardedDataset.create_dataloader(str(folder), num_workers=num_workers, **settings)[0]


def plain(value: Any) -> Any:
    """Equal only for equal bits."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.hex() if isinstance(value, float) else value


def stored(state: Any) -> Any:
    """A state as it comes back from a file that holds no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Ranks:
    """All ranks of a run, which take their steps together and agree as a process group does."""

    def __init__(
        self, make_rank: Callable[..., Any], world_size: int = 1, *, states: Sequence[Any] = (), **options: Any
    ) -> None:
        self._group = LocalRanks(world_size)
        self.loaders = [make_rank(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for rank, loader in enumerate(self.loaders):
            loader.peers = self._group.peers(rank)
            if states:
                loader.load_state_dict(states)
        self._open: list[Any] = []

    def step(self) -> list[Any] | None:
        """The batch of every rank; None at the end of the epoch."""
        self._open = self._open or [iter(loader) for loader in self.loaders]
        batches = self._group.run([lambda one=one: next(one, NOTHING) for one in self._open])  # type: ignore[misc]
        ended = [batch is NOTHING for batch in batches]
        assert all(ended) or not any(ended), f"some ranks have ended, others wait in a collective: {ended}"
        if all(ended):
            self._open = []
            return None
        return batches

    def epoch(self) -> list[list[Any]]:
        """The steps that are left of the epoch."""
        return list(iter(self.step, None))

    def states(self, behind: int = 0) -> list[Any]:
        return [stored(loader.state_dict(behind)) for loader in self.loaders]


def samples(steps: Sequence[Sequence[Any]]) -> list[int]:
    """The samples of some steps of all ranks, by number, in order."""
    return [number_of(sample) for batches in steps for batch in batches for sample in batch]
