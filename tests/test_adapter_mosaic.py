"""MosaicML Streaming: elastic, with repeats that even out ranks, and none lost."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_resume import CheckpointMismatchError, make_resumable
from lightning_resume.data.capabilities import Randomness
from lightning_resume.state.component import Sharing
from tests.conformance import LoaderConformance
from tests.harness import Zygote, zygote
from tests.loader_packages import package
from tests.replay import (
    assert_replays_from_every_batch,
    assert_replays_in_a_chain,
    lost_and_repeated,
    plain,
    resumable,
    run,
    stored,
)
from tests.simulated_ranks import Topology
from tests.toy_data import draw
from tests.toy_fabric import launch

streaming = package("streaming")
World = package("streaming.base.world").World
prefixes = package("streaming.base.shared.prefix")
SharedMemory = package("streaming.base.shared.memory").SharedMemory
LENGTH = 26
TEMPORARY = Path(tempfile.gettempdir())


class Dataset(streaming.StreamingDataset):  # type: ignore[misc]
    """Each sample is its index and a random augmentation."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"i": super().__getitem__(index)["i"], "noise": draw()}


def write(folder: Path, length: int = LENGTH) -> None:
    with streaming.MDSWriter(out=str(folder), columns={"i": "int"}, size_limit=200) as writer:
        for i in range(length):
            writer.write({"i": i})


