"""The random numbers of a sample: the same bits whatever makes it, and others for every sample and epoch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from lightning_resume import make_resumable, sample_rng
from lightning_resume.data.randomness import RandomStream, draws_nothing, keyed_seed
from lightning_resume.state import rng
from tests.simulated_ranks import bits, stored
from tests.toy_data import Noisy, plain, reseed

LENGTH = 18
EPOCHS = 2


def draw_each() -> list[int]:
    """64 bits or fewer from each generator that a user may draw from: a sample's own mark of each."""
    drawn = random.getrandbits(62), int(np.random.randint(2**62)), int(torch.randint(2**62, ()))
    return [*drawn, int(sample_rng().integers(2**62)), int(sample_rng().integers(2**62))]


class Drawing(Dataset[Any]):
    """Draws in the dataset, and again in a transform."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return index, draw_each() + draw_each()


class DrawingBatches(Drawing):
    """Fetches batches, and draws each sample's numbers from its own generator."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(index, [int(sample_rng(n).integers(2**62))]) for n, index in enumerate(indices)]


class DrawingStream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for index in range(LENGTH):
            yield index, draw_each()


def collate(samples: list[Any]) -> Any:
    return [index for index, _ in samples], [marks for _, marks in samples], draw_each()


def loader(dataset: Any = None, batch_size: int = 3, *, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    reseed(random.randrange(10**6))
    made = DataLoader(Drawing() if dataset is None else dataset, batch_size, collate_fn=collate, **options)
    return make_resumable(made, rank=rank, world_size=world_size, seed=3, shared=True)


Marks = dict[tuple[int, int], list[int]]


def marks(made: Any, epochs: int = EPOCHS) -> Marks:
    """The numbers drawn for each sample of each epoch."""
    return {
        (epoch, index): drawn
        for epoch in range(epochs)
        for indices, of_samples, _ in made
        for index, drawn in zip(indices, of_samples, strict=True)
    }


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


@pytest.fixture(scope="module")
def expected() -> Marks:
    return marks(loader(shuffle=True))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [3, 7])
def test_they_do_not_depend_on_forked_workers(workers: int, batch_size: int, expected: Marks) -> None:
    assert marks(loader(None, batch_size, shuffle=True, num_workers=workers)) == expected


def test_they_do_not_depend_on_spawned_workers(expected: Marks) -> None:
    # spawned once for both epochs and for what a resume goes on with
    made = loader(shuffle=True, num_workers=3, multiprocessing_context="spawn", persistent_workers=True)
    found: Marks = {}
    batches = []
    for epoch in range(EPOCHS):
        for indices, of_samples, of_batch in made:
            found |= {(epoch, index): drawn for index, drawn in zip(indices, of_samples, strict=True)}
            batches.append(of_batch)
    assert found == expected
    assert batches == [of_batch for made in [loader(shuffle=True)] for _ in range(EPOCHS) for _, _, of_batch in made]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 18])
def test_they_do_not_depend_on_ranks_or_batches(world_size: int, batch_size: int, expected: Marks) -> None:
    found: Marks = {}
    for rank in range(world_size):
        found |= marks(loader(None, batch_size, rank=rank, world_size=world_size, shuffle=True))
    assert found == expected


def test_they_do_not_depend_on_the_order(expected: Marks) -> None:
    assert marks(loader(shuffle=False)) == expected


def test_they_are_the_same_after_any_resume(expected: Marks) -> None:
    whole = loader(shuffle=True)
    for epoch in range(EPOCHS):
        for _ in whole:
            again = loader(None, 5, shuffle=True)
            again.load_state_dict(stored(whole.state_dict()))
            rest = {
                (epoch, index): drawn
                for indices, of_samples, _ in again
                for index, drawn in zip(indices, of_samples, strict=True)
            }
            assert rest.items() <= expected.items()


