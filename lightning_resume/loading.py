"""Loads a checkpoint folder or a single file into the objects of a run. Every function is a collective."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_resume import _distributed
from lightning_resume.checkpoint._dcp import ObjectPath, unflatten_state_dict
from lightning_resume.checkpoint.components import FILE_KEY, FileComponents, LeafComponents, SavedComponents
from lightning_resume.checkpoint.exact import Lost, checked, put_back_lost, within
from lightning_resume.checkpoint.layout import Kind, resolve
from lightning_resume.checkpoint.paths import PathLike, as_path, read_bytes
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
)
from lightning_resume.state import collect
from lightning_resume.state.component import BUFFERS, LOST, USER
from lightning_resume.state.objects import Objects, put_back

S = TypeVar("S")
T = TypeVar("T")

_NOTHING: Mapping[str, Any] = {}

Check = Callable[[SavedComponents | None], None]


def accept_all(_components: SavedComponents | None) -> None:
    """The check that refuses nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a load leaves for its caller: content that was not asked for, and the components."""

    remainder: dict[str, Any]
    components: SavedComponents | None
    """``None`` for a checkpoint that lightning-resume did not write."""


class Verify(str, enum.Enum):
    """When what is stored is compared with its hashes."""

    READ = "read"
    """As it is read; a load that fails may leave the objects given filled in part."""
    FIRST = "first"
    """All of it before anything is changed, which reads it twice."""


def open_folder(path: PathLike, *, trust: bool, verify: Verify) -> tuple[CheckpointReader, LeafComponents | None]:
    """Opens a checkpoint folder, and reads what this rank needs of the components. A collective."""

    def open_it() -> tuple[CheckpointReader, LeafComponents | None]:
        reader = CheckpointReader(path, trust=trust)
        components = None if reader.manifest is None else LeafComponents(reader, trust=trust)
        if components is not None:
            components.fetch(_distributed.rank())
        return reader, components

    reader, components = _distributed.agree(f"opening {str(path)!r}", open_it)
    if verify is Verify.FIRST:
        files = sorted(reader.file_bytes, key=reader.file_bytes.__getitem__)
        mine = files[_distributed.rank() :: _distributed.world_size()]
        _distributed.agree(f"verifying {str(path)!r}", lambda: reader.verify(mine))
    return reader, components


@contextlib.contextmanager
def filling(path: PathLike) -> Iterator[None]:
    """Around what changes the objects given: says so, where it fails for what is stored."""
    try:
        yield
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{error} The objects that {str(path)!r} was loaded into are now filled in part: load another checkpoint"
            " into them before they are used."
        ) from error


@collect.quiet()
def load_folder(
    path: PathLike,
    state: MutableMapping[str, Any],
    objects: Objects,
    *,
    strict: bool,
    trust: bool,
    verify: Verify = Verify.READ,
    check: Check = accept_all,
    content_if_empty: bool = True,
) -> Loaded:
    """Loads a checkpoint folder into ``objects``; ``state`` is the user's dict, whose plain values are replaced.

    Everything is checked before anything is changed; ``check`` may refuse the components.
    """
    reader, components = open_folder(path, trust=trust, verify=verify)
    meta = _distributed.agree(f"reading {str(path)!r}", lambda: dict(reader.meta(weights_only=not trust)))
    if not state and content_if_empty:
        content = _distributed.agree(f"reading {str(path)!r}", reader.read)
        put_back_lost(content, lost_of(components))
        return Loaded(remainder={**content, **meta}, components=components)

    lost = lost_of(components)

    def examine() -> dict[str, list[list[Any]]]:
        saved_keys = {str(keypath[0]) for keypath in reader.mappings.values()} | set(meta)
        _check_keys(state, saved_keys, strict=strict)
        for key, module in objects.modules.items():
            if key in saved_keys:
                _check_model(reader, key, module, lost, strict=strict)
        groups = {key: _saved_groups(reader, key) for key in objects.optimizers if key in saved_keys}
        for key, saved in groups.items():
            collect.check_optimizer(key, objects.optimizers[key], saved, objects.owners)
        return groups

    groups = _distributed.agree(f"checking {str(path)!r} against the state given", examine)
    _distributed.agree(f"checking {str(path)!r} against the loaders", lambda: check(components))
    with filling(path):
        for key, module in objects.modules.items():
            _load_model(reader, key, module, lost, strict=strict)
        load_own_buffers(objects.modules, components)
        for key in groups:
            _load_optimizer(reader, key, objects.optimizers[key], objects.owners, lost)
    _distributed.agree("restoring objects", lambda: _load_others(state, objects, meta, components))
    return Loaded(remainder=meta, components=components)


@collect.quiet()
def load_single_file(
    path: PathLike,
    state: MutableMapping[str, Any],
    objects: Objects,
    *,
    strict: bool,
    trust: bool,
    check: Check = accept_all,
    content_if_empty: bool = True,
) -> Loaded:
    """Loads one file, ours or stock Lightning's, into ``objects``. Each rank reads it for itself."""
    content = _distributed.agree(f"reading {str(path)!r}", lambda: dict(read_file(path, trust=trust)))
    saved = content.pop(FILE_KEY, None)
    components = None if saved is None else FileComponents(saved)
    if not state and content_if_empty:
        return Loaded(remainder=content, components=components)

    def examine() -> None:
        _check_keys(state, content, strict=strict)
        for key, module in objects.modules.items():
            if key in content:
                check_model(key, module, content[key], strict=strict)
        for key, optimizer in objects.optimizers.items():
            if key in content:
                groups = [list(group["params"]) for group in content[key]["param_groups"]]
                collect.check_optimizer(key, optimizer, groups, objects.owners)

    _distributed.agree(f"checking {str(path)!r} against the state given", examine)
    _distributed.agree(f"checking {str(path)!r} against the loaders", lambda: check(components))
    models = {key: content.pop(key) for key in objects.modules if key in content}
    for key, model in models.items():
        collect.load_full_model_state(objects.modules[key], model, strict=strict)
    load_own_buffers(objects.modules, components)
    for key, optimizer in objects.optimizers.items():
        if key in content:
            dtypes = objects.owners.dtypes(optimizer, models)
            collect.load_full_optimizer_state(optimizer, content.pop(key), objects.owners, dtypes=dtypes)
    _distributed.agree("restoring objects", lambda: _load_others(state, objects, content, components))
    return Loaded(remainder=content, components=components)


