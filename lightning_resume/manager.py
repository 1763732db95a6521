"""Saves and loads the objects of a run, in a checkpoint folder or a single file. Every function is a collective."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_resume import _distributed
from lightning_resume.checkpoint._dcp import unflatten_state_dict
from lightning_resume.checkpoint.commit import commit_file
from lightning_resume.checkpoint.components import (
    FILE_KEY,
    FileComponents,
    LeafComponents,
    SavedComponents,
    entries,
    settle,
    to_file,
    to_leaves,
)
from lightning_resume.checkpoint.filesystem import local_path, torch_save
from lightning_resume.checkpoint.layout import Kind, classify, newest
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.checkpoint.writer import write_checkpoint
from lightning_resume.errors import CheckpointMismatchError, CheckpointNotFoundError
from lightning_resume.state import collect
from lightning_resume.state.component import Component, Sharing
from lightning_resume.state.topology import Topology

Filter = Mapping[str, Callable[[str, Any], bool]]
Path_ = str | os.PathLike[str]


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


def save_folder(
    path: Path_,
    objects: Objects,
    components: Sequence[Component],
    *,
    topology: Mapping[str, Any],
    filter: Filter | None = None,
    step: int | None = None,
    epoch: int | None = None,
) -> Manifest:
    """Saves a checkpoint folder: tensors as DCP shards, the rest in ``meta.pt`` and one leaf a component."""
    filter = filter or {}
    tensors: dict[str, Any] = {}
    for key, module in objects.modules.items():
        tensors[key] = _filtered(key, collect.model_state(module), filter)
    for key, optimizer in objects.optimizers.items():
        tensors[key] = _filtered(key, collect.optimizer_state(optimizer, objects.owners), filter)
    meta = {key: _filtered(key, to_saved(value), filter) for key, value in objects.others.items()}
    return save_state(path, tensors, meta, components, topology=topology, step=step, epoch=epoch)


def save_state(
    path: Path_,
    tensors: dict[str, Any],
    meta: Mapping[str, Any],
    components: Sequence[Component],
    *,
    topology: Mapping[str, Any],
    step: int | None = None,
    epoch: int | None = None,
) -> Manifest:
    """Saves a checkpoint folder of state that was collected already."""
    stored = with_own_values(meta, components)
    return write_checkpoint(
        path,
        state=tensors,
        leaves=to_leaves(stored),
        meta=dict(meta),
        components=entries(stored),
        step=step,
        epoch=epoch,
        topology=topology,
    )


def save_file(
    path: Path_,
    objects: Objects,
    components: Sequence[Component],
    *,
    filter: Filter | None = None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Saves one file, in the layout of stock Lightning, with the components under one more key.

    Args:
        path: Where to; a folder there is replaced.
        objects: The user's objects; sharded ones are gathered on rank 0.
        components: What else makes the run the same.
        filter: As in ``fabric.save``.
        write: Writes the content on rank 0, instead of us: a ``CheckpointIO`` of the user's.
    """
    filter = filter or {}
    content: dict[str, Any] = {}
    for key, module in objects.modules.items():
        content[key] = _filtered(key, collect.full_model_state(module), filter)
    for key, optimizer in objects.optimizers.items():
        content[key] = _filtered(key, collect.full_optimizer_state(optimizer, objects.owners), filter)
    meta = {key: _filtered(key, to_saved(value), filter) for key, value in objects.others.items()}
    content |= meta
    content[FILE_KEY] = to_file(with_own_values(meta, components))
    write_file(path, content, write=write)