def test_all_differ_between_samples_epochs_and_batches() -> None:
    made = loader(shuffle=True)
    numbers = []
    for _ in range(3):
        for _, of_samples, of_batch in made:
            numbers += [number for drawn in [*of_samples, of_batch] for number in drawn]
    assert len(set(numbers)) == len(numbers) == 3 * (LENGTH * 10 + 6 * 5)


def test_numpy_and_torch_do_not_draw_the_same() -> None:
    """Both are the Mersenne Twister, and torch takes 32 bits of a seed."""
    for drawn in marks(loader()).values():
        assert len(set(drawn)) == 10


def test_collate_is_keyed_by_the_batch() -> None:
    def of_batches(**options: Any) -> list[Any]:
        return [of_batch for _, _, of_batch in loader(shuffle=True, **options)]

    alone = of_batches()
    assert of_batches(num_workers=3) == alone
    whole = loader(shuffle=True)
    for taken, _ in enumerate(whole, 1):
        again = loader(shuffle=True)
        again.load_state_dict(stored(whole.state_dict()))
        assert [of_batch for _, _, of_batch in again] == alone[taken:]


@pytest.mark.parametrize("batch_size", [1, 5, 18])
def test_a_dataset_that_fetches_batches_draws_for_its_nth_sample(batch_size: int) -> None:
    found = marks(loader(DrawingBatches(), batch_size, shuffle=True))
    assert found == marks(loader(DrawingBatches(), shuffle=True, num_workers=2))
    assert len({drawn[0] for drawn in found.values()}) == EPOCHS * LENGTH


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_draws_the_same_after_a_resume(workers: int) -> None:
    made = loader(DrawingStream(), num_workers=workers)
    seen = [plain(batch) for batch in made]
    whole = loader(DrawingStream(), num_workers=workers)
    for taken, _ in enumerate(whole, 1):
        again = loader(DrawingStream(), num_workers=workers)
        again.load_state_dict(stored(whole.state_dict()))
        assert [plain(batch) for batch in again] == seen[taken:]
        break
    numbers = [number for _, of_samples, of_batch in seen for drawn in [*of_samples, of_batch] for number in drawn]
    assert len(set(numbers)) == len(numbers)


def test_an_unbatched_sample_has_its_own() -> None:
    made = make_resumable(DataLoader(Drawing(), batch_size=None, shuffle=True), seed=3)
    found = {(epoch, index): drawn for epoch in range(EPOCHS) for index, drawn in made}
    assert found == marks(loader(shuffle=True))


def test_loaders_do_not_disturb_each_other(expected: Marks) -> None:
    found: Marks = {}
    for one, other in zip(loader(shuffle=True), loader(None, 4, shuffle=True), strict=False):
        for indices, of_samples, _ in (one, other):
            for index, drawn in zip(indices, of_samples, strict=True):
                assert drawn == expected[0, index]
                found[0, index] = drawn
    assert len(found) == LENGTH


class Nested(Drawing):
    """Iterates over another loader while it makes a sample."""

    def __getitem__(self, index: int) -> Any:
        first = int(sample_rng().integers(2**62))
        next(iter(loader()))
        return index, [first, int(sample_rng().integers(2**62))]


def test_a_loader_within_a_dataset_leaves_its_generator_alone(expected: Marks) -> None:
    for (epoch, index), drawn in marks(loader(Nested()), epochs=1).items():
        assert drawn == expected[epoch, index][3:5]


def test_outside_of_a_loader_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"no sample is being made. Call it in a dataset's __getitem__"):
        sample_rng()
    list(loader())
    with pytest.raises(RuntimeError, match="no sample is being made"):
        sample_rng(0)


class Failing(Drawing):
    def __getitem__(self, index: int) -> Any:
        raise KeyError(index)


def test_a_sample_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(KeyError):
        list(loader(Failing()))
    with pytest.raises(RuntimeError, match="no sample is being made"):
        sample_rng()


class Asking(Drawing):
    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask

    def __getitem__(self, index: int) -> Any:
        return index, self.ask()


