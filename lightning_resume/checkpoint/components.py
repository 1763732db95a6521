"""Auxiliary state of a checkpoint: one opaque leaf for each component, or one for each rank."""

from __future__ import annotations

import abc
import dataclasses
import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch

from lightning_resume import _distributed
from lightning_resume.checkpoint.manifest import ComponentEntry
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.errors import CheckpointSaveError
from lightning_resume.state.component import Component, Sharing, digest, leaf_name

FILE_KEY = "lightning_resume"
"""Where a single-file checkpoint holds its components."""


class SavedComponents(abc.ABC):
    """The components of a checkpoint, by name and rank."""

    @abc.abstractmethod
    def ranks(self, name: str) -> int | None:
        """For how many ranks ``name`` was stored: ``None`` when it was not, 1 when once for all."""

    @abc.abstractmethod
    def value(self, name: str, rank: int) -> Any:
        """What ``rank`` had; of a component stored once, what all had."""

    def __contains__(self, name: str) -> bool:
        return self.ranks(name) is not None

    @abc.abstractmethod
    def names(self) -> list[str]: ...


@final
class LeafComponents(SavedComponents):
    """The components of a checkpoint folder."""

    def __init__(self, reader: CheckpointReader, *, trust: bool = False) -> None:
        self._reader, self._trust = reader, trust
        self._leaves = set(reader.leaf_names())
        self._fetched: dict[str, Any] = {}

    def ranks(self, name: str) -> int | None:
        if leaf_name(name) in self._leaves:
            return 1
        prefix = leaf_name(name) + ".rank_"
        return sum(leaf.startswith(prefix) for leaf in self._leaves) or None

    def value(self, name: str, rank: int) -> Any:
        leaf = leaf_name(name) if leaf_name(name) in self._leaves else leaf_name(name, rank)
        return self._fetched[leaf] if leaf in self._fetched else self._load(leaf)

    def fetch(self, rank: int) -> None:
        """Reads and verifies now what ``rank`` will ask for: its own; that of rank 0 or the last where it has none."""
        for name in self.names():
            ranks = self.ranks(name) or 1
            for of in {rank} if rank < ranks else {0, ranks - 1}:
                leaf = leaf_name(name) if leaf_name(name) in self._leaves else leaf_name(name, of)
                self._fetched[leaf] = self._load(leaf)

    def _load(self, leaf: str) -> Any:
        return safe_load(self._reader.leaf(leaf), name=f"{self._reader.path}: {leaf}", trust=self._trust)

    def names(self) -> list[str]:
        return sorted({leaf.removeprefix("resume.").split(".rank_")[0] for leaf in self._leaves})


@final
class FileComponents(SavedComponents):
    """The components of a single-file checkpoint."""

    def __init__(self, saved: Mapping[str, Sequence[Any]]) -> None:
        self._saved = saved

    def ranks(self, name: str) -> int | None:
        return len(self._saved[name]) if name in self._saved else None

    def value(self, name: str, rank: int) -> Any:
        values = self._saved[name]
        return values[0 if len(values) == 1 else rank]

    def names(self) -> list[str]:
        return sorted(self._saved)


def settle(components: Iterable[Component]) -> list[Component]:
    """Compares what all ranks should have alike. A collective.

    A REPLICATED component that differs and is not ``required`` becomes PER_RANK: each rank has a value of its own.

    Raises:
        CheckpointSaveError: A required REPLICATED component differs between ranks.
    """
    components = list(components)
    hash_all = lambda: {component.name: digest(component.value) for component in components}  # noqa: E731
    of_ranks = _distributed.all_gather_object(_distributed.agree("hashing what is no tensor", hash_all))
    for rank, digests in enumerate(of_ranks):
        if digests.keys() != of_ranks[0].keys():
            raise CheckpointSaveError(
                f"Rank {rank} saves {sorted(digests.keys() ^ of_ranks[0].keys())} and rank 0 does not, or the other way"
                " round. Give save the same keys on every rank; a rank without a value can give None."
            )
    return [_settled(component, [digests[component.name] for digests in of_ranks]) for component in components]


def _settled(component: Component, digests: list[str]) -> Component:
    if component.sharing is not Sharing.REPLICATED or len(set(digests)) == 1:
        return component
    if not component.required:
        return dataclasses.replace(component, sharing=Sharing.PER_RANK)
    listed = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(digests))
    raise CheckpointSaveError(
        f"{component.name} must be the same on every rank, but differs:\n{listed}\n"
        "Seed samplers and generators alike on all ranks, and call save on all ranks at the same step."
    )


def to_leaves(components: Iterable[Component]) -> dict[str, bytes]:
    """This rank's leaves: its own of what each rank has, and, on rank 0, what is stored once."""
    rank = _distributed.rank()
    leaves = {}
    for component in components:
        if component.sharing is Sharing.PER_RANK:
            leaves[leaf_name(component.name, rank)] = pack(component.value)
        elif rank == 0:
            leaves[leaf_name(component.name)] = pack(component.value)
    return leaves


def to_file(components: Iterable[Component]) -> dict[str, list[Any]]:
    """All ranks' components, for a single file; complete on every rank. A collective."""
    mine = {component.name: (component.sharing, component.value) for component in components}
    packed = _distributed.agree("packing what is no tensor", lambda: pickle.dumps(mine))
    everyone = [pickle.loads(of_rank) for of_rank in _distributed.all_gather_object(packed)]
    return {
        name: [of_rank[name][1] for of_rank in everyone] if sharing is Sharing.PER_RANK else [everyone[0][name][1]]
        for name, (sharing, _) in mine.items()
    }


def entries(components: Iterable[Component]) -> dict[str, ComponentEntry]:
    """What the manifest says of the components; ``bytes`` of one rank's leaf."""
    world = tuple(range(_distributed.world_size()))
    return {
        component.name: ComponentEntry(
            sharing=component.sharing.value,
            ranks=world if component.sharing is Sharing.PER_RANK else (0,),
            bytes=len(pack(component.value)),
            hash=digest(component.value),
            required=component.required,
        )
        for component in components
    }


def pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