def write_file(path: Path_, content: dict[str, Any], *, write: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Writes rank 0's ``content`` as one file; every rank learns of an error."""
    path = _distributed.broadcast_object(os.fspath(path))
    if write is None:
        _distributed.on_rank_zero(f"saving {path}", lambda: commit_file(path, lambda file: torch_save(content, file)))
    else:
        _distributed.on_rank_zero(f"saving {path}", lambda: write(content))


_USER = "user."


def with_own_values(meta: Mapping[str, Any], components: Iterable[Component]) -> list[Component]:
    """``components``, and those values of ``meta`` that differ between ranks: ``meta`` itself is stored as rank 0's."""
    settled = settle([*components, *_user_components(meta)])
    return [c for c in settled if c.sharing is Sharing.PER_RANK or not c.name.startswith(_USER)]


def take_own_values(meta: dict[str, Any], components: SavedComponents) -> None:
    """Replaces rank 0's values in ``meta`` by this rank's, where each rank had its own."""
    for key in meta:
        meta[key] = own_value(components, f"{_USER}{key}", meta[key])


def _user_components(meta: Mapping[str, Any]) -> list[Component]:
    return [
        Component(name=f"{_USER}{key}", value=value, sharing=Sharing.REPLICATED, required=False)
        for key, value in meta.items()
    ]


def _filtered(key: str, state: Any, filter: Filter) -> Any:
    return collect.restrict(state, filter[key]) if key in filter and isinstance(state, Mapping) else state


def to_saved(value: Any) -> Any:
    """What is saved of a user's object that is no module or optimizer."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return dict(value.bit_generator.state)
    return value.state_dict() if is_stateful(value) else value


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _put_back(state: MutableMapping[str, Any], key: str, saved: Any) -> None:
    current = state[key]
    if isinstance(current, torch.Generator):
        current.set_state(saved)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = saved
    elif is_stateful(current):
        current.load_state_dict(saved)
    else:
        state[key] = saved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a load leaves for its caller: content that was not asked for, and the components."""

    remainder: dict[str, Any]
    components: SavedComponents | None
    """``None`` for a checkpoint that lightning-resume did not write."""


def locate(path: Path_) -> tuple[str, Kind]:
    """Rank 0's path and what lies there; a run folder stands for its newest complete checkpoint.

    Raises:
        CheckpointNotFoundError: There is nothing that could be loaded.
    """

    def look() -> tuple[str, Kind]:
        kind = classify(path)
        if kind is Kind.RUN_FOLDER:
            found = newest(path)
            if found is not None:
                return str(found), Kind.RESUMABLE
        if kind in (Kind.MISSING, Kind.NOT_A_CHECKPOINT):
            raise CheckpointNotFoundError(
                f"{os.fspath(path)!r} is no checkpoint: found {kind.value}. Pass the folder or file that was saved."
            )
        return os.fspath(path), kind

    return _distributed.on_rank_zero(f"looking at {os.fspath(path)!r}", look)


def load_folder(
    path: Path_,
    state: MutableMapping[str, Any],
    objects: Objects,
    *,
    strict: bool,
    trust: bool,
    check: Callable[[SavedComponents | None], None] = lambda components: None,
    content_if_empty: bool = True,
) -> Loaded:
    """Loads a checkpoint folder into ``objects``; ``state`` is the user's dict, whose plain values are replaced.

    Everything is checked before anything is changed; ``check`` may refuse the components.
    """
    reader = CheckpointReader(path, trust=trust)
    meta = reader.meta(weights_only=not trust)
    components = LeafComponents(reader, trust=trust) if reader.manifest is not None else None
    if not state and content_if_empty:
        return Loaded(remainder={**reader.read(), **meta}, components=components)

    def examine() -> dict[str, list[list[Any]]]:
        saved_keys = {keypath[0] for keypath in reader.mappings.values()} | set(meta)
        _check_keys(state, saved_keys, strict=strict)
        for key, module in objects.modules.items():
            if key in saved_keys:
                _check_model(reader, key, module, strict=strict)
        groups = {key: _saved_groups(reader, key) for key in objects.optimizers if key in saved_keys}
        for key, saved in groups.items():
            collect.check_optimizer(key, objects.optimizers[key], saved, objects.owners)
        check(components)
        return groups

    groups = _distributed.agree(f"checking {os.fspath(path)!r} against the state given", examine)
    for key, module in objects.modules.items():
        _load_model(reader, key, module, strict=strict)
    for key in groups:
        _load_optimizer(reader, key, objects.optimizers[key], objects.owners)
    _load_others(state, objects, meta, components)
    return Loaded(remainder=meta, components=components)


def load_single_file(
    path: Path_,
    state: MutableMapping[str, Any],
    objects: Objects,
    *,
    strict: bool,
    trust: bool,
    check: Callable[[SavedComponents | None], None] = lambda components: None,
    content_if_empty: bool = True,
) -> Loaded:
    """Loads one file, ours or stock Lightning's, into ``objects``. Each rank reads it for itself."""
    content = dict(read_file(path, trust=trust))
    saved = content.pop(FILE_KEY, None)
    components = None if saved is None else FileComponents(saved)
    if not state and content_if_empty:
        return Loaded(remainder=content, components=components)

    def examine() -> None:
        _check_keys(state, content, strict=strict)
        for key, module in objects.modules.items():
            if key in content:
                _check_names(key, collect.model_state(module), content[key], strict=strict)
        check(components)

    _distributed.agree(f"checking {os.fspath(path)!r} against the state given", examine)
    for key, module in objects.modules.items():
        if key in content:
            collect.load_full_model_state(module, content.pop(key), strict=strict)
    for key, optimizer in objects.optimizers.items():
        if key in content:
            collect.load_full_optimizer_state(optimizer, content.pop(key), objects.owners)
    _load_others(state, objects, content, components)
    return Loaded(remainder=content, components=components)


def load_raw(
    path: Path_, kind: Kind, obj: Module | Optimizer, *, more_modules: Iterable[Module], strict: bool, trust: bool
) -> None:
    """Loads one module or optimizer: from a file that holds just its state dict, or out of a checkpoint."""
    if kind is Kind.SINGLE_FILE:
        content = read_file(path, trust=trust)
        if isinstance(obj, Module):
            _check_names("", collect.model_state(obj), content, strict=strict)
            collect.load_full_model_state(obj, content, strict=strict)
        else:
            collect.load_full_optimizer_state(obj, content, Objects.of({"": obj}, more_modules=more_modules).owners)
        return
    reader = CheckpointReader(path, trust=trust)
    tops = list(dict.fromkeys(str(keypath[0]) for keypath in reader.mappings.values()))
    optimizers = {str(keypath[0]) for keypath in reader.mappings.values() if "param_groups" in keypath[1:2]}
    fitting = [top for top in tops if (top in optimizers) == isinstance(obj, Optimizer)]
    if len(fitting) != 1:
        raise CheckpointMismatchError(
            "object",
            "key",
            saved=fitting or tops,
            current=type(obj).__name__,
            advice="`load_raw` needs a checkpoint with one such object. Use `fabric.load(path, {key: object})`.",
        )
    state: dict[str, Any] = {fitting[0]: obj}
    load_folder(path, state, Objects.of(state, more_modules=more_modules), strict=strict, trust=trust)


def read_file(path: Path_, *, trust: bool) -> Any:
    """The content of a single-file checkpoint, on the CPU."""
    with open(local_path(path), "rb") as file:
        return safe_load(file, name=os.fspath(path), trust=trust)


def warn_foreign(path: Path_) -> None:
    """Says what a checkpoint that lightning-resume did not write cannot bring back."""
    if _distributed.rank() == 0:
        warnings.warn(
            f"{os.fspath(path)!r} was not saved by lightning-resume. It has no position in the data and no random"
            " number generators: weights, optimizers and loops are restored, but samples of the epoch may repeat or"
            " be missed, and the run is not the same run.",
            stacklevel=2,
        )


def _check_keys(state: Mapping[str, Any], saved: Iterable[str], *, strict: bool) -> None:
    missing = sorted(set(state) - set(saved))
    if strict and missing:
        raise CheckpointMismatchError(
            "state",
            "keys",
            saved=sorted(saved),
            current=f"{sorted(state)}; not in the checkpoint: {missing}",
            advice="Ask only for keys that were saved, or pass `strict=False` to leave the others as they are.",
        )


def _check_model(reader: CheckpointReader, key: str, module: Module, *, strict: bool) -> None:
    saved = {
        path[1]: reader.keys[flat] for flat, path in reader.mappings.items() if path[0] == key and len(path) > 1
    }
    _check_names(key, collect.model_state(module), saved, strict=strict)


def _check_names(key: str, current: Mapping[str, Any], saved: Mapping[Any, Any], *, strict: bool) -> None:
    names = {collect.clean_name(name): value for name, value in saved.items()}
    missing, unexpected = sorted(set(current) - set(names)), sorted(set(names) - set(current))
    if strict and (missing or unexpected):
        raise CheckpointMismatchError(
            f"model {key!r}",
            "parameter names",
            saved=f"{len(names)} names, of which the model does not have: {unexpected or 'none'}",
            current=f"{len(current)} names, of which the checkpoint does not have: {missing or 'none'}",
            advice="Build the model as it was when it was saved, or pass `strict=False` to load what fits.",
        )
    for name, value in current.items():
        shape, found = _shape(value), _shape(names.get(name))
        if shape is not None and found is not None and shape != found:
            raise CheckpointMismatchError(
                f"model {key!r}",
                f"the shape of {name!r}",
                saved=found,
                current=shape,
                advice="Build the model with the sizes that it was saved with.",
            )


def _shape(value: Any) -> tuple[int, ...] | None:
    size = getattr(value, "shape", None)
    return None if size is None else tuple(size)


def _load_model(reader: CheckpointReader, key: str, module: Module, *, strict: bool) -> None:
    saved = {path[1] for path in reader.mappings.values() if path[0] == key and len(path) > 1}
    target = {name: value for name, value in collect.model_state(module).items() if name in saved}
    if not target:
        return
    state = {key: target}
    reader.load_into(state)
    collect.load_model_state(module, state[key], strict=strict)


def _saved_groups(reader: CheckpointReader, key: str) -> list[list[Any]]:
    """The parameters of each saved group. Stored apart from the tensors, so this reads a few bytes."""
    groups = _optimizer_skeleton(reader, key, {}, only="param_groups")
    reader.load_into(groups)
    return [list(group["params"]) for group in groups[key]["param_groups"]]


def _load_optimizer(reader: CheckpointReader, key: str, optimizer: Optimizer, owners: collect.Owners) -> None:
    modules = owners.of(optimizer)
    one = len(modules) == 1
    shapes = {
        name if one else f"{owner}.{name}": value
        for owner, module in modules.items()
        for name, value in collect.model_state(module).items()
    }
    state = _optimizer_skeleton(reader, key, shapes)
    reader.load_into(state)
    collect.load_optimizer_state(optimizer, {"state": {}, "param_groups": [], **state[key]}, owners)


def _optimizer_skeleton(
    reader: CheckpointReader, key: str, model: Mapping[str, Any], only: str | None = None
) -> dict[str, Any]:
    """The nested state of one optimizer as it was saved, to be filled: empty tensors laid out as the parameters."""
    flat: dict[str, Any] = {}
    for name, path in reader.mappings.items():
        if path[0] == key and (only is None or path[1] == only):
            info = reader.keys[name]
            flat[name] = None if info is None else collect.like(model, str(path[2]), info.shape, info.dtype)
    return unflatten_state_dict(flat, {name: reader.mappings[name] for name in flat})


def _load_others(
    state: MutableMapping[str, Any], objects: Objects, saved: dict[str, Any], components: SavedComponents | None
) -> None:
    """Puts back what is no module or optimizer; takes it out of ``saved``."""
    for key in objects.others:
        if key not in saved:
            continue
        value = saved.pop(key)
        _put_back(state, key, own_value(components, f"{_USER}{key}", value))


def own_value(components: SavedComponents | None, name: str, shared: Any) -> Any:
    """This rank's value of a user's component; rank 0's where this rank had none."""
    ranks = None if components is None else components.ranks(name)
    if components is None or ranks is None:
        return shared
    rank = _distributed.rank()
    if ranks != _distributed.world_size() and rank == 0:
        warnings.warn(
            f"{name.removeprefix(_USER)!r} differed between the {ranks} ranks that saved it; on"
            f" {_distributed.world_size()} ranks those without a value of their own get rank 0's.",
            stacklevel=2,
        )
    return components.value(name, rank if rank < ranks else 0)


def topology_of(strategy: Any) -> Topology:
    """The topology of a Lightning strategy's run."""
    mesh = getattr(strategy, "_device_mesh", None)
    return Topology.of(mesh=mesh, data_parallel=getattr(strategy, "distributed_sampler_kwargs", None))


def model_key(path: Path_) -> str:
    """Under which key a Trainer's checkpoint folder holds the model: stock Lightning uses two."""
    tops = {keypath[0] for keypath in CheckpointReader(path).mappings.values()}
    return "model" if "model" in tops and "state_dict" not in tops else "state_dict"


def read_trainer_folder(path: Path_, *, optimizers: bool, trust: bool) -> Loaded:
    """The checkpoint dict of a Trainer from a folder, with whole tensors and optimizer states by parameter name."""
    reader = CheckpointReader(path, trust=trust)
    names = sorted({str(keypath[0]) for keypath in reader.mappings.values()})
    wanted = [name for name in names if optimizers or not name.startswith("optimizer_")]
    state = reader.read(wanted)
    content: dict[str, Any] = dict(reader.meta(weights_only=not trust))
    content["state_dict"] = state.get("state_dict", state.get("model", {}))
    if optimizers:
        found = sorted(int(name.removeprefix("optimizer_")) for name in names if name.startswith("optimizer_"))
        content["optimizer_states"] = [{"state": {}, "param_groups": [], **state[f"optimizer_{i}"]} for i in found]
    components = LeafComponents(reader, trust=trust) if reader.manifest is not None else None
    return Loaded(remainder=content, components=components)


def missing_loader(index: int) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        "loader",
        "number of train dataloaders",
        saved=index,
        current=f"more than {index}",
        advice="Return the same train dataloaders as in the run that saved the checkpoint.",
    )
