"""How the ranks of a run agree on when an epoch ends: none may end while others go on to a collective."""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
import torch.distributed as dist

from lightning_resume import _distributed
from lightning_resume.data.handshake import in_step


class Peers(Protocol):
    """All ranks that share the data. Every method is a collective."""

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""


@final
class ProcessGroup(Peers):
    """The ranks of the process group, over a gloo group of their own: training may use the other at the same time."""

    def __init__(self) -> None:
        self._group = _gloo_group()

    def smallest(self, value: int) -> int:
        box = torch.tensor([value], dtype=torch.int64)
        with _distributed.together():
            dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._group)
        return int(box)

    def gather(self, value: Any) -> list[Any]:
        box: list[Any] = [None] * dist.get_world_size()
        with _distributed.together():
            dist.all_gather_object(box, value, group=self._group)
        return box


_known: tuple[Any, Any] = (None, None)


def _gloo_group() -> Any:
    """One for the life of the process group; made by all ranks together."""
    global _known
    if _known[0] is not dist.group.WORLD:
        # torch makes it without a word of who is missing, where a loader is iterated over on one rank only
        in_step("iter() of a stream, which all ranks read together")
        _known = dist.group.WORLD, _distributed.new_group()
    return _known[1]
