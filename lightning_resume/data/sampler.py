"""The elastic order for use without Lightning: a batch sampler, and a loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sized
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Sampler

from lightning_resume import _distributed
from lightning_resume.data import order
from lightning_resume.data.fingerprint import fingerprint
from lightning_resume.data.handshake import agreed, is_of_group
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.data.resumable import SEEDS, make_resumable
from lightning_resume.errors import CheckpointMismatchError


@final
class ElasticSampler(Sampler[list[int]]):
    """A batch sampler in the elastic order: pass it as ``DataLoader(dataset, batch_sampler=...)``.

    Every rank takes its part of each step; the state is the same on every rank, and world size and ``batch_size`` may
    change between :meth:`state_dict` and :meth:`load_state_dict`. The sampler cannot see how many batches a loader with
    workers has fetched ahead, so ``state_dict`` is exact without workers only; :class:`ResumableDataLoader` counts for
    itself.

    Args:
        dataset: Anything with a length.
        batch_size: Samples of one rank in one step; the last step of an epoch may be smaller, or larger by one.
        shuffle: ``False`` for the dataset's own order.
        seed: Key of the order; None for torch's initial seed, of rank 0 where there is a process group.
        tail: What becomes of samples that do not fill a step.
        rank: This process's index among those that see different data; by default its global rank.
        world_size: Number of those processes; by default all.

    Where rank and world size are those of the process group, all ranks must make it: they compare the arguments.

    Raises:
        OutOfStepError: The ranks' samplers differ; raised on all of them.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int | None = 0,
        tail: order.Tail | str = order.Tail.EVEN,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.rank = _distributed.rank() if rank is None else rank
        self.world_size = _distributed.world_size() if world_size is None else world_size
        self._state = order.OrderState(
            seed=torch.initial_seed() & SEEDS if seed is None else seed,
            length=len(dataset),
            tail=order.Tail(tail),
            shuffle=shuffle,
            fingerprint=fingerprint(dataset),
        )
        if is_of_group(self.rank, self.world_size):
            same = {
                **self._state.to_dict(),
                "batch_size": batch_size,
                "seed": "none was given" if seed is None else seed,
            }
            seeds = agreed("ElasticSampler()", same, self._state.seed)
            self._state = dataclasses.replace(self._state, seed=seeds[0])
        self._finished, self._finished_at = False, self._counts

    @property
    def _counts(self) -> dict[str, int]:
        return {"world_size": self.world_size, "batch_size": self.batch_size}

    def __len__(self) -> int:
        return self._state.batches + order.steps_left(self._state, **self._counts)

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch; after its end, the next epoch."""
        if self._finished:
            self._state = order.next_epoch(self._state, **self._finished_at)
        self._finished = False
        start = self._state
        for step, window in enumerate(order.windows(start, **self._counts)):
            mine = order.rank_slice(*window, rank=self.rank, world_size=self.world_size)
            self._state = order.advance(start, step + 1, **self._counts)
            yield order.indices(start, *mine).tolist()
        self._finished, self._finished_at = True, self._counts

    def set_epoch(self, epoch: int) -> None:
        """Starts ``epoch`` from its beginning; within the same epoch, the position is kept until it has ended."""
        if epoch == self._state.epoch + 1 and self._finished:  # samples may be left over, or taken already
            self._state = order.next_epoch(self._state, **self._finished_at)
        elif epoch != self._state.epoch or self._finished:
            self._state = dataclasses.replace(self._state, epoch=epoch, consumed=0, batches=0)
        else:
            return
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch given last."""
        return {"order": self._state.to_dict(), "finished": self._finished, "counts": self._finished_at}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``.

        Raises:
            CheckpointMismatchError: It belongs to another dataset or another order; nothing was changed.
        """
        saved = order.OrderState.from_dict(state_dict["order"])
        for field in ("length", "fingerprint", "tail", "shuffle", "seed"):
            if getattr(saved, field) != getattr(self._state, field):
                raise CheckpointMismatchError(
                    "sampler",
                    field,
                    saved=getattr(saved, field),
                    current=getattr(self._state, field),
                    advice="Make the sampler as it was when its state was saved.",
                )
        self._state, self._finished = saved, bool(state_dict["finished"])
        # another topology might have had a step left; not in states of earlier versions
        self._finished_at = state_dict.get("counts", self._counts)


class ResumableDataLoader(ElasticLoader, DataLoader[Any]):  # type: ignore[misc]  # __iter__ gives any iterator
    """A ``DataLoader`` that knows its position, for training loops without Lightning.

    Takes the arguments of :class:`torch.utils.data.DataLoader` for a map-style dataset; the batches of one step are
    divided over the ranks, so no ``DistributedSampler`` is needed. ``state_dict()`` is a few integers, the same on
    every rank; after ``load_state_dict`` the next ``for batch in loader`` goes on, at any world size, batch size and
    number of workers.

    Args:
        dataset: A map-style dataset.
        rank: This process's index among those that see different data; by default its global rank.
        world_size: Number of those processes; by default all.
        seed: Key of the order and of the samples' random numbers; by default what ``generator`` was seeded with, or
            ``seed_everything``, or torch's initial seed, of rank 0 where there is a process group.

    Where rank and world size are those of the process group, all ranks must make it: they compare the arguments.

    Raises:
        OutOfStepError: The ranks' loaders differ; raised on all of them.
    """

    def __init__(
        self,
        dataset: Any,
        *args: Any,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        loader = DataLoader(dataset, *args, **kwargs)
        made = make_resumable(
            loader,
            rank=_distributed.rank() if rank is None else rank,
            world_size=_distributed.world_size() if world_size is None else world_size,
            seed=seed,
            shared=True,
        )
        if not isinstance(made, ElasticLoader):
            raise TypeError("ResumableDataLoader is for map-style datasets; use make_resumable(DataLoader(...)).")
        self.__dict__.update(made.__dict__)
