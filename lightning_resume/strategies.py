"""Fabric strategies whose checkpoints bring the whole run back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap
from torch.nn import Module
from torch.optim import Optimizer

from lightning_resume import candidates, loading, saving
from lightning_resume._distributed import agree
from lightning_resume._lightning import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    user_checkpoint_io,
)
from lightning_resume.checkpoint.background import AsyncSave, Background
from lightning_resume.checkpoint.components import SavedComponents
from lightning_resume.checkpoint.layout import Kind
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.checkpoint.validation import Validate
from lightning_resume.data.position import Resumable
from lightning_resume.data.resumable import make_resumable
from lightning_resume.run import Tracker, describe
from lightning_resume.saving import CheckpointOptions
from lightning_resume.state.component import Component, Sharing
from lightning_resume.state.objects import Objects

_Path = str | os.PathLike[str]
_PRECISION = "precision"


class ResumeMixin:
    """Makes a Fabric strategy save and load the whole run; put it before the strategy's class.

    ``fabric.save`` also saves the position of every loader that ``fabric.setup_dataloaders`` returned and the random
    number generators of every rank, whether or not the loaders are in ``state``. ``fabric.load`` restores them when
    ``state`` holds an optimizer or a loader, so that the next ``for batch in loader`` goes on where the run was; with
    a model alone it loads just that.

    A batch is consumed when the optimizer has stepped on it. A checkpoint taken inside a gradient accumulation window
    goes back to the last step, with a warning.

    Example::

        class ResumableXYZStrategy(ResumeMixin, XYZStrategy): ...

    Args:
        save_distributed_checkpoint: ``True`` saves a folder to which every rank writes its part, ``False`` one file
            that plain ``torch.load`` reads. ``True`` by default.
        verify: ``"read"`` compares a folder with its hashes as it is read, so that a load that fails may leave objects
            filled in part; ``"first"`` reads and compares all of it before anything is changed.
        validate: Whether the tensors that ranks hold alike (all of DDP's) are compared before a folder is saved:
            ``"quick"`` by one hash of all, ``"full"`` tensor by tensor, ``None`` not at all.
        async_save: ``"thread"`` (or ``True``) or ``"process"``: ``fabric.save`` returns once the state is copied, and
            a thread, or a process for each rank, writes the folder while training goes on. What failed is raised at
            the optimizer's next step, the next save, load or :meth:`wait`. Call :meth:`wait` before the process group
            is destroyed, and before another process reads the checkpoint.
        when_busy: ``"wait"``, or ``"skip"`` with a warning, a save that is asked for while one is being written.
        staging: ``"now"``: all is copied before ``fabric.save`` returns. ``"deferred"``: what only optimizers change is
            copied beside the forward and backward that follow, and the optimizer's step waits for it; for runs that
            change parameters in no other way, which else fails the save.

    Raises:
        ValueError: One of the words is another one, or ``async_save`` is asked for where one file is saved.
    """

    _save_distributed_checkpoint: bool
    saved: Manifest | None = None
    """Of the last folder that was saved."""

    def __init__(
        self,
        *args: Any,
        save_distributed_checkpoint: bool | None = None,
        verify: str = "read",
        validate: str | None = None,
        async_save: Literal["thread", "process"] | bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        staging: Literal["now", "deferred"] = "now",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        how = AsyncSave.of(async_save, when_busy, staging)
        self._options = CheckpointOptions(
            verify=loading.Verify(verify),
            validate=None if validate is None else Validate(validate),
            background=None if how is None else Background(how),
        )
        if save_distributed_checkpoint is not None:
            self._save_distributed_checkpoint = save_distributed_checkpoint
        elif not hasattr(self, "_save_distributed_checkpoint"):  # ModelParallelStrategy takes it itself
            self._save_distributed_checkpoint = True
        if how is not None and not self._save_distributed_checkpoint:
            raise ValueError(
                f"async_save={async_save!r} saves folders only. Leave out save_distributed_checkpoint=False."
            )
        self._tracker = Tracker()

    def process_dataloader(self, dataloader: Any) -> Any:
        loader = super().process_dataloader(dataloader)  # type: ignore[misc]
        share = getattr(self, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        resumable = make_resumable(loader, rank=share["rank"], world_size=share["num_replicas"])
        self._tracker.add_loader(resumable)
        return resumable

    def setup_module_and_optimizers(self, module: Module, optimizers: list[Optimizer], *args: Any) -> Any:
        result = super().setup_module_and_optimizers(module, optimizers, *args)  # type: ignore[misc]
        self._remember(result[0], result[1])
        return result

    def setup_module(self, module: Module) -> Module:
        module = super().setup_module(module)  # type: ignore[misc]
        self._remember(module, [])
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        optimizer = super().setup_optimizer(optimizer)  # type: ignore[misc]
        self._remember(None, [optimizer])
        return optimizer

    def _remember(self, module: Module | None, optimizers: list[Optimizer]) -> None:
        if module is not None:
            self._tracker.add_module(module)
        for optimizer in optimizers:
            if not getattr(optimizer, "_lightning_resume_watched", False):
                optimizer._lightning_resume_watched = True  # type: ignore[attr-defined]
                self._tracker.watch(optimizer)

    def backward(self, tensor: Any, module: Module | None, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, **kwargs)  # type: ignore[misc]
        self._tracker.backward()

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        steps = self._tracker.steps
        output = super().optimizer_step(optimizer, **kwargs)  # type: ignore[misc]
        if self._tracker.steps == steps:  # a step that the precision plugin left out consumed its batches as well
            self._tracker.stepped()
        return output

    def save_checkpoint(
        self,
        path: _Path,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        background = self._options.background
        if background is not None and not background.is_free(str(path)):
            return
        components = [*self._tracker.components(), *self._precision_component()]
        objects = Objects.of(self._with_loader_states(state), more_modules=self._tracker.modules)
        earlier = {key: self._tracker.buffers_to_go_back_to(module) for key, module in objects.modules.items()}
        if self._save_distributed_checkpoint or self._options.as_folder:
            if storage_options is not None:
                raise TypeError(
                    f"`{type(self).__name__}` saves folders without a `CheckpointIO`, so `storage_options` has no"
                    " effect. Leave it out, or save one file with `save_distributed_checkpoint=False`."
                )
            topology = saving.topology_of(self).to_manifest(loaders=describe(self._tracker.loaders))
            about = dataclasses.replace(self._options.about, topology=topology)
            if about.step is None:
                about = dataclasses.replace(about, step=self._tracker.steps)
            how: dict[str, Any] = {"about": about, "validate": self._options.validate, "background": background}
            how["done"] = self._options.done or self._note
            saving.save_folder(path, objects, components, filter=filter, earlier_buffers=earlier, **how)
        else:
            write = self._user_io(path, storage_options)
            saving.save_file(path, objects, components, filter=filter, earlier_buffers=earlier, write=write)

    def _note(self, saved: Manifest) -> None:
        self.saved = saved

    def wait(self) -> None:
        """Waits until what is being saved in the background is durable. Call it on all ranks.

        Raises:
            CheckpointSaveError: It failed, on every rank; older checkpoints are untouched.
        """
        if self._options.background is not None:
            self._options.background.wait()

    def close(self) -> None:
        """Waits as :meth:`wait` does, but is no collective, and ends what saves in the background: a process, a group.

        The end of the interpreter does so too.

        Raises:
            CheckpointSaveError: What was being saved failed.
        """
        if self._options.background is not None:
            self._options.background.close()

    @contextlib.contextmanager
    def using(self, options: CheckpointOptions) -> Iterator[None]:
        """Saves and loads inside as ``options`` say."""
        before, self._options = self._options, options
        try:
            yield
        finally:
            self._options = before

    def _precision_component(self) -> list[Component]:
        """What the precision plugin keeps, such as a gradient scaler's factor; stock Fabric leaves it out."""
        state = self.precision.state_dict()  # type: ignore[attr-defined]
        return [Component(name=_PRECISION, value=state, sharing=Sharing.REPLICATED)] if state else []

    def _with_loader_states(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` with the loaders that we follow replaced by their positions, as stock Lightning would save them."""
        positions = dict(zip(map(id, self._tracker.loaders), self._tracker.loader_states(), strict=True))
        return {key: positions.get(id(value), value) for key, value in state.items()}

    def _user_io(self, path: _Path, storage_options: Any) -> Callable[[dict[str, Any]], None] | None:
        checkpoint_io = user_checkpoint_io(self)
        if checkpoint_io is None and storage_options is None:
            return None
        return lambda content: self.checkpoint_io.save_checkpoint(  # type: ignore[attr-defined]
            content, path, storage_options=storage_options
        )

    def load_checkpoint(
        self,
        path: _Path,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        self.wait()
        found, kind = candidates.locate(path)
        trust = weights_only is False
        return candidates.load_first(found, lambda one: self._load_from(one, kind, state, strict, trust))

    def _load_from(
        self, found: AnyPath, kind: Kind, state: Module | Optimizer | dict[str, Any] | None, strict: bool, trust: bool
    ) -> dict[str, Any]:
        if isinstance(state, (Module, Optimizer)):
            loading.load_raw(found, kind, state, more_modules=self._tracker.modules, strict=strict, trust=trust)
            return {}
        state = {} if state is None else state
        followed = {key for key, value in state.items() if any(value is loader for loader in self._tracker.loaders)}
        asked = {key: value for key, value in state.items() if key not in followed}
        resumes = bool(followed) or any(isinstance(value, (Optimizer, Resumable)) for value in state.values())

        def check(components: SavedComponents | None) -> None:
            if resumes and components is not None:
                self._tracker.check(components, strict=strict)

        objects = Objects.of(asked, more_modules=self._tracker.modules)
        how: dict[str, Any] = {"strict": strict, "trust": trust, "check": check, "content_if_empty": not state}
        if kind is Kind.SINGLE_FILE:
            loaded = loading.load_single_file(found, asked, objects, **how)
        else:
            loaded = loading.load_folder(found, asked, objects, verify=self._options.verify, **how)
        state.update(asked)
        for key in followed:
            loaded.remainder.pop(key, None)
        if resumes and loaded.components is not None:
            if _PRECISION in loaded.components:
                self.precision.load_state_dict(loaded.components.value(_PRECISION, 0))  # type: ignore[attr-defined]
            components = loaded.components
            agree("restoring the loaders", lambda: self._tracker.restore(components, strict=strict))
        elif resumes:
            loading.warn_foreign(found)
        return loaded.remainder


class ResumableSingleDeviceStrategy(ResumeMixin, SingleDeviceStrategy):
    """:class:`~lightning.fabric.strategies.SingleDeviceStrategy` with :class:`ResumeMixin`."""


class ResumableDDPStrategy(ResumeMixin, DDPStrategy):  # type: ignore[misc]  # wider types than setup_module's
    """:class:`~lightning.fabric.strategies.DDPStrategy` with :class:`ResumeMixin`."""


class ResumableModelParallelStrategy(ResumeMixin, ModelParallelStrategy):
    """:class:`~lightning.fabric.strategies.ModelParallelStrategy` (FSDP2, TP) with :class:`ResumeMixin`."""


class ResumableFSDPStrategy(ResumeMixin, FSDPStrategy):
    """:class:`~lightning.fabric.strategies.FSDPStrategy` with :class:`ResumeMixin`; runs on CPU too.

    ``state_dict_type="full"`` saves one file.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        sharded = kwargs.get("state_dict_type", "sharded") == "sharded"
        super().__init__(*args, save_distributed_checkpoint=sharded, **kwargs)

    def setup_module(self, module: Module) -> Module:
        wrapped = any(isinstance(child, FullyShardedDataParallel) for child in module.modules())
        if self.root_device.type == "cpu" and not wrapped:
            # stock Lightning passes the device's index, which a CPU does not have; what is wrapped already it leaves be
            module = FullyShardedDataParallel(module, **self._fsdp_arguments())
            self._fsdp_kwargs.pop("auto_wrap_policy", None)
        return super().setup_module(module)

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        if self.root_device.type == "cpu":
            return enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._fsdp_arguments())
        return super().module_sharded_context()

    def _fsdp_arguments(self) -> dict[str, Any]:
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": self.root_device,
            **self._fsdp_kwargs,
        }
