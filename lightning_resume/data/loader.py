"""Loaders that know their position: the user's own loader, with an order that can be gone on with.

A resumable loader stands in for the user's: its attributes are the user's (``dataset``, ``collate_fn``, ``sampler``,
...) and it is an instance of the user's class. Batches come from a private copy of the user's loader, the engine, whose
dataset, sampler and ``collate_fn`` are wrapped to fetch what the order says with random numbers keyed by sample.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from lightning_resume.data import handshake, order
from lightning_resume.data.adapters.torchdata import without_state
from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.fingerprint import fingerprint
from lightning_resume.data.position import Resumable
from lightning_resume.data.randomness import (
    Batch,
    KeyedCollate,
    KeyedDataset,
    StepDataset,
    as_it_is,
    draws_nothing,
    keyed_seed,
    keys_each_sample,
    worker_init,
)
from lightning_resume.data.source import UNSIZED, Permuted, Source
from lightning_resume.errors import CheckpointMismatchError
from lightning_resume.state import rng
from lightning_resume.state.component import Sharing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's share of each step: ``rank`` of ``world_size`` takes ``batch_size`` items."""

    rank: int = 0
    world_size: int = 1
    batch_size: int = 1
    default: bool = False
    """Whether nobody has chosen rank and world size, so that a strategy may."""
    whole: bool = False
    """Whether this process makes the batches of all ranks: a step's batch is then a list of them."""

    def __post_init__(self) -> None:
        check_share(self.rank, self.world_size)

    @property
    def ranks(self) -> Sequence[int]:
        return range(self.world_size) if self.whole else (self.rank,)


