"""MosaicML Streaming's ``StreamingDataset``, in its own ``StreamingDataLoader`` or any ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset

from lightning_resume.data.adapters.iterable import keyed_copy, shut_down
from lightning_resume.data.adapters.protocol import LoaderAdapter, is_from, skipped
from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.randomness import EpochCell, keyed_seed
from lightning_resume.state import rng
from lightning_resume.state.component import Sharing


@final
class StreamingDatasetAdapter(LoaderAdapter):
    """Goes on from the number of samples that all ranks took of the epoch, counted by us.

    The loader's own count is off after a resume, and cannot tell batches in prefetch from those that were used.
    """

    kind = "MosaicML StreamingDataset"
    sharing = Sharing.REPLICATED

    def __init__(self, loader: Any, **run: Any) -> None:
        super().__init__(loader, **run)
        self._dataset: Any = loader.dataset
        self._epoch = EpochCell()
        self.engine, self._keyed = keyed_copy(loader, self.seed, self._epoch, KeyedBySample)
        self._samples = 0
        self._position: dict[str, Any] = {}

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return isinstance(loader, DataLoader) and is_from(loader.dataset, "streaming", "StreamingDataset")

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        world = self._dataset._parallel_rank_world
        canonical = self._dataset.num_canonical_nodes or world.num_nodes
        return Capabilities(
            world_size=Change.ELASTIC,
            num_workers=Change.ELASTIC,
            batch_size=Change.ELASTIC,
            # it repeats what canonical nodes and ranks lack to be even, in every epoch, and begins at a multiple of the
            # number of nodes
            repeated=canonical - 1 + world.num_ranks - 1 + world.num_nodes - 1,
            order=Order.TOPOLOGY,
            randomness=Randomness.SAMPLE,
            resume_cost="plans the epoch again: O(samples)",
            state_size="O(1)",
        )

    def topology(self) -> dict[str, Any]:
        # it has detected for itself how many ranks there are; `replication` lets several see the same
        return {**super().topology(), "world_size": self._dataset._parallel_rank_world.num_ranks}

    def identity(self) -> dict[str, Any]:
        names = ("shuffle", "shuffle_algo", "sampling_method", "batching_method", "partition_algo")
        return {"samples": self._dataset.epoch_size, **{name: getattr(self._dataset, name) for name in names}}

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        self._epoch.set(epoch)
        samples = skip * self._step_size if state is None else state["sample_in_epoch"]
        ahead = self._steps_to_skip(samples)
        begin = max(0, samples - ahead * self._step_size)
        self._begin_at({**(state or {}), "epoch": epoch, "sample_in_epoch": begin})
        self._samples = begin - begin % self._rounds_to()
        return skipped(self._counted(iter(self.engine)), ahead)

    def _steps_to_skip(self, samples: int) -> int:
        """Near the end of an epoch it has to begin some steps before ``samples``, which are then passed over."""
        # it refuses to begin after its last sample, where only repeats are left that even the ranks out
        past_end = samples - self._dataset.epoch_size
        # of too few samples it repeats others than it would have without a resume
        world = self._dataset._parallel_rank_world
        too_few = past_end + 2 * (world.num_ranks - world.num_nodes)
        return max(_steps(past_end, self._step_size), min(_steps(too_few, self._step_size), samples // self._step_size))

    def _begin_at(self, position: dict[str, Any]) -> None:
        from filelock import FileLock

        # the ranks of a node share the memory that holds the state, and one may look at it while another makes it
        with FileLock(f"{self._dataset._shared_barrier.filelock_path}.resume"):
            # asked once an epoch: every call leaves two file descriptors open (streaming 0.13)
            asked = self._dataset.state_dict(position["sample_in_epoch"], from_beginning=True)
            self._position = {**asked, **position}
            self._dataset.next_epoch = position["epoch"]  # a state of an earlier epoch than this is taken for stale
            self._dataset.load_state_dict(self._position)

    def _rounds_to(self) -> int:
        """What it rounds its beginning down to a multiple of: the number of nodes that it divides the samples over."""
        nodes, canonical = self._dataset._parallel_rank_world.num_nodes, self._position["num_canonical_nodes"] or 1
        initial = self._position["initial_physical_nodes"]
        divides = max(nodes, canonical) % min(nodes, canonical) == 0
        return int(nodes if initial is None or divides or self._dataset.partition_algo != "relaxed" else initial)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._samples += self._step_size
            yield batch

    @property
    def _step_size(self) -> int:
        topology = self.topology()
        return int(topology["world_size"] * (topology["batch_size"] or 1))

    def capture(self) -> Any:
        return {**self._position, "sample_in_epoch": self._samples}

    def reseed(self, seed: int) -> None:
        self.seed = self._keyed.seed = seed

    def shut_down(self) -> None:
        shut_down(self.engine)


def _steps(samples: int, step_size: int) -> int:
    """That hold so many samples."""
    return -(-max(0, samples) // step_size)


class KeyedBySample(IterableDataset[Any]):
    """Iterates over a ``StreamingDataset`` with random numbers keyed by seed, epoch and sample."""

    def __init__(self, dataset: Any, seed: int, epoch: EpochCell) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.batch_key = 0

    def __iter__(self) -> Iterator[Any]:
        # its iterator asks `self.__getitem__`, which an attribute of the instance answers before the class does
        self.dataset.__dict__["__getitem__"] = self._fetch
        try:
            yield from iter(self.dataset)
        finally:
            self.dataset.__dict__.pop("__getitem__", None)
            if hasattr(self.dataset, "_iterator"):  # left in the middle, it would wait in its threads for ever
                self.dataset._iterator.exit()

    def _fetch(self, sample_id: Any) -> Any:
        key = (self.seed, int(self.epoch), int(sample_id))
        self.batch_key = keyed_seed("batch", *key)
        rng.seed_all(keyed_seed("sample", *key))
        return type(self.dataset).__getitem__(self.dataset, sample_id)

    def __len__(self) -> int:
        return len(self.dataset)
