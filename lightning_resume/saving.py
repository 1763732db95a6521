"""Saves the objects of a run, as a checkpoint folder or a single file. Every function is a collective."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch.nn import Module
from torch.optim import Optimizer

from lightning_resume import _distributed
from lightning_resume.checkpoint.background import Background
from lightning_resume.checkpoint.commit import commit_file
from lightning_resume.checkpoint.components import FILE_KEY, entries, pack, settle, to_file, to_leaves
from lightning_resume.checkpoint.exact import lost_in
from lightning_resume.checkpoint.filesystem import torch_save
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.paths import PathLike
from lightning_resume.checkpoint.staging import Snapshot
from lightning_resume.checkpoint.validation import Validate, validate_replicas
from lightning_resume.checkpoint.writer import Packed, write_checkpoint
from lightning_resume.errors import CheckpointSaveError, RankLostError, ResumeError, ResumeWarning
from lightning_resume.loading import Verify
from lightning_resume.state import collect
from lightning_resume.state.component import BUFFERS, LOST, USER, Component, Sharing
from lightning_resume.state.objects import Objects, to_saved
from lightning_resume.state.topology import Topology

P = ParamSpec("P")
T = TypeVar("T")

Filter = Mapping[str, Callable[[str, Any], bool]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What the manifest says of a save beside what is in it; ``docs/format.md`` explains every field."""

    topology: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How a strategy saves and loads, beyond what Fabric's signatures can say."""

    verify: Verify = Verify.READ
    validate: Validate | None = None
    as_folder: bool = False
    """Whether to save a folder where the strategy's own option asks for one file."""
    about: About = dataclasses.field(default_factory=About)
    background: Background | None = None
    """What saves folders while training goes on; None: training waits."""
    done: Callable[[Manifest], None] | None = None
    """What follows once a folder is durable."""


