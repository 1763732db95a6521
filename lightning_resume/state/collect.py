"""State of models and optimizers by parameter name, whatever strategy holds them.

Names are those of the module that the user wrote: what DDP, FSDP and ``torch.compile`` put around it leaves no trace.

Optimizer state does not go through ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``: for an
optimizer that has not stepped yet it runs a step to see what state there will be, which leaves Adam at step 1, so a run
that saved at step 0 would not be the same run; and ``set_optimizer_state_dict`` refuses parameters without state, such
as those that got no gradient yet (both seen with torch 2.13). Only FSDP1's flat parameters need its own functions.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_resume import _distributed
from lightning_resume.errors import CheckpointMismatchError

StateDict = dict[str, Any]


def user_module(module: Module) -> Module:
    """The module inside DDP's wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_fsdp1(module: Module) -> bool:
    return any(isinstance(child, FullyShardedDataParallel) for child in module.modules())


def renames_what_it_loads(module: Module) -> bool:
    """Whether the user's modules change a state dict before it is loaded; FSDP1 does so for its own wrapping."""
    return any(
        child._load_state_dict_pre_hooks
        for child in module.modules()
        if not isinstance(child, FullyShardedDataParallel)
    )


def clean_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and FSDP put into it."""
    return (
        name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
    )


def model_state(module: Module) -> StateDict:
    """The module's state by name: the live tensors, but for FSDP1; sharded where the module is."""
    if is_fsdp1(module):
        with quiet():
            return get_model_state_dict(module)
    return {clean_name(name): value for name, value in user_module(module).state_dict().items()}


