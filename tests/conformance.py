"""What every loader that knows its position has to pass: subclass :class:`LoaderConformance` once per loader or format.

In a module ``tests/test_conformance_<what>.py`` (any ``tests/test_*.py`` will do), a class at its top level::

    class TestParquet(LoaderConformance):
        length = 14                                    # samples in an epoch; None for a stream without end

        def prepare(self, folder): ...                 # once per class: write the data that `make` reads
        def make(self, *, rank=0, world_size=1, num_workers=0, batch_size=4, seed=3, folder, prefetch_factor=None):
            return ...                                 # a fresh loader, a `Resumable`, over the same data
        def ids(self, batch): return batch["id"].tolist()       # which samples are in a batch
        def noise(self, batch): return batch["noise"].tolist()  # the random numbers of each sample, or None

Everything else is read from the ``capabilities`` that the loader declares: what is elastic is changed, what is to stay
the same is changed too and must be refused. Keep the data small (about 14 samples: 4 steps of 4), for every step is
resumed from. ``workers``, ``world_sizes`` and ``batch_sizes`` are the values that are tried, not a promise; narrow them
where the package allows no more (one rank per process: ``world_sizes = (1,)``) and say why. ``tail`` says what becomes
of samples that fill no step, ``unique = False`` that an epoch may hold a sample twice; ``content`` is what must come
back with equal bits: override it for a loader that declares ``Randomness.OWN``. ``make`` is also called in child
processes (SIGKILL): the class is importable, and ``make`` depends on its arguments alone. The large setting:
``python -m tests.conformance --examples 500 --kills 20 [-k TestParquet]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lightning_resume.data.capabilities import Capabilities, Change, Randomness
from lightning_resume.data.order import Tail
from lightning_resume.errors import CheckpointMismatchError
from lightning_resume.state.component import Sharing
from tests.chained_runs import ENDLESS_STEPS, EPOCHS, Account, Leg, allowed, chains_of
from tests.chained_runs import check as check_chain
from tests.harness import ROOT, Launch, zygote
from tests.killed_consumer import Record
from tests.loader_runs import ALONE, TWO_RANKS, WITH_WORKERS, LoaderRuns
from tests.simulated_ranks import Ranks, Topology, bits, stored
from tests.toy_data import draw, global_rng

EXAMPLES, KILLS = "CONFORMANCE_EXAMPLES", "CONFORMANCE_KILLS"  # environment variables of the large setting
NAMES = {ALONE: "alone", WITH_WORKERS: "2 workers", TWO_RANKS: "2 ranks"}


class LoaderConformance(LoaderRuns):
    """The suite; see the module's docstring for what a subclass gives."""

    _prepared: Path

    @classmethod
    def setup_class(cls) -> None:
        zygote()  # lives on: started here, it is not taken for something that a test left behind

    @pytest.fixture
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        cls = type(self)
        if "_prepared" not in vars(cls):
            folder = tmp_path_factory.mktemp("data")
            self.prepare(folder)
            cls._prepared = folder
        return cls._prepared

    @pytest.fixture
    def capabilities(self, folder: Path) -> Capabilities:
        """What a loader of several ranks declares: a single one may not know that others would be unlike it."""
        return self.make(folder=folder, world_size=max(self.world_sizes)).capabilities

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "topology" in metafunc.fixturenames:
            possible = [ALONE, *[WITH_WORKERS] * (2 in self.workers), *[TWO_RANKS] * (2 in self.world_sizes)]
            metafunc.parametrize("topology", possible, ids=[NAMES[topology] for topology in possible])

    # -- what is served without any resume

    def test_an_epoch_holds_every_sample(self, folder: Path) -> None:
        run = self.begun(ALONE, folder)
        epochs: list[list[int]] = [[] for _ in range(self.epochs)]
        noise: list[Any] = []
        for epoch, batches in self.steps(run):
            for batch in batches or []:
                epochs[epoch] += self.ids(batch)
                noise += map(str, map(bits, self.noise(batch) or []))
        assert len(set(noise)) == len(noise), "a sample's random numbers differ from any other's, in every epoch"
        if self.length is None:
            return
        assert run.taken >= 2 * self.epochs, "there are steps to resume from in every epoch"
        if self.tail is Tail.EVEN and self.of_one_length:
            assert [len(ids) for ids in epochs] == [self.length] * self.epochs
        if self.unique and self.tail is not Tail.CARRY:
            assert [len(set(ids)) for ids in epochs] == [len(ids) for ids in epochs]

    def test_ranks_have_equal_states_where_the_state_is_saved_once(self, folder: Path) -> None:
        run = self.begun(Topology(world_size=max(self.world_sizes)), folder)
        for _ in range(2):
            states = bits(run.point().states)
            if run.loaders[0].sharing is Sharing.REPLICATED:
                assert states == states[:1] * len(states)
            assert {loader.sharing for loader in run.loaders} == {run.loaders[0].sharing}
            run.step()

    def test_it_neither_draws_from_the_global_generators_nor_depends_on_them(
        self, folder: Path, capabilities: Capabilities
    ) -> None:
        if capabilities.randomness is Randomness.OWN:
            pytest.skip("says that its random numbers are its own doing")
        whole, _ = self.record(ALONE, folder)
        run = self.begun(ALONE, folder)
        disturbed = []
        while not self.over(run):
            before, epoch = global_rng(), run.ended
            batches = run.step()
            assert global_rng() == before
            disturbed += [] if batches is None else [(epoch, list(map(self.content, batches)))]
            draw()
        assert disturbed == whole

    def test_set_epoch_before_each_epoch_changes_nothing(self, folder: Path) -> None:
        whole, _ = self.record(ALONE, folder)
        run = self.begun(ALONE, folder)
        told = []
        while not self.over(run):
            if len(told) == run.ended:
                told.append(run.ended)
                run.loaders[0].set_epoch(run.ended)
            epoch, batches = run.ended, run.step()
            told_of = [] if batches is None else [(epoch, list(map(self.content, batches)))]
            assert told_of == whole[run.taken - len(told_of) : run.taken]
        assert run.taken == len(whole)

    # -- a resume at the same topology is exact

    def test_it_replays_from_every_step_of_three_epochs(self, folder: Path, topology: Topology) -> None:
        whole, points = self.record(topology, folder)
        wrong = []
        for point in points:
            # to start workers takes long: of the rest of the run, they do this epoch and the next
            epochs = min(self.epochs, point.ended + 2) if topology.num_workers else self.epochs
            expected = [(epoch, content) for epoch, content in whole[point.taken :] if epoch < epochs]
            if self.rest(self.resumed(point, topology, folder), epochs) != expected:
                wrong.append((point.taken, point.ended))
        assert wrong == []

    def test_it_goes_on_when_each_run_takes_one_step(self, folder: Path, topology: Topology) -> None:
        self.epochs = EPOCHS
        whole, points = self.record(topology, folder)
        point, seen = points[0], []
        while len(seen) < len(whole) or point.ended < points[-1].ended:
            run = self.resumed(point, topology, folder)
            epoch, batches = next(self.steps(run))
            if batches is not None:
                seen.append((epoch, list(map(self.content, batches))))
            point = run.point()
        assert seen == whole

    def test_a_state_is_the_same_when_saved_twice_and_is_not_changed_by_going_on(self, folder: Path) -> None:
        run = self.begun(ALONE, folder)
        loader = run.loaders[0]
        for _ in self.steps(run):
            state, told_later = loader.state_dict(), loader.moment()
            saved = bits(stored(state))
            assert bits(stored(loader.state_dict())) == saved
            run.step()
            assert bits(stored(state)) == bits(stored(told_later())) == saved

    def test_a_loaded_state_is_the_state_that_was_saved(self, folder: Path) -> None:
        for point in self.record(ALONE, folder)[1]:
            first = self.resumed(point, ALONE, folder).point()
            second = self.resumed(first, ALONE, folder)
            assert bits(second.point().states) == bits(first.states)

    def test_the_last_of_two_loads_counts(self, folder: Path) -> None:
        whole, (first, second) = self.middle(folder)
        for points in ([first, second], [second, first], [first, first]):
            run = self.begun(ALONE, folder)
            for point in points:
                run.load(point)
            assert self.rest(run) == whole[points[-1].taken :]

    def test_it_loads_into_a_loader_that_has_been_iterated(self, folder: Path, topology: Topology) -> None:
        self.epochs = EPOCHS
        whole, points = self.record(topology, folder)
        for taken, point in [(1, points[2]), (len(whole) // 2 + 1, points[1])]:
            run = self.begun(topology, folder)
            while run.taken < taken:
                run.step()
            run.load(point)
            assert self.rest(run) == whole[point.taken :]

    def test_set_epoch_after_a_load_keeps_the_position(self, folder: Path) -> None:
        whole, points = self.record(ALONE, folder)
        for point in points:
            run = self.resumed(point, ALONE, folder)
            for loader in run.loaders:
                loader.set_epoch(loader.epoch)
            assert self.rest(run) == whole[point.taken :]

    def test_the_end_of_an_epoch_leads_into_the_next_however_it_is_loaded(self, folder: Path) -> None:
        whole, points = self.record(ALONE, folder)
        for last, end in itertools.pairwise(points):
            if end.ended == last.ended:
                continue
            left, held = self.begun(ALONE, folder), self.begun(ALONE, folder)
            left.loaders[0].load_epoch_end(last.states[0])
            held.loaders[0].load_exhausted(end.states[0])
            assert list(held.loaders[0]) == []
            for run in (left, held):
                run.ended, run.taken = end.ended, end.taken
                assert self.rest(run) == whole[end.taken :]

    @pytest.mark.parametrize("behind", [0, 1, 2])
    def test_a_state_from_before_the_last_batches_replays_them(self, folder: Path, behind: int) -> None:
        whole, _ = self.record(ALONE, folder)
        run = self.begun(ALONE, folder)
        taken = 0  # in this epoch
        for _, batches in self.steps(run):
            taken = 0 if batches is None else taken + 1
            if taken >= max(1, behind):
                point = run.point(behind)
                assert self.rest(self.resumed(point, ALONE, folder)) == whole[point.taken :]

    def test_another_seed_is_refused_or_gives_way_to_the_saved_one(self, folder: Path) -> None:
        whole, (_, point) = self.middle(folder)
        run = Ranks([self.make(folder=folder, seed=4)])
        expected = self.rest(Ranks([self.make(folder=folder, seed=4)]))
        try:
            run.load(point)
        except CheckpointMismatchError:
            assert self.rest(run) == expected
        else:
            assert self.rest(run) == whole[point.taken :]

    # -- SIGKILL

    def test_exactly_once_under_sigkill_with_prefetch_and_a_slow_consumer(
        self, folder: Path, capabilities: Capabilities, tmp_path: Path
    ) -> None:
        topology = WITH_WORKERS if any(self.workers) else ALONE
        self.epochs = EPOCHS
        whole, points = self.record(topology, folder)
        chance = random.Random(f"{type(self).__qualname__} {os.environ.get(KILLS)}")
        record = Record(tmp_path / "record")
        workers = topology.num_workers
        for _ in range(int(os.environ.get(KILLS, 1))):
            taken = len(record.read().steps)
            kill = {"step": chance.randint(taken, len(whole)), "seconds": chance.uniform(0, 0.02)}
            self._consume(folder, tmp_path, num_workers=workers, kill=kill)
            if workers and capabilities.num_workers is Change.ELASTIC:
                workers = 3 - workers
        self._consume(folder, tmp_path, num_workers=workers, kill=None)
        assert record.read().steps == [(epoch, ranks[0]) for epoch, ranks in whole]
        end = dataclasses.replace(points[-1], states=[record.read().state])
        if not self.ends_alike:
            self.epochs = EPOCHS + 1
            run, other = (self.resumed(point, topology, folder) for point in (end, points[-1]))
            assert self.rest(run) == self.rest(other)
            return
        expected = points[-1].states[0]
        if workers != topology.num_workers and "topology" in expected:  # it says at which it was saved
            expected = {**expected, "topology": {**expected["topology"], "num_workers": workers}}
        assert bits(stored(end.states[0])) == bits(expected)

    def _consume(self, data: Path, folder: Path, *, num_workers: int, kill: dict[str, Any] | None) -> None:
        case = f"{type(self).__module__}:{type(self).__qualname__}"
        arguments = {"case": case, "data": data, "num_workers": num_workers, "epochs": EPOCHS, "kill": kill}
        launch = Launch(function="tests.killed_consumer:consume", arguments=arguments, world_size=1, folder=folder)
        assert zygote().run(launch) == (kill is not None)

    # -- changes of topology

    def test_a_change_that_is_not_allowed_is_refused_and_changes_nothing(
        self, folder: Path, capabilities: Capabilities
    ) -> None:
        _, (point, _) = self.middle(folder)
        for field, other in self._changes():
            loader = self.loader(other, folder)
            if loader.topology.get(field) == self.make(folder=folder).topology.get(field):
                continue  # it has no such thing
            if field not in capabilities.fixed():
                loader.load_state_dict(point.of_rank(0))
                continue
            expected = self.rest(Ranks([self.loader(other, folder)]))
            for taken in (0, 1):
                run = Ranks([self.loader(other, folder)])
                seen = [(0, list(map(self.content, run.step() or []))) for _ in range(taken)]
                for refuses in (run.loaders[0].check, run.loaders[0].load_state_dict):
                    with pytest.raises(CheckpointMismatchError, match=self.called.get(field, field)):
                        refuses(point.of_rank(0))
                assert seen + self.rest(run) == expected

    def _changes(self) -> Iterator[tuple[str, Topology]]:
        tried = {"world_size": self.world_sizes, "num_workers": self.workers, "batch_size": self.batch_sizes}
        for field, values in tried.items():
            for value in values:
                if value != getattr(ALONE, field):
                    yield field, dataclasses.replace(ALONE, **{field: value})
                    break

    def test_a_chain_of_changes_keeps_what_is_declared(self, folder: Path, capabilities: Capabilities) -> None:
        large = EXAMPLES in os.environ
        chains = chains_of(
            capabilities,
            world_sizes=self.world_sizes,
            num_workers=self.workers if large else self.workers[:1],  # a worker starts more slowly than a chain runs
            batch_sizes=self.batch_sizes,
        )

        @settings(
            max_examples=int(os.environ.get(EXAMPLES, 15)),
            deadline=None,
            derandomize=not large,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(legs=chains)
        def check(legs: list[Leg]) -> None:
            self._check_chain(legs, capabilities, folder)

        check()

    def test_a_chain_of_changes_with_workers_keeps_what_is_declared(
        self, folder: Path, capabilities: Capabilities
    ) -> None:
        most, least, world_size = max(self.workers), min(self.workers), max(self.world_sizes)
        sizes = self.batch_sizes
        legs = [
            Leg(topology=Topology(world_size=min(2, world_size), num_workers=most, batch_size=sizes[0]), steps=1),
            Leg(topology=Topology(world_size=1, num_workers=least, batch_size=sizes[-1]), steps=0),
            Leg(topology=Topology(world_size=world_size, num_workers=least, batch_size=min(sizes)), steps=1),
            Leg(topology=Topology(world_size=1, num_workers=most, batch_size=sizes[0]), steps=1),
        ]
        self._check_chain(allowed(legs, capabilities), capabilities, folder)

    def test_samples_too_few_for_all_ranks_are_not_lost_by_another_topology(
        self, folder: Path, capabilities: Capabilities
    ) -> None:
        """An epoch that one world size has ended would have had a step left for another."""
        length, world_size = self.length or 0, max(self.world_sizes)
        size = next((size for size in self.batch_sizes if 0 < length % size < world_size), self.batch_sizes[0])
        few, many = Topology(batch_size=size), Topology(world_size=world_size, batch_size=size)
        legs = [Leg(topology=few, steps=length // size), Leg(topology=many, steps=1), Leg(topology=few, steps=0)]
        self._check_chain(allowed(legs, capabilities), capabilities, folder)

    def _check_chain(self, legs: list[Leg], capabilities: Capabilities, folder: Path) -> None:
        def samples(batch: Any) -> list[Any]:
            noise = self.noise(batch) if capabilities.randomness is Randomness.SAMPLE else None
            return list(self.ids(batch)) if noise is None else list(zip(self.ids(batch), map(str, noise), strict=True))

        # ranks that have to stay the same ones may each have an order of their own
        streams = legs[0].topology.world_size if "world_size" in capabilities.fixed() else 1
        seen, whole = Account(streams), Account(streams)
        run = self.begun(legs[0].topology, folder)
        for leg, following in itertools.zip_longest(legs, legs[1:]):
            left = leg.steps if following else -1  # the last runs to the end
            while left and run.ended < EPOCHS and (self.length or run.taken < ENDLESS_STEPS):
                seen.take(run, leg.topology, samples)
                left -= 1
            if following:
                run = self.resumed(run.point(), following.topology, folder)
                seen.resumes += 1
        run = self.begun(legs[0].topology, folder)
        while (self.length and run.ended <= EPOCHS) or len(whole.all()[0]) < len(seen.all()[0]):
            whole.take(run, legs[0].topology, samples)
        check_chain(seen, whole, legs, capabilities, self.tail, evens_out=self.evens_out, piece=self.piece)


def main() -> int:
    parser = argparse.ArgumentParser(description="The conformance suite in its large setting.")
    parser.add_argument("--examples", type=int, default=500, help="chains of changes, for each loader")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs, for each loader")
    parser.add_argument("-n", default="1", help="loaders at the same time")
    parser.add_argument("-k", default="", help="which loaders, as pytest's -k")
    chosen = parser.parse_args()
    large = {EXAMPLES: str(chosen.examples), KILLS: str(chosen.kills)}
    which = "(chain_of_changes_keeps or sigkill)" + (f" and ({chosen.k})" if chosen.k else "")
    modules = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "Conformance" in path.read_text()]
    options = ["-v", "-o", "timeout=0", "-n", chosen.n, "--dist", "loadscope", "-k", which]
    command = [sys.executable, "-m", "pytest", *options, *modules]
    return subprocess.call(command, cwd=ROOT, env={**os.environ, **large})


if __name__ == "__main__":
    sys.exit(main())
