"""Megatron-Energon's ``get_savable_loader(...)``."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np
import torch

from lightning_resume.data.adapters.iterable import shut_down
from lightning_resume.data.adapters.protocol import LoaderAdapter, is_from, skipped
from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.randomness import keyed_seed

_MORE_STATES = 16
"""That a worker keeps of what it handed out: a save may be asked for the position some batches ago."""
_SECONDS_TO_BEGIN = 60
"""That workers are waited for which have not begun when a position is saved."""


@final
class SavableDataLoaderAdapter(LoaderAdapter):
    """Goes on by the loader's own state of every worker.

    Over a dataset that repeats for ever (``repeat=True``), ranks may become workers and workers ranks, as long as there
    are as many workers in all: the states of all ranks are divided anew, as ``energon checkpoint redist`` does. Over
    one that ends, a state whose source has ended begins the next epoch (energon 7.4), before what is in the shuffle
    buffer; so there the epoch is begun again from its start and as many batches are skipped.
    """

    kind = "Energon SavableDataLoader"
    restores_from_all_ranks = True
    goes_on_after_its_end = True
    _REPEATING = Capabilities(
        world_size=Change.SAME,
        num_workers=Change.SAME,
        batch_size=Change.SAME,
        order=Order.TOPOLOGY,
        randomness=Randomness.POSITION,
        resume_cost="reads the samples of its shuffle buffers again",
        state_size="about 25 KB a worker, and its shuffle buffer's keys",
        caution="It starts again, and as many samples of the epoch are skipped as were taken. The shuffle buffers are"
        " filled anew: some samples may be seen twice in this epoch, and as many not at all.",
    )

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        cost = self._REPEATING.resume_cost if self._endless else "reads again what was read of the epoch"
        return dataclasses.replace(self._REPEATING, resume_cost=cost)

    def __init__(self, loader: Any, **run: Any) -> None:
        super().__init__(loader, **run)
        self.engine = loader
        self._open: Iterator[Any] | None = None
        if loader.generator is None:  # what it draws for each iterator would otherwise shift the samples' numbers
            loader.generator = torch.Generator().manual_seed(keyed_seed("workers", self.seed))
        self._endless = _repeats_for_ever(loader.config())
        self._epoch_start: Any = None
        if loader.num_workers:
            loader.dataset.n_checkpoints += _MORE_STATES
        self._initial = None if loader.num_workers else plain(loader.save_state_rank())

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return is_from(loader, "megatron.energon", "SavableDataLoader")

    def topology(self) -> dict[str, Any]:
        config = self.loader.worker_config
        return {
            "world_size": config.world_size,
            "num_workers": config.num_workers,
            "batch_size": self.loader._get_batch_size(),
        }

    def fixed(self) -> dict[str, Any]:
        topology = self.topology()
        workers = topology["num_workers"]
        if not self._endless:
            return topology
        if not workers:  # what runs in the main process saves another kind of state
            alone = f"{topology['world_size']}, in the main processes"
            return {"workers of all ranks": alone, "batch_size": topology["batch_size"]}
        return {"workers of all ranks": topology["world_size"] * workers, "batch_size": topology["batch_size"]}

    def identity(self) -> dict[str, Any]:
        config = json.dumps(_of_the_data(self.loader.config()), sort_keys=True, default=str)
        return {"dataset": hashlib.blake2b(config.encode(), digest_size=8).hexdigest()}

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        if state is not None:
            self._restore(self._mine(state))
            return self._begin(0 if self._endless else skip)
        if self._open is None:
            return self._begin(skip)
        if self._endless:  # goes on in an epoch that was left, where it is
            return self._open
        for _ in self._open:
            pass
        return self._begin(0)

    def _begin(self, skip: int) -> Iterator[Any]:
        if not self._endless:
            self._epoch_start = {"epoch start": self._where_it_is()}
        self._open = self._until_its_end(iter(self.loader))
        return skipped(self._open, skip)

    def _where_it_is(self) -> Any:
        return plain(self._ask() if self.loader._has_workers else self.loader.save_state_rank())

    def _until_its_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        if not self._endless:  # where it ended, the next epoch begins
            self._epoch_start = {"epoch start": self._where_it_is()}

    def _mine(self, states: Mapping[int, Any]) -> Any:
        """This rank's state, of those of all ranks, at the world size that they were saved at or another."""
        mine = max(1, self.loader.num_workers)
        own = states.get(self.rank)
        if own is not None and not self._endless:
            return rebuilt(own["epoch start"])
        if own is not None and len(own["fields"]["worker_states"]) == mine and len(states) in (1, self.world_size):
            return rebuilt(own)
        loaded = [rebuilt(states[rank]) for rank in sorted(states)]
        workers = [worker for state in loaded for worker in state.worker_states]
        if len(workers) != mine * self.world_size:
            raise ValueError(
                f"These are the states of {len(workers)} workers, of {mine * self.world_size} in all: to go on with"
                " another number of ranks, load the states of all ranks (`restore_state_global`)."
            )
        of_rank = workers[self.rank * mine : (self.rank + 1) * mine]
        return dataclasses.replace(loaded[0], worker_states=of_rank, next_worker_id=0)

    def _restore(self, state: Any) -> None:
        self.shut_down()
        self.loader.restore_state_rank(state)
        if self.loader.num_workers and state is not None:
            # 7.4 leaves out what is to be skipped: a worker that hands out nothing before the next save would repeat it
            self.loader._worker_sample_counters = [
                worker.offset - 1 + (0 if worker.state is None else worker.state.sample_index)
                for worker in state.worker_states
            ]

    def capture(self) -> Any:
        """With workers, a function: to ask them waits until each is done with what it is working on."""
        if not self._endless:
            return self._epoch_start
        if not self.loader.num_workers:
            return plain(self.loader.save_state_rank())
        return self._later(list(self.loader._worker_sample_counters), self.loader._next_worker_id)

    def _later(self, counters: list[int], next_worker_id: int) -> Callable[[], Any]:
        def ask() -> Any:
            loader = self.loader
            now = loader._worker_sample_counters, loader._next_worker_id
            loader._worker_sample_counters, loader._next_worker_id = counters, next_worker_id
            try:
                return plain(self._ask())
            finally:
                loader._worker_sample_counters, loader._next_worker_id = now

        return ask

    def _ask(self) -> Any:
        """The states of all workers, when all have begun.

        Of one that has not, energon 7.4 gives the state of the very start, with one sample too many to skip.
        """
        until = time.monotonic() + _SECONDS_TO_BEGIN
        while time.monotonic() < until:
            state = self.loader.save_state_rank()
            if all(worker.state is not None for worker in state.worker_states):
                return state
            time.sleep(0.01)
        raise RuntimeError(
            f"A worker of the Energon loader has not begun within {_SECONDS_TO_BEGIN} s, so its position is not known."
            " Save again when every worker has made a batch."
        )

    def shut_down(self) -> None:
        loader = self.loader
        self._open = None
        if not loader.num_workers:
            loader.dataset.reset_state_deep()  # by itself 7.4 refuses to fill a shuffle buffer that has samples
            loader.restore_state_rank(rebuilt(self._initial))
            return
        shut_down(loader)
        for queues in (loader.cmd_queues, loader.result_queues):
            queues[:] = [_in_place_of(queue) for queue in queues]
        loader._epoch_iterator, loader._has_workers, loader._next_worker_id = None, False, 0
        loader._worker_sample_counters = [-1] * loader.num_workers
        loader.dataset.restore_checkpoint(None, worker_offset=0)