@collect.quiet()
def load_raw(
    path: PathLike, kind: Kind, obj: Module | Optimizer, *, more_modules: Iterable[Module], strict: bool, trust: bool
) -> None:
    """Loads one module or optimizer: from a file that holds just its state dict, or out of a checkpoint."""
    if kind is Kind.SINGLE_FILE:
        content = _distributed.agree(f"reading {str(path)!r}", lambda: read_file(path, trust=trust))
        if FILE_KEY not in content:
            _load_state_dict(obj, content, Objects.of({"": obj}, more_modules=more_modules).owners, strict=strict)
            return
        entries = {key: set(value) for key, value in content.items() if isinstance(value, Mapping) and key != FILE_KEY}
    else:
        reader = _distributed.agree(f"opening {str(path)!r}", lambda: CheckpointReader(path, trust=trust))
        keypaths = reader.mappings.values()
        entries = {str(top): {p[1] for p in keypaths if p[0] == top and len(p) > 1} for top in {p[0] for p in keypaths}}
    state: dict[str, Any] = {_only_one_like(obj, entries): obj}
    load = load_single_file if kind is Kind.SINGLE_FILE else load_folder
    load(path, state, Objects.of(state, more_modules=more_modules), strict=strict, trust=trust)


def _load_state_dict(obj: Module | Optimizer, content: Any, owners: collect.Owners, *, strict: bool) -> None:
    if isinstance(obj, Module):
        _check_names("", collect.model_state(obj), content, strict=strict)
        collect.load_full_model_state(obj, content, strict=strict)
    else:
        collect.load_full_optimizer_state(obj, content, owners)


def _only_one_like(obj: Module | Optimizer, entries: Mapping[str, set[Any]]) -> str:
    """The key of the one entry of a checkpoint that can be ``obj``'s; ``entries`` holds the names in each."""
    if isinstance(obj, Optimizer):
        fitting = [key for key, names in entries.items() if "param_groups" in names]
    else:
        current = set(collect.model_state(obj))
        fitting = [key for key, names in entries.items() if current & {collect.clean_name(str(n)) for n in names}]
    if len(fitting) != 1:
        raise _not_one_object(obj, sorted(fitting or entries))
    return fitting[0]


