"""Rank 0 loads, and gives every rank its batches: the others need no data, and the position is saved once.

Rank 0's loader makes the batches of all ranks of a step. One in the elastic order cuts each step as ranks that load for
themselves would, so that the samples are the same; of any other, the ranks take the batches in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from torch.utils.data import DataLoader, DistributedSampler

from lightning_resume import _distributed
from lightning_resume.data import order
from lightning_resume.data.capabilities import Capabilities, Change
from lightning_resume.data.handshake import alone
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.data.position import Resumable
from lightning_resume.data.producer import Elastic, InTurn, Producer
from lightning_resume.data.resumable import make_resumable
from lightning_resume.data.transport import Channel, Packed, Sends, pack
from lightning_resume.errors import CheckpointMismatchError, OutOfStepError
from lightning_resume.state.component import Sharing


def dispatched(
    make_loader: Callable[[], Iterable[Any]],
    *,
    seed: int | None = None,
    tail: order.Tail | str | None = None,
) -> DispatchedLoader:
    """Returns a loader whose data only rank 0 reads; the others get their batches from it.

    For ``trainer.fit`` (with ``ResumeCallback``), ``fabric.setup_dataloaders`` (with a ``Resumable...Strategy``), or
    by itself. All ranks must take the same number of batches. The position is saved once, and any loader can go on at
    another world size, since rank 0 reads alone.

    Args:
        make_loader: Makes the loader; called on rank 0 alone, which so may be the only one that reaches the data. Its
            ``batch_size`` is that of one rank, as in every loader of Lightning.
        seed: As for :func:`~lightning_resume.make_resumable`.
        tail: As for :func:`~lightning_resume.make_resumable`.

    An error of ``make_loader`` or of the loader is raised on every rank.
    """
    if not callable(make_loader):
        raise TypeError(
            f"dispatched() was given a {type(make_loader).__name__}, but takes a function that makes the loader, which"
            " only rank 0 calls: dispatched(lambda: DataLoader(...))."
        )
    return DispatchedLoader(make_loader, seed=seed, tail=tail)


@final
class _Elsewhere(DistributedSampler[int]):
    """What Lightning sees as the sampler: of this kind it takes none away to distribute the data itself."""

    def __init__(self) -> None:
        super().__init__([None], num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]


@final
class DispatchedLoader(Resumable, DataLoader[Any]):  # type: ignore[misc]  # __iter__ gives any iterator
    """Made by :func:`dispatched`.

    Attributes:
        loader: What rank 0 loads with, ``None`` on the others.
    """

    sharing = Sharing.GLOBAL

    def __init__(
        self, make_loader: Callable[[], Iterable[Any]], *, seed: int | None, tail: order.Tail | str | None
    ) -> None:
        # stands for a loader that Lightning leaves as it is; its data is on rank 0
        self.__dict__.update(DataLoader([None], sampler=_Elsewhere()).__dict__)  # type: ignore[arg-type]
        self._make: Callable[[], Iterable[Any]] = make_loader
        self._options: dict[str, Any] = {"seed": seed, "tail": tail}
        self._begin_attributes()
        self.epoch = self._before = 0
        self._share: tuple[int, int] | None = None
        self._start: order.OrderState | None = None
        self._producer: Producer | None = None
        self._steps: Iterator[Sequence[Any]] = iter(())
        self.loader: Any = None

    # -- who gets what

    def share_by_default(self, *, rank: int, world_size: int) -> None:
        """Has rank 0 make its loader. A collective, as is the first use of one that no strategy has set up."""
        if self._share == (rank, world_size):
            return
        self._share = rank, world_size
        part_of = _distributed.all_gather_object(rank)  # ranks that share a model see the same data
        channel = Channel() if _distributed.world_size() > 1 else None
        self._connect(part_of, channel, _distributed.on_rank_zero("making the loader", self._produce))

    def _connect(self, part_of: Sequence[int], channel: Sends | None, about: About) -> None:
        self._part_of, self._channel, self._about = part_of, channel, about
        self._start = about.start
        self.__dict__.update(num_workers=about.num_workers, batch_size=about.batch_size)

    def _produce(self) -> About:
        assert self._share is not None
        world_size = self._share[1]
        with alone():
            self.loader = make_resumable(self._make(), rank=0, world_size=1, **self._options)
        cuts = isinstance(self.loader, ElasticLoader) and not self.loader.changes_batches
        self._producer = (Elastic if cuts else InTurn)(self.loader, world_size)
        return About.of(self.loader, self._producer.start)

    @property
    def about(self) -> About:
        """What all ranks know of rank 0's loader."""
        if self._share is None:
            self.share_by_default(rank=_distributed.rank(), world_size=_distributed.world_size())
        return self._about

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        return self.about.capabilities

    @property
    def topology(self) -> Mapping[str, Any]:  # type: ignore[override]  # read only
        about = self.about
        assert self._share is not None
        return {"world_size": self._share[1], "num_workers": about.num_workers, "batch_size": about.batch_size}

    def _kind(self) -> str:
        return f"dispatched {self.about.kind}"

    def __len__(self) -> int:
        if self.about.start is None or self._start is None:
            raise TypeError("What rank 0 dispatches has no length: its loader is not in the elastic order.")
        return self._start.batches + order.steps_left(self._start, **self._counts)

    @property
    def _counts(self) -> dict[str, int]:
        return {"world_size": self.topology["world_size"], "batch_size": self.about.counted}

    # -- batches

    def _opened(self) -> None:
        self._start = self._exchange(f"the start of epoch {self.epoch} at batch {self._before}", self._begin)

    def _begin(self) -> Sequence[Any]:
        assert self._producer is not None
        # held here, not by the producer: a cycle would keep worker processes until it is collected, maybe in a fork
        self._steps = self._producer.begin()
        return [self._producer.start] * self._counts["world_size"]

    def _batches(self) -> Iterator[Any]:
        while True:
            what = f"batch {self._before + self._taken} of epoch {self.epoch}"
            batch = self._exchange(what, lambda: next(self._steps, None))
            if isinstance(batch, _End):
                self._steps = iter(())
                return
            yield batch

    def _exchange(self, what: str, act: Callable[[], Sequence[Any] | None]) -> Any:
        """This rank's of what ``act`` gives on rank 0, one for each; its error, or :class:`_End` for ``None``."""
        ranks, failed = self._counts["world_size"], None  # sets it up, where no strategy has
        if self._producer is None:
            return self._receive(what)
        try:
            parts = act()
            parts = [_End()] * ranks if parts is None else parts
            packed = self._pack(what, parts)
        except Exception as error:
            failed, packed = error, self._pack(what, [_Error(_distributed.sendable(error))] * ranks)
        if self._channel is not None:
            self._channel.send({rank: packed[part] for rank, part in enumerate(self._part_of) if rank})
        if failed is not None:
            raise failed
        assert parts is not None
        return parts[self._part_of[0]]

    def _pack(self, what: str, parts: Sequence[Any]) -> dict[int, Packed]:
        """The parts that other ranks get."""
        return {part: pack((what, parts[part])) for part in set(self._part_of[1:])}

    def _receive(self, what: str) -> Any:
        assert self._channel is not None
        sent, part = self._channel.receive()
        if sent != what:
            raise OutOfStepError(
                f"Rank {_distributed.rank()} asks for {what}, but rank 0 dispatches {sent}. Take the same number of"
                " batches on every rank."
            )
        if isinstance(part, _Error):
            raise part.error from _distributed.RemoteError(f"rank 0 failed to load {what}: {part.error}")
        return part

    # -- position

    def set_epoch(self, epoch: int) -> None:
        _ = self.about  # sets it up, where no strategy has
        super().set_epoch(epoch)

    def _restart(self) -> None:
        self._go_to(self.epoch)

    def _go_to(self, epoch: int) -> None:
        about = self.about
        if self._producer is not None:
            self._producer.set_epoch(epoch)
        if about.start is not None and self._start is not None:
            self._start = dataclasses.replace(self._start, epoch=epoch, consumed=0, batches=0)
        self.epoch, self._before = epoch, 0

    def remember(self, batches: int) -> None:
        if self._producer is not None:
            self._producer.remember(batches)

    def _at_end(self) -> bool:
        return self._ended

    def _begun(self) -> bool:
        return self._before > 0

    def _next_epoch(self) -> None:
        if self._start is not None:
            self._start = order.next_epoch(order.advance(self._start, self._taken, **self._counts), **self._counts)
        if self._producer is not None:
            self._producer.next_epoch()
        self.epoch, self._before = self.epoch + 1, 0

    def _state(self, behind: int) -> dict[str, Any]:
        kind, taken = self._kind(), self._taken - behind
        start = None if self._start is None else order.advance(self._start, taken, **self._counts).to_dict()
        inner = None if self._producer is None else self._producer.state(behind)
        return {
            "kind": kind,
            "epoch": self.epoch,
            "batches": self._before + taken,
            "order": start,
            "inner": inner,
            "fixed": self._fixed(),
        }

    def check(self, state_dict: Mapping[str, Any]) -> None:
        super().check(state_dict)
        if self._producer is None:
            return
        if state_dict["inner"] is None:
            raise CheckpointMismatchError(
                "loader", "rank", saved="another than 0", current=0, advice="Restore on rank 0 what rank 0 has saved."
            )
        self.loader.strict = self.strict
        self.loader.check(self._producer.state_of_loader(state_dict["inner"]))

    def hint(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict.get("kind") == self._kind() and self._producer is not None:
            self.loader.hint(self._producer.state_of_loader(state_dict["inner"]))

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        saved = state_dict["order"]
        self._start = None if saved is None else order.OrderState.from_dict(saved)
        self.epoch, self._before = state_dict["epoch"], state_dict["batches"]
        if self._producer is not None:
            self._producer.load(state_dict["inner"], ended=state_dict["ended"])

    def _fixed(self) -> dict[str, Any]:
        return {}  # what rank 0's loader cannot change, it checks itself

    @property
    def _iterator(self) -> Any:
        # what Lightning looks at to shut workers down
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if self.loader is not None:
            self.loader._iterator = value


@final
class _End:
    """Sent after the last batch of an epoch."""


@final
@dataclasses.dataclass(frozen=True)
class _Error:
    """Sent instead of a batch."""

    error: Exception


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What rank 0 tells the others of its loader; ``counted`` items make a batch in the order's arithmetic."""

    kind: str
    capabilities: Capabilities
    num_workers: int
    batch_size: int | None
    counted: int
    start: order.OrderState | None

    @classmethod
    def of(cls, loader: Any, start: order.OrderState | None) -> About:
        return cls(
            kind=loader._kind(),
            capabilities=dataclasses.replace(loader.capabilities, world_size=Change.ELASTIC),
            num_workers=getattr(loader, "num_workers", 0),
            batch_size=getattr(loader, "batch_size", None),
            counted=loader.topology["batch_size"] if start is not None else 1,
            start=start,
        )
