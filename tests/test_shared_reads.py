"""What all ranks want of a remote store is read once and sent to the others: all of it, or an error on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lightning_resume.checkpoint import indexed, reads
from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.writer import write_checkpoint
from tests.checkpoint_worker import launch, sharded
from tests.counting import Counted

RANKS = 3
PIECE = 2**18
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    """Of one piece, of several, of less than a block, and one that comes in pieces of rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (1000, 300), "block": (256, 256), "small": (7,), "none": (0,), "wide": (3, 100_001)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def empty(dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in tensors().items()}


def transposed() -> Tensors:
    """Memory that nothing can be read straight into, as a GPU's."""
    return {name: torch.zeros((2, *tensor.shape)).movedim(0, -1)[..., 1] for name, tensor in tensors().items()}


def are_there(found: Tensors) -> bool:
    return all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in tensors().items())


def of_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Everything that is asked of one group of ranks: to make it takes longer than all of it."""
    indexed._REMOTE_PIECE_BYTES, indexed._REMOTE_READERS = PIECE, 2
    write_checkpoint(folder / "c", state={"model": tensors()}, leaves={}, meta=None)
    told: dict[str, Any] = {}
    for name, of_this_rank in STATES.items():
        fsspec.config.conf["counting"] = {"log": str(folder / f"{name}.log")}
        reader = CheckpointReader(f"counting://{folder}/c")
        into = of_this_rank(rank)
        reader.load_into({"model": into}, together=True)
        told[name] = {key: _is_there(key, tensor) for key, tensor in into.items()}
    fsspec.config.conf["counting"] = {}
    for name, (failing, method, fails) in FAILURES.items():
        stock = getattr(ItemSource, method)
        if rank == failing:
            setattr(ItemSource, method, fails)
        into = empty()
        try:
            CheckpointReader(f"counting://{folder}/c").load_into({"model": into}, together=True)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        setattr(ItemSource, method, stock)
        CheckpointReader(f"counting://{folder}/c").load_into({"model": into}, together=True)
        told[f"after {name}"] = are_there(into)
    return told


def _is_there(key: str, tensor: Any) -> bool:
    whole = tensors()[key]
    if hasattr(tensor, "to_local"):
        return torch.equal(tensor.full_tensor(), whole)
    return torch.equal(tensor, whole.to(tensor.dtype))


STATES: dict[str, Callable[[int], Tensors]] = {
    "alike": lambda _: empty(),
    "of another type": lambda _: empty(torch.float64),
    "not in one piece": lambda _: transposed(),
    "one in another type": lambda rank: empty(torch.float64 if rank == 1 else torch.float32),
    "one wants less": lambda rank: {"small": empty()["small"]} if rank == 2 else empty(),
    "shards": lambda _: {"large": sharded(torch.zeros(1000, 300))},
}


def away(self: ItemSource, name: str, *where: int) -> bytes:
    if name.endswith(".distcp"):
        raise OSError(5, "the store is away")
    return STOCK_PART(self, name, *where)


def rejects(self: ItemSource, name: str, *which: Any) -> None:
    self.reject(f"file {name}, {which[-1]}", "what was sent", "something else")


STOCK_PART = ItemSource.part
FAILURES: dict[str, tuple[int, str, Callable[..., Any]]] = {
    "a store that is away for one": (1, "part", away),
    "what arrives is not what was sent": (2, "check", rejects),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, launch(of_rank, RANKS, folder)


@pytest.mark.parametrize("name", STATES)
def test_every_rank_has_what_it_wanted(ranks: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    told = ranks[1]
    assert [set(of_rank[name].values()) for of_rank in told] == [{True}] * RANKS


@pytest.mark.parametrize(
    ("name", "times"),
    [("alike", 1), ("of another type", 1), ("one wants less", 2), ("shards", 1)],
)
def test_the_bytes_that_all_want_are_read_once(ranks: tuple[Path, list[dict[str, Any]]], name: str, times: int) -> None:
    counted = Counted(ranks[0] / f"{name}.log")
    read = Counter[str]()
    for call, file, *range_read in counted.calls():
        if call == "read" and file.endswith(".distcp"):
            read[file] += range_read[1] - range_read[0]
    wanted = tensors() if name != "shards" else {"large": tensors()["large"]}
    size = sum(tensor.nbytes for tensor in wanted.values())
    assert times * size <= sum(read.values()) <= 1.25 * times * size  # pieces as small as here may share a block


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("a store that is away for one", "OSError: [Errno 5] the store is away"),
        ("what arrives is not what was sent", "CheckpointCorruptError: "),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all_and_the_next_load_works(
    ranks: tuple[Path, list[dict[str, Any]]], name: str, error: str
) -> None:
    assert [of_rank[name][: len(error)] for of_rank in ranks[1]] == [error] * RANKS
    assert [of_rank[f"after {name}"] for of_rank in ranks[1]] == [True] * RANKS


def test_of_a_local_disk_each_rank_reads_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "fetch_shared", lambda *_: pytest.fail("ranks of one machine share its memory"))
    write_checkpoint(tmp_path / "c", state={"model": tensors()}, leaves={}, meta=None)
    into = empty()
    CheckpointReader(tmp_path / "c").load_into({"model": into}, together=True)
    assert are_there(into)
