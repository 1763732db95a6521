"""Takes over a Trainer's live strategy and loops, so that every checkpoint of the run brings back the whole run.

Lightning has no hook at the one moment at which a run can be cut and put together again without a seam: after
everything that belongs to a batch (the user's ``on_train_batch_end``, a validation that is due, the plateau schedulers)
and before the next batch is fetched. So the binding wraps three methods of the training loops to see these moments, and
on resume puts the loops where they were instead of leaving it to Lightning's own restart logic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_resume import _distributed, candidates, loading
from lightning_resume._lightning import Loops, fit_argument, is_fitting, is_sharded
from lightning_resume.checkpoint.components import SavedComponents
from lightning_resume.checkpoint.layout import Found, Kind
from lightning_resume.checkpoint.paths import AnyPath
from lightning_resume.checkpoint.validation import Validate
from lightning_resume.data.position import Resumable
from lightning_resume.data.resumable import make_resumable
from lightning_resume.run import describe, loader_component, loader_count, restore_rng, rng_component, saved_loader
from lightning_resume.run_folder import RunFolder
from lightning_resume.state import rng
from lightning_resume.state.buffers import BufferCopies
from lightning_resume.state.component import Component, Sharing
from lightning_resume.state.metrics import load_metrics_state, metrics_state
from lightning_resume.state.modules import ModuleTree
from lightning_resume.trainer_checkpoints import TrainerCheckpoints

_CURSOR = "trainer"
_METRICS = "metrics"


class Cursor(str, enum.Enum):
    """Where in the training loop a checkpoint was taken, so where the resumed run goes on."""

    STEP = "step"
    """Between two batches."""
    BATCH_END = "batch_end"
    """The optimizer has stepped, but what follows it in the batch (validation, plateau schedulers) has not been run."""
    VALIDATED = "validated"
    """As above, with the validation that was due already run."""
    EPOCH_END = "epoch_end"
    """All batches of the epoch are done, but what follows ``on_train_epoch_end`` has not been run."""
    EPOCH = "epoch"
    """Between two epochs."""

    @property
    def in_batch(self) -> bool:
        """Whether something of a batch is left to do."""
        return self in (Cursor.BATCH_END, Cursor.VALIDATED)


class Phase(enum.Enum):
    """What the training loop is doing."""

    BETWEEN_BATCHES = enum.auto()
    IN_BATCH = enum.auto()
    AFTER_BATCH = enum.auto()
    VALIDATED = enum.auto()
    AFTER_EPOCH = enum.auto()
    BETWEEN_EPOCHS = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boundary:
    """The run at the last moment at which no gradients were pending: a checkpoint from later may go back to it."""

    rng: rng.RngState
    loaders: list[Callable[[], dict[str, Any]]]
    batches: dict[str, Any]
    metrics: dict[str, Any]
    epoch_metrics: dict[str, Any]
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """What a loaded checkpoint says of where to go on."""

    components: SavedComponents
    cursor: Cursor
    loops: Mapping[str, Any]
    exhausted: list[bool]
    callback_metrics: dict[str, Any]
    epoch_metrics: dict[str, Any]


class TrainerBinding:
    """Binds to one Trainer: ``on_step`` and ``on_epoch`` are called between batches and between epochs."""

    def __init__(
        self,
        trainer: Any,
        *,
        on_step: Callable[[], None],
        on_epoch: Callable[[], None],
        find: Callable[[], list[Found]],
        folder: RunFolder,
        trust: bool,
        strict: bool,
        verify: loading.Verify,
        validate: Validate | None,
    ) -> None:
        self.trainer = trainer
        self._on_step, self._on_epoch, self._find = on_step, on_epoch, find
        self._trust, self._strict = trust, strict
        self._folder = folder
        self._found: list[Found] = []
        self._loops = Loops(trainer)
        self.checkpoints = TrainerCheckpoints(trainer, self._loops, verify=verify, validate=validate)
        self._phase = Phase.BETWEEN_EPOCHS
        self._boundary: Boundary | None = None
        self._rng_before: rng.RngState | None = None
        self._buffers = BufferCopies()
        self._tree: ModuleTree | None = None
        self._resume: Resume | None = None
        self._hints: list[dict[str, Any] | None] = []
        self._skip_batch = False
        self._restore_max_steps: Callable[[], None] = lambda: None
        self._stopped: dict[str, Any] | None = None
        self._attach()

    # -- what is taken over

    def _attach(self) -> None:
        strategy = self.trainer.strategy
        self._stock_process = strategy.process_dataloader
        strategy.save_checkpoint, strategy.load_checkpoint = self._save, self._load
        strategy.process_dataloader = self._process_dataloader
        self._loops.wrap(
            resume_start=self._resume_start,
            run=self._run,
            setup_data=self._setup_data,
            on_advance_start=self._start_epoch,
            on_run_start=self._start_batches,
            advance=self._batch,
            on_batch_advance_end=self._end_batch,
            on_epoch_advance_end=self._end_epoch,
            validate=self._validate,
            dump_checkpoint=self._dump,
        )

    # -- saving

    def _dump(self, stock: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Collects the state on all ranks; the user's hooks in there may fail on one.

        Where collecting is itself a collective there can be no other around it.
        """
        if is_sharded(self.trainer.strategy):
            return stock(*args, **kwargs)
        return _distributed.agree("collecting the state", lambda: stock(*args, **kwargs))

    def _save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        with rng.preserved():
            components = self._components(checkpoint) if "optimizer_states" in checkpoint else []
            loaders = describe(self._train_loaders())
            self.checkpoints.save(checkpoint, filepath, components, loaders=loaders, storage_options=storage_options)

    def _components(self, checkpoint: dict[str, Any]) -> list[Component]:
        """The run as it is now, or, where gradients are pending, as it was before they were."""
        # a stock Trainer with plain loaders would refuse these
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        cursor, boundary = self._cursor()
        if boundary is not None:
            self._go_back(checkpoint, boundary)
        elif self._stopped is not None:
            cursor, boundary = Cursor.STEP, self._boundary
            checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._stopped)
        loaders = self._train_loaders()
        states = [state() for state in (self._loader_moments() if boundary is None else boundary.loaders)]
        if cursor is Cursor.EPOCH:
            self._loops.before_epoch(checkpoint["loops"]["fit_loop"])
        metrics = metrics_state(self.trainer.lightning_module.named_modules()) if boundary is None else boundary.metrics
        value = {
            "cursor": cursor.value,
            "exhausted": self._loops.exhausted(),
            "callback_metrics": dict(self.trainer.callback_metrics),
            "epoch_metrics": self._loops.epoch_metrics() if boundary is None else boundary.epoch_metrics,
        }
        if boundary is not None:
            state = boundary.rng
        elif cursor in (Cursor.BATCH_END, Cursor.EPOCH) and self._rng_before is not None:
            state = self._rng_before
        else:
            state = rng.capture()
        return [
            rng_component(state),
            *(loader_component(i, *pair) for i, pair in enumerate(zip(loaders, states, strict=True))),
            Component(name=_CURSOR, value=value, sharing=Sharing.REPLICATED, required=False),
            Component(name=_METRICS, value=metrics, sharing=Sharing.PER_RANK, required=False),
        ]

    def _cursor(self) -> tuple[Cursor, Boundary | None]:
        """Where the run is, and the boundary to go back to when it cannot go on from there."""
        stepped = self._boundary is None or self.trainer.global_step > self._boundary.steps
        pending = self._loops.in_accumulation_window() or not stepped
        if self._phase is Phase.BETWEEN_EPOCHS:
            return Cursor.EPOCH, None
        if self._phase is Phase.AFTER_EPOCH:
            return Cursor.EPOCH_END, None
        if self._phase is Phase.BETWEEN_BATCHES and not self._loops.in_accumulation_window():
            return Cursor.STEP, None
        if pending and self._boundary is not None:
            return Cursor.STEP, self._boundary
        return (Cursor.VALIDATED if self._phase is Phase.VALIDATED else Cursor.BATCH_END), None

    def _go_back(self, checkpoint: dict[str, Any], boundary: Boundary) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        again = self._loops.batches_ready - boundary.batches["current"]["ready"]
        loops["epoch_loop.batch_progress"] = copy.deepcopy(boundary.batches)
        for name, buffer in self._buffers.of(self.trainer.lightning_module).items():
            if name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = buffer
        if again and self._loops.in_accumulation_window():
            self._loops.warn(
                f"This checkpoint is saved inside a gradient accumulation window. Gradients are not saved: it goes"
                f" back to the last optimizer step, and {again} batches will be seen again by a run that resumes from"
                " it."
            )

    def _loader_moments(self) -> list[Callable[[], dict[str, Any]]]:
        ahead = self._loops.prefetched()
        return [loader.moment(ahead if loader.taken else 0) for loader in self._train_loaders()]

    def _train_loaders(self) -> list[Resumable]:
        return [loader for loader in self._loops.train_loaders() if isinstance(loader, Resumable)]

    # -- loading

    def _resume_start(self, stock: Callable[..., None], path: Any = None, *args: Any, **kwargs: Any) -> None:
        self._found = self._find() if path is None and is_fitting(self.trainer) else []
        if self._found:
            path = str(self._found[0].path)
        stock(path, *args, **kwargs)

    def _load(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._resume = None
        weights_only = fit_argument(self.trainer, "weights_only", weights_only)
        trust = self._trust or weights_only is False
        if self._found:
            load = lambda path: self._load_from(path, Kind.RESUMABLE, trust)  # noqa: E731
            return self._folder.load_newest(load, self._found)
        found, kind = candidates.locate(self._folder.path_of(checkpoint_path))
        return candidates.load_first(found, lambda path: self._load_from(path, kind, trust))

    def _load_from(self, path: AnyPath, kind: Kind, trust: bool) -> dict[str, Any]:
        loaded = self.checkpoints.load(path, kind, trust=trust, check=self._check_components)
        if is_fitting(self.trainer):
            self._take(path, loaded)
        return loaded.remainder

    def _check_components(self, components: SavedComponents | None) -> None:
        if components is None or not is_fitting(self.trainer):
            return
        self._hints = [saved_loader(components, index) for index in range(loader_count(components))]
        try:
            self._loops.setup_data()
        finally:
            self._hints = []
        for index, loader in enumerate(self._train_loaders()):
            saved = saved_loader(components, index)
            if saved is not None:
                loader.check(saved)

    def _take(self, path: AnyPath, loaded: loading.Loaded) -> None:
        """Remembers where to go on; acted on when the loops are about to start."""
        if loaded.components is None or _CURSOR not in loaded.components:
            loading.warn_foreign(path)
            return
        if not is_sharded(self.trainer.strategy):
            _distributed.agree(f"checking {path}", lambda: self._check_components(loaded.components))
        loading.take_own_values(loaded.remainder, loaded.components)
        rank = _distributed.rank()
        saved = loaded.components.value(_CURSOR, min(rank, (loaded.components.ranks(_CURSOR) or 1) - 1))
        self._resume = Resume(
            components=loaded.components,
            cursor=Cursor(saved["cursor"]),
            loops=loaded.remainder["loops"]["fit_loop"],
            exhausted=saved["exhausted"],
            callback_metrics=saved["callback_metrics"],
            epoch_metrics=saved["epoch_metrics"],
        )

    # -- going on

    def place_loops(self) -> None:
        """Puts the loops' progress where it was: their own restart logic has guessed by now, and changed it."""
        if self._resume is None:
            return
        self._loops.load(self._resume.loops)
        self._loops.set_callback_metrics(self._resume.callback_metrics)
        if (
            self._resume.components.ranks(_METRICS) == _distributed.world_size()
        ):  # parts of a sum: no other rank's will do
            metrics = self._resume.components.value(_METRICS, _distributed.rank())
            load_metrics_state(self.trainer.lightning_module, metrics)
        if self._resume.cursor.in_batch:
            self._loops.complete_batch()
        if self._resume.cursor is Cursor.EPOCH_END:
            self._loops.finish_epoch()

    def _run(self, stock: Callable[[], None]) -> None:
        if self._resume is not None and self._resume.cursor.in_batch:
            with self._loops.past_max_steps() as self._restore_max_steps:
                stock()
        else:
            stock()
        if self._resume is not None:  # the run had ended, and there was nothing left to do
            restore_rng(self._resume.components)
            self._resume = None

    def _start_epoch(self, stock: Callable[[], None]) -> None:
        resume = self._resume
        if resume is None:
            with self._done_again():
                stock()
            return
        between_epochs = resume.cursor in (Cursor.EPOCH, Cursor.EPOCH_END)
        place = lambda: self._place_loaders(resume, between_epochs=between_epochs)  # noqa: E731
        _distributed.agree("placing the loaders", place)
        if between_epochs:
            self._loops.forget_restart()
            if self._loops.first_epoch:
                self._loops.restart_iteration()
            restore_rng(resume.components)
            self._resume = None
            with self._done_again():
                stock()
        else:
            self._loops.restart_iteration()  # `stock` would begin an epoch that has begun already

    def _place_loaders(self, resume: Resume, *, between_epochs: bool) -> None:
        begun = resume.loops["epoch_loop.batch_progress"]["total"]["ready"]
        if not begun and saved_loader(resume.components, 0) is None:
            return  # taken before there were any, as Lightning's tuner does
        for index, loader in enumerate(self._train_loaders()):
            saved = saved_loader(resume.components, index)
            if saved is None:
                raise loading.missing_loader(index)
            if between_epochs:
                loader.load_epoch_end(saved)
            elif saved["ended"]:
                loader.load_exhausted(saved)
            else:
                loader.load_state_dict(saved)

    def _start_batches(self, stock: Callable[[Any], None], fetcher: Any) -> None:
        resume, self._resume = self._resume, None
        if resume is None:
            stock(fetcher)
        else:
            self._loops.load(resume.loops)
            tail = resume.cursor.in_batch
            if tail:
                self._loops.complete_batch()
            stock(fetcher)
            self._loops.go_on(after_batch=tail, validated=resume.cursor is Cursor.VALIDATED)
            self._skip_batch = tail
            self._loops.set_exhausted(resume.exhausted)
            self._loops.set_epoch_metrics(resume.epoch_metrics)
        self._loops.refresh_limits()
        for loader in self._train_loaders():
            if resume is not None and self._loops.epoch_is_over():
                loader.leave_epoch()
            loader.remember(self.trainer.accumulate_grad_batches + 1)
        self._stopped = None
        if resume is not None:
            restore_rng(resume.components)
        self._phase = Phase.BETWEEN_BATCHES
        self._mark()

    def _mark(self) -> None:
        if self._tree is None or self._tree.root is not self.trainer.lightning_module:
            self._tree = ModuleTree(self.trainer.lightning_module)
        self._buffers.take([self._tree])
        self._boundary = Boundary(
            rng=rng.capture(),
            loaders=self._loader_moments(),
            batches=self._loops.batch_progress(),
            metrics=metrics_state(self._tree.named),
            epoch_metrics=self._loops.epoch_metrics(),
            steps=self.trainer.global_step,
        )

    def _batch(self, stock: Callable[[Any], None], fetcher: Any) -> None:
        if self._skip_batch:
            self._skip_batch = False
            self._restore_max_steps()
        else:
            self._phase = Phase.IN_BATCH
            stock(fetcher)
        self._phase = Phase.AFTER_BATCH

    def _end_batch(self, stock: Callable[[Any], None], fetcher: Any) -> None:
        stock(fetcher)
        self._phase = Phase.BETWEEN_BATCHES
        if self._loops.in_accumulation_window():
            return
        self._mark()
        if self._loops.epoch_is_over():
            return
        if self._loops.stops():
            # the end of the epoch follows, although the epoch has not ended: a longer run would go on from here
            self._stopped = copy.deepcopy(self.trainer.fit_loop.state_dict())
            self._stopped["state_dict"].pop("combined_loader", None)  # each rank's own, and ours to keep
        self._on_step()

    def _end_epoch(self, stock: Callable[[], None]) -> None:
        self._phase = Phase.AFTER_EPOCH
        stock()
        self._loops.end_epoch_metrics()
        self._phase = Phase.BETWEEN_EPOCHS
        self._on_epoch()

    @property
    def stopped(self) -> bool:
        """Whether training has just stopped in the middle of an epoch."""
        return self._stopped is not None

    def _validate(self, stock: Callable[[], Any]) -> Any:
        with self._done_again():
            return stock()

    @contextlib.contextmanager
    def _done_again(self) -> Iterator[None]:
        """Around what a run that resumes from a checkpoint taken inside will do again, from its start."""
        self._rng_before = rng.capture()
        try:
            yield
        finally:
            self._rng_before = None

    def validated(self) -> None:
        """Notes that a validation within ``fit`` has run all its batches."""
        if self._phase is Phase.AFTER_BATCH:
            self._phase = Phase.VALIDATED

    # -- data

    def _process_dataloader(self, dataloader: Any) -> Any:
        loader = self._stock_process(dataloader)
        share = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        if not (is_fitting(self.trainer) and self.trainer.training):
            if isinstance(loader, Resumable):  # one that divides its data itself does so in validation too
                loader.share_by_default(rank=share["rank"], world_size=share["num_replicas"])
                loader.agree()
            return loader
        resumable = make_resumable(loader, rank=share["rank"], world_size=share["num_replicas"])
        if not self._strict:
            resumable.strict = False
        if self._hints and (saved := self._hints.pop(0)) is not None:
            resumable.hint(saved)  # Lightning is about to ask for its length
        return resumable

    def _setup_data(self, stock: Callable[[], None]) -> None:
        before = self._train_loaders()
        stock()
        for old, new in zip(before, self._train_loaders(), strict=False):
            if old is not new:  # `reload_dataloaders_every_n_epochs`: a new loader goes on counting epochs
                new.set_epoch(old.epoch + 1)
