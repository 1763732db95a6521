"""Which rank writes what: DCP's plan, made once and used again while all ranks have the same tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import xxhash
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from lightning_resume._distributed import agree, all_gather_object, gather_object, rank, scatter_object, world_size

_KEPT = 4  # plans of the last structures: a run may save two kinds of checkpoints in turns


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What every rank writes; on the ranks but 0 only what this one does."""

    mine: SavePlan
    of_ranks: tuple[SavePlan, ...] = ()
    metadata: Metadata | None = None


_kept: OrderedDict[str, Planned] = OrderedDict()


def plan_save(state: dict[str, Any]) -> tuple[SavePlanner, Planned]:
    """Returns who writes what of ``state``, and what finds the values of this rank's items in it. A collective.

    Ranks exchange one hash each of names, dtypes, shapes and placements. Where these are as they were in one of the
    last saves, so is the plan, and nothing more is exchanged.

    Raises:
        ValueError: What ranks hold under one key is of different shape, dtype or kind.
    """
    planner = _Planner()
    local, structure = agree("planning", partial(_plan_mine, planner, state))
    told = all_gather_object((structure, tuple(_kept)))
    key = xxhash.xxh3_128_hexdigest(repr([of_rank for of_rank, _ in told]).encode())
    if not all(key in kept for _, kept in told):
        _kept[key] = _plan_together(planner, local)
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    planner.finish_plan(_kept[key].mine)
    return planner, _kept[key]


class _Planner(DefaultSavePlanner):
    """DCP's planner, which divides replicated tensors among ranks, made exact for values that ranks disagree on."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _check_same_tensors(all_plans)
        return super().create_global_plan(_keep_lowest_rank(all_plans))


def _plan_mine(planner: SavePlanner, state: dict[str, Any]) -> tuple[SavePlan, str]:
    planner.set_up_planner(state, is_coordinator=rank() == 0)
    plan = planner.create_local_plan()
    items = [(item.index.fqn, item.index.offset, item.type.value, item.tensor_data) for item in plan.items]
    told = (rank(), world_size(), items, plan.planner_data)
    return plan, xxhash.xxh3_128_hexdigest(repr(told).encode())


def _plan_together(planner: SavePlanner, local: SavePlan) -> Planned:
    of_ranks = gather_object(local, dst=0)
    plans: list[SavePlan] = []
    metadata: Metadata | None = None

    def plan() -> None:
        nonlocal plans, metadata
        if of_ranks is not None:
            plans, metadata = planner.create_global_plan(of_ranks)

    agree("planning", plan)
    mine = scatter_object(plans, src=0)
    return Planned(mine=mine, of_ranks=tuple(plans), metadata=metadata)


def _check_same_tensors(plans: list[SavePlan]) -> None:
    first: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    for of_rank, plan in enumerate(plans):
        for item in plan.items:
            rank_0, item_0 = first.setdefault(item.index, (of_rank, item))
            if _kind(item) != _kind(item_0):
                raise ValueError(
                    f"{item.index.fqn!r} is {_kind(item_0)} on rank {rank_0} and {_kind(item)} on rank {of_rank}; "
                    "what several ranks hold under one key must be equal. Give each rank a key of its own."
                )


def _kind(item: WriteItem) -> str:
    if item.tensor_data is None:
        return "a plain value"
    return f"a {item.tensor_data.properties.dtype} tensor of shape {tuple(item.tensor_data.size)}"


def _keep_lowest_rank(plans: list[SavePlan]) -> list[SavePlan]:
    """Leaves each plain value to the lowest rank that has it; DCP would take any rank's, of one dict even several."""
    owner: dict[str, int] = {}
    for of_rank, plan in enumerate(plans):
        for item in plan.items:
            owner.setdefault(item.index.fqn, of_rank)
    return [
        replace(plan, items=[i for i in plan.items if _is_kept(i, of_rank, owner)])
        for of_rank, plan in enumerate(plans)
    ]


def _is_kept(item: WriteItem, of_rank: int, owner: Mapping[str, int]) -> bool:
    return item.type != WriteItemType.BYTE_IO or owner[item.index.fqn] == of_rank
