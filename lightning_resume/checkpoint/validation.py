"""Compares what ranks should hold alike before it is saved: DCP writes one rank's, and nobody would see the others."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import xxhash
from torch.distributed.tensor import DTensor

from lightning_resume._distributed import agree, all_gather_object, world_size
from lightning_resume.checkpoint._dcp import flatten, is_distributed_tensor
from lightning_resume.errors import ReplicaMismatchError

Piece: TypeAlias = tuple[str, tuple[int, ...]]
"""A tensor's flat key and, of a DTensor, which part of it: the coordinate in the mesh's sharded dimensions."""

_MOST_NAMES = 10


class Validate(str, enum.Enum):
    """How replicas are compared before a save."""

    QUICK = "quick"
    """Ranks exchange one hash of all tensors, and hashes of each only where that one differs."""
    FULL = "full"
    """Ranks exchange a hash of every tensor."""


def validate_replicas(state: Mapping[str, Any], how: Validate) -> None:
    """Compares, bit for bit, the tensors of ``state`` that several ranks hold. A collective.

    Each rank hashes all that it holds. Parameters and optimizer state of DDP are held by all ranks; of a DTensor, what
    a mesh dimension replicates (HSDP) is compared within it.

    Raises:
        ReplicaMismatchError: A tensor differs; names it, the ranks and their hashes. Raised on every rank.
    """
    if world_size() == 1:
        return
    mine = agree("hashing the tensors", partial(_hashes, state))
    if how is Validate.QUICK:
        combined = None if _is_sharded(mine) else xxhash.xxh3_128_hexdigest(repr(sorted(mine.items())).encode())
        told = set(all_gather_object(combined))
        if len(told) == 1 and None not in told:
            return
    different = _different(all_gather_object(mine))
    if different:
        raise ReplicaMismatchError(
            f"{len(different)} tensors differ between ranks that should hold them alike:\n"
            + _told(different)
            + "Nothing"
            " was saved. Save on all ranks after the same step, and look for what changes a model on some ranks only:"
            " unseeded initialization, a step outside of backward, a parameter that DDP ignores."
        )


def _hashes(state: Mapping[str, Any]) -> dict[Piece, str]:
    flat, _ = flatten(dict(state))
    return {
        (key, _part(value)): _hash(value.to_local() if isinstance(value, DTensor) else value)
        for key, value in flat.items()
        if isinstance(value, DTensor) or (isinstance(value, torch.Tensor) and not is_distributed_tensor(value))
    }


def _part(value: torch.Tensor) -> tuple[int, ...]:
    if not isinstance(value, DTensor):
        return ()
    coordinate = value.device_mesh.get_coordinate() or ()
    return tuple(-1 if p.is_replicate() else c for c, p in zip(coordinate, value.placements, strict=False))


def _hash(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    hasher = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        hasher.update(plain.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
    return hasher.hexdigest()


def _is_sharded(pieces: Mapping[Piece, str]) -> bool:
    return any(part for _, part in pieces)


def _different(of_ranks: Sequence[Mapping[Piece, str]]) -> dict[Piece, dict[str, list[int]]]:
    """The ranks by hash, of every piece of which there is more than one hash."""
    found: dict[Piece, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    whole = {piece for hashes in of_ranks for piece in hashes if not piece[1]}
    for rank, hashes in enumerate(of_ranks):
        for piece, digest in hashes.items():
            found[piece][digest].append(rank)
        for piece in whole - hashes.keys():
            found[piece]["none"].append(rank)
    return {piece: dict(ranks) for piece, ranks in sorted(found.items()) if len(ranks) > 1}


def _told(different: Mapping[Piece, Mapping[str, list[int]]]) -> str:
    lines = []
    for (key, _), ranks_by_hash in list(different.items())[:_MOST_NAMES]:
        hashes = "; ".join(f"ranks {ranks}: {digest}" for digest, ranks in ranks_by_hash.items())
        lines.append(f"  {key}: {hashes}\n")
    more = len(different) - _MOST_NAMES
    return "".join(lines) + (f"  and {more} more\n" if more > 0 else "")
