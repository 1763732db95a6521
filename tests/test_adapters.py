"""The protocol by which others add loaders: registered by a call, or by an installed package."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_resume import CheckpointMismatchError, LoaderAdapter, make_resumable, register_adapter
from lightning_resume.data.adapters import registry
from lightning_resume.data.adapters.protocol import READS_AGAIN
from lightning_resume.data.capabilities import Capabilities, Change
from lightning_resume.data.loader import ElasticLoader
from lightning_resume.data.scenarios import merged
from lightning_resume.data.stream import StreamLoader
from lightning_resume.errors import ResumeWarning, UnsafeResumeWarning
from lightning_resume.state.component import Sharing
from tests.replay import assert_replays_from_every_batch, assert_replays_in_a_chain, plain, resumable, stored
from tests.toy_data import Noisy, draw


class Reader:
    """A loader of somebody else's: elastic in the world size, and by a call of its own."""

    def __init__(self, length: int = 10, *, rank: int = 0, world_size: int = 1, name: str = "a") -> None:
        self.length, self.rank, self.world_size, self.name = length, rank, world_size, name
        self.position, self.epoch = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position + self.world_size <= self.length:
            mine = self.position + self.rank
            self.position += self.world_size
            yield self.epoch * 100 + mine, draw()


class ReaderAdapter(LoaderAdapter):
    kind = "Reader"
    sharing = Sharing.REPLICATED
    capabilities = Capabilities(
        world_size=Change.ELASTIC,
        num_workers=Change.SAME,
        batch_size=Change.SAME,
        resume_cost="O(1)",
        state_size="O(1)",
    )

    @classmethod
    def matches(cls, loader: Any) -> bool:
        return isinstance(loader, Reader)

    def identity(self) -> dict[str, Any]:
        return {"name": self.loader.name}

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        self.loader.epoch = epoch
        self.loader.position = skip * self.world_size if state is None else state["position"]
        return iter(self.loader)

    def capture(self) -> Any:
        return {"position": self.loader.position}


@pytest.fixture
def registered() -> Iterator[None]:
    register_adapter(ReaderAdapter)
    yield
    registry.unregister_adapter(ReaderAdapter)


@pytest.mark.usefixtures("registered")
def test_a_registered_adapter_makes_a_loader_exact() -> None:
    assert_replays_in_a_chain(Reader, assert_replays_from_every_batch(Reader))


@pytest.mark.usefixtures("registered")
def test_what_it_declares_elastic_may_change_and_what_tells_the_data_may_not() -> None:
    loader = resumable(Reader)
    assert isinstance(loader, StreamLoader)
    seen = [next(batches)[0] for batches in [iter(loader)] for _ in range(4)]
    state = stored(loader.state_dict())
    for rank in (0, 1):
        share = {"rank": rank, "world_size": 2}
        seen += [value for value, _ in resumable(functools.partial(Reader, **share), state, **share)]
    assert sorted(seen) == list(range(10))
    other = resumable(lambda: Reader(name="b"), strict=False)
    with pytest.raises(CheckpointMismatchError, match=r"not the same name(.|\n)*saved: +a\n +current: b"):
        other.load_state_dict(state)


def test_an_adapter_of_the_user_comes_before_ours() -> None:
    class Own(ReaderAdapter):
        kind = "own"
        capabilities = READS_AGAIN

        @classmethod
        def matches(cls, loader: Any) -> bool:
            return isinstance(loader, DataLoader)

        def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
            return iter(["mine"])

        def capture(self) -> Any:
            return None

    try:
        assert register_adapter(Own) is Own
        assert list(make_resumable(DataLoader(Noisy()))) == ["mine"]
    finally:
        registry.unregister_adapter(Own)
    assert isinstance(make_resumable(DataLoader(Noisy())), ElasticLoader)


def test_what_is_no_whole_adapter_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="derived from LoaderAdapter"):
        register_adapter(Reader)  # type: ignore[type-var]

    class Half(LoaderAdapter):
        matches = ReaderAdapter.matches

    with pytest.raises(TypeError, match="it lacks capture, iterate"):
        register_adapter(Half)


