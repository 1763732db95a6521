"""The only place that imports Lightning, under either of its package names, and that knows its private parts.

``lightning`` is taken where it is installed; with ``pytorch_lightning`` and ``lightning_fabric`` alone these are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import SequentialSampler

if TYPE_CHECKING:
    from lightning.fabric.strategies import (
        DDPStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
else:
    _WHOLE = importlib.util.find_spec("lightning") is not None
    _fabric = importlib.import_module("lightning.fabric.strategies" if _WHOLE else "lightning_fabric.strategies")
    _pytorch = "lightning.pytorch" if _WHOLE else "pytorch_lightning"
    DDPStrategy, FSDPStrategy = _fabric.DDPStrategy, _fabric.FSDPStrategy
    ModelParallelStrategy, SingleDeviceStrategy = _fabric.ModelParallelStrategy, _fabric.SingleDeviceStrategy
    Checkpoint = importlib.import_module(f"{_pytorch}.callbacks").Checkpoint
    _rank_zero = importlib.import_module(f"{_pytorch}.utilities.rank_zero")
    rank_zero_info, rank_zero_warn = _rank_zero.rank_zero_info, _rank_zero.rank_zero_warn

__all__ = [
    "Checkpoint",
    "DDPStrategy",
    "FSDPStrategy",
    "Loops",
    "ModelParallelStrategy",
    "SingleDeviceStrategy",
    "fit_argument",
    "is_fitting",
    "is_sharded",
    "rank_zero_info",
    "rank_zero_warn",
    "user_checkpoint_io",
]


def user_checkpoint_io(strategy: Any) -> Any:
    """The ``CheckpointIO`` that the user gave the strategy, ``None`` where it has none but Lightning's own."""
    checkpoint_io = getattr(strategy, "_checkpoint_io", None)
    return None if type(checkpoint_io).__name__ == "TorchCheckpointIO" else checkpoint_io


def is_sharded(strategy: Any) -> bool:
    """Whether a Trainer strategy shards the model and loads it itself: FSDP and ModelParallel."""
    return {"FSDPStrategy", "ModelParallelStrategy"} & {cls.__name__ for cls in type(strategy).__mro__} != set()


def is_fitting(trainer: Any) -> bool:
    return trainer.state.fn is not None and trainer.state.fn.value == "fit"


def fit_argument(trainer: Any, name: str, value: Any) -> Any:
    """The argument ``name`` of the running ``trainer.fit``; ``value`` where it was not given.

    With FSDP and ModelParallel, Lightning (2.6) drops ``fit(weights_only=...)`` on its way to the strategy: the frame
    of ``Trainer._run`` is the only place that still has it.
    """
    frame = inspect.currentframe()
    while frame is not None and value is None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            value = frame.f_locals.get(name)
        frame = frame.f_back
    return value


