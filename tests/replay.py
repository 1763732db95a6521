"""What every loader has to pass, whatever it is made of: replay from every batch, chains of resumes, counting."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_resume import make_resumable
from tests.toy_data import reseed

Make = Callable[[], Any]
Show = Callable[[Any], Any]


def stored(state: dict[str, Any]) -> Any:
    """``state`` as it comes back from a file that holds no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def plain(batch: Any) -> Any:
    """A batch as lists of numbers and text, equal only for equal bits."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(part) for part in batch] if isinstance(batch, (list, tuple)) else batch


def resumable(make: Make, state: Any = None, *, seed: int = 1, **options: Any) -> Any:
    """What a new process has: a new loader, other global random numbers, and then perhaps the saved state."""
    reseed(seed)
    loader = make_resumable(make(), **options)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def run(loader: Any, *, epochs: int = 2, show: Show = plain) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """The batches of some epochs, and (batches taken, epochs ended, the state) at 0 and after every batch and epoch."""
    batches: list[Any] = []
    states = [(0, 0, stored(loader.state_dict()))]
    for epoch in range(epochs):
        for batch in loader:
            batches.append((epoch, show(batch)))
            states.append((len(batches), epoch, stored(loader.state_dict())))
        states.append((len(batches), epoch + 1, stored(loader.state_dict())))
    return batches, states


def assert_replays_from_every_batch(make: Make, *, epochs: int = 2, show: Show = plain, **options: Any) -> list[Any]:
    """Also saved at 0, at each last batch, twice without stepping, and at the end of each epoch."""
    batches, states = run(resumable(make, **options), epochs=epochs, show=show)
    wrong = []
    for number, (taken, ended, state) in enumerate(states):
        loader = resumable(make, state, seed=number + 2, **options)
        again = stored(loader.state_dict())
        if number % 2:  # the state of a loader that was loaded and not used is as good
            loader = resumable(make, again, seed=number + 9, **options)
        rest = [(epoch, show(batch)) for epoch in range(ended, epochs) for batch in loader]
        if rest != batches[taken:]:
            wrong.append((taken, ended))
        end(loader)
    assert wrong == []
    return batches


def assert_replays_in_a_chain(
    make: Make, batches: list[Any], *, epochs: int = 2, show: Show = plain, **options: Any
) -> None:
    """Resume, one step, save, resume, ... gives ``batches``."""
    state = stored(resumable(make, **options).state_dict())
    seen: list[Any] = []
    ended = 0
    while ended < epochs and len(seen) <= len(batches):
        loader = resumable(make, state, seed=len(seen) + 9, **options)
        batch = next(iter(loader), None)
        if batch is None:  # saved at the last batch: nothing was left of the epoch
            ended += 1
        else:
            seen.append((ended, show(batch)))
        state = stored(loader.state_dict())
        end(loader)
    assert seen == batches


def end(loader: Any) -> None:
    """Ends its workers now; left to the garbage collector, some loaders wait seconds for them."""
    if hasattr(loader, "_iterator"):
        loader._iterator = None


def lost_and_repeated(seen: Iterable[Any], expected: Iterable[Any]) -> tuple[int, int]:
    """How many of ``expected`` were not seen, and how many were seen more often than expected."""
    counted, wanted = collections.Counter(seen), collections.Counter(expected)
    return (wanted - counted).total(), (counted - wanted).total()
