"""The collectives that the rest of the package uses, each a no-op where no process group exists."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, final

import torch
import torch.distributed as dist

from lightning_resume.errors import RankLostError, ResumeError

T = TypeVar("T")


_of_thread = threading.local()


def group() -> dist.ProcessGroup | None:
    """The group that the collectives of this thread go over; ``None`` is the default group."""
    return getattr(_of_thread, "group", None)


@contextlib.contextmanager
def using(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, the collectives of this thread go over ``group``, so that they never mix with those of another thread."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


def new_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for another thread to use; ``None`` where there is no process group. A collective.

    It waits as long for a rank as the default group does.
    """
    return dist.new_group(backend="gloo", timeout=timeout()) if is_distributed() else None


def sends_main_memory() -> bool:
    """Whether the default group can send what lies in main memory, as NCCL alone cannot."""
    return torch.device("cpu") in dist.distributed_c10d._get_default_group()._device_types


def end_group(group: dist.ProcessGroup | None) -> None:
    """Ends what :func:`new_group` returned, unless it ended with the default group. Not a collective."""
    if group is not None and is_distributed() and group in dist.distributed_c10d._world.pg_map:
        dist.destroy_process_group(group)


def is_distributed() -> bool:
    """Whether there is a process group.

    Raises:
        RankLostError: The one that this thread was to use is gone; each rank would take itself for the only one.
    """
    found = dist.is_available() and dist.is_initialized()
    if group() is not None and not found:
        raise RankLostError(
            "The process group was destroyed while a checkpoint was being saved in the background; it is lost. Call"
            " wait() of the strategy or the manager before."
        )
    return found


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def timeout() -> timedelta:
    """How long the process group waits for a rank: groups that we make wait as long, not torch's 30 minutes."""
    group = dist.distributed_c10d._get_default_group()
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    store: Any = dist.distributed_c10d._get_default_store()  # waits as long, unless a user made it
    limit: timedelta = getattr(options, "_timeout", store.timeout)
    return limit


def local_world_size() -> int:
    """How many ranks share this machine: what the launcher says, else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def broadcast_object(obj: T, src: int = 0) -> T:
    """Returns rank ``src``'s ``obj`` on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    with together():
        dist.broadcast_object_list(box, src=src, device=_object_device(), group=group())
    return box[0]


def all_gather_object(obj: T) -> list[T]:
    """Returns the ``obj`` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    box: list[Any] = [None] * world_size()
    with together():
        dist.all_gather_object(box, obj, group=group())
    return box


def gather_object(obj: T, dst: int) -> list[T] | None:
    """Returns the ``obj`` of every rank, in rank order, on rank ``dst``; ``None`` on the others."""
    if world_size() == 1:
        return [obj]
    box: list[Any] | None = [None] * world_size() if rank() == dst else None
    with together():
        dist.gather_object(obj, box, dst=dst, group=group())
    return box


def scatter_object(objs: Sequence[T], src: int) -> T:
    """Returns this rank's of rank ``src``'s ``objs``, one for each rank."""
    if world_size() == 1:
        return objs[0]
    box: list[Any] = [None]
    with together():
        dist.scatter_object_list(box, list(objs) if rank() == src else None, src=src, group=group())
    return box[0]  # type: ignore[no-any-return]


@final
class Carrier:
    """Gives bytes in main memory, of any rank, to all ranks. Made by all of them."""

    def __init__(self) -> None:
        self.rank, self.world_size = rank(), world_size()
        self._made = None if sends_main_memory() else new_group()
        self._group = group() if self._made is None else self._made

    def send(self, memory: torch.Tensor, src: int) -> None:
        """Makes ``memory`` what it is on rank ``src``; it is as large on every rank."""
        with together():
            dist.broadcast(memory, src, group=self._group)

    def goes_on(self, can: bool, src: int) -> bool:
        """What rank ``src`` says of whether it can send."""
        said = torch.tensor([can])
        self.send(said, src)
        return bool(said)

    def close(self) -> None:
        end_group(self._made)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a collective: names what it means that one fails.

    Raises:
        RankLostError: Another rank is gone, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError, DistNetworkError and gloo's own are
        raise RankLostError(
            f"Rank {rank()} waited for the others, but at least one has ended or did not answer in time"
            f" ({str(error).splitlines()[0]}). Look for the first error in the logs of the other ranks, then start the"
            " run again: it goes on from its newest checkpoint."
        ) from error


class RemoteError(ResumeError, RuntimeError):
    """Stands for errors of other ranks; its text names each rank and error."""


def agree(what: str, act: Callable[[], T]) -> T:
    """Runs ``act`` on every rank and raises on every rank when it raised on any.

    Must be called on all ranks. A rank on which it failed raises its own error; the others raise the same error, from a
    :class:`RemoteError`, or that one where the error cannot be sent. So no rank goes on, or waits in a collective,
    after another one has failed, and the caller can catch the same error everywhere.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    try:
        told = all_gather_object(None if error is None else _Failure.of(error))
    except RankLostError as lost:
        raise error or lost  # noqa: B904 - the error of this rank is the nearer one
    if error is not None:
        raise error
    failed = {r: failure for r, failure in enumerate(told) if failure is not None}
    if failed:
        texts = "; ".join(f"rank {r}: {failure.text}" for r, failure in failed.items())
        remote = RemoteError(f"{what} failed on {texts}")
        same = next(iter(failed.values())).error()
        if same is None:
            raise remote
        raise same from remote
    return result  # type: ignore[return-value]


def sendable(error: Exception) -> Exception:
    """Returns ``error``, or what stands for it where it would not come back from being pickled."""
    if _Failure.of(error).pickled is not None:
        return error
    text = f"{type(error).__name__}: {error}"
    return OSError(error.errno or errno.EIO, text) if isinstance(error, OSError) else ResumeError(text)


class _Failure(NamedTuple):
    """An error on its way to the other ranks."""

    text: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        text = f"{type(error).__name__}: {error}"
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # an exception class of anybody's may fail to come back in any way
            return cls(text, None)
        return cls(text, pickled)

    def error(self) -> Exception | None:
        return None if self.pickled is None else pickle.loads(self.pickled)


def on_rank_zero(what: str, act: Callable[[], T]) -> T:
    """Runs ``act`` on rank 0 alone; every rank gets its result, or an error when it raised."""
    result = agree(what, act if rank() == 0 else lambda: None)
    return broadcast_object(result)  # type: ignore[return-value]


def _object_device() -> torch.device | None:
    # object collectives move pickles through tensors; with NCCL these must live on this rank's GPU
    if dist.get_backend(group()) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return None
