"""A save or delete on a store that is killed after any of its requests: what is left loads as the old or the new one.

The requests that change the store are recorded by taking its whole content after each. What one request removes may be
gone in any part, since stores promise no order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from lightning_resume import ResumeError
from lightning_resume.checkpoint import commit
from lightning_resume.checkpoint.layout import Kind, classify, leftovers, list_checkpoints, step_name
from lightning_resume.checkpoint.reader import CheckpointReader
from tests.test_remote import save, value_at

Content = dict[str, bytes]
ROOT = "memory://run"
TARGET = f"{ROOT}/{step_name(2)}"
BESIDE = f"{ROOT}/{step_name(1)}"


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    put({})
    yield
    put({})


def content() -> Content:
    return {path: file.getvalue() for path, file in MemoryFileSystem.store.items()}


def put(wanted: Content) -> None:
    filesystem = fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    for path, data in wanted.items():
        MemoryFileSystem.store[path] = MemoryFile(filesystem, path, data)


def states(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[Content]:
    """What the store may hold when ``act`` is killed, in order and without repeats."""
    seen = [content()]

    def note(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = content()
            result = method(*args, **kwargs)
            seen.extend(between(before, content()))
            return result

        return noted

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "commit", note(MemoryFile.commit))
        patch.setattr(MemoryFile, "write", note(MemoryFile.write))
        for name in ("pipe_file", "rm_file", "rm", "mv", "cp_file"):
            patch.setattr(MemoryFileSystem, name, note(getattr(MemoryFileSystem, name)))
        act()
    seen.extend(between(seen[-1], content()))
    return [state for number, state in enumerate(seen) if state not in seen[:number]]


def between(before: Content, after: Content) -> list[Content]:
    """``after``, and what there may be before all that one request removes is gone."""
    gone = sorted(before.keys() - after.keys())
    rng = random.Random(len(gone))
    parts = [rng.sample(gone, size) for size in range(len(gone)) for _ in range(4)]
    return [*({**after, **{path: before[path] for path in part}} for part in parts), after]


def found(url: str) -> float | None:
    """The value of what lies at ``url``; None where it says that there is nothing whole."""
    try:
        return value_at(url)
    except ResumeError:
        assert classify(url) is not Kind.RESUMABLE
        return None


SCENARIOS: dict[str, tuple[Callable[[], None], Callable[[], None], set[float | None], float | None]] = {
    "a fresh save": (lambda: None, lambda: save(TARGET, 2, step=2), {None, 2}, 2),
    "a save over a save": (lambda: save(TARGET, 1, step=2), lambda: save(TARGET, 2, step=2), {1, 2}, 2),
    "a save over a save over a save": (
        lambda: (save(TARGET, 0, step=2), save(TARGET, 1, step=2))[0],
        lambda: save(TARGET, 2, step=2),
        {1, 2},
        2,
    ),
    "a delete": (lambda: save(TARGET, 1, step=2), lambda: commit.delete_checkpoint(TARGET), {None, 1}, None),
    "a delete of what replaced another": (
        lambda: (save(TARGET, 0, step=2), save(TARGET, 1, step=2))[0],
        lambda: commit.delete_checkpoint(TARGET),
        {None, 1},
        None,
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_state_between_two_requests_loads_the_old_or_the_new(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, act, allowed, after = SCENARIOS[scenario]
    save(BESIDE, 9, step=1)
    before()
    possible = states(act, monkeypatch)
    assert len(possible) >= 7
    order = []
    for state in possible:
        put(state)
        order.append(found(TARGET))
        assert value_at(BESIDE) == 9
        listed = {str(path) for path in list_checkpoints(ROOT)}
        assert listed == {BESIDE} | ({TARGET} if order[-1] is not None else set())
        save(TARGET, 5, step=2)  # the next save works, and leaves nothing of this one
        assert value_at(TARGET) == 5
        assert leftovers(ROOT) == []
    assert set(order) == allowed
    assert order[-1] == after
    first_new = order.index(after)
    assert set(order[first_new:]) == {after}


@pytest.mark.parametrize("scenario", ["a fresh save", "a save over a save", "a delete"])
def test_what_a_crash_left_is_cleaned_without_harm(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, act, _, _ = SCENARIOS[scenario]
    before()
    for state in states(act, monkeypatch):
        put(state)
        value = found(TARGET)
        commit.clean_leftovers(ROOT)
        assert found(TARGET) == value
        assert leftovers(ROOT) == []
        if value is None:
            assert content() == {}


def test_a_commit_that_puts_the_manifest_first_would_be_found_out() -> None:
    """The model can fail: a checkpoint whose manifest is there before its files are."""
    save(TARGET, 1, step=2)
    whole = content()
    put({path: data for path, data in whole.items() if path.endswith("manifest.json")})
    with pytest.raises(ResumeError):
        CheckpointReader(TARGET).read()
    with pytest.raises(AssertionError):
        found(TARGET)