class ElasticLoader(Resumable):
    """A map-style loader in the elastic order; made by :func:`~lightning_resume.data.resumable.make_resumable`.

    Attributes:
        elastic: Whether world size, batch size and workers may change between save and load. A custom
            ``batch_sampler``, or a sampler that is each rank's own, ties the position to the world size.
    """

    # of the user's loader, with all its other attributes
    num_workers: int
    dataset: Any
    worker_init_fn: Any
    batch_sampler: Any

    def attach(
        self,
        loader: DataLoader[Any],
        *,
        source: Source,
        start: order.OrderState,
        share: Share,
        ranks: int | None = None,
        explicit_seed: bool = False,
    ) -> None:
        """Takes over from ``loader``. ``ranks`` is the world size that the position is tied to, if it is."""
        self.__dict__.update(loader.__dict__)
        self._begin_attributes()
        self._user_loader, self._source, self._share = loader, source, share
        self._known_start, self._explicit_seed, self._ranks = start, explicit_seed, ranks
        self._measured = not source.lazy
        self.sharing = Sharing.REPLICATED if ranks is None else Sharing.PER_RANK
        self._engine: DataLoader[Any] | None = None
        self._most_workers: int | None = None
        """Processes that read for the rank that has the most, where ranks have told each other."""

    @property
    def _start(self) -> order.OrderState:
        """Where this iteration, or the next, begins."""
        if not self._measured:
            most = self._most_workers or self._readers
            readers = (1 if self._share.whole else self._share.world_size) * most
            self._source.plan(readers=readers, batch_size=self._share.batch_size)
            enough_for_all(self._source.length, self._share.world_size)
            self._start = dataclasses.replace(self._known_start, length=self._source.length)
        return self._known_start

    @_start.setter
    def _start(self, start: order.OrderState) -> None:
        self._known_start, self._measured = start, True

    def leave_share_open(self) -> None:
        """Says that rank and world size are a guess, which a strategy may correct."""
        self._share = dataclasses.replace(self._share, default=True)

    def share_by_default(self, *, rank: int, world_size: int) -> None:
        super().share_by_default(rank=rank, world_size=world_size)
        if self._share.default:
            self._share = dataclasses.replace(self._share, rank=rank, world_size=world_size)

    def agree(self) -> None:
        share = self._share
        if share.whole or self._ranks is not None or not handshake.is_of_group(share.rank, share.world_size):
            return  # an order of each rank's own may differ
        fresh = not (self._resumed or self._taken or self._ended or self._known_start.batches)
        self._source.agree(fresh=fresh)
        if fresh:  # a length that was asked for before came of this rank's own plan
            self._measured = not self._source.lazy
            fingerprint_now = fingerprint(self._user_loader.dataset)
            self._known_start = dataclasses.replace(self._known_start, fingerprint=fingerprint_now)
        told = handshake.agreed(
            f"the setup of the {self._kind()} loader", self._compared(), [self._known_start.seed, self._readers]
        )
        self._reseed(told[0][0])
        # those of the rank that has the most for each: lanes are then as many on every rank, and none is in two
        self._most_workers = max(readers for _, readers in told)

    @property
    def _readers(self) -> int:
        return max(1, self.num_workers)

    def _compared(self) -> dict[str, Any]:
        start = self._known_start
        return {
            "batch_size": self._share.batch_size,
            "tail": start.tail.value,
            "seed": start.seed if self._explicit_seed else "none was given",
            "dataset": start.fingerprint,
            "length of the dataset": "told by its files" if self._source.lazy else start.length,
            "epoch": start.epoch,
            "samples taken of it": start.consumed,
            **self._source.facts(),
        }

    def _reseed(self, seed: int) -> None:
        if seed != self._known_start.seed:
            self._known_start = dataclasses.replace(self._known_start, seed=seed)
            self._source.reseed(seed)
            self._shut_down()

    def make_for_all(self, world_size: int) -> None:
        """From here on makes the batches of ``world_size`` ranks: a list of them is one batch."""
        if self._measured:
            enough_for_all(self._source.length, world_size)
        self._share = dataclasses.replace(self._share, rank=0, world_size=world_size, default=False, whole=True)
        self._ranks, self.sharing = None, Sharing.REPLICATED  # no rank but this one draws, so it is no order of its own
        if isinstance(self._source, BatchRequests) and self._known_start.tail is order.Tail.EVEN:
            # the user's batches are not put together to make the last step even
            self._known_start = dataclasses.replace(self._known_start, tail=order.Tail.CARRY)

    @property
    def is_sized(self) -> bool:
        return _is_sized(self._source)

    @property
    def changes_batches(self) -> bool:
        """Whether the user's class does something to the batches on their way out."""
        return not type(self._user_loader).__iter__.__module__.startswith(("torch.utils.data.", "torchdata."))

    @property
    def elastic(self) -> bool:
        return self._ranks is None

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        return Capabilities(
            world_size=Change.ELASTIC if self.elastic else Change.SAME,
            num_workers=Change.ELASTIC,
            batch_size=Change.ELASTIC,
            order=Order.GLOBAL,
            randomness=Randomness.SAMPLE if keys_each_sample(self._user_loader.dataset) else Randomness.POSITION,
            resume_cost=self._source.resume_cost,
            state_size=self._source.state_size,
        )

    @property
    def topology(self) -> Mapping[str, Any]:  # type: ignore[override]  # read only
        world_size = self._share.world_size if self._ranks is None else self._ranks
        return {"world_size": world_size, "num_workers": self.num_workers, "batch_size": self._share.batch_size}

    @property
    def epoch(self) -> int:  # type: ignore[override]  # read only
        return self._start.epoch

    @property
    def _counts(self) -> dict[str, int]:
        return {"world_size": self._share.world_size, "batch_size": self._share.batch_size}

    def __len__(self) -> int:
        if not _is_sized(self._source):
            return len(self._user_loader)  # the same TypeError as without us
        return self._start.batches + order.steps_left(self._start, **self._counts)

    def _go_to(self, epoch: int) -> None:
        if epoch == self._start.epoch + 1:  # as the next iteration would: samples may be left over, or taken already
            self._next_epoch()
            return
        if epoch > self._start.epoch:
            self._grow(epoch)
        self._start = self._at_start_of(epoch)

    def _restart(self) -> None:
        if self._start.batches:  # else it is the start, with what earlier epochs have left over
            self._start = self._at_start_of(self._start.epoch)

    def _at_start_of(self, epoch: int) -> order.OrderState:
        length = self._source.length_of(epoch)
        return dataclasses.replace(self._start, epoch=epoch, length=length, consumed=0, batches=0)

    def _at_end(self) -> bool:
        return self._start.batches > 0 and order.steps_left(self._start, **self._counts) == 0

    def _begun(self) -> bool:
        return self._start.batches > 0

    def _next_epoch(self) -> None:
        position = self._position(0)
        self._grow(position.epoch + 1)
        if _is_sized(self._source):
            # whether the saved epoch had come to its end is for the topology to say that it was in
            following = order.next_epoch(position, **(self._saved_counts if self._resumed else self._counts))
            self._start = dataclasses.replace(following, length=self._source.length_of(following.epoch))
        else:
            self._start = dataclasses.replace(position, epoch=position.epoch + 1, consumed=0, batches=0)

    def _grow(self, epoch: int) -> None:
        if self._source.grow(epoch):
            self._shut_down()  # persistent workers know only the files that there were

    def _position(self, behind: int) -> order.OrderState:
        return order.advance(self._start, self._taken - behind, **self._counts)

    def _batches(self) -> Iterator[Any]:
        if order.steps_left(self._start, **self._counts) == 0:
            return
        if self._engine is None:
            self._tell_what_is_visited()
            self._engine = self._make_engine()
        assert self._engine.generator is not None
        self._engine.generator.manual_seed(keyed_seed("workers", self._start.seed, self._start.epoch))
        with rng.preserved():
            batches = iter(self._engine)
        apart = self._apart
        while True:
            with apart():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @property
    def _apart(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Around each batch: without workers the dataset runs here, and seeds the global generators for each sample."""
        if self.num_workers:
            return contextlib.nullcontext
        if self.changes_batches:  # draws, perhaps, before the first sample is seeded
            return rng.preserved
        loader = self._user_loader
        if isinstance(self._source, Permuted) and draws_nothing(loader.dataset) and draws_nothing(loader.collate_fn):
            return contextlib.nullcontext
        return rng.apart

    def _tell_what_is_visited(self) -> None:
        """Says what one process reads, so that it keeps no more than that in memory."""
        share, size = self._share, self._share.batch_size
        step = share.world_size * size
        of_rank = 0 if share.whole else share.rank * size
        starts = [self._start.consumed + of_rank + worker * step for worker in range(max(1, self.num_workers))]
        starts += [start - self._start.consumed for start in starts]
        self._source.visit(starts, steps_apart=max(1, self.num_workers) * step, batch=step if share.whole else size)

    def _make_engine(self) -> DataLoader[Any]:
        engine = copy.copy(without_state(self._user_loader))
        dataset: KeyedDataset = KeyedDataset(self._user_loader.dataset, self._start.seed)
        requests = Requests(self)
        batched = self._user_loader.batch_sampler is not None
        collate: Callable[[Any], Any] = KeyedCollate(self._user_loader.collate_fn, dataset)
        if self._share.whole:
            dataset, collate = StepDataset(dataset, collate, batched=batched), as_it_is
        # DataLoader refuses these assignments after construction; the copy has not been iterated over yet
        engine.__dict__.update(
            dataset=dataset,
            batch_sampler=requests if batched or self._share.whole else None,
            sampler=requests,
            collate_fn=collate,
            worker_init_fn=worker_init(self.worker_init_fn),
            generator=torch.Generator(),
            _iterator=None,
        )
        return engine

    def requests(self) -> Iterator[Any]:
        """This rank's samples of each remaining step of the epoch; with a whole share a list of every rank's."""
        start, share = self._start, self._share
        for window in order.windows(start, **self._counts):
            slices = [order.rank_slice(*window, rank=rank, world_size=share.world_size) for rank in share.ranks]
            batches = [Batch.of(self._source.take(start, *one)) for one in slices]
            if all(batch.positions for batch in batches):
                yield batches if share.whole else batches[0]
            if any(batch.positions < last - first for batch, (first, last) in zip(batches, slices, strict=True)):
                return  # an unsized sampler has come to its end

    def moment(self, behind: int = 0) -> Callable[[], dict[str, Any]]:
        start, counts, source, ended = self._start, self._counts, self._source.state_dict(), self._ended
        taken = self._taken - behind
        return lambda: {**self._state_at(order.advance(start, taken, **counts), counts, source), "ended": ended}

    def _state(self, behind: int) -> dict[str, Any]:
        return self._state_at(self._position(behind), self._counts, self._source.state_dict())

    def _state_at(
        self, position: order.OrderState, counts: Mapping[str, int], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "kind": self._kind(),
            "order": position.to_dict(),
            "source": source,
            "counts": counts,
            "explicit_seed": self._explicit_seed,
            "fixed": self._fixed(),
        }

    def hint(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict.get("kind") == self._kind():
            self._source.hint(state_dict["source"])

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._start = order.OrderState.from_dict(state_dict["order"])
        self._saved_counts = state_dict.get("counts", self._counts)  # not in states of earlier versions
        self._source.load_state_dict(state_dict["source"], seed=self._start.seed)
        self._shut_down()

    def check(self, state_dict: Mapping[str, Any]) -> None:
        super().check(state_dict)
        saved = order.OrderState.from_dict(state_dict["order"])
        self._source.check(state_dict["source"], saved, self._known_start)
        for field in ("shuffle", "tail"):
            if getattr(saved, field) != getattr(self._known_start, field):
                argument = "drop_last" if field == "tail" else field
                raise CheckpointMismatchError(
                    "loader",
                    field,
                    saved=getattr(saved, field),
                    current=getattr(self._known_start, field),
                    advice=f"Use the same `{argument}` as before."
                    " (`fabric.load(..., strict=False)` leaves this loader's position out.)",
                )
        if self._explicit_seed and state_dict["explicit_seed"] and saved.seed != self._known_start.seed:
            raise CheckpointMismatchError(
                "loader",
                "seed",
                saved=saved.seed,
                current=self._known_start.seed,
                advice="Another seed is another order: samples would repeat or be lost. Use the saved seed, or none.",
            )

    def _kind(self) -> str:
        return self._source.kind

    @property
    def _iterator(self) -> Any:
        # what Lightning looks at to shut workers down
        return None if self._engine is None else self._engine._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._shut_down()

    def _shut_down(self) -> None:
        if self._engine is not None and getattr(self._engine._iterator, "_shutdown_workers", None) is not None:
            self._engine._iterator._shutdown_workers()  # type: ignore[union-attr]
        self._engine = None


def check_share(rank: int, world_size: int) -> None:
    """Raises ValueError when there is no such rank."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank} and world_size is {world_size}; pass a world_size of at least 1, and a rank from 0 to"
            " world_size - 1."
        )


