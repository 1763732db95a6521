"""The forms in which a Trainer's checkpoints are saved and loaded, under any of its stock strategies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_resume import _distributed, loading, saving
from lightning_resume._lightning import Loops, is_fitting, is_sharded
from lightning_resume.checkpoint.background import Background
from lightning_resume.checkpoint.commit import delete_checkpoint
from lightning_resume.checkpoint.components import FILE_KEY, FileComponents, to_file
from lightning_resume.checkpoint.layout import Kind
from lightning_resume.checkpoint.manifest import Manifest
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.checkpoint.validation import Validate
from lightning_resume.state import collect
from lightning_resume.state.component import Component
from lightning_resume.state.objects import Objects


class TrainerCheckpoints:
    """Saves and loads in place of a strategy: one file under single device and DDP, a folder under the sharded ones,
    and a folder under all of them inside :meth:`as_folder`. Loads either, whoever wrote it.
    """

    def __init__(self, trainer: Any, loops: Loops, *, verify: loading.Verify, validate: Validate | None) -> None:
        self.trainer, self._loops = trainer, loops
        self.verify, self.validate = verify, validate
        strategy = trainer.strategy
        self._stock_save, self._stock_load = strategy.save_checkpoint, strategy.load_checkpoint
        self._stock_load_optimizers = strategy.load_optimizer_state_dict
        self._folder_form = False
        self._background: Background | None = None
        self._done: Callable[[Manifest], None] = lambda _: None
        strategy.remove_checkpoint = self._remove
        if is_sharded(strategy):
            strategy.optimizer_state = self._optimizer_state
        else:
            self._stock_load_model = strategy.load_model_state_dict
            strategy.load_model_state_dict = self._load_model
            strategy.load_optimizer_state_dict = self._load_optimizers

    @contextlib.contextmanager
    def as_folder(self, *, background: Background | None, done: Callable[[Manifest], None]) -> Iterator[None]:
        """Inside, ``trainer.save_checkpoint`` saves a folder whatever the strategy, and shards, not whole tensors.

        Args:
            background: Saves it while training goes on.
            done: Called once it is durable.
        """
        before = self._background, self._done
        self._folder_form, self._background, self._done = True, background, done
        try:
            with self._loops.sharded_state_dicts():
                yield
        finally:
            self._folder_form = False
            self._background, self._done = before

    @property
    def _saves_folder(self) -> bool:
        return self._folder_form or self._loops.saves_folders

    def save(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        components: list[Component],
        *,
        loaders: list[dict[str, Any]],
        storage_options: Any,
    ) -> None:
        """Saves what ``trainer.save_checkpoint`` collected; ``loaders`` is what the manifest says of them."""
        if not self._saves_folder:
            self._save_file(checkpoint, path, components, storage_options)
            return
        if storage_options is not None:
            raise TypeError("`storage_options` has no effect on a checkpoint folder. Leave it out.")
        self._save_folder(checkpoint, path, components, loaders)

    def load(self, path: AnyPath, kind: Kind, *, trust: bool, check: loading.Check) -> loading.Loaded:
        """Returns the checkpoint dict that Lightning goes on with; sharded strategies have their state loaded here."""
        if is_sharded(self.trainer.strategy):
            return self._load_sharded(path, kind, trust=trust, check=check)
        return self._load_plain(path, kind, trust=trust)

    def _save_folder(
        self, checkpoint: dict[str, Any], path: Any, components: list[Component], loaders: list[dict[str, Any]]
    ) -> None:
        tensors: dict[str, Any] = {self._loops.model_key: checkpoint.pop("state_dict")}
        buffers = collect.buffers_of(self._model, tensors[self._loops.model_key])
        for i, state in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors[f"optimizer_{i}"] = self._named(i, state)
        about = saving.About(
            topology=saving.topology_of(self.trainer.strategy).to_manifest(loaders=loaders),
            step=checkpoint["global_step"],
            epoch=checkpoint["epoch"],
            metrics=self._loops.metrics(),
        )
        key = self._loops.model_key
        weights = collect.weights_of(self._model, tensors[key])
        saving.save_state(
            path,
            tensors,
            checkpoint,
            components,
            buffers={key: buffers},
            weights={key: weights},
            about=about,
            validate=self.validate,
            background=self._background,
            optimizers=self._loops.optimizers,
            done=self._done,
        )

    def _save_file(
        self, checkpoint: dict[str, Any], path: Any, components: list[Component], storage_options: Any
    ) -> None:
        whole = {"state_dict", "optimizer_states"}
        rest = {key: value for key, value in checkpoint.items() if key not in whole}
        if components:
            # where whole tensors were gathered, the other ranks have none
            state = checkpoint["state_dict"] or collect.model_state(self._model)
            buffers = collect.buffers_of(self._model, state)
            checkpoint[FILE_KEY] = to_file(saving.with_own_values(rest, components, {"state_dict": buffers}))
        write = None
        if storage_options is not None or self._loops.has_own_io:
            write = lambda content: self._stock_save(content, path, storage_options=storage_options)  # noqa: E731
        saving.write_file(path, checkpoint, write=write)

    def _named(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state by parameter name, which is how every strategy can read it."""
        optimizer = self._loops.optimizers[index]
        names = self._owners().names(optimizer)
        if names is None or _is_named(state):
            return state
        return collect.rename_parameters(state, [names[id(p)] for g in optimizer.param_groups for p in g["params"]])

    @property
    def _model(self) -> Any:
        return self.trainer.strategy.model if is_sharded(self.trainer.strategy) else self.trainer.lightning_module

    def _owners(self) -> collect.Owners:
        return collect.Owners({"model": self._model})

    def _optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self._saves_folder:
            return collect.optimizer_state(optimizer, self._owners())
        return collect.full_optimizer_state(optimizer, self._owners())

    def _remove(self, filepath: Any) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):  # as stock: somebody may have removed it
                delete_checkpoint(filepath)

        _distributed.on_rank_zero(f"removing {filepath}", remove)

    def _load_sharded(self, path: AnyPath, kind: Kind, *, trust: bool, check: loading.Check) -> loading.Loaded:
        """Loads model and optimizers in place: with these strategies they exist when a checkpoint is loaded."""
        model = self.trainer.strategy.model
        optimizers = self._loops.optimizers if is_fitting(self.trainer) else []
        strict = self.trainer.lightning_module.strict_loading
        if kind is Kind.SINGLE_FILE:
            content = _distributed.agree(f"reading {path}", lambda: dict(loading.read_file(path, trust=trust)))
            owners, weights = self._owners(), content.pop("state_dict")
            collect.load_full_model_state(model, weights, strict=strict)
            for optimizer, whole in zip(optimizers, content.pop("optimizer_states", []), strict=False):
                dtypes = owners.dtypes(optimizer, {"model": weights})
                collect.load_full_optimizer_state(optimizer, whole, owners, dtypes=dtypes)
            loaded = _of_file(content)
            loading.load_own_buffers({"state_dict": model}, loaded.components)
            return loaded
        key = loading.model_key(path)
        state: dict[str, Any] = {key: model, **{f"optimizer_{i}": o for i, o in enumerate(optimizers)}}
        objects = Objects.of(state)
        return loading.load_folder(path, state, objects, strict=strict, trust=trust, verify=self.verify, check=check)

    def _load_plain(self, path: AnyPath, kind: Kind, *, trust: bool) -> loading.Loaded:
        if kind is not Kind.SINGLE_FILE:
            loaded = loading.read_trainer_folder(
                path, optimizers=is_fitting(self.trainer), trust=trust, verify=self.verify
            )
            return self._with_own_buffers(loaded, loading.model_key(path))
        if self._loops.has_own_io:
            content = self._stock_load(str(path), **({"weights_only": False} if trust else {}))
        else:
            content = _distributed.agree(f"reading {path}", lambda: loading.read_file(path, trust=trust))
        return self._with_own_buffers(_of_file(dict(content)), "state_dict")

    def _with_own_buffers(self, loaded: loading.Loaded, key: str) -> loading.Loaded:
        """Lightning loads the weights itself, so this rank's own buffers go where it will find them."""
        loaded.remainder["state_dict"] |= loading.own_buffers(loaded.components, key)
        return loaded

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Refuses the state of another model, which stock Lightning would load in part; after the user's hooks."""
        loading.check_model("state_dict", self.trainer.lightning_module, checkpoint["state_dict"], strict=strict)
        self._stock_load_model(checkpoint, strict=strict)

    def _load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads optimizer states that are keyed by name; others as stock Lightning does."""
        states = checkpoint["optimizer_states"]
        if not all(_is_named(state) for state in states):
            self._stock_load_optimizers(checkpoint)
            return
        for i, (optimizer, state) in enumerate(zip(self._loops.optimizers, states, strict=False)):
            saved = [list(group["params"]) for group in state["param_groups"]]
            owners = self._owners()
            collect.check_optimizer(f"optimizer_{i}", optimizer, saved, owners)
            dtypes = owners.dtypes(optimizer, {"model": checkpoint["state_dict"]})
            collect.load_optimizer_state(optimizer, state, owners, dtypes=dtypes)


def _of_file(content: dict[str, Any]) -> loading.Loaded:
    saved = content.pop(FILE_KEY, None)
    return loading.Loaded(remainder=content, components=None if saved is None else FileComponents(saved))


def _is_named(state: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) for group in state["param_groups"] for name in group["params"])
