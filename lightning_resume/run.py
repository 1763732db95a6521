"""What makes a run the same run beside its weights: the position of every loader and the random number generators."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from lightning_resume import _distributed
from lightning_resume.checkpoint.components import SavedComponents
from lightning_resume.data.position import Resumable
from lightning_resume.data.scenarios import merged
from lightning_resume.errors import CheckpointMismatchError
from lightning_resume.state import rng
from lightning_resume.state.buffers import BufferCopies
from lightning_resume.state.component import Component, Sharing
from lightning_resume.state.modules import ModuleTree

RNG = "rng"
_LOADER = "loader."


def rng_component(state: rng.RngState) -> Component:
    return Component(name=RNG, value=state.to_plain(), sharing=Sharing.PER_RANK)


def loader_component(index: int, loader: Resumable, state: dict[str, Any]) -> Component:
    return Component(name=f"{_LOADER}{index}", value=state, sharing=loader.sharing)


def saved_loader(components: SavedComponents, index: int) -> dict[str, Any] | None:
    """The state of the ``index``-th loader for this rank, ``None`` when there were fewer loaders."""
    ranks = components.ranks(f"{_LOADER}{index}")
    if ranks is None:
        return None
    # a position that belongs to each rank also holds the world size, and is refused at another one by the loader
    state = components.value(f"{_LOADER}{index}", min(_distributed.rank(), ranks - 1))
    if "lanes" in state:  # each rank's cursors, which other ranks may go on from
        return dict(merged([components.value(f"{_LOADER}{index}", rank) for rank in range(ranks)]))
    return state  # type: ignore[no-any-return]


def restore_rng(components: SavedComponents) -> None:
    """Sets this rank's generators; a rank that did not exist gets a state derived from rank 0's."""
    ranks = components.ranks(RNG)
    if ranks is None:
        return
    rank = _distributed.rank()
    state = rng.RngState.from_plain(components.value(RNG, rank if rank < ranks else 0))
    rng.restore(state if rank < ranks else rng.derive(state, rank))


class Tracker:
    """Follows the loaders and optimizer steps of a Fabric run."""

    def __init__(self) -> None:
        self._loaders: list[weakref.ref[Resumable]] = []
        self._pending: dict[int, dict[str, Any]] = {}
        self._trees: list[ModuleTree] = []
        self._rng: rng.RngState | None = None
        self._buffers = BufferCopies()
        self._backwards = 0
        self._watched = False
        self.steps = 0

    @property
    def loaders(self) -> list[Resumable]:
        """Those that are still in use, in the order in which they were set up."""
        return [loader for ref in self._loaders if (loader := ref()) is not None]

    def add_module(self, module: Module) -> None:
        if not any(module is known for known in self.modules):
            self._trees.append(ModuleTree(module))

    @property
    def modules(self) -> list[Module]:
        """All that were set up."""
        return [tree.root for tree in self._trees]

    def buffers_to_go_back_to(self, module: Module) -> dict[str, Any]:
        """The buffers as they were before the batches that :meth:`components` leaves out; none where it leaves none."""
        behind = any(self._behind(loader) for loader in self.loaders)
        return self._buffers.of(module) if behind and self._backwards else {}

    def add_loader(self, loader: Resumable) -> None:
        index = len(self.loaders)
        self._loaders = [ref for ref in self._loaders if ref() is not None] + [weakref.ref(loader)]
        if self._watched:
            loader.watch_steps(self._remember)
        if index in self._pending:
            loader.load_state_dict(self._pending.pop(index))

    def watch(self, optimizer: Any) -> None:
        """From now on a batch counts as consumed when an optimizer has stepped on it."""
        self._watched = True
        for loader in self.loaders:
            loader.watch_steps(self._remember)
        # a step through Fabric calls `stepped` too; this also sees steps on the optimizer itself
        optimizer.register_step_post_hook(lambda *_: self.stepped())

    def backward(self) -> None:
        self._backwards += 1

    def stepped(self) -> None:
        self.steps += 1
        self._backwards = 0
        for loader in self.loaders:
            loader.mark_stepped()
        self._rng = None

    def _remember(self) -> None:
        """Keeps what a checkpoint goes back to when it is taken before the next step."""
        if self._rng is None:
            self._rng = rng.capture()
            self._buffers.take(self._trees)

    def loader_states(self) -> list[dict[str, Any]]:
        return [loader.state_dict(self._behind(loader)) for loader in self.loaders]

    def components(self) -> list[Component]:
        """The run as of the last optimizer step: what came after it is done again when the run goes on."""
        states = self.loader_states()
        behind = max((self._behind(loader) for loader in self.loaders), default=0)
        if behind and self._backwards and _distributed.rank() == 0:
            warnings.warn(
                f"This checkpoint is saved inside a gradient accumulation window. Gradients are not saved: it goes"
                f" back to the last optimizer step, and the {behind} batches since then will be seen again."
                " Save right after `optimizer.step()` to avoid the repeated work.",
                stacklevel=2,
            )
        state = self._rng if behind and self._rng is not None else rng.capture()
        loaders = [loader_component(i, *pair) for i, pair in enumerate(zip(self.loaders, states, strict=True))]
        return [rng_component(state), *loaders]

    def _behind(self, loader: Resumable) -> int:
        return loader.unstepped if self._watched else 0

    def check(self, components: SavedComponents, *, strict: bool) -> None:
        """Raises when a loader cannot go on from its saved position; changes nothing."""
        if strict:
            for index, loader in enumerate(self.loaders):
                saved = saved_loader(components, index)
                if saved is not None:
                    loader.check(saved)

    def restore(self, components: SavedComponents, *, strict: bool) -> None:
        """Puts loaders where they were, and those set up later too; the random number generators last."""
        self._pending = {}
        for index in range(loader_count(components)):
            saved = saved_loader(components, index)
            assert saved is not None
            if index < len(self.loaders):
                _load(self.loaders[index], saved, strict=strict)
            else:
                self._pending[index] = saved
        restore_rng(components)
        self._backwards = 0
        self._rng = None


def loader_count(components: SavedComponents) -> int:
    """How many loaders' positions were saved."""
    return sum(name.startswith(_LOADER) for name in components.names())


def _load(loader: Resumable, saved: dict[str, Any], *, strict: bool) -> None:
    try:
        loader.load_state_dict(saved, strict=None if strict else False)
    except CheckpointMismatchError as error:
        if strict:
            raise
        warnings.warn(f"A loader starts from its beginning: {error}", stacklevel=2)


def describe(loaders: Iterable[Resumable]) -> list[dict[str, Any]]:
    """What the manifest says about the loaders."""
    return [
        {
            "kind": loader._kind(),
            "num_workers": getattr(loader, "num_workers", 0),
            "batch_size": getattr(loader, "batch_size", None),
        }
        for loader in loaders
    ]