def in_order(loader: Any) -> Any:
    """``loader``, or a copy that gives its batches in their order: a position cannot say which came early."""
    if getattr(loader, "in_order", True):
        return loader
    warnings.warn(
        "in_order=False is not honoured: a loader with a position gives its batches in their order, whichever worker is"
        " the first to have one. Leave it out.",
        stacklevel=4,
    )
    ordered = copy.copy(loader)
    ordered.__dict__.update(in_order=True, _iterator=None)
    return ordered


def enough_for_all(length: int, world_size: int) -> None:
    """Raises ValueError when some rank would get no sample."""
    if not length:
        raise ValueError("The dataset has no samples.")
    if length < world_size:
        raise ValueError(
            f"The dataset has {length} samples for {world_size} ranks, so some rank would get none. Use fewer ranks."
            " (A Trainer with `use_distributed_sampler=False` gives every rank all samples of a plain DataLoader.)"
        )


@final
class Requests:
    """The engine's sampler: what is left of the epoch, this rank's part, as the loader says."""

    def __init__(self, loader: ElasticLoader) -> None:
        # weak, so that a dropped loader takes its engine and workers with it at once
        self._loader = weakref.ref(loader)

    @property
    def loader(self) -> ElasticLoader:
        loader = self._loader()
        assert loader is not None
        return loader

    def __iter__(self) -> Iterator[Any]:
        requests = self.loader.requests()
        flat = self.loader.batch_sampler is None and not self.loader._share.whole
        return (one for batch in requests for one in batch) if flat else requests

    def __len__(self) -> int:
        return len(self.loader)


@final
class BatchRequests(Source):
    """Splits what a custom ``batch_sampler`` gives into one request for each sample."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.length, self.kind = source.length, source.kind
        self.resume_cost, self.state_size = source.resume_cost, source.state_size

    def take(self, state: order.OrderState, start: int, stop: int) -> Batch:
        batches = self._source.take(state, start, stop)
        of_samples = [(i, batch.epoch, (batch.key << 32) + n) for batch in batches for n, i in enumerate(batch.index)]
        indices, epochs, keys = map(list, zip(*of_samples, strict=True)) if of_samples else ([], [], [])
        return Batch(indices, epochs, keys, positions=len(batches))  # a batch of the user's may be empty

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        self._source.load_state_dict(state, seed=seed)


def _is_sized(source: Source) -> bool:
    return source.lazy or source.length < UNSIZED
