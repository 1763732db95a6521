"""Loaders whose order is not ours: iterable datasets, those of other packages, any iterable.

An adapter knows how one kind of them goes on (``data/adapters``); the loader here knows where the run is.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, final

from lightning_resume.data.adapters.protocol import LoaderAdapter
from lightning_resume.data.capabilities import Capabilities
from lightning_resume.data.position import Resumable
from lightning_resume.data.randomness import keyed_seed
from lightning_resume.errors import CheckpointMismatchError
from lightning_resume.state import rng
from lightning_resume.state.component import Sharing


class StreamLoader(Resumable):
    """A loader that goes on as its adapter says: by its own state, or by reading again and skipping."""

    def attach(self, wrapped: Any, adapter: LoaderAdapter) -> None:
        """Takes over from ``wrapped``."""
        self.__dict__.update(getattr(wrapped, "__dict__", {}))
        self._begin_attributes()
        self._wrapped, self._adapter = wrapped, adapter
        self._epoch = self._skip = 0
        self._inner: Any = None
        self._led_here: Any = None
        self._untouched = False  # the adapter has not been asked for a batch since a state was loaded
        self._done = self._ended_when_saved = self._exhausted = False
        self.remember(2)

    def __len__(self) -> int:
        return len(self._wrapped)

    @property
    def epoch(self) -> int:  # type: ignore[override]  # read only
        return self._epoch

    @property
    def adapter(self) -> LoaderAdapter:
        """What drives the loader."""
        return self._adapter

    @property
    def sharing(self) -> Sharing:  # type: ignore[override]  # read only
        return self._adapter.sharing

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # read only
        return self._adapter.capabilities

    @property
    def topology(self) -> Mapping[str, Any]:  # type: ignore[override]  # read only
        return self._adapter.topology()

    def remember(self, batches: int) -> None:
        """Keeps the states of so many batches, for ``state_dict(behind=...)``."""
        known = getattr(self, "_history", ())  # a batch that was fetched ahead is in it
        self._history: collections.deque[tuple[int, Any]] = collections.deque(known, maxlen=batches + 1)

    def _go_to(self, epoch: int) -> None:
        if epoch == self._epoch + 1:  # as the next iteration would
            self._next_epoch()
        else:
            self._epoch, self._skip, self._inner, self._led_here, self._done = epoch, 0, None, None, False
        self._history.clear()

    def _restart(self) -> None:
        self._go_to(self._epoch)

    def check(self, state_dict: Mapping[str, Any]) -> None:
        super().check(state_dict)
        current = self._adapter.identity()
        for field, saved in state_dict["identity"].items():
            if saved != current.get(field):
                raise CheckpointMismatchError(
                    "loader",
                    field,
                    saved=saved,
                    current=current.get(field),
                    advice=f"This is other data, or the same in another order: use the {field} that the run was started"
                    " with.",
                )

    def _at_end(self) -> bool:
        return self._done

    def _begun(self) -> bool:
        return self._skip > 0

    def _next_epoch(self) -> None:
        goes_on = self._adapter.goes_on_after_its_end
        self._led_here = self._history[-1][1] if goes_on and self._done and not self._untouched else None
        if self._untouched and self._inner is not None and not self._ended_when_saved:
            with self._randomness(0):
                self._adapter.iterate(self._epoch, self._inner, self._skip)
            self._inner = None
        elif not self._untouched or not goes_on:
            self._inner = None
        self._epoch, self._skip, self._done = self._epoch + 1, 0, False

    def load_exhausted(self, state_dict: Mapping[str, Any]) -> None:
        super().load_exhausted(state_dict)
        self._exhausted = True

    def _batches(self) -> Iterator[Any]:
        if self._exhausted:
            self._exhausted, self._done, self._ended_when_saved = False, True, True
            return
        self._untouched = False
        with self._randomness(0):
            batches = self._adapter.iterate(self._epoch, self._inner, self._skip)
            start = self._at_start()
            if start is None and self._adapter.goes_on_after_its_end:  # nothing else tells where an epoch that was left
                start = self._captured()  # in the middle has led to
            self._history.append((0, start))
        while True:
            with self._randomness(self._skip + self._taken + 1):
                try:
                    batch = next(batches)
                except StopIteration:
                    self._done = True
                    self._handed_out()
                    return
            yield batch

    @contextlib.contextmanager
    def _randomness(self, batch: int) -> Iterator[None]:
        """Inside, the global generators are seeded for that batch; outside nothing is noticed."""
        with rng.apart():
            rng.seed_all(keyed_seed("stream", self._adapter.seed, self._epoch, batch))
            yield

    def _opened(self) -> None:
        self._history.clear()

    def _handed_out(self) -> None:
        self._history.append((self._taken, self._captured()))

    def _captured(self) -> Any:
        state = self._adapter.capture()
        return {self._adapter.rank: state} if self._adapter.restores_from_all_ranks else state

    def _state(self, behind: int) -> dict[str, Any]:
        taken = self._taken - behind
        states = dict(self._history) if self._history else {0: self._at_start()}
        if taken not in states:
            raise RuntimeError(
                f"The position {behind} batches ago is no longer known: only the last {len(states) - 1} are kept."
                " Save where the optimizer has just stepped."
            )
        state = states[taken]
        if self._adapter.restores_from_all_ranks:  # "lanes" are merged from all ranks' states on load
            inner = {"lanes": {rank: _asked(of_rank) for rank, of_rank in (state or {}).items()}}
        else:
            inner = {"inner": _asked(state)}
        return {
            "kind": self._kind(),
            "seed": self._adapter.seed,
            "epoch": self._epoch,
            "batches": self._skip + taken,
            **inner,
            "fixed": self._fixed(),
            "topology": dict(self.topology),
            "identity": self._adapter.identity(),
        }

    def _at_start(self) -> Any:
        """The state before the first batch: what was loaded, or what the epoch before this one ended with."""
        return self._led_here if self._inner is None else self._inner

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._epoch, self._skip = state_dict["epoch"], state_dict["batches"]
        self._inner = (state_dict["lanes"] or None) if "lanes" in state_dict else state_dict["inner"]
        self._led_here, self._untouched = None, True
        self._done, self._ended_when_saved = False, state_dict["ended"]
        self._history.clear()
        self._adapter.shut_down()
        self._adapter.reseed(state_dict["seed"])
        if state_dict["fixed"] != self._fixed():  # passed `check` by `strict=False`
            self._inner = self._adapter.convert(self._inner, state_dict["topology"])
            self._skip = self._skip * _step_size(state_dict["topology"]) // _step_size(self.topology)

    def _fixed(self) -> dict[str, Any]:
        return self._adapter.fixed()

    def _kind(self) -> str:
        return self._adapter.kind

    @property
    def _iterator(self) -> Any:
        # what Lightning looks at to shut workers down
        engine = getattr(self._adapter, "engine", None)
        return getattr(engine, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._adapter.shut_down()


def _asked(state: Any) -> Any:
    """What an adapter captured, which may be a function that asks only now."""
    return state() if callable(state) else state


def _step_size(topology: Mapping[str, Any]) -> int:
    """Samples of all ranks in one step."""
    return (topology.get("world_size") or 1) * (topology.get("batch_size") or 1)


@final
class ResumableIterable(StreamLoader):
    """Stands in for an iterable that is no ``DataLoader``; its attributes are the iterable's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_wrapped":
            raise AttributeError(name)
        return getattr(self._wrapped, name)