@pytest.mark.parametrize("n", [1, -1])
def test_a_number_that_no_sample_has_is_refused(n: int) -> None:
    with pytest.raises(IndexError, match=rf"sample_rng\({n}\) was called where 1 samples are being made"):
        list(loader(Asking(lambda: sample_rng(n))))
    assert next(iter(loader(Asking(lambda: sample_rng(0) is sample_rng()))))[1] == [True] * 3


# -- the generators outside


@pytest.mark.parametrize("normals", [0, 1])
@pytest.mark.parametrize("around", [rng.apart, rng.preserved, RandomStream("a stream")])
def test_code_with_random_numbers_of_its_own_is_not_noticed_outside(
    around: Callable[[], contextlib.AbstractContextManager[None]], normals: int
) -> None:
    """NumPy draws two normal numbers at a time, and keeps one: it comes back, too."""
    reseed(7)
    np.random.randn(normals)
    expected = following()
    reseed(7)
    np.random.randn(normals)
    before = bits(rng.capture().to_plain())
    with contextlib.suppress(KeyError), around():
        rng.seed_all(1)
        np.random.randn(3), random.random(), torch.rand(2)
        with rng.apart():
            rng.seed_all(2)
            np.random.randn(1)
        raise KeyError
    assert bits(rng.capture().to_plain()) == before
    assert following() == expected


def following() -> Any:
    return bits([np.random.randn(3), [random.gauss(0, 1) for _ in range(3)], torch.randn(3)])


def test_what_is_seeded_apart_draws_what_it_would_draw_elsewhere() -> None:
    with rng.preserved():
        rng.seed_all(5)
        expected = following()
    np.random.randn(1)
    for _ in range(2):
        with rng.apart():
            rng.seed_all(5)
            assert following() == expected


def test_a_stream_goes_on_where_it_was_a_left_over_normal_number_included() -> None:
    with rng.preserved():
        rng.seed_all(keyed_seed("a stream"))
        expected = bits([np.random.randn(1) for _ in range(4)])
    stream, seen = RandomStream("a stream"), []
    for _ in range(4):
        np.random.randn(1)
        with stream():
            seen.append(np.random.randn(1))
    assert bits(seen) == expected


def test_what_is_known_to_draw_nothing_needs_no_seeds() -> None:
    tensors = TensorDataset(torch.arange(4))
    for known in (tensors, Subset(tensors, [1]), ConcatDataset([tensors, Subset(tensors, [0])]), default_collate):
        assert draws_nothing(known)
    for unknown in (Noisy(), Subset(Noisy(), [1]), ConcatDataset([tensors, Noisy()]), LikeTensors(torch.ones(1)), list):
        assert not draws_nothing(unknown)


class LikeTensors(TensorDataset):
    """May do anything."""


def test_tensors_come_as_they_are_and_leave_the_generators_alone() -> None:
    loader = make_resumable(DataLoader(TensorDataset(torch.arange(10)), 4, shuffle=True), seed=3)
    before = bits(rng.capture().to_plain())
    assert sorted(int(number) for [batch] in loader for number in batch) == list(range(10))
    assert bits(rng.capture().to_plain()) == before


@pytest.mark.parametrize("normals", [0, 1])
def test_numpys_state_is_read_as_numpy_reads_it(normals: int) -> None:
    np.random.seed(5)
    for drawn in (0, 3, 700):
        np.random.random(drawn)
        np.random.randn(normals)
        expected, found = np.random.get_state(legacy=False), rng.capture().numpy
        assert bits(found) == bits(expected)
        assert np.random.get_state(legacy=False)["state"]["pos"] == expected["state"]["pos"]


def test_another_bit_generator_than_numpys_own_is_read_by_numpy() -> None:
    with rng.apart():
        np.random.set_bit_generator(np.random.PCG64(3))
        assert rng.capture().numpy["bit_generator"] == "PCG64"
