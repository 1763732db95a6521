"""Loaders over lanes: data whose samples cannot be counted beforehand, at any topology."""

from __future__ import annotations

import bisect
import collections
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

from torch.utils.data import DataLoader, get_worker_info

from lightning_resume import _distributed
from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.handshake import disagreement, is_of_group
from lightning_resume.data.position import Resumable
from lightning_resume.data.scenarios import merged
from lightning_resume.data.sharded.columns import Columns
from lightning_resume.data.sharded.dataset import Output
from lightning_resume.data.sharded.grouping import Group, Samples
from lightning_resume.data.sharded.lane_source import LaneSource
from lightning_resume.data.sharded.lanes import IN_TAIL, LEFT, OVER, Cursor, Lane, lanes_of
from lightning_resume.data.sharded.peers import Peers, ProcessGroup
from lightning_resume.data.sharded.processes import Processes, ThisProcess, Workers
from lightning_resume.data.sharded.reader import Reader
from lightning_resume.data.sharded.session import Changes, Session, Share, Taken
from lightning_resume.errors import CheckpointMismatchError, OutOfStepError
from lightning_resume.state.component import Sharing

_REMEMBERED = 1024
"""Batches whose cursors are kept for ``state_dict(behind=...)``: a few numbers each."""
_AHEAD = 4
"""Batches that ranks without workers look ahead for before they agree to go on."""


