"""Saving a loader's position outside of a checkpoint: each rank for itself, or all ranks' in one place.

The three scenarios and their names are those of Megatron-Energon (https://nvidia.github.io/Megatron-Energon/, "Save and
Restore").
"""

from __future__ import annotations

import abc
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_resume import _distributed
from lightning_resume.data.capabilities import Capabilities
from lightning_resume.data.handshake import in_step
from lightning_resume.errors import CheckpointMismatchError, CheckpointSaveError
from lightning_resume.state.component import Sharing, digest

_Timeout = float | datetime.timedelta | None

_SAVED_BY = "saved_by"
_RANKS = "ranks"
_VERSION = 1
_OF_ONE, _OF_ALL = "the state of one rank", "the states of all ranks"


class Scenarios(abc.ABC):
    """Saves and restores a position without a checkpoint, with or without a process group.

    States are plain values and tensors, for ``torch.save`` and ``torch.load`` as it is. The ``..._global`` methods are
    collectives over all ranks. Calls that are out of step end in an error on every rank, never in a hang: what each
    rank calls is compared before anything is sent.
    """

    sharing: Sharing
    capabilities: Capabilities
    strict: bool

    def save_state_rank(self) -> dict[str, Any]:
        """This rank's position, for a file of its own."""
        saved_by = {"rank": _distributed.rank(), "world_size": _distributed.world_size()}
        return {**self.state_dict(self._behind()), _SAVED_BY: saved_by}

    def restore_state_rank(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`save_state_rank` returned on this rank.

        An elastic loader takes that of any rank, at any world size.

        Raises:
            CheckpointMismatchError: It is another rank's, of another world size, or does not fit this loader; nothing
                was changed.
        """
        if _what(state) != _OF_ONE:
            raise ValueError(
                f"restore_state_rank was given {_what(state)}, but takes what save_state_rank returned on one rank."
                " What save_state_global returned is for restore_state_global."
            )
        self._check_saved_by(state)
        self.load_state_dict(_without_saved_by(state))

    def save_state_global(self, dst_rank: int = 0, *, timeout: _Timeout = None) -> dict[str, Any] | None:
        """The positions of all ranks, on rank ``dst_rank``; ``None`` on the others. A collective.

        Args:
            dst_rank: The rank that gets them.
            timeout: Seconds to wait for ranks that have not called it; by default as long as the process group does.

        Raises:
            OutOfStepError: Other ranks call something else.
            RankLostError: A rank did not call it in time, or has ended.
            CheckpointSaveError: Ranks that share one position are at different ones.
        """
        in_step(f"save_state_global(dst_rank={dst_rank}) of the {self._kind()} loader", timeout=timeout)
        _check_rank("dst_rank", dst_rank)
        mine = _distributed.agree("taking the position", self.save_state_rank)
        if self.sharing is Sharing.REPLICATED:
            _check_equal(mine)
        # of what is the same everywhere, or rank 0's alone, one is enough
        sends = self.sharing is Sharing.PER_RANK or _distributed.rank() == 0
        states = _distributed.gather_object(mine if sends else None, dst_rank)
        if states is None:
            return None
        kept = states if self.sharing is Sharing.PER_RANK else states[:1]
        return {"version": _VERSION, "world_size": _distributed.world_size(), _RANKS: kept}

    def restore_state_global(
        self, state: Mapping[str, Any] | None, src_rank: int | None = 0, *, timeout: _Timeout = None
    ) -> None:
        """Goes on from what :meth:`save_state_global` returned. A collective.

        Args:
            state: The positions of all ranks, on rank ``src_rank``; the others' is ignored.
            src_rank: The rank that has them and gives each rank its own. ``None``: every rank has them, and takes its
                own.
            timeout: Seconds to wait for ranks that have not called it; by default as long as the process group does.

        Raises:
            OutOfStepError: Other ranks call something else.
            RankLostError: A rank did not call it in time, or has ended.
            CheckpointMismatchError: The state does not fit, on some rank; nothing was changed on any.
        """
        in_step(f"restore_state_global(src_rank={src_rank}) of the {self._kind()} loader", timeout=timeout)
        _check_rank("src_rank", src_rank)
        if src_rank is None:
            mine = _distributed.agree(
                "reading the saved state", lambda: self._state_of_each(state)[_distributed.rank()]
            )
        else:
            mine = self._receive_state(state, src_rank)
        _distributed.agree("checking the saved state", lambda: self.check(mine))
        _distributed.agree("restoring the position", lambda: self.load_state_dict(mine))

    def _receive_state(self, state: Mapping[str, Any] | None, src_rank: int) -> Mapping[str, Any]:
        make: Callable[[], list[Any]] = lambda: self._state_of_each(state)  # noqa: E731
        parts = _distributed.agree("reading the saved state", make if _distributed.rank() == src_rank else list)
        alike = bool(parts) and all(part is parts[0] for part in parts)
        shared = _distributed.broadcast_object(parts[0] if alike else None, src_rank)
        return _distributed.scatter_object(parts, src_rank) if shared is None else shared

    def _state_of_each(self, gathered: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
        """The state that each rank goes on from."""
        if gathered is None or _what(gathered) != _OF_ALL:
            raise ValueError(
                f"restore_state_global was given {_what(gathered)}, but takes what save_state_global returned on its"
                " dst_rank: on rank src_rank, or on every rank with src_rank=None."
            )
        states, world_size = [_without_saved_by(of_rank) for of_rank in gathered[_RANKS]], _distributed.world_size()
        if "lanes" in states[0]:
            return [merged(states)] * world_size
        changed = gathered["world_size"] != world_size
        if changed and self.sharing is Sharing.PER_RANK and self._refuses_changes:
            raise _other_world_size(self._kind(), gathered["world_size"])
        return [states[min(rank, len(states) - 1)] for rank in range(world_size)]

    def _check_saved_by(self, state: Mapping[str, Any]) -> None:
        saved_by, rank = state.get(_SAVED_BY), _distributed.rank()
        if saved_by is None or self.sharing is Sharing.REPLICATED or not self._refuses_changes:
            return
        if self.sharing is Sharing.PER_RANK and saved_by["world_size"] != _distributed.world_size():
            raise _other_world_size(self._kind(), saved_by["world_size"], lanes="lanes" in state)
        if saved_by["rank"] != rank and (self.sharing is Sharing.PER_RANK or rank == 0):
            raise CheckpointMismatchError(
                "loader",
                "rank",
                saved=saved_by["rank"],
                current=rank,
                advice=f"This loader ({self._kind()}) has another position on each rank: restore each rank's own.",
            )

    @property
    def _refuses_changes(self) -> bool:
        return self.strict or not self.capabilities.caution

    @abc.abstractmethod
    def state_dict(self, behind: int = 0) -> dict[str, Any]: ...
    @abc.abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...
    @abc.abstractmethod
    def check(self, state_dict: Mapping[str, Any]) -> None: ...
    @abc.abstractmethod
    def _behind(self) -> int: ...
    @abc.abstractmethod
    def _kind(self) -> str: ...


def merged(states: Sequence[Any]) -> Mapping[str, Any]:
    """One state from those of all ranks, where each rank's holds the cursors of its own lanes and the rest is equal.

    Raises:
        TypeError: They are no states.
    """
    if isinstance(states, str) or not states or not all(isinstance(state, Mapping) for state in states):
        raise TypeError(f"load_state_dict was given {states!r}; pass one state, or a list of those of all ranks.")
    if "lanes" not in states[0]:  # any rank's is that of all
        return states[0]  # type: ignore[no-any-return]
    lanes: dict[str, Any] = {}
    for state in states:
        lanes.update(state["lanes"])
    return {**states[0], "lanes": lanes}


def _without_saved_by(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != _SAVED_BY}


def _check_rank(name: str, rank: int | None) -> None:
    if rank is not None and not 0 <= rank < _distributed.world_size():
        raise ValueError(f"{name} is {rank}, but the ranks are 0 to {_distributed.world_size() - 1}.")


def _check_equal(state: Mapping[str, Any]) -> None:
    """Compares what all ranks should have alike. A collective."""
    told = _distributed.all_gather_object((digest(_without_saved_by(state)), _where(state)))
    if len({hashed for hashed, _ in told}) > 1:
        listed = "\n".join(f"  rank {rank}: {where}" for rank, (_, where) in enumerate(told))
        raise CheckpointSaveError(
            f"The ranks share one position in the data, but are at different ones:\n{listed}\n"
            "Save on all ranks after the same number of batches, from loaders with the same seed."
        )


def _where(state: Mapping[str, Any]) -> str:
    order = state.get("order", {})
    return ", ".join(f"{name} {order[name]}" for name in ("seed", "epoch", "batches", "consumed") if name in order)


def _other_world_size(kind: str, saved: int, *, lanes: bool = False) -> CheckpointMismatchError:
    advice = f"This loader ({kind}) can only go on with as many ranks as it was saved with: start with that many again."
    if lanes:
        advice = "One rank's state has its own lanes only: use save_state_global and restore_state_global to change it."
    return CheckpointMismatchError(
        "loader", "world_size", saved=saved, current=_distributed.world_size(), advice=advice
    )


def _what(state: object) -> str:
    if isinstance(state, Mapping):
        return _OF_ALL if isinstance(state.get(_RANKS), list) else _OF_ONE
    return "None" if state is None else f"a {type(state).__name__}"