def _not_one_object(obj: object, found: list[str]) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        "object",
        "key",
        saved=found,
        current=type(obj).__name__,
        advice="`load_raw` needs a checkpoint with one such object. Use `fabric.load(path, {key: object})`.",
    )


def read_file(path: PathLike, *, trust: bool) -> Any:
    """The content of a single-file checkpoint, on the CPU."""
    return safe_load(read_bytes(resolve(as_path(path))), name=str(path), trust=trust)


def warn_foreign(path: PathLike) -> None:
    """Says what a checkpoint that lightning-resume did not write cannot bring back."""
    if _distributed.rank() == 0:
        warnings.warn(
            f"{str(path)!r} was not saved by lightning-resume. It has no position in the data and no random"
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


def _check_model(reader: CheckpointReader, key: str, module: Module, lost: Lost, *, strict: bool) -> None:
    saved: dict[Any, Any] = {
        path[1]: reader.keys[flat] if len(path) == 2 else None
        for flat, path in reader.mappings.items()
        if path[0] == key and len(path) > 1
    }
    saved |= {path[0]: None for path, _ in lost.get(key, ())}
    _check_names(key, collect.model_state(module), saved, strict=strict)


def check_model(key: str, module: Module, saved: Mapping[Any, Any], *, strict: bool) -> None:
    """Raises :class:`CheckpointMismatchError` when ``saved`` is the state of another model; changes nothing."""
    if collect.renames_what_it_loads(module):
        return  # only loading shows whether it fits
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
                f"shape of {name!r}",
                saved=found,
                current=shape,
                advice="Build the model with the sizes that it was saved with.",
            )


def _shape(value: Any) -> tuple[int, ...] | None:
    size = getattr(value, "shape", None)
    return None if size is None else tuple(size)


def _load_model(reader: CheckpointReader, key: str, module: Module, lost: Lost, *, strict: bool) -> None:
    current = collect.model_state(module)
    saved = {path[1] for path in reader.mappings.values() if path[0] == key and len(path) > 1}
    # into what a module's `get_extra_state` has now, only what it has now would be loaded
    extra = {name for name, value in current.items() if not isinstance(value, torch.Tensor)}
    state = _skeleton(reader, lambda path: path[0] == key and len(path) > 1 and path[1] in extra, lost)
    target = state.setdefault(key, {})
    target |= {name: value for name, value in current.items() if name in saved - extra}
    if target:
        reader.load_into(state, together=True)
    put_back_lost(state, {key: [(path, value) for path, value in lost.get(key, ()) if path[0] in current]})
    if target:
        collect.load_model_state(module, target, strict=strict)


def _saved_groups(reader: CheckpointReader, key: str) -> list[list[Any]]:
    """The parameters of each saved group. Stored apart from the tensors, so this reads a few bytes."""
    groups = _skeleton(reader, lambda path: path[:2] == (key, "param_groups"), {})
    reader.load_into(groups)
    return [list(group["params"]) for group in groups[key]["param_groups"]]


def _load_optimizer(
    reader: CheckpointReader, key: str, optimizer: Optimizer, owners: collect.Owners, lost: Lost
) -> None:
    modules = owners.of(optimizer)
    one = len(modules) == 1
    shapes = {
        name if one else f"{owner}.{name}": value
        for owner, module in modules.items()
        for name, value in collect.model_state(module).items()
    }
    state = _skeleton(reader, lambda path: path[0] == key, lost, shapes)
    reader.load_into(state, together=True)
    state[key] = {"state": {}, "param_groups": [], **state.get(key, {})}
    put_back_lost(state, {key: lost.get(key, [])})
    saved: dict[str, dict[str, Any]] = {owner: {} for owner in modules}
    for flat, path in reader.mappings.items():
        if path[0] in modules and len(path) == 2:
            saved[str(path[0])][str(path[1])] = reader.keys[flat]
    collect.load_optimizer_state(optimizer, state[key], owners, dtypes=owners.dtypes(optimizer, saved))