@final
class StreamedLoader(Resumable, DataLoader[Any]):  # type: ignore[misc]  # our iterators are generators
    """A loader whose position is a cursor for each of its lanes.

    Args:
        dataset: What the user sees as ``dataset``.
        source: What lanes are lanes of.
        group: Makes units of samples.
        seed: Key of the order and of the samples' random numbers.
        share: Rank and world size; None where a strategy or the process group knows them.
        lanes: How many; by default as many as there are processes that read, when the run starts.
        output: How a batch arrives without a ``collate_fn``.
        options: For the ``DataLoader``.

    Attributes:
        peers: The other ranks, for them to agree on the end of an epoch; by default those of the process group.
    """

    sharing = Sharing.PER_RANK

    def __init__(
        self,
        dataset: Any,
        *,
        source: LaneSource,
        group: Group | None = None,
        seed: int = 0,
        share: tuple[int, int] | None = None,
        lanes: int | None = None,
        batch_size: int | None = 1,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        output: Output = Output.TORCH,
        persistent_workers: bool = False,
        **options: Any,
    ) -> None:
        if batch_size is None:
            raise ValueError(
                "batch_size is None; a stream makes batches. For single samples pass batch_size=1 and a `collate_fn`"
                " that takes the one sample out of its list."
            )
        if group is not None and not isinstance(group, Group):
            raise TypeError(f"group is {group!r}; pass a Packing or a BatchByLength.")
        # public, by the names of the arguments: Lightning makes a loader anew to predict with
        self.source, self.group, self.seed, self.output = source, group or Samples(), seed, output
        self.share, self.lanes = share, lanes
        self._told_share = (0, 0)
        self.peers: Peers | None = None
        self._processes: Processes | None = None
        self._epoch = 0
        self._before: int | None = 0
        """Batches that every rank took of the epoch before the iteration; not in states of earlier versions."""
        self._most_workers: int | None = None
        """Processes that read for the rank that has the most, where ranks have told each other."""
        self._lanes_from: list[tuple[int, int]] = []
        """From which epoch on how many lanes; empty until the first iteration."""
        self._loaded: Changes = {}
        """What a state, or the epoch before, has left of lanes, of any rank."""
        self._start: Changes | None = None
        """The lanes of this rank where the iteration begins; None until it does."""
        self._now: Changes = {}
        self._undo: collections.deque[dict[Lane, Cursor | None]] = collections.deque(maxlen=_REMEMBERED)
        self._taken_now: Taken | None = None
        self._begin_attributes()
        make = collate_fn or Columns(output)
        DataLoader.__init__(
            self, dataset, batch_size, collate_fn=make, persistent_workers=persistent_workers, **options
        )
        self._reader = Reader(source.reader, self.group, make, collate_draws=not isinstance(make, Columns), seed=seed)

    # -- what it is

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        return Capabilities(
            world_size=Change.ELASTIC,
            num_workers=Change.ELASTIC,
            batch_size=Change.ELASTIC,
            order=Order.TOPOLOGY,
            randomness=Randomness.SAMPLE,
            resume_cost=self.source.resume_cost,
            state_size="O(lanes), and the list of files",
        )

    @property
    def topology(self) -> Mapping[str, Any]:  # type: ignore[override]  # read only
        return {"world_size": self._share[1], "num_workers": self.num_workers, "batch_size": self.batch_size}

    @property
    def epoch(self) -> int:  # type: ignore[override]  # read only
        return self._epoch

    def _kind(self) -> str:
        return self.source.kind

    def __len__(self) -> int:
        raise TypeError(
            f"This loader ({self.source.kind}) has no length: how many samples there are is known when they were read."
        )

    # -- which part of it is this rank's

    @property
    def _share(self) -> tuple[int, int]:
        if self.share is not None:
            return self.share
        return self._told_share if self._told_share[1] else (_distributed.rank(), _distributed.world_size())

    def share_by_default(self, *, rank: int, world_size: int) -> None:
        self._told_share = rank, world_size

    def agree(self) -> None:
        if self.peers is None and is_of_group(*self._share):
            self.source.agree(fresh=not self._lanes_from)

    def _peers(self) -> Peers | None:
        _, world_size = self._share
        if world_size == 1 or self.peers is not None:
            return self.peers if world_size > 1 else None
        if not _distributed.is_distributed() or get_worker_info() is not None:
            return None
        if not self._peers_known:
            warnings.warn(
                f"rank={self._share[0]} and world_size={world_size} were given, which are not those of the process"
                " group: the ranks cannot agree on the end of an epoch, and end at different steps. Leave rank and"
                " world_size out, or stop all ranks at the same step.",
                stacklevel=2,
            )
            return None
        return ProcessGroup()

    def _lanes_of(self, epoch: int) -> int:
        if not self._lanes_from:
            return self._enough_lanes()
        return self._lanes_from[max(0, bisect.bisect([first for first, _ in self._lanes_from], epoch) - 1)][1]

    def _enough_lanes(self) -> int:
        # as many for each rank, and for none fewer than it has processes: ranks need the same amount of data
        return self.lanes or self._share[1] * (self._most_workers or self._readers)

    @property
    def _lanes_to_be(self) -> list[tuple[int, int]]:
        """What a run that has not begun says of its lanes: nothing, where other ranks have a say."""
        asks = self.lanes is None and self._share[1] > 1 and self._peers_known
        return [] if asks else [(self._epoch, self._enough_lanes())]

    @property
    def _readers(self) -> int:
        return max(1, self.num_workers)

    @property
    def _is_shared(self) -> bool:
        """Whether there are too few lanes for the ranks, so that all of them read all lanes."""
        return self._share[1] > self._lanes_of(self._epoch)

    def _lanes(self) -> Changes:
        """The lanes of this rank and where they are, those that were left of earlier epochs too."""
        if self._start is not None:
            return self._now
        lanes, everything = self._lanes_of(self._epoch), dict(self._loaded)
        if not any(lane.epoch == self._epoch for lane in everything):
            everything.update({Lane(self._epoch, number): Cursor() for number in range(lanes)})
        rank, world_size = self._share
        together = world_size == 1 or self._is_shared or self._peers_known
        current = [cursor for lane, cursor in everything.items() if lane.epoch == self._epoch]
        if self._is_shared or (together and all(cursor.turns <= IN_TAIL for cursor in current)):
            return everything
        mine = lanes_of(rank, world_size, lanes)
        own = [lane for lane in everything if lane.number in mine or (together and lane.epoch < self._epoch)]
        return {lane: everything[lane] for lane in own}

    @property
    def _peers_known(self) -> bool:
        # asking for the peers themselves is a collective
        of_group = (_distributed.rank(), _distributed.world_size())
        return self.peers is not None or (_distributed.is_distributed() and self.share in (None, of_group))

    # -- iterating

    def _opened(self) -> None:
        if self._start is not None:  # the batches of the last iteration did not count
            self._now = dict(self._start)
        self._undo.clear()

    def _begin(self, peers: Peers | None) -> int:
        """Settles which lanes there are, with the other ranks. Returns how many batches all look ahead for.

        At the first batch of an iteration, since the ranks that share a stream ask each other then anyway: whoever
        calls ``iter`` alone, or on one rank, does not wait. And in each epoch, of which ranks may have other ideas.
        """
        ahead = max(_AHEAD, self.num_workers * (self.prefetch_factor or 1))
        begun = any(cursor != Cursor() for lane, cursor in self._loaded.items() if lane.epoch == self._epoch)
        told = [(self._readers, ahead, begun or self._start is not None)]
        if peers is not None:
            ranks = peers.gather((self._compared(), told[0]))
            if differ := disagreement(f"the {self._kind()} loader", [compared for compared, _ in ranks]):
                raise OutOfStepError(differ)
            told = [of_rank for _, of_rank in ranks]
        self._most_workers = max(readers for readers, _, _ in told)
        if not any(begun for _, _, begun in told):
            self._grow_lanes()
        if self._start is None:
            self._start = self._lanes()
        self._now = dict(self._start)
        return max(ahead for _, ahead, _ in told)

    def _compared(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            **self._facts(),
            **self.source.data(),
            "lanes": self.lanes,
            "epoch": self._epoch,
            "lanes of each epoch": str(self._lanes_from),
            "batches taken of it": "unknown" if self._before is None else self._before,
        }

    def _grow_lanes(self) -> None:
        """At the start of an epoch: as many lanes as there are processes, where these have become more."""
        enough = self._enough_lanes()
        first, most = self._lanes_from[-1] if self._lanes_from else (0, 0)
        if self._lanes_from and (self.lanes is not None or enough <= most or self._epoch < first):
            return
        self._lanes_from.append((self._epoch, enough))
        self._loaded = {lane: cursor for lane, cursor in self._loaded.items() if lane.epoch != self._epoch}

    def _batches(self) -> Iterator[Any]:
        iteration, peers = self._iteration, self._peers()
        ahead = self._begin(peers)
        live = {lane: cursor for lane, cursor in self._now.items() if cursor.turns > OVER}
        earlier = {lane: cursor for lane, cursor in self._now.items() if lane.epoch < self._epoch}
        if not live:
            return
        session = self._session(peers, ahead)
        try:
            if self._is_shared or all(cursor.turns == IN_TAIL for cursor in live.values()):
                batches = session.tail({**live, **earlier})
            else:
                mine = {lane: cursor._replace(turns=max(0, cursor.turns)) for lane, cursor in live.items()}
                batches = session.batches(mine, earlier)
            for self._taken_now in batches:
                yield self._taken_now.batch
        finally:
            if self._processes is not None and iteration is self._iteration:
                self._processes.rest()
        if iteration is self._iteration:
            self._finish(session)

    def _session(self, peers: Peers | None, ahead: int) -> Session:
        rank, world_size = self._share if peers is not None or self._is_shared else (0, 1)
        assert self.batch_size is not None
        return Session(
            self._make_processes(),
            lambda lane, cursor: self.source.lane(lane, self._lanes_of(lane.epoch), cursor),
            Share(rank=rank, world_size=world_size, batch_size=self.batch_size, drop_last=self.drop_last),
            peers=peers,
            ahead=ahead,
        )

    def _handed_out(self) -> None:
        assert self._taken_now is not None
        changes = self._taken_now.changes
        self._undo.append({lane: self._now.get(lane) for lane in changes})
        self._now.update(changes)

    def _finish(self, session: Session) -> None:
        """Notes that the epoch is over, and of which lanes something is to be taken up by the next."""
        before: dict[Lane, Cursor | None] = {}
        for lane, cursor in {**session.read_by_all, **self._now}.items():
            before[lane] = self._now.get(lane)
            if lane in session.left and not self.drop_last:
                self._now[lane] = cursor._replace(turns=LEFT)
            elif lane.epoch < self._epoch:
                self._now.pop(lane, None)
            else:
                self._now[lane] = cursor._replace(turns=OVER)
        if self._undo:
            self._undo[-1] = {**before, **self._undo[-1]}

    def _at_end(self) -> bool:
        return self._start is not None and self._is_over(self._now)

    def _is_over(self, lanes: Mapping[Lane, Cursor]) -> bool:
        return all(cursor.turns <= OVER for lane, cursor in lanes.items() if lane.epoch == self._epoch)

    def _begun(self) -> bool:
        return any(cursor != Cursor() for lane, cursor in self._lanes().items() if lane.epoch == self._epoch)

    def _next_epoch(self) -> None:
        lanes = self._lanes()
        over = self._is_over(lanes)
        left = {lane: cursor for lane, cursor in lanes.items() if cursor.turns == LEFT} if over else {}
        self._begin_epoch(self._epoch + 1, left)

    def _begin_epoch(self, epoch: int, left: Changes) -> None:
        if epoch > self._epoch:
            self.source.grow(epoch)
        self._epoch, self._loaded, self._start, self._now = epoch, left, None, {}
        self._before = 0
        self._undo.clear()

    def _go_to(self, epoch: int) -> None:
        if epoch == self._epoch + 1:  # as the next iteration would: samples may be left over
            self._next_epoch()
        else:
            self._begin_epoch(epoch, {})

    def _restart(self) -> None:
        self._begin_epoch(self._epoch, {lane: at for lane, at in self._loaded.items() if lane.epoch < self._epoch})

    # -- the state

    def _state(self, behind: int) -> dict[str, Any]:
        if behind > len(self._undo):
            raise RuntimeError(
                f"The position {behind} batches ago is no longer known: only the last {len(self._undo)} are kept."
                " Save where the optimizer has just stepped."
            )
        lanes: dict[Lane, Cursor | None] = dict(self._lanes())
        for entry in list(self._undo)[::-1][:behind]:
            lanes.update(entry)
        return {
            "kind": self._kind(),
            "epoch": self._epoch,
            "batches": None if self._before is None else self._before + self._taken - behind,
            "facts": self._facts(),
            "lanes_from": [list(entry) for entry in self._lanes_from or self._lanes_to_be],
            "lanes": {lane.name: cursor.to_plain() for lane, cursor in sorted(lanes.items()) if cursor is not None},
            "source": self.source.state_dict(),
            "fixed": self._fixed(),
        }

    def _facts(self) -> dict[str, Any]:
        return {**self.source.facts(), "group": self.group.name, "drop_last": self.drop_last}

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], strict: bool | None = None
    ) -> None:
        """Goes on from ``state_dict``: this rank's at the same world size, or, at any, a list of those of all ranks."""
        if isinstance(state_dict, Sequence):
            state_dict = merged(state_dict)
        super().load_state_dict(state_dict, strict)

    def check(self, state_dict: Mapping[str, Any]) -> None:
        super().check(state_dict)
        for field, current in self._facts().items():
            if (saved := state_dict["facts"].get(field)) != current:
                raise CheckpointMismatchError(
                    "loader",
                    field,
                    saved=saved,
                    current=current,
                    advice=f"Use the same `{field}` as before: with another, samples would repeat or be lost."
                    " (`fabric.load(..., strict=False)` leaves this loader's position out.)",
                )
        self.source.check(state_dict["source"])
        self._check_lanes(state_dict)

    def _check_lanes(self, state_dict: Mapping[str, Any]) -> None:
        epoch, lanes_from = state_dict["epoch"], state_dict["lanes_from"]
        if not lanes_from:  # no run had begun
            return
        count = next(lanes for first, lanes in reversed(lanes_from) if first <= epoch)
        saved = [Lane.from_name(name) for name in state_dict["lanes"]]
        rank, world_size = self._share
        needed = range(count) if world_size > count else lanes_of(rank, world_size, count)
        missing = set(needed) - {lane.number for lane in saved if lane.epoch == epoch}
        later = any(lane.epoch > epoch for lane in saved)
        if later or missing:
            raise CheckpointMismatchError(
                "loader",
                "lanes",
                saved=f"{len(saved)} of {count} lanes" + (", some of them in the next epoch" if later else ""),
                current=f"rank {rank} of {world_size}, which has {len(needed)} lanes",
                advice="Pass a list of the states of all ranks, saved after the same step. A checkpoint has them all.",
            )

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._close()
        self.source.load_state_dict(state_dict["source"])
        self._epoch = int(state_dict["epoch"])
        self._before = state_dict.get("batches")
        self._lanes_from = [(int(first), int(lanes)) for first, lanes in state_dict["lanes_from"]]
        self._loaded = {Lane.from_name(name): Cursor.from_plain(plain) for name, plain in state_dict["lanes"].items()}
        self._start, self._now = None, {}
        self._undo.clear()

    # -- processes

    def _make_processes(self) -> Processes:
        if self._processes is None:
            self._processes = self._workers() if self.num_workers else ThisProcess(self._reader)
        return self._processes

    def _workers(self) -> Workers:
        names = ("pin_memory", "timeout", "prefetch_factor", "multiprocessing_context")
        return Workers(
            self._reader,
            self.dataset,
            self.num_workers,
            worker_init_fn=self.worker_init_fn,
            persistent=self.persistent_workers,
            options={name: getattr(self, name) for name in names},
        )

    def _close(self) -> None:
        if getattr(self, "_processes", None) is not None:
            self._processes.close()  # type: ignore[union-attr]
            self._processes = None

    @property
    def _iterator(self) -> Any:
        return None

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        # what Lightning, and DataLoader when it is made, say to have workers shut down
        self._close()