def test_with_strict_false_as_many_samples_are_skipped_as_were_taken() -> None:
    def stream(world_size: int) -> Any:
        return make_resumable(iter_of(24 // world_size), world_size=world_size)

    first = stream(1)
    for _ in zip(range(7), first, strict=False):
        pass
    state = stored(first.state_dict())
    other = stream(2)
    with pytest.raises(CheckpointMismatchError, match="not the same world_size"):
        other.load_state_dict(state)
    with pytest.warns(UnsafeResumeWarning, match=r"goes on .*world_size.*1 became 2"):
        other.load_state_dict(state, strict=False)
    assert list(other) == list(range(3, 12))


def iter_of(length: int) -> Any:
    class Batches:
        def __iter__(self) -> Iterator[int]:
            yield from range(length)

    return Batches()


class AllRanks(ReaderAdapter):
    """Knows how to go on from the states of all ranks together, at any world size."""

    kind = "all ranks"
    sharing = Sharing.PER_RANK
    restores_from_all_ranks = True

    def iterate(self, epoch: int, state: Any, skip: int) -> Iterator[Any]:
        taken = [] if state is None else [index for rank in sorted(state) for index in state[rank]]
        self.taken: list[int] = [] if state is None or self.rank else list(taken)
        left = [index for index in range(10) if index not in taken]
        return self._mine(left[self.rank :: self.world_size])

    def _mine(self, left: list[int]) -> Iterator[int]:
        for index in left:
            self.taken.append(index)
            yield index

    def capture(self) -> Any:
        return list(self.taken)


def test_an_adapter_may_ask_for_the_states_of_all_ranks() -> None:
    register_adapter(AllRanks)
    try:
        seen: list[int] = []
        state: Any = None
        for world_size, steps in [(2, 2), (3, 1), (1, 3)]:
            loaders = [make_resumable(Reader(), rank=rank, world_size=world_size) for rank in range(world_size)]
            states = []
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
                batches = iter(loader)
                seen += [next(batches) for _ in range(steps)]
                states.append(loader.state_dict())
            state = stored(dict(merged(states)))
        assert sorted(seen) == list(range(10))
    finally:
        registry.unregister_adapter(AllRanks)


# -- by an installed package


def install(folder: Path, name: str, entry: str, code: str) -> None:
    """Makes a distribution whose entry point is ``entry``, as an installer would have."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lightning_resume.adapters]\n{name} = {entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    registry._installed.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    registry._installed.cache_clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


PACKAGE = """
    from tests.test_adapters import Reader, ReaderAdapter

    class FromPackage(ReaderAdapter):
        kind = "from a package"
"""


def test_a_packages_entry_point_is_enough(site: Path) -> None:
    install(site, "their_package", "their_package:FromPackage", PACKAGE)
    loader = make_resumable(Reader())
    assert loader.state_dict()["kind"] == "from a package"
    assert [value for value, _ in loader] == list(range(10))


BROKEN = {
    "does not import": ("broken:Adapter", "import a_module_that_is_nowhere", "a_module_that_is_nowhere"),
    "is not there": ("broken:Adapter", "", "Adapter"),
    "is no adapter": ("broken:Adapter", "class Adapter: ...", "derived from LoaderAdapter"),
    "lacks a method": (
        "broken:Adapter",
        "from lightning_resume import LoaderAdapter\nclass Adapter(LoaderAdapter): ...",
        "it lacks capture, iterate, matches",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_point_is_named_once_and_training_goes_on(site: Path, name: str) -> None:
    entry, code, reason = BROKEN[name]
    install(site, "broken", entry, code)
    with pytest.warns(ResumeWarning, match=rf"broken = broken:Adapter.*of broken(.|\n)*{reason}"):
        loader = make_resumable(DataLoader(Noisy(), 4))
    assert len(plain(list(loader))) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_resumable(DataLoader(Noisy(), 4))


def test_asking_the_adapters_imports_no_package() -> None:
    code = """
        import sys
        from lightning_resume import make_resumable
        from torch.utils.data import DataLoader
        make_resumable(DataLoader([1, 2, 3]))
        make_resumable([1, 2, 3])
        packages = ("torchdata", "datasets", "streaming", "litdata", "megatron")
        print([name for name in packages if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
