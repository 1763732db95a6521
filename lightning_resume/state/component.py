"""What a checkpoint is made of, and how each part is shared between ranks."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class Sharing(enum.Enum):
    """How the ranks of a run hold one component of its state."""

    SHARDED = "sharded"
    """Split between ranks (DTensor, ShardedTensor)."""
    REPLICATED = "replicated"
    """Equal on all ranks; stored once."""
    GLOBAL = "global"
    """Rank 0's; the others have none of their own."""
    PER_RANK = "per_rank"
    """Each rank has its own."""
    PER_GROUP = "per_group"
    """Equal within one coordinate of the device mesh."""
    PER_NODE = "per_node"
    """Equal within one node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A named part of the state that is stored as one opaque leaf, or one leaf for each rank.

    Args:
        name: Names the leaf: ``resume.<name>``, or ``resume.<name>.rank_00003`` where each rank has its own.
        value: This rank's value: plain containers, numbers, strings and tensors.
        sharing: How the ranks hold it.
        required: Whether a load must fail when the checkpoint has no such component.
    """

    name: str
    value: Any
    sharing: Sharing
    required: bool = True


USER = "user."
"""Begins the names of components that are values of the user's ``state``."""
BUFFERS = "buffers."
"""Begins the names of components that are a module's buffers, where each rank has its own."""
LOST = "lost"
"""The component of what flat keys do not hold (:mod:`lightning_resume.checkpoint.exact`)."""


def leaf_name(component: str, rank: int | None = None) -> str:
    """The key of a component's leaf in the checkpoint; ``rank`` where each rank has its own."""
    return f"resume.{component}" if rank is None else f"resume.{component}.rank_{rank:05d}"


def digest(value: Any) -> str:
    """Equal values give equal digests in every process: tensors and arrays by content, containers item by item.

    Pickles would not do: their bytes depend on which equal strings happen to be the same object.
    """
    hasher = hashlib.blake2b(digest_size=16)
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    hasher.update(type(value).__qualname__.encode())
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        hasher.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        hasher.update(plain.flatten().view(torch.uint8).numpy() if plain.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        hasher.update(f"{value.dtype}{value.shape}".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _feed(hasher, key)
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(str(len(value)).encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(repr(value).encode())