@pytest.fixture(autouse=True)
def leaves_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every dataset of the package leaves dozens of file descriptors open until its process ends; here, until unused.

    Their names, and files that lock them in the folder for temporary files, are passed over by all that come later. Two
    processes that are given their numbers at the same time end in an error; here each has numbers of its own.
    """
    init, process = SharedMemory.__init__, os.getpid()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(prefixes, "_each_prefix_int", lambda: itertools.count(process * 1000))

    def close(blocks: Iterable[Any]) -> None:
        for block in blocks if os.getpid() == process else ():  # a worker has them from its parent
            with contextlib.suppress(BufferError):  # somebody still looks at it
                block.close()

    def closing(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        atexit.unregister(self.cleanup)
        _created.extend(self.created_shms)
        weakref.finalize(self, close, [*self.created_shms, *self.opened_shms])

    monkeypatch.setattr(SharedMemory, "__init__", closing)
    yield
    gc.collect()
    forget_names()


_created: list[Any] = []


def forget_names() -> None:
    while _created:
        with contextlib.suppress(FileNotFoundError):
            _created.pop().unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mds")
    write(made)
    return made


@pytest.fixture(scope="module")
def ranks() -> Zygote:
    return zygote()


def make(
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    batch_size: int = 4,
    *,
    folder: Path,
    loader: Any = None,
    prefetch_factor: int | None = None,
    **options: Any,
) -> Any:
    """One rank's loader; told so here, as if each were the only one that plans on its node."""
    options = {"shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 2, **options}
    dataset = Dataset(local=str(folder), batch_size=batch_size, **options)
    dataset._parallel_rank_world = World(1, world_size, 1, rank)
    loader = loader or streaming.StreamingDataLoader
    return loader(dataset, batch_size=batch_size, num_workers=num_workers, prefetch_factor=prefetch_factor)


def indices(batches: Any) -> list[int]:
    return [i for batch in batches for i in plain(batch["i"])]


@pytest.mark.filterwarnings("ignore:Attempting to partition:UserWarning")  # fewer samples are left than ranks
class TestMosaic(LoaderConformance):
    length = 14
    evens_out = True

    def prepare(self, folder: Path) -> None:
        write(folder, self.length)

    def make(self, *, rank: int = 0, world_size: int = 1, seed: int = 3, **options: Any) -> Any:
        loader = make(rank, world_size, shuffle_seed=seed, **options)
        return make_resumable(loader, rank=rank, world_size=world_size, seed=seed)

    def test_ranks_that_have_to_be_evened_out_replay_from_every_step(self, folder: Path) -> None:
        self.test_it_replays_from_every_step_of_three_epochs(folder, Topology(world_size=3))

    def _check_chain(self, *args: Any) -> None:
        super()._check_chain(*args)
        forget_names()  # each dataset looks at all that there are

    def _consume(self, data: Path, folder: Path, **options: Any) -> None:
        super()._consume(data, folder, **options)
        for found in Path("/dev/shm").glob("*_locals"):  # of a process that was killed, and has cleaned up nothing
            if str(data).encode() in found.read_bytes():
                prefix = found.name.removesuffix("locals")
                for left in (*found.parent.glob(f"{prefix}*"), *TEMPORARY.glob(f"{prefix}*filelock*")):
                    left.unlink(missing_ok=True)

    def ids(self, batch: Any) -> list[int]:
        return plain(batch["i"])  # type: ignore[no-any-return]

    def noise(self, batch: Any) -> list[float]:
        return plain(batch["noise"])  # type: ignore[no-any-return]


OPTIONS: dict[str, dict[str, Any]] = {
    "in order": {"shuffle": False, "loader": DataLoader},
    "uneven canonical nodes": {"num_canonical_nodes": 7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_resumes_exactly_from_every_batch_and_in_a_chain(name: str, folder: Path) -> None:
    made = lambda: make(folder=folder, **OPTIONS[name])  # noqa: E731
    assert_replays_in_a_chain(made, assert_replays_from_every_batch(made))


def together(topology: tuple[int, int, int], state: Any, steps: int | None, folder: Path) -> Any:
    """What all ranks of (world size, workers, batch size) take in some steps, and the state that they share then."""
    world_size, workers, batch_size = topology
    loaders = [
        resumable(
            lambda rank=rank: make(  # type: ignore[misc]
                rank, world_size, workers, batch_size, folder=folder, **OPTIONS["uneven canonical nodes"]
            ),
            state,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    batches = [list(itertools.islice(loader, steps)) for loader in loaders]
    assert len({len(of_rank) for of_rank in batches}) == 1
    states = [stored(loader.state_dict()) for loader in loaders]
    assert states == states[:1] * world_size  # so it is stored once
    return [i for of_rank in batches for i in indices(of_rank)], states[0], loaders[0].capabilities


CHAINS = [
    [(2, 0, 4, 2), (1, 0, 4, None)],
    [(1, 0, 4, 3), (2, 0, 4, None)],
    [(1, 0, 4, 3), (1, 2, 4, None)],
    [(1, 2, 4, 3), (1, 0, 4, None)],
    [(1, 0, 4, 3), (1, 0, 7, None)],
    [(2, 0, 3, 2), (3, 0, 4, 1), (1, 0, 5, None)],
    [(4, 0, 2, 1), (3, 0, 2, 2), (2, 0, 2, 1), (3, 0, 3, None)],
    [(3, 0, 4, 1), (3, 0, 4, 1), (4, 0, 1, None)],
]


@pytest.mark.filterwarnings("ignore:Attempting to partition:UserWarning")  # fewer samples are left than ranks
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_uneven_canonical_nodes_lose_nothing_and_repeat_no_more_than_declared(chain: list[Any], folder: Path) -> None:
    seen: list[int] = []
    state, allowed = None, 0
    for *topology, steps in chain:
        taken, state, capabilities = together(tuple(topology), state, steps, folder)  # type: ignore[arg-type]
        seen += taken
        allowed = max(allowed, capabilities.repeated)
        assert capabilities.lost == 0
    lost, repeated = lost_and_repeated(seen, range(LENGTH))
    assert lost == 0
    assert repeated <= allowed


def test_a_samples_random_numbers_are_the_same_at_any_topology(folder: Path) -> None:
    def noise(**options: Any) -> dict[int, float]:
        loader = resumable(lambda: make(folder=folder, **options))
        assert loader.capabilities.randomness is Randomness.SAMPLE
        assert loader.sharing is Sharing.REPLICATED
        return {i: n for b in loader for i, n in zip(plain(b["i"]), plain(b["noise"]), strict=True)}

    alone = noise()
    assert len(set(alone.values())) == LENGTH
    assert noise(num_workers=2, batch_size=7) == alone
    of_ranks = [noise(rank=rank, world_size=2) for rank in range(2)]
    assert of_ranks[0] | of_ranks[1] == alone


def test_epochs_differ_and_a_resumed_one_is_followed_by_the_next(folder: Path) -> None:
    loader = resumable(lambda: make(folder=folder))
    epochs = [indices(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(LENGTH)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    loader.set_epoch(1)
    assert indices(loader) == epochs[1]


def test_another_dataset_or_another_way_of_shuffling_is_refused(folder: Path, tmp_path: Path) -> None:
    state = resumable(lambda: make(folder=folder)).state_dict()
    write(tmp_path, LENGTH + 1)
    for field, other in [
        ("samples", lambda: make(folder=tmp_path)),
        ("shuffle_algo", lambda: make(folder=folder, shuffle_algo="py2s")),
        ("shuffle", lambda: make(folder=folder, shuffle=False)),
    ]:
        with pytest.raises(CheckpointMismatchError, match=f"not the same {field}"):
            make_resumable(other(), strict=False).load_state_dict(state)


# -- what it gets wrong by itself


def test_stock_counts_wrong_after_a_resume_and_we_do_not(folder: Path) -> None:
    """Its loader counts batches that were handed out as used, and with ``drop_last``-like tails by their size."""
    expected = indices(make(folder=folder))
    state: Any = None
    seen: list[int] = []
    while len(seen) < LENGTH:
        loader = resumable(lambda: make(folder=folder), state, seed=len(seen) + 1)
        seen += indices([next(iter(loader))])
        state = stored(loader.state_dict())
    assert seen == expected


def test_stock_leaves_file_descriptors_open_with_every_state_and_we_ask_once_an_epoch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `leaves_nothing_of_its_own`

    def opened(work: Any) -> int:
        before = len(os.listdir("/proc/self/fd"))
        work()
        return len(os.listdir("/proc/self/fd")) - before

    stock = make(folder=folder)
    list(stock)
    stock.load_state_dict(stock.state_dict())
    assert opened(lambda: [stock.state_dict() for _ in range(10)]) >= 10
    ours = resumable(lambda: make(batch_size=1, folder=folder))
    list(ours)
    assert opened(lambda: run(ours, epochs=1)) < 10


# -- real ranks


def check_ranks(_folder: Path, *, data: Path, to: Path) -> None:
    """Two ranks take two steps; what they took and where they are goes into a file of each."""
    import torch

    rank = int(os.environ["RANK"])
    dataset = Dataset(local=str(data), batch_size=4, shuffle=True, shuffle_seed=5, num_canonical_nodes=2)
    loader = make_resumable(streaming.StreamingDataLoader(dataset, batch_size=4), rank=rank, world_size=2, seed=3)
    taken = indices(itertools.islice(loader, 2))
    torch.save((taken, loader.state_dict()), to / f"{rank}.pt")
    del loader
    gc.collect()
    dataset._executor.shutdown()
    if dist.is_initialized():
        dist.barrier()


def test_two_real_ranks_go_on_as_one(ranks: Zygote, folder: Path, tmp_path: Path) -> None:
    import torch

    launch(ranks, check_ranks, tmp_path, data=folder, to=tmp_path)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert saved[0][1] == saved[1][1]
    rest = indices(resumable(lambda: make(folder=folder), saved[0][1]))
    assert sorted(saved[0][0] + saved[1][0] + rest) == list(range(LENGTH))