def load_model_state(module: Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Loads what :func:`model_state` returned, or a part of it with ``strict=False``."""
    if is_fsdp1(module):
        with quiet():
            set_model_state_dict(module, dict(state), options=StateDictOptions(strict=strict))
        return
    inner = user_module(module)
    current = {clean_name(name): name for name in inner.state_dict()}
    inner.load_state_dict({current.get(name, name): value for name, value in state.items()}, strict=strict)


def weights_of(module: Module, state: Mapping[str, Any]) -> set[str]:
    """The names in ``state`` that are what training changes: no buffers and no frozen parameters."""
    inner = user_module(module)
    fixed = {name for name, _ in inner.named_buffers()}
    fixed |= {name for name, parameter in inner.named_parameters() if not parameter.requires_grad}
    return set(state) - set(map(clean_name, fixed))


def buffers_of(module: Module, state: Mapping[str, Any]) -> StateDict:
    """Copies of those whole tensors in ``state`` that are buffers: each rank may have its own.

    BatchNorm's statistics are each rank's under FSDP; under DDP they are rank 0's, but only from the next forward on.
    """
    names = {clean_name(name) for name, _ in user_module(module).named_buffers()}
    return {
        name: value.detach().cpu().clone()
        for name, value in state.items()
        if name in names and type(value) is torch.Tensor
    }


def load_buffers(module: Module, values: Mapping[str, Any]) -> None:
    """Sets the buffers in ``values``."""
    for name, buffer in user_module(module).named_buffers():
        if clean_name(name) in values:
            buffer.detach().copy_(values[clean_name(name)])


def load_full_model_state(module: Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Loads whole tensors, equal on every rank, into a module that may be sharded."""
    if is_fsdp1(module) or has_dtensors(module):
        with quiet():
            options = StateDictOptions(full_state_dict=True, strict=strict)
            set_model_state_dict(module, {clean_name(k): v for k, v in state.items()}, options=options)
        return
    load_model_state(module, {clean_name(k): v for k, v in state.items()}, strict=strict)


def full_model_state(module: Module) -> StateDict:
    """Whole tensors on the CPU; filled on rank 0 alone where the module is sharded. A collective."""
    if is_fsdp1(module):
        with _fsdp1_full(module, rank0_only=True):
            return {clean_name(name): value for name, value in module.state_dict().items()}
    if has_dtensors(module):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return model_state(module)


def has_dtensors(module: Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class Owners:
    """The modules whose parameters an optimizer may hold, by the user's keys."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = dict(modules)

    def of(self, optimizer: Optimizer) -> Mapping[str, Module]:
        """The modules that hold ``optimizer``'s parameters; empty when some parameter is in none of them."""
        wanted = {id(parameter) for parameter in _parameters(optimizer)}
        found = {
            key: module
            for key, module in self.modules.items()
            if wanted & {id(parameter) for parameter in module.parameters()}
        }
        held = {id(parameter) for module in found.values() for parameter in module.parameters()}
        return found if wanted <= held else {}

    def dtypes(self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.dtype]:
        """Of the parameters by name, in what was ``saved`` of the modules by key: anything with a ``dtype``."""
        modules = self.of(optimizer)
        return {
            clean_name(name if len(modules) == 1 else f"{key}.{name}"): value.dtype
            for key in modules
            for name, value in saved.get(key, {}).items()
            if getattr(value, "dtype", None) is not None
        }

    def names(self, optimizer: Optimizer) -> dict[int, str] | None:
        """Parameter names by ``id``, ``None`` when the parameters belong to no known module."""
        modules = self.of(optimizer)
        if not modules:
            return None
        one = len(modules) == 1
        return {
            id(parameter): clean_name(name if one else f"{key}.{name}")
            for key, module in modules.items()
            for name, parameter in user_module(module).named_parameters()
        }


def optimizer_state(optimizer: Optimizer, owners: Owners) -> StateDict:
    """``state`` by parameter name, ``param_groups`` with names as ``params``; as torch's own ``get_state_dict`` lays it
    out. Keyed by index where the optimizer's parameters belong to no known module.
    """
    names = owners.names(optimizer)
    if names is None:
        return optimizer.state_dict()
    modules = list(owners.of(optimizer).values())
    if len(modules) == 1 and is_fsdp1(modules[0]):
        with _fsdp1_sharded(modules[0]):
            return FullyShardedDataParallel.optim_state_dict(modules[0], optimizer)
    return rename_parameters(optimizer.state_dict(), [names[id(parameter)] for parameter in _parameters(optimizer)])


def rename_parameters(state: Mapping[str, Any], names: Sequence[Any]) -> StateDict:
    """Replaces each parameter's key in an optimizer's state dict: ``names`` are the new ones, in the order of the
    parameters in ``param_groups``.
    """
    old = [parameter for group in state["param_groups"] for parameter in group["params"]]
    new = dict(zip(old, names, strict=True))
    # some optimizers keep a count of all steps beside what they keep of each parameter
    renamed = [(new.get(key, key), value) for key, value in state["state"].items()]
    if len(dict(renamed)) < len(renamed):
        raise ValueError(f"the optimizer's state has a key that is also a parameter's name: {list(state['state'])}")
    return {
        **state,
        "state": dict(renamed),
        "param_groups": [{**group, "params": [new[p] for p in group["params"]]} for group in state["param_groups"]],
    }


def load_optimizer_state(
    optimizer: Optimizer, state: Mapping[str, Any], owners: Owners, *, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Loads a state by name, or by index where the parameters belong to no known module.

    Parameters without state in ``state`` get none: they had none when it was saved.

    Args:
        optimizer: Is changed.
        state: What :func:`optimizer_state` returned.
        owners: The modules that hold its parameters.
        dtypes: Of the parameters by name, when they were saved, as far as that is known.
    """
    names = owners.names(optimizer)
    if names is None or not _is_named(state):
        optimizer.load_state_dict(dict(state))
        _keep_dtypes(optimizer, [state["state"].get(n, {}) for n in range(len(_parameters(optimizer)))], [])
        return
    modules = list(owners.of(optimizer).values())
    if len(modules) == 1 and is_fsdp1(modules[0]):
        with _fsdp1_sharded(modules[0]):
            flat = FullyShardedDataParallel.optim_state_dict_to_load(modules[0], optimizer, dict(state))
        optimizer.load_state_dict(flat)
        return
    optimizer.load_state_dict(
        in_parameter_order(state, [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups])
    )
    in_order = [names[id(parameter)] for parameter in _parameters(optimizer)]
    _keep_dtypes(
        optimizer, [state["state"].get(name, {}) for name in in_order], [(dtypes or {}).get(name) for name in in_order]
    )


def _keep_dtypes(
    optimizer: Optimizer, saved: Sequence[Mapping[str, Any]], dtypes: Sequence[torch.dtype | None]
) -> None:
    """Undoes that ``load_state_dict`` makes of an optimizer's state what the parameter's dtype is: more exact moments
    of a bfloat16 parameter would lose bits. Where the parameter itself is of another dtype than it was, they follow it.
    """
    for parameter, values, dtype in itertools.zip_longest(_parameters(optimizer), saved, dtypes):
        own = optimizer.state.get(parameter, {})
        for key, value in values.items():
            loaded = own.get(key)
            if not (isinstance(loaded, torch.Tensor) and isinstance(value, torch.Tensor)):
                continue
            if value.dtype != loaded.dtype and (dtype == parameter.dtype or value.shape != parameter.shape):
                own[key] = value.to(loaded.device)


def in_parameter_order(state: Mapping[str, Any], current: Sequence[Sequence[str]]) -> StateDict:
    """Turns a state by name into one by index, in the order of the current ``param_groups``."""
    saved = {name: group for group in state["param_groups"] for name in group["params"]}
    index = {name: i for i, name in enumerate(name for group in current for name in group)}
    return {
        **state,
        "state": {index.get(name, name): value for name, value in state["state"].items()},
        "param_groups": [
            {**(saved[group[0]] if group else {}), "params": [index[name] for name in group]} for group in current
        ],
    }


def full_optimizer_state(optimizer: Optimizer, owners: Owners) -> StateDict:
    """Whole tensors on the CPU, filled on rank 0 alone where the module is sharded. A collective.

    Laid out as stock Lightning does: by name where the module is sharded, else by index.
    """
    modules = list(owners.of(optimizer).values())
    if len(modules) == 1 and is_fsdp1(modules[0]):
        with _fsdp1_full(modules[0], rank0_only=True):
            return FullyShardedDataParallel.optim_state_dict(modules[0], optimizer)
    if not any(has_dtensors(module) for module in modules):
        return optimizer.state_dict()
    state = optimizer_state(optimizer, owners)
    whole = {name: _whole(values) for name, values in state["state"].items()}
    return {**state, "state": whole if _distributed.rank() == 0 else {}}


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole(inner) for key, inner in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def load_full_optimizer_state(
    optimizer: Optimizer, state: Mapping[str, Any], owners: Owners, *, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Loads whole tensors, by name or by index and equal on every rank, for parameters that may be sharded.

    ``dtypes`` as for :func:`load_optimizer_state`.
    """
    names = owners.names(optimizer)
    if names is not None and not _is_named(state):
        state = rename_parameters(state, [names[id(parameter)] for parameter in _parameters(optimizer)])
    modules = list(owners.of(optimizer).values())
    if names is not None and len(modules) == 1 and is_fsdp1(modules[0]):
        with _fsdp1_full(modules[0], rank0_only=False):
            flat = FullyShardedDataParallel.optim_state_dict_to_load(modules[0], optimizer, dict(state))
        optimizer.load_state_dict(flat)
        return
    if names is not None:
        parameters = {names[id(parameter)]: parameter for parameter in _parameters(optimizer)}
        state = {
            **state,
            "state": {
                name: {key: _sharded_like(parameters[name], value) for key, value in values.items()}
                if name in parameters
                else values
                for name, values in state["state"].items()
            },
        }
    load_optimizer_state(optimizer, state, owners, dtypes=dtypes)


def _sharded_like(parameter: torch.Tensor, value: Any) -> Any:
    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
        return value
    # every rank holds the whole tensor, so each cuts out its own part without asking the others
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def check_optimizer(key: str, optimizer: Optimizer, saved_groups: Sequence[Sequence[Any]], owners: Owners) -> None:
    """Raises :class:`CheckpointMismatchError` when the saved ``param_groups`` are not the optimizer's."""
    names = owners.names(optimizer)
    if names is None or not all(isinstance(name, str) for group in saved_groups for name in group):
        current: list[Any] = [len(group["params"]) for group in optimizer.param_groups]
        saved: list[Any] = [len(group) for group in saved_groups]
    else:
        current = [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]
        saved = [sorted(group) for group in saved_groups]
    if current != saved:
        raise CheckpointMismatchError(
            f"optimizer {key!r}",
            "param_groups",
            saved=_difference(saved, current),
            current=_difference(current, saved),
            advice="Create the optimizer with the same parameter groups as in the run that saved it.",
        )


def _difference(one: list[Any], other: list[Any]) -> str:
    if len(one) != len(other):
        return f"{len(one)} groups"
    first = next(i for i, group in enumerate(one) if group != other[i])
    only = sorted(set(one[first]) - set(other[first])) if isinstance(one[first], list) else one[first]
    return f"group {first}: {only}"


def like(model: Mapping[str, Any], name: str, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor to load one entry of a parameter's optimizer state into, laid out as the parameter is."""
    parameter = model.get(name)
    is_tensor = isinstance(parameter, torch.Tensor) or hasattr(parameter, "local_shards")
    if is_tensor and tuple(parameter.size()) == tuple(shape):  # type: ignore[union-attr]
        return torch.empty_like(parameter, dtype=dtype)  # type: ignore[arg-type]
    return torch.empty(tuple(shape), dtype=dtype)


def _is_named(state: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) for group in state["param_groups"] for name in group["params"])


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch says of FSDP1's ShardedTensors, which it makes itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*FSDP.state_dict_type.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*(ShardedTensor|_get_pg_default_device).*")
        yield


@contextlib.contextmanager
def _fsdp1_sharded(module: Module) -> Iterator[None]:
    with (
        quiet(),
        FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        ),
    ):
        yield


@contextlib.contextmanager
def _fsdp1_full(module: Module, *, rank0_only: bool) -> Iterator[None]:
    offload = module_device(module).type != "cpu"  # offloading what is on the CPU already fails (seen with torch 2.13)
    with (
        quiet(),
        FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only and offload),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
        ),
    ):
        yield


def module_device(module: Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def restrict(state: Mapping[str, Any], keep: Callable[[str, Any], bool]) -> StateDict:
    """The entries of ``state`` that a ``filter=`` of ``fabric.save`` lets through."""
    return {name: value for name, value in state.items() if keep(name, value)}