class OnSaveError(str, enum.Enum):
    """What becomes of a run when a checkpoint could not be saved."""

    RAISE = "raise"
    """It ends."""
    WARN = "warn"
    """It goes on, with the checkpoints that it has."""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Around a save; every rank raises the same error, so that all go on or none does."""
        try:
            yield
        except CheckpointSaveError as error:
            if self is OnSaveError.RAISE or isinstance(error.__cause__, RankLostError):
                raise
            if _distributed.rank() == 0:
                warnings.warn(f"{error} Training goes on without it.", ResumeWarning, stacklevel=2)


def _explained(save: Callable[Concatenate[PathLike, P], T]) -> Callable[Concatenate[PathLike, P], T]:
    """Makes a failed save of what the user's objects raise, which every rank raises by then."""

    def explained(path: PathLike, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return save(path, *args, **kwargs)
        except ResumeError:
            raise
        except Exception as error:
            raise CheckpointSaveError(
                f"Saving the checkpoint {path} failed ({type(error).__name__}: {error}). A checkpoint that was there"
                " before is untouched."
            ) from error

    return functools.update_wrapper(explained, save)


@_explained
@collect.quiet()
def save_folder(
    path: PathLike,
    objects: Objects,
    components: Sequence[Component],
    *,
    about: About,
    validate: Validate | None = None,
    filter: Filter | None = None,
    earlier_buffers: Mapping[str, Mapping[str, Any]] | None = None,
    background: Background | None = None,
    done: Callable[[Manifest], None] = lambda _: None,
) -> None:
    """Saves a checkpoint folder: tensors as DCP shards, the rest in ``meta.pt`` and one leaf a component."""
    run = _together(objects, collective=collect.is_fsdp1)
    models = run("collecting models", lambda: _models(objects, earlier_buffers))
    states = run("collecting optimizers", lambda: _optimizers(objects))
    tensors, meta = _distributed.agree("collecting the state", lambda: _chosen(objects, models | states, filter))
    buffers = {key: collect.buffers_of(module, tensors[key]) for key, module in objects.modules.items()}
    weights = {key: collect.weights_of(module, tensors[key]) for key, module in objects.modules.items()}
    how: dict[str, Any] = {"about": about, "validate": validate, "background": background, "done": done}
    optimizers = objects.optimizers.values()
    save_state(path, tensors, meta, components, buffers=buffers, weights=weights, optimizers=optimizers, **how)


def _chosen(
    objects: Objects, collected: Mapping[str, Any], filter: Filter | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the user's filter leaves of the state of modules and optimizers, and of the other objects."""
    chosen = {key: _filtered(key, state, filter) for key, state in collected.items()}
    return chosen, {key: _filtered(key, to_saved(value), filter) for key, value in objects.others.items()}


def _models(objects: Objects, earlier: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {key: _with(collect.model_state(module), key, earlier) for key, module in objects.modules.items()}


def _optimizers(objects: Objects) -> dict[str, Any]:
    return {key: collect.optimizer_state(one, objects.owners) for key, one in objects.optimizers.items()}


def _together(objects: Objects, *, collective: Callable[[Module], bool]) -> Callable[[str, Callable[[], T]], T]:
    """How to collect: with the ranks agreeing on errors, but where collecting is a collective already."""
    if any(map(collective, objects.modules.values())) or any(map(collective, objects.owners.modules.values())):
        return lambda _what, act: act()
    return _distributed.agree


@_explained
@collect.quiet()
def save_state(
    path: PathLike,
    tensors: dict[str, Any],
    meta: Mapping[str, Any],
    components: Sequence[Component],
    *,
    buffers: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Iterable[str]],
    about: About,
    validate: Validate | None = None,
    background: Background | None = None,
    optimizers: Iterable[Optimizer] = (),
    done: Callable[[Manifest], None] = lambda _: None,
) -> None:
    """Saves a checkpoint folder of state that was collected already.

    Args:
        path: Where to; a checkpoint there is replaced.
        tensors: The state of models and optimizers; live tensors, or copies.
        meta: The rest of the user's state.
        components: What else makes the run the same.
        buffers: Of ``tensors``, by key and name; they may differ by rank.
        weights: The names in ``tensors`` of what training changes.
        about: What the manifest says.
        validate: How to compare what ranks hold alike.
        background: Saves copies while training goes on, in the same way.
        optimizers: Those that change ``tensors``.
        done: Called once the checkpoint is durable, on the thread that wrote it. May be a collective.
    """
    lost = Component(name=LOST, value=lost_in(tensors), sharing=Sharing.REPLICATED, required=False)
    settled = with_own_values(meta, [*components, lost], buffers)
    stored = [one for one in settled if one.name != LOST or one.value or one.sharing is Sharing.PER_RANK]
    alike = {key: _without(value, buffers.get(key, ())) for key, value in tensors.items()}
    if validate is not None:
        validate_replicas(alike, validate)
    if _distributed.rank() > 0:  # of what all ranks hold, DCP keeps any rank's; of buffers it is to be rank 0's
        tensors = alike
    leaves, described = _distributed.agree("packing what is no tensor", lambda: (to_leaves(stored), entries(stored)))
    write = functools.partial(
        write_checkpoint,
        leaves=leaves,
        components=described,
        step=about.step,
        epoch=about.epoch,
        topology=about.topology,
        metrics=about.metrics,
        metadata=about.metadata,
        weights={f"{key}.{name}" for key, names in weights.items() for name in names},
    )
    if background is None:
        done(write(path, state=tensors, meta=dict(meta)))
        return
    packed = _distributed.agree("packing what is no tensor", lambda: _packed(meta))

    @_explained
    def write_copy(path: PathLike, copied: Snapshot) -> Manifest:
        return write(path, state=copied.state, meta=packed, before_commit=copied.check)

    save_copy = functools.partial(write_copy, path)
    background.save(str(path), tensors, save_copy, done=done, optimizers=list(optimizers))


def _packed(meta: Mapping[str, Any]) -> Packed:
    """A copy of ``meta`` as it is now; rank 0's is what is stored."""
    return Packed(pack(dict(meta)) if _distributed.rank() == 0 else b"")


def _without(state: Any, names: Collection[str]) -> Any:
    return {name: value for name, value in state.items() if name not in names} if names else state


@_explained
def save_file(
    path: PathLike,
    objects: Objects,
    components: Sequence[Component],
    *,
    filter: Filter | None = None,
    earlier_buffers: Mapping[str, Mapping[str, Any]] | None = None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Saves one file, in the layout of stock Lightning, with the components under one more key.

    Args:
        path: Where to; a checkpoint there is replaced.
        objects: The user's objects; sharded ones are gathered on rank 0.
        components: What else makes the run the same.
        filter: As in ``fabric.save``.
        write: Writes the content on rank 0, instead of us: a ``CheckpointIO`` of the user's.
    """
    run = _together(objects, collective=lambda module: collect.is_fsdp1(module) or collect.has_dtensors(module))
    whole = lambda: {  # noqa: E731
        key: _with(collect.full_model_state(module), key, earlier_buffers) for key, module in objects.modules.items()
    }
    states = lambda: {  # noqa: E731
        key: collect.full_optimizer_state(one, objects.owners) for key, one in objects.optimizers.items()
    }
    collected = run("collecting models", whole) | run("collecting optimizers", states)
    parts = run("collecting buffers", lambda: _models(objects, earlier_buffers))
    buffers = {key: collect.buffers_of(module, parts[key]) for key, module in objects.modules.items()}
    content, meta = _distributed.agree("collecting the state", lambda: _chosen(objects, collected, filter))
    content |= meta
    content[FILE_KEY] = to_file(with_own_values(meta, components, buffers))
    write_file(path, content, write=write)


def write_file(
    path: PathLike, content: dict[str, Any], *, write: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Writes rank 0's ``content`` as one file; every rank learns of an error."""
    path = _distributed.broadcast_object(path)

    def save() -> None:
        try:
            if write is None:
                commit_file(path, lambda file: torch_save(content, file))
            else:
                write(content)
        except OSError as error:
            raise CheckpointSaveError(
                f"The checkpoint {path} could not be saved ({type(error).__name__}: {error}); what was there before is"
                " still there. Make room, or choose a folder that can be written to."
            ) from error

    _distributed.on_rank_zero(f"saving {path}", save)


def with_own_values(
    meta: Mapping[str, Any], components: Iterable[Component], buffers: Mapping[str, Mapping[str, Any]]
) -> list[Component]:
    """``components``, and what differs between ranks of ``meta`` and ``buffers``, which are stored as rank 0's."""
    values = {f"{USER}{key}": value for key, value in meta.items()}
    values |= {f"{BUFFERS}{key}": dict(value) for key, value in buffers.items()}
    own = [Component(name=n, value=v, sharing=Sharing.REPLICATED, required=False) for n, v in values.items()]
    settled = settle([*components, *own])
    return [c for c in settled if c.sharing is Sharing.PER_RANK or c.name not in values]


def _with(state: dict[str, Any], key: str, buffers: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """``state`` with what ``buffers`` has of it."""
    return state | {name: value for name, value in (buffers or {}).get(key, {}).items() if name in state}


def _filtered(key: str, state: Any, filter: Filter | None) -> Any:
    filter = filter or {}
    return collect.restrict(state, filter[key]) if key in filter and isinstance(state, Mapping) else state


def topology_of(strategy: Any) -> Topology:
    """The topology of a Lightning strategy's run."""
    mesh = getattr(strategy, "_device_mesh", None)
    return Topology.of(mesh=mesh, data_parallel=getattr(strategy, "distributed_sampler_kwargs", None))
