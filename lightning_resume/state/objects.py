"""The user's objects of one save or load, sorted by what is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_resume.state import collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objects:
    """The user's objects of one save or load, by key and by what is done with them."""

    modules: Mapping[str, Module]
    optimizers: Mapping[str, Optimizer]
    others: Mapping[str, Any]
    owners: collect.Owners

    @classmethod
    def of(cls, state: Mapping[str, Any], *, more_modules: Iterable[Module] = ()) -> Objects:
        """Sorts ``state``. ``more_modules`` may hold an optimizer's parameters without being saved themselves."""
        modules = {key: value for key, value in state.items() if isinstance(value, Module)}
        optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
        held = {id(module) for module in modules.values()}
        more = {f"module_{i}": module for i, module in enumerate(more_modules) if id(module) not in held}
        return cls(
            modules=modules,
            optimizers=optimizers,
            others={key: value for key, value in state.items() if key not in modules and key not in optimizers},
            owners=collect.Owners({**modules, **more} if not _cover(modules, optimizers) else modules),
        )


def _cover(modules: Mapping[str, Module], optimizers: Mapping[str, Optimizer]) -> bool:
    owners = collect.Owners(modules)
    return all(owners.of(optimizer) for optimizer in optimizers.values())


def to_saved(value: Any) -> Any:
    """What is saved of a user's object that is no module or optimizer."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return dict(value.bit_generator.state)
    return value.state_dict() if is_stateful(value) else value


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def put_back(state: MutableMapping[str, Any], key: str, saved: Any) -> None:
    current = state[key]
    if isinstance(current, torch.Generator):
        current.set_state(saved)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = saved
    elif is_stateful(current):
        current.load_state_dict(saved)
    else:
        state[key] = saved