def _in_place_of(queue: Any) -> Any:
    """A new queue: a worker of 7.4 that ends while it waits for the next command takes the old one's lock with it."""
    queue.close()
    return multiprocessing.Queue()


_OF_THE_RUN = ("worker_config", "slice_offsets", "len", "_path", "num_workers", "prefetch_factor", "persistent_workers")


def _of_the_data(config: Any) -> Any:
    """What of a loader's ``config()`` is the same at every topology, and wherever the data lies."""
    if isinstance(config, Mapping):
        return {key: _of_the_data(value) for key, value in config.items() if key not in (*_OF_THE_RUN, "batch_size")}
    return [_of_the_data(value) for value in config] if isinstance(config, (list, tuple)) else config


def _repeats_for_ever(config: Any) -> bool:
    if isinstance(config, Mapping):
        return (config.get("type") == "RepeatDataset" and config.get("repeats") is None) or any(
            map(_repeats_for_ever, config.values())
        )
    return isinstance(config, (list, tuple)) and any(map(_repeats_for_ever, config))


# -- its states are objects of its own classes, which a checkpoint that runs no code cannot hold


def plain(value: Any) -> Any:
    """The state in numbers, text, lists, dicts and tensors."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return {_TYPE: "tuple", "items": [plain(item) for item in value]}
    if isinstance(value, dict):
        items = [[plain(key), plain(item)] for key, item in value.items()]
        return {_TYPE: "dict" if type(value) is dict else _name(type(value)), "items": items}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", "items": list(value)}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {_TYPE: "array", "dtype": str(value.dtype), "shape": list(value.shape), "items": value.ravel().tolist()}
    if isinstance(value, np.generic):
        return value.item()
    name = _name(type(value))
    return {
        _TYPE: name,
        "fields": {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)},
    }


def rebuilt(value: Any) -> Any:
    """What :func:`plain` was given; of classes, only Energon's dataclasses and dicts are made."""
    if isinstance(value, list):
        return [rebuilt(item) for item in value]
    if not isinstance(value, dict):
        return value
    name = value[_TYPE]
    if name == "tuple":
        return tuple(map(rebuilt, value["items"]))
    if name == "bytes":
        return bytes(value["items"])
    if name == "array":
        return np.array(value["items"], dtype=value["dtype"]).reshape(value["shape"])
    made = dict if name == "dict" else _class(name)
    if "fields" in value:
        return made(**{field: rebuilt(item) for field, item in value["fields"].items()})
    return made({rebuilt(key): rebuilt(item) for key, item in value["items"]})


_TYPE = "type of Energon's state"


def _name(cls: type) -> str:
    name = f"{cls.__module__}:{cls.__qualname__}"
    if not _is_of_energon(cls):
        raise TypeError(
            f"The state of the Energon loader holds a {name}. Only plain values and Energon's own states can be saved:"
            " save numbers, text, lists, dicts or arrays in `save_state` of your own dataset."
        )
    return name


def _class(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if not module.startswith("megatron.energon."):
        raise TypeError(f"The saved position of the Energon loader names {name}, which is no state of Energon's.")
    cls = getattr(importlib.import_module(module), qualname)
    if not _is_of_energon(cls):
        raise TypeError(f"The saved position of the Energon loader names {name}, which is no state of Energon's.")
    return cls


def _is_of_energon(cls: Any) -> bool:
    known = isinstance(cls, type) and (dataclasses.is_dataclass(cls) or issubclass(cls, dict))
    return known and cls.__module__.startswith("megatron.energon.")
