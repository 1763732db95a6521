"""The conformance suite on what rank 0 loads for all ranks."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_resume import dispatched
from lightning_resume.data.dispatch import DispatchedLoader
from lightning_resume.data.order import Tail
from lightning_resume.data.transport import Packed
from tests.conformance import LoaderConformance
from tests.simulated_ranks import Ranks, Topology
from tests.toy_data import LENGTH, Noisy, Stateful


class Queues:
    """Carries what rank 0 sends to ranks of the same process, which receive after it has sent."""

    def __init__(self) -> None:
        self._sent: dict[int, collections.deque[Packed]] = collections.defaultdict(collections.deque)

    def send(self, objects: Mapping[int, Packed]) -> None:
        for rank, packed in objects.items():
            self._sent[rank].append(packed)

    def of_rank(self, rank: int) -> EndOfQueue:
        return EndOfQueue(self._sent[rank])


class EndOfQueue:
    def __init__(self, sent: collections.deque[Packed]) -> None:
        self._sent = sent

    def send(self, objects: Mapping[int, Packed]) -> None:
        raise AssertionError("only rank 0 sends")

    def receive(self) -> Any:
        return self._sent.popleft().unpack()


class TestDispatched(LoaderConformance):
    length: int | None = LENGTH

    def user_loader(self, **options: Any) -> Any:
        return DataLoader(Noisy(), shuffle=True, **options)

    def make(
        self, *, folder: Path, rank: int = 0, world_size: int = 1, seed: int = 3, batch_size: int = 4, **options: Any
    ) -> DispatchedLoader:
        return dispatched(lambda: self.user_loader(batch_size=batch_size, **options), seed=seed)

    def begun(self, topology: Topology, folder: Path) -> Ranks:
        loaders = [self.loader(topology, folder, rank) for rank in range(topology.world_size)]
        queues, about = Queues(), None
        for rank, loader in enumerate(loaders):
            assert isinstance(loader, DispatchedLoader)
            loader._share = rank, topology.world_size
            about = about or loader._produce()
            loader._connect(range(topology.world_size), queues.of_rank(rank) if rank else queues, about)
        return Ranks(loaders)

    def ids(self, batch: Any) -> list[int]:
        return batch[0].tolist()

    def noise(self, batch: Any) -> list[Any] | None:
        return batch[1].tolist()


class TestDispatchedInTurn(TestDispatched):
    """Of a loader in an order of its own, whose batches the ranks take in turn."""

    tail = Tail.CARRY

    def user_loader(self, **options: Any) -> Any:
        return DataLoader(Stateful(), **options)