class Loops:
    """The training loops of a Trainer, by what is read from and done to them. All of it is private to Lightning."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._fit = trainer.fit_loop
        self._epoch = trainer.fit_loop.epoch_loop

    def wrap(self, *, resume_start: Callable[..., None], **wrappers: Callable[..., Any]) -> None:
        """Puts each wrapper in place of the method of its name; it is given the original as its first argument."""
        targets = {
            "run": (self._fit, "run"),
            "setup_data": (self._fit, "setup_data"),
            "on_advance_start": (self._fit, "on_advance_start"),
            "on_epoch_advance_end": (self._fit, "on_advance_end"),
            "on_run_start": (self._epoch, "on_run_start"),
            "advance": (self._epoch, "advance"),
            "on_batch_advance_end": (self._epoch, "on_advance_end"),
            "validate": (self._epoch.val_loop, "run"),
            "dump_checkpoint": (self.trainer._checkpoint_connector, "dump_checkpoint"),
        }
        for name, wrapper in wrappers.items():
            owner, method = targets[name]
            setattr(owner, method, partial(wrapper, getattr(owner, method)))
        data = self.trainer._data_connector
        data._prepare_dataloader = partial(_prepare_as_asked, data._prepare_dataloader)
        connector = self.trainer._checkpoint_connector
        connector.resume_start = partial(resume_start, connector.resume_start)

    # -- the strategy

    @property
    def model_key(self) -> str:
        """Under which name stock Lightning's strategy looks for the model in a checkpoint folder."""
        names = {cls.__name__ for cls in type(self.trainer.strategy).__mro__}
        return "model" if "FSDPStrategy" in names else "state_dict"

    @property
    def saves_folders(self) -> bool:
        strategy = self.trainer.strategy
        if not is_sharded(strategy):
            return False
        return bool(getattr(strategy, "_state_dict_type", None) == "sharded") or bool(
            getattr(strategy, "_save_distributed_checkpoint", False)
        )

    @contextlib.contextmanager
    def sharded_state_dicts(self) -> Iterator[None]:
        """Inside, a sharded strategy gives shards, although it is set to give whole tensors."""
        strategy = self.trainer.strategy
        name = "_state_dict_type" if hasattr(strategy, "_state_dict_type") else "_save_distributed_checkpoint"
        before = getattr(strategy, name, None)
        if before is not None:
            setattr(strategy, name, "sharded" if name == "_state_dict_type" else True)
        try:
            yield
        finally:
            if before is not None:
                setattr(strategy, name, before)

    @property
    def has_own_io(self) -> bool:
        return user_checkpoint_io(self.trainer.strategy) is not None

    @property
    def optimizers(self) -> list[Any]:
        return [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.trainer.strategy.optimizers]

    # -- where the loops are

    def in_accumulation_window(self) -> bool:
        return bool(self._epoch._should_accumulate())

    @property
    def batches_ready(self) -> int:
        return int(self._epoch.batch_progress.current.ready)

    def batch_progress(self) -> dict[str, Any]:
        # as its `state_dict`, which takes five times as long, at every step
        progress = vars(self._epoch.batch_progress).items()
        return {name: dict(vars(value)) if dataclasses.is_dataclass(value) else value for name, value in progress}

    def epoch_is_over(self) -> bool:
        return bool(self._epoch._num_ready_batches_reached())

    def stops(self) -> bool:
        """Whether training ends here, in the middle of an epoch."""
        early = self.trainer.should_stop and self._fit._can_stop_early
        return bool(self._epoch._is_training_done or early)

    def train_loaders(self) -> list[Any]:
        loader = self._fit._combined_loader
        return [] if loader is None else list(loader.flattened)

    def setup_data(self) -> None:
        self._fit.setup_data()

    def prefetched(self) -> int:
        """Batches that were fetched ahead, to know which one is the last."""
        return len(getattr(self._fit._data_fetcher, "batches", ()))

    def exhausted(self) -> list[bool]:
        """In mode ``max_size_cycle``, which of the loaders have come to their end at least once."""
        return list(getattr(self._iterator, "_consumed", ()))

    def set_exhausted(self, exhausted: list[bool]) -> None:
        if len(exhausted) == len(getattr(self._iterator, "_consumed", ())):
            self._iterator._consumed = list(exhausted)

    @property
    def _iterator(self) -> Any:
        return getattr(self._fit._combined_loader, "_iterator", None)

    # -- metrics

    def metrics(self) -> dict[str, float]:
        """What was logged last, as numbers."""
        found = self.trainer.callback_metrics.items()
        return {name: float(value) for name, value in found if getattr(value, "numel", lambda: 1)() == 1}

    def set_callback_metrics(self, metrics: Mapping[str, Any]) -> None:
        self.trainer._logger_connector._callback_metrics.update(metrics)

    def epoch_metrics(self) -> dict[str, Any]:
        """What ``self.log(on_epoch=True)`` has accumulated in this epoch, and how it was called."""
        return {
            key: {
                "meta": {name: getattr(metric.meta, name) for name in _PLAIN_META},
                "reduce_fx": metric.meta.reduce_fx.__name__,
                "sync": [metric.meta.sync.should, metric.meta.sync.rank_zero_only],
                "state": {name: getattr(metric, name).clone() for name in _accumulated(metric)},
                "forward": metric._forward_cache,
            }
            for key, metric in self._epoch._results.items()
            if metric.meta.on_epoch and not metric.has_reset
        }

    def set_epoch_metrics(self, saved: Mapping[str, Any]) -> None:
        """Goes on accumulating from ``saved``, also where nothing is logged any more in this epoch."""
        results = self._epoch._results
        if self.batches_ready:  # else the next `self.log` would take its batch for the epoch's first, and start anew
            self.trainer._logger_connector._first_loop_iter = self.batches_ready == 1
        pending = {key: entry["state"] for key, entry in saved.items()}
        for key, entry in saved.items():
            results[key] = self._result_metric(entry)
        stock_log, stock_update = type(results).log, type(results).update_metrics

        def log(fx: str, name: str, *args: Any, **kwargs: Any) -> None:
            # the next call makes the metric anew, with all that only the call knows, and then takes over the sum
            key = f"{fx}.{name}"
            if key in pending:
                results.pop(key, None)
            stock_log(results, fx, name, *args, **kwargs)

        def update(key: str, value: Any, batch_size: int) -> None:
            for name, accumulated in pending.pop(key, {}).items():
                setattr(results[key], name, accumulated.to(value.device))
            stock_update(results, key, value, batch_size)

        results.log, results.update_metrics = log, update

    def end_epoch_metrics(self) -> None:
        """Forgets what :meth:`set_epoch_metrics` left to go on from: it was of the epoch that has ended."""
        vars(self._epoch._results).pop("log", None)
        vars(self._epoch._results).pop("update_metrics", None)

    def _result_metric(self, entry: Mapping[str, Any]) -> Any:
        module = importlib.import_module(type(self._epoch._results).__module__)
        meta = module._Metadata(**entry["meta"], reduce_fx=entry["reduce_fx"])
        should, rank_zero_only = entry["sync"]
        meta.sync = module._Sync(_should=should, fn=self.trainer.strategy.reduce, rank_zero_only=rank_zero_only)
        by_object = meta.metric_attribute is not None
        metric = module._ResultMetric(meta, not by_object)
        metric.to(self.trainer.strategy.root_device)
        if by_object:
            metric.value = self.trainer.lightning_module.get_submodule(meta.metric_attribute)
        for name, accumulated in entry["state"].items():
            setattr(metric, name, accumulated.to(self.trainer.strategy.root_device))
        metric._forward_cache = entry["forward"]
        metric._update_count = 1  # else torchmetrics warns that nothing was accumulated
        return metric

    # -- putting the loops where they were

    def load(self, saved: Mapping[str, Any]) -> None:
        self._fit.load_state_dict(dict(saved))

    @staticmethod
    def before_epoch(saved: dict[str, Any]) -> None:
        """Takes back what the beginning of an epoch has changed in the loops' state ``saved``."""
        for counts in saved["epoch_progress"].values():
            counts["ready"] = counts["started"] = counts["processed"]

    @contextlib.contextmanager
    def past_max_steps(self) -> Iterator[Callable[[], None]]:
        """Lets the loops run although the last step is done, for what follows it, until the yielded call."""
        before = self._epoch.max_steps

        def restore() -> None:
            self._epoch.max_steps = before

        self._epoch.max_steps = -1
        try:
            yield restore
        finally:
            restore()

    def complete_batch(self) -> None:
        self._epoch.batch_progress.increment_completed()

    def finish_epoch(self) -> None:
        """Does what was left of an epoch whose ``on_train_epoch_end`` had been called."""
        progress = self._fit.epoch_progress
        progress.current.completed, progress.total.completed = progress.current.processed, progress.total.processed
        if self._epoch._num_ready_batches_reached():
            self._epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    def forget_restart(self) -> None:
        """Makes the loops go on as if they had never stopped."""
        for loop in _with_children(self._fit):
            loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
            if hasattr(loop, "reset_restart_stage"):
                loop.reset_restart_stage()

    @property
    def first_epoch(self) -> bool:
        """Whether the next epoch goes on with the iterator that ``setup_data`` made: Lightning makes no other."""
        return int(self.trainer.current_epoch) == 0

    def restart_iteration(self) -> None:
        self.refresh_limits()
        iter(self._fit._data_fetcher)

    def go_on(self, *, after_batch: bool, validated: bool) -> None:
        """Goes on with the next batch, or with what is left to do ``after_batch``: all of it, or all but validating."""
        self.forget_restart()
        self._epoch._restarting = after_batch  # else an epoch whose last batch is done is not entered at all
        if validated:
            stock = self._epoch._should_check_val_fx

            def not_again(_fetcher: Any) -> bool:
                self._epoch._should_check_val_fx = stock
                return False

            self._epoch._should_check_val_fx = not_again

    def refresh_limits(self) -> None:
        """Recomputes the number of batches of the epoch: after a change of topology it is another one."""
        loader = self._fit._combined_loader
        lengths = [_length(child) for child in loader.flattened]
        limits = [_limited(length, self.trainer.limit_train_batches) for length in lengths]
        loader.limits = limits
        if self._iterator is not None:
            self._iterator.limits = limits
            total = _length(loader)
        else:
            total = self._fit.max_batches
        fetcher = self._fit._data_fetcher
        if fetcher.length is not None:
            fetcher.length = total
        if total != self._fit.max_batches:
            self._fit.max_batches = total
            by_fraction = (
                isinstance(self.trainer.val_check_interval, float) and self.trainer.val_check_batch is not None
            )
            if by_fraction and total != float("inf"):
                self.trainer.val_check_batch = max(1, int(total * self.trainer.val_check_interval))

    def warn(self, message: str) -> None:
        rank_zero_warn(message)


_PLAIN_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def _accumulated(metric: Any) -> list[str]:
    return [name for name in ("value", "cumulated_batch_size") if metric.is_tensor and hasattr(metric, name)]


def _prepare_as_asked(stock: Callable[..., Any], dataloader: Any, shuffle: bool, mode: Any = None) -> Any:
    """Stock Lightning shuffles every train dataloader that it distributes, also those that were not to be shuffled."""
    sequential = type(getattr(dataloader, "sampler", None)) is SequentialSampler
    return stock(dataloader, shuffle=shuffle and not sequential, mode=mode)


def _with_children(loop: Any) -> Iterator[Any]:
    yield loop
    for child in vars(loop).values():
        if hasattr(child, "_restarting") and hasattr(child, "load_state_dict"):
            yield from _with_children(child)


def _length(loader: Any) -> int | float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")


def _limited(length: int | float, limit: int | float) -> int | float:
    if isinstance(limit, int):
        return min(length, limit)
    return length if length == float("inf") else int(length * limit)
