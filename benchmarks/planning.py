"""What many ranks cost: planning a save, writing the index and ``.metadata``, one rank's look into them; simulated.

    python benchmarks/planning.py                # 256, 1024 and 4096 ranks, 1000 tensors: some GiB of memory
    python benchmarks/planning.py --small        # for tests

No process but this one, and no tensor: rank 0 gets the plans that the ranks of an FSDP2 run of so many ranks would send
it, of which every rank has a slice of every tensor, and what they would tell of the files that they wrote. Each number
of ranks is measured in a process of its own. Seconds are the processor's, of one run; machines differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.manifest import Manifest, to_json
from lightning_resume.checkpoint.names import INDEX_NAME, METADATA_NAME
from lightning_resume.checkpoint.planning import Planned, _Planner
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.shards import Written, WrittenFile, _without_collecting
from lightning_resume.checkpoint.stored import StoredItem, block_count

ROWS, COLUMNS = 32, 1024
"""Of each rank's slice of a tensor of float32: 128 KiB, two blocks."""
HEAD, TAIL = 704, 960
"""About the bytes of the archive around a tensor."""


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = round(time.process_time() - started, 3)


def plan_of(rank: int, ranks: int, tensors: int) -> SavePlan:
    """What one rank sends to rank 0."""
    properties, size = TensorProperties(dtype=torch.float32), torch.Size([ROWS * ranks, COLUMNS])
    offset, sizes = torch.Size([ROWS * rank, 0]), torch.Size([ROWS, COLUMNS])
    chunk = ChunkStorageMetadata(offset, sizes)
    items = [
        WriteItem(
            index=MetadataIndex(name, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
        )
        for name in map(name_of, range(tensors))
    ]
    return SavePlan(items, planner_data={name: tuple(name.split(".", 1)) for name in map(name_of, range(tensors))})


def name_of(number: int) -> str:
    return f"model.layers.{number}.weight"


def written_by(rank: int, plan: SavePlan) -> WrittenFile:
    """What one rank tells of the file that it wrote."""
    data = ROWS * COLUMNS * 4
    length = HEAD + data + TAIL
    digests = rank.to_bytes(16, "little") * (2 + block_count(data))
    items = [
        StoredItem(offset=number * length, length=length, head=HEAD, data=data, digests=digests)
        for number in range(len(plan.items))
    ]
    return WrittenFile(
        name=f"__{rank}_0.distcp", indexes=[item.index for item in plan.items], items=items, nonfinite=[]
    )


def measure(ranks: int, tensors: int, folder: Path) -> dict[str, Any]:
    """All figures of one number of ranks."""
    watch = Stopwatch()
    plans = [plan_of(rank, ranks, tensors) for rank in range(ranks)]
    with watch("plan, DCP"):
        planned_by(DefaultSavePlanner(), plans)
    with watch("plan, ours"):
        of_ranks, metadata = planned_by(_Planner(), plans)
    del plans
    files = [written_by(rank, plan) for rank, plan in enumerate(of_ranks)]
    with watch("write all that says where things are"):
        written = Written(Planned(mine=of_ranks[0], metadata=metadata), files, frozenset())
        shards = written.describe(folder)
    with _without_collecting():
        with watch("build .index"):
            written._index()
        with watch("build .metadata"):
            written._stock_metadata()
    manifest = Manifest(
        step=1,
        epoch=1,
        created="2026-01-01T00:00:00+00:00",
        sequence=0,
        topology={},
        versions={},
        components={},
        files=shards.files,
        save_seconds=0.0,
        save_bytes_per_second=0.0,
        metadata={},
    )
    (folder / "manifest.json").write_text(to_json(manifest))
    del files, of_ranks, written, metadata, shards, manifest
    gc.collect()  # a rank that loads has none of this in memory
    return watch.seconds | look(folder, ranks, tensors, watch) | {"GiB": round(peak_bytes() / 2**30, 2)}


def planned_by(planner: DefaultSavePlanner, plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
    planner.set_up_planner({}, is_coordinator=True)
    return planner.create_global_plan(plans)


def look(folder: Path, ranks: int, tensors: int, watch: Stopwatch) -> dict[str, Any]:
    """One rank finds its slice of every tensor; beside it, what every stock reader does before it knows of any."""
    read_bytes = 0
    part = ItemSource.part

    def counting(self: ItemSource, name: str, offset: int, length: int) -> bytes:
        nonlocal read_bytes
        read_bytes += length
        return part(self, name, offset, length)

    rank = ranks // 2
    ItemSource.part = counting  # type: ignore[method-assign]  # for this process, which ends after it
    with watch("one rank opens ours"):
        content: Any = CheckpointReader(folder)._content
    with watch("one rank finds its shards in ours"):
        found = [content._index.items(name_of(n), ((ROWS * rank, 0), (ROWS, COLUMNS))) for n in range(tensors)]
    assert [len(items) for items in found] == [1] * tensors
    assert {items[0].file for items in found} == {rank}
    with watch("one rank unpickles .metadata"), (folder / METADATA_NAME).open("rb") as file:
        pickle.load(file)  # as stock torch does
    sizes = {f"MB {name}": (folder / name).stat().st_size for name in (INDEX_NAME, METADATA_NAME, "manifest.json")}
    read = {"MB of .index that one rank reads": read_bytes}
    return {**watch.seconds, **{name: round(size / 1e6, 2) for name, size in (sizes | read).items()}}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_its_own_process(ranks: int, tensors: int, seconds: float) -> dict[str, Any]:
    """The figures of :func:`measure`; of what does not fit into memory or time, none."""
    command = [sys.executable, __file__, f"--measure={ranks}", f"--tensors={tensors}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {seconds:.0f} s"}
    if done.returncode:
        return {"failed": f"exit status {done.returncode}: {done.stderr[-300:].strip()}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def report(by_ranks: dict[int, dict[str, Any]], tensors: int, write: Callable[[str], None] = print) -> None:
    names = list(dict.fromkeys(name for figures in by_ranks.values() for name in figures))
    write(f"{tensors} tensors; seconds of the processor, unless it says MB or GiB")
    write(f"{'ranks':40}" + "".join(f"{ranks:>12}" for ranks in by_ranks))
    for name in names:
        write(f"{name:40}" + "".join(f"{figures.get(name, '-')!s:>12}" for figures in by_ranks.values()))


def main() -> None:
    options = _options()
    if options.measure:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(options.measure, options.tensors, Path(folder))))
        return
    tensors = 20 if options.small else options.tensors
    by_ranks: dict[int, dict[str, Any]] = {}
    for ranks in (4, 64) if options.small else options.ranks:
        if options.small:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                by_ranks[ranks] = measure(ranks, tensors, Path(folder))
        else:
            by_ranks[ranks] = in_its_own_process(ranks, tensors, options.seconds)
    report(by_ranks, tensors)
    if options.output:
        options.output.write_text(json.dumps({"tensors": tensors, "by_ranks": by_ranks}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=900, help="at most so long for each number of ranks")
    parser.add_argument("--small", action="store_true", help="4 and 64 ranks, 20 tensors")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    parser.add_argument("--output", type=Path, help="the figures as JSON")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
