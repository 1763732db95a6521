"""What DCP's flat keys do not hold of a nested state: it makes text of every key of a dict, lists of tuples, and drops
empty dicts. A module's ``get_extra_state`` and an optimizer of the user's may have any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch

from lightning_resume.checkpoint._dcp import is_distributed_tensor
from lightning_resume.errors import CheckpointCorruptError

Lost: TypeAlias = dict[str, list[tuple[list[str | int], Any]]]
"""By the user's key: values that flat keys do not hold, each with its path within what is saved under that key."""


def lost_in(state: Mapping[str, Any]) -> Lost:
    """What of the state of modules and optimizers, by the user's keys, has to be kept as it is."""
    found = {key: list(_lost(value, _depth(value), [])) for key, value in state.items()}
    return {key: values for key, values in found.items() if values}


def checked(lost: Any) -> Lost:
    """``lost``, as it was read.

    Raises:
        CheckpointCorruptError: It is not what :func:`lost_in` returns.
    """
    fits = isinstance(lost, dict) and all(
        isinstance(values, list) and all(map(_is_entry, values)) for values in lost.values()
    )
    if not fits:
        raise CheckpointCorruptError(f"The checkpoint is damaged: its component 'lost' is {str(lost)[:80]}. {_ADVICE}")
    return lost  # type: ignore[no-any-return]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], list) and len(entry[0]) > 0


def put_back_lost(state: MutableMapping[str, Any], lost: Lost) -> None:
    """Puts what :func:`lost_in` has found into a ``state`` that has been through flat keys.

    An optimizer's state by index is by index again, for which nothing needs to be kept: its groups tell the indices.

    Raises:
        CheckpointCorruptError: There is no such place.
    """
    for value in state.values():
        if _is_optimizer(value):
            _key_by_index(value)
    for key, values in lost.items():
        for path, value in values if key in state else ():
            try:
                node = state[key]
                for part in path[:-1]:
                    node = node.setdefault(part, {}) if isinstance(node, MutableMapping) else node[part]
                node[path[-1]] = value
            except (LookupError, TypeError, AttributeError) as error:
                raise CheckpointCorruptError(f"The checkpoint is damaged: {key!r} has no {path}. {_ADVICE}") from error


def within(lost: Lost) -> Callable[[Sequence[str | int]], bool]:
    """Tells of a path, as flat keys have it, the user's key first, whether it lies in what ``lost`` holds whole."""
    places = {(key, *map(str, path)) for key, values in lost.items() for path, _ in values}
    if not places:
        return lambda _: False
    return lambda path: any(tuple(map(str, path[:end])) in places for end in range(2, len(path) + 1))


_ADVICE = "Load another checkpoint."


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def _key_by_index(optimizer: MutableMapping[str, Any]) -> None:
    groups, state = optimizer["param_groups"], optimizer["state"]
    params = [group.get("params") for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    indices = {str(one): one for listed in params if isinstance(listed, list) for one in listed if type(one) is int}
    if indices and isinstance(state, Mapping):
        optimizer["state"] = {indices.get(key, key): value for key, value in state.items()}


def _depth(state: Any) -> int:
    """How many levels are our own: an optimizer's state is by parameter and field, its groups are a list of dicts."""
    return 3 if _is_optimizer(state) else 1


def _lost(value: Any, depth: int, path: list[str | int]) -> Iterator[tuple[list[str | int], Any]]:
    if depth <= 0 and _is_lost(value) and not _has_distributed(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _lost(inner, depth - 1, [*path, key])
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _lost(inner, depth - 1, [*path, index])


def _is_lost(value: Any) -> bool:
    """Whether this container does not come back; of a dict but for what is in it, which has a path of its own."""
    if isinstance(value, Mapping):
        return not value or not all(isinstance(key, str) for key in value)
    if isinstance(value, tuple):
        return any(isinstance(one, (torch.Tensor, Mapping, list, tuple)) for one in value)
    return isinstance(value, list) and any(map(_holds_lost, value))


def _holds_lost(value: Any) -> bool:
    return _is_lost(value) or (isinstance(value, Mapping) and any(map(_holds_lost, value.values())))


def _has_distributed(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return is_distributed_tensor(value) or any(map(_has_distributed, inner))
