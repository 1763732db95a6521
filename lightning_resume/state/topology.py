"""Where a run runs: ranks, nodes, device mesh. Saved with every checkpoint, compared on load."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lightning_resume import _distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """The shape of a run and this rank's place in it.

    Args:
        world_size: Number of processes.
        rank: This process's global rank.
        num_nodes: Number of machines.
        mesh: Names and sizes of the device mesh's dimensions, empty where there is no mesh.
        coordinates: This rank's index in each dimension of the mesh.
        data_parallel_size: Number of ranks that see different data.
        data_parallel_rank: This rank's index among them.
    """

    world_size: int = 1
    rank: int = 0
    num_nodes: int = 1
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    coordinates: Mapping[str, int] = dataclasses.field(default_factory=dict)
    data_parallel_size: int = 1
    data_parallel_rank: int = 0

    @classmethod
    def of(cls, *, mesh: Any = None, data_parallel: Mapping[str, int] | None = None) -> Topology:
        """The current process's topology; ``data_parallel`` holds ``num_replicas`` and ``rank``."""
        names = tuple(mesh.mesh_dim_names or ()) if mesh is not None else ()
        data_parallel = data_parallel or {"num_replicas": 1, "rank": 0}
        world_size = _distributed.world_size()
        return cls(
            world_size=world_size,
            rank=_distributed.rank(),
            num_nodes=max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
            mesh={name: int(mesh.size(i)) for i, name in enumerate(names)},
            coordinates={name: int(mesh.get_local_rank(name)) for name in names},
            data_parallel_size=int(data_parallel["num_replicas"]),
            data_parallel_rank=int(data_parallel["rank"]),
        )

    def to_manifest(self, *, loaders: Any = ()) -> dict[str, Any]:
        """What the manifest keeps: the same on every rank, so without this rank's place."""
        return {
            "world_size": self.world_size,
            "num_nodes": self.num_nodes,
            "mesh": dict(self.mesh),
            "data_parallel_size": self.data_parallel_size,
            "loaders": list(loaders),
        }
