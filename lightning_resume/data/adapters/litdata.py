"""LitData's streaming datasets, in its own ``StreamingDataLoader`` or any ``DataLoader``."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from lightning_resume.data.adapters.iterable import IterableAdapter, WorkersAdapter, shut_down
from lightning_resume.data.adapters.protocol import READS_AGAIN, LoaderAdapter, is_from, skipped
from lightning_resume.data.capabilities import Capabilities, Randomness
from lightning_resume.data.randomness import keyed_seed

_DATASETS = ("StreamingDataset", "CombinedStreamingDataset", "ParallelStreamingDataset")


@final
class StreamingDataLoaderAdapter(LoaderAdapter):
    """Goes on by the loader's own state, at the topology that it was saved at.

    Combined datasets, and those in a ``DataLoader`` that is not LitData's, are read again.
    """

    def __init__(self, loader: Any, **run: Any) -> None:
        super().__init__(loader, **run)
        self.kind = f"LitData {type(loader.dataset).__name__}"
        self._inner: LoaderAdapter | None = None
        if not is_from(loader, "litdata", "StreamingDataLoader"):
            self._inner = (
                WorkersAdapter(loader, **run)
                if loader.num_workers
                else IterableAdapter(loader, reads_again=True, **run)
            )
        self.engine = loader if self._inner is None else getattr(self._inner, "engine", None)

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return isinstance(loader, DataLoader) and is_from(loader.dataset, "litdata", *_DATASETS)

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        if self._inner is not None:
            return self._inner.capabilities
        randomness = Randomness.OWN if self.loader.num_workers else Randomness.POSITION
        if not self._keeps_its_state:
            return dataclasses.replace(READS_AGAIN, randomness=randomness)
        return dataclasses.replace(
            READS_AGAIN,
            randomness=randomness,
            resume_cost="plans the epoch again: O(samples)",
            caution="LitData divides what is left of the epoch anew over ranks and workers: samples may be seen twice"
            " in this epoch or not at all, and more of them with every such resume.",
        )

    def topology(self) -> dict[str, Any]:
        return {**super().topology(), "world_size": _parts(self.loader.dataset)[0].distributed_env.world_size}

    def fixed(self) -> dict[str, Any]:
        # on by default where there are several ranks
        return {**super().fixed(), "drop_last": any(part.drop_last for part in _parts(self.loader.dataset))}

    def identity(self) -> dict[str, Any]:
        return {"datasets": [_identity(part) for part in _parts(self.loader.dataset)]}

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        if self._inner is not None:
            self.loader.dataset.set_epoch(epoch + 1)  # as its own loader counts
            return self._inner.iterate(epoch, None, skip)
        self.shut_down()
        self.loader.generator = torch.Generator().manual_seed(keyed_seed("workers", self.seed, epoch, skip))
        self.loader.restore = False
        if state is not None and skip >= len(self.loader):  # at the last batch it would begin the epoch again
            return iter(())
        if state is not None:
            self.loader.load_state_dict(copy.deepcopy(state))
            # left to itself it is set in workers only, and the next state would be of epoch 1 (litdata 0.2.76)
            self.loader.dataset.current_epoch = state["dataset"]["current_epoch"]
            return iter(self.loader)
        self.loader.current_epoch = epoch  # counted up when it begins
        return skipped(iter(self.loader), skip)

    def capture(self) -> Any:
        # the loader goes on writing into what it returned
        return copy.deepcopy(self.loader.state_dict()) if self._keeps_its_state else None

    @property
    def _keeps_its_state(self) -> bool:
        """Combined datasets are off by a batch after a resume where workers have ended (litdata 0.2.76)."""
        return self._inner is None and is_from(self.loader.dataset, "litdata", "StreamingDataset")

    def convert(self, state: Any, topology: Mapping[str, Any]) -> Any:
        return state

    def reseed(self, seed: int) -> None:
        self.seed = seed
        if self._inner is not None:
            self._inner.reseed(seed)

    def shut_down(self) -> None:
        if self._inner is not None:
            self._inner.shut_down()
        else:
            shut_down(self.loader)


def _parts(dataset: Any) -> list[Any]:
    return list(getattr(dataset, "_datasets", [dataset]))


def _identity(dataset: Any) -> str:
    """Which items there are, and what shuffles them."""
    samples = sum(stop - start for start, stop in dataset.region_of_interest)
    files = hashlib.blake2b(repr(dataset.subsampled_files).encode(), digest_size=4).hexdigest()
    return f"{samples} samples of {files}, seed {dataset.seed}, shuffle {dataset.shuffle}"