def _skeleton(
    reader: CheckpointReader, chosen: Callable[[ObjectPath], bool], lost: Lost, model: Mapping[str, Any] = _NOTHING
) -> dict[str, Any]:
    """What was saved at the ``chosen`` paths, to be filled; state of a parameter in tensors laid out as it is.

    Without what lies in ``lost``, which is complete.
    """
    flat: dict[str, Any] = {}
    is_in = within(lost)
    for name, path in reader.mappings.items():
        if chosen(path) and not is_in(path):
            info, parameter = reader.keys[name], str(path[2]) if len(path) > 2 else ""
            flat[name] = None if info is None else collect.like(model, parameter, info.shape, info.dtype)
    return unflatten_state_dict(flat, {name: reader.mappings[name] for name in flat})


def lost_of(components: SavedComponents | None) -> Lost:
    """What flat keys do not hold of this rank's state."""
    ranks = None if components is None else components.ranks(LOST)
    if components is None or ranks is None:
        return {}
    rank = _distributed.rank()
    return checked(components.value(LOST, rank if rank < ranks else 0))


def _load_others(
    state: MutableMapping[str, Any], objects: Objects, saved: dict[str, Any], components: SavedComponents | None
) -> None:
    """Puts back what is no module or optimizer; takes it out of ``saved``."""
    for key in objects.others:
        if key not in saved:
            continue
        value = saved.pop(key)
        put_back(state, key, own_value(components, f"{USER}{key}", value))


def own_buffers(components: SavedComponents | None, key: str) -> dict[str, Any]:
    """This rank's own buffers of the module saved as ``key``; none where all ranks had the same, or it had none."""
    ranks = None if components is None else components.ranks(f"{BUFFERS}{key}")
    if components is None or ranks is None or _distributed.rank() >= ranks:
        return {}
    return dict(components.value(f"{BUFFERS}{key}", _distributed.rank()))


def load_own_buffers(modules: Mapping[str, Module], components: SavedComponents | None) -> None:
    for key, module in modules.items():
        collect.load_buffers(module, own_buffers(components, key))


def take_own_values(meta: dict[str, Any], components: SavedComponents) -> None:
    """Replaces rank 0's values in ``meta`` by this rank's, where each rank had its own."""
    for key in meta:
        meta[key] = own_value(components, f"{USER}{key}", meta[key])


def own_value(components: SavedComponents | None, name: str, shared: Any) -> Any:
    """This rank's value of a user's component; rank 0's where this rank had none."""
    ranks = None if components is None else components.ranks(name)
    if components is None or ranks is None:
        return shared
    rank = _distributed.rank()
    if ranks != _distributed.world_size() and rank == 0:
        warnings.warn(
            f"{name.removeprefix(USER)!r} differed between the {ranks} ranks that saved it; on"
            f" {_distributed.world_size()} ranks those without a value of their own get rank 0's.",
            stacklevel=2,
        )
    return components.value(name, rank if rank < ranks else 0)


def model_key(path: PathLike) -> str:
    """Under which key a Trainer's checkpoint folder holds the model: stock Lightning uses two."""
    mappings = _distributed.agree(f"opening {str(path)!r}", lambda: CheckpointReader(path).mappings)
    tops = {keypath[0] for keypath in mappings.values()}
    return "model" if "model" in tops and "state_dict" not in tops else "state_dict"


def read_trainer_folder(path: PathLike, *, optimizers: bool, trust: bool, verify: Verify) -> Loaded:
    """The checkpoint dict of a Trainer from a folder, with whole tensors and optimizer states by parameter name."""
    reader, components = open_folder(path, trust=trust, verify=verify)
    names = sorted({str(keypath[0]) for keypath in reader.mappings.values()})
    wanted = [name for name in names if optimizers or not name.startswith("optimizer_")]

    def read() -> dict[str, Any]:
        state = reader.read(wanted)
        put_back_lost(state, lost_of(components))
        content: dict[str, Any] = dict(reader.meta(weights_only=not trust))
        content["state_dict"] = state.get("state_dict", state.get("model", {}))
        if optimizers:
            found = sorted(int(name.removeprefix("optimizer_")) for name in names if name.startswith("optimizer_"))
            content["optimizer_states"] = [{"state": {}, "param_groups": [], **state[f"optimizer_{i}"]} for i in found]
        return content

    return Loaded(remainder=_distributed.agree(f"reading {str(path)!r}", read), components=components)


def missing_loader(index: int) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        "loader",
        "number of train dataloaders",
        saved=index,
        current=f"more than {index}",
        advice="Return the same train dataloaders as in the run that saved the checkpoint.",
    )
