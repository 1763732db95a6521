"""Map-style datasets as streams, and streams mixed by weight."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, get_worker_info

from lightning_resume import BatchByLength, Packing, ShardedDataset, StreamMixture, sample_rng, stream_of
from lightning_resume.errors import CheckpointMismatchError
from tests.streams import FORMATS, Ranks, noisy, number_of, plain, stored, write
from tests.test_streamed_stages import chained, odd, replays
from tests.toy_data import Noisy, draw

LENGTH = 23

pytestmark = pytest.mark.filterwarnings("ignore:.* lanes have nothing to read:UserWarning")  # of the two tar files


# -- map-style datasets


class Documents(Dataset[Any]):
    """Lists of numbers, and random ones in them."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[int]:
        return [index + 100] * (index % 6) + [int(draw() * 1000) + 1000]


OPTIONS: dict[str, dict[str, Any]] = {
    "samples": {"dataset": Noisy(LENGTH)},
    "in order": {"dataset": Noisy(LENGTH), "shuffle": False},
    "filter": {"dataset": Noisy(LENGTH), "filter": lambda sample: sample[0] % 3 > 0},
    "packing": {"dataset": Documents(), "group": Packing(8, eos=1)},
    "by length": {"dataset": Documents(), "group": BatchByLength(window=10)},
    "by tokens": {"dataset": Documents(), "group": BatchByLength(max_tokens=20, window=10)},
}


def of(name: str, **options: Any) -> Any:
    settings = {"shuffle": True, "seed": 3, "collate_fn": list, "lanes": 2, "batch_size": 3, **OPTIONS[name], **options}
    return stream_of(settings.pop("dataset"), **settings)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_map_style_dataset_replays_from_every_batch(name: str) -> None:
    replays(functools.partial(of, name))


def test_random_numbers_do_not_depend_on_workers_lanes_or_batches() -> None:
    def by_sample(**options: Any) -> dict[int, Any]:
        return {sample[0]: plain(sample[1]) for batch in of("samples", **options) for sample in batch}

    alone = by_sample()
    assert len(set(map(str, alone.values()))) == len(alone) == LENGTH
    assert by_sample(num_workers=2) == by_sample(lanes=5, batch_size=7) == alone
    assert by_sample(shuffle=False) == alone


def test_dataset_filter_and_transform_draw_from_different_numbers() -> None:
    drawn: dict[str, list[float]] = {"dataset": [], "filter": [], "transform": []}

    class Recording(Noisy):
        def __getitem__(self, index: int) -> Any:
            drawn["dataset"].append(float(sample_rng().random()))
            return index

    def chosen(_sample: Any) -> bool:
        drawn["filter"].append(float(sample_rng().random()))
        return True

    def made(sample: Any) -> Any:
        drawn["transform"].append(float(sample_rng().random()))
        return sample

    list(stream_of(Recording(5), filter=chosen, transform=made, collate_fn=list))
    together = [number for numbers in drawn.values() for number in numbers]
    assert len(together) == len(set(together)) == 15


LEGS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(legs=LEGS, lanes=st.integers(1, 4))
def test_filtered_map_style_samples_come_once_through_every_change(
    legs: list[tuple[int, int, int]], lanes: int
) -> None:
    read = lambda steps: [sample[0] for batches in steps for batch in batches for sample in batch]  # noqa: E731
    seen, left = chained(functools.partial(of, "filter", lanes=lanes), legs, read)
    assert sorted(seen + left) == [number for number in range(LENGTH) if number % 3]


def test_another_dataset_is_refused() -> None:
    state = stored(of("samples").state_dict())
    with pytest.raises(CheckpointMismatchError, match="not the same length"):
        stream_of(Noisy(5), shuffle=True, seed=3).load_state_dict(state)


def test_a_map_style_stream_has_the_users_dataset_in_workers() -> None:
    loader = stream_of(Named(), num_workers=1, worker_init_fn=set_name, collate_fn=list)
    assert [sample for batch in loader for sample in batch] == [0] * 4
    assert isinstance(loader.dataset.dataset, Named)


class Named(Dataset[Any]):
    name = -1

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.name


def set_name(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert info.num_workers == 1
    info.dataset.dataset.name = worker_id


# -- mixtures


def parts(folder: Path, sizes: tuple[tuple[int, ...], ...] = ((30, 20), (9,), (16, 4))) -> list[Any]:
    """A JSON lines, a text and a tar dataset whose samples are numbered from 0, 1000 and 2000."""
    made = []
    for number, (name, shards) in enumerate(zip(("jsonl", "text", "tar"), sizes, strict=True)):
        path = folder / name
        if not path.exists():
            write(path, name, shards, first=1000 * number)
        options = {"format": FORMATS[name][0], "transform": noisy, "window": 4}
        made.append(ShardedDataset.create_dataloader(path, **options)[1])
    return made


def mix(folder: Path, *, weights: Any = (6, 1, 3), stop: str = "first_exhausted", seed: int = 3, **options: Any) -> Any:
    settings = {"batch_size": 4, "collate_fn": list, "lanes": 2, **options}
    return StreamMixture(parts(folder), weights, seed=seed, stop=stop).create_dataloader(**settings)


def numbers(steps: Any) -> list[int]:
    return [number_of(sample) for batches in steps for batch in batches for sample in batch]


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_a_mixture_replays_from_every_batch(tmp_path: Path, stop: str) -> None:
    replays(functools.partial(mix, tmp_path, stop=stop))


def test_a_mixture_of_packed_streams_replays(tmp_path: Path) -> None:
    tokens = lambda sample: [number_of(sample)] * 3  # noqa: E731
    for name in ("jsonl", "text"):
        write(tmp_path / name, name)
    made = [
        ShardedDataset.create_dataloader(tmp_path / name, format=name, transform=tokens)[1]
        for name in ("jsonl", "text")
    ]
    replays(lambda: StreamMixture(made).create_dataloader(group=Packing(8), lanes=2, collate_fn=list))


def test_weights_are_exact_in_every_block_of_every_lane(tmp_path: Path) -> None:
    sizes = ((9000,), (3000,), (3000,))
    made = [stream(tmp_path, number, *shards) for number, shards in enumerate(sizes)]
    loader = StreamMixture(made, [0.5, 0.25, 0.25]).create_dataloader(batch_size=1000, collate_fn=list)
    for _, batch in zip(range(4), loader, strict=False):
        assert Counter(number // 10000 for number in batch) == {0: 500, 1: 250, 2: 250}


def stream(folder: Path, number: int, length: int) -> Any:
    path = folder / f"{number}.txt"
    path.write_text("\n".join(str(number * 10000 + n) for n in range(length)))
    return ShardedDataset.create_dataloader(path, format="text", transform=int)[1]


def test_an_epoch_ends_with_the_first_the_last_or_never(tmp_path: Path) -> None:
    first = numbers([list(mix(tmp_path, lanes=1))])
    assert len(first) == len(set(first))
    assert max(Counter(number // 1000 for number in first).values()) <= 50
    every = Counter(numbers([list(mix(tmp_path, lanes=1, stop="all_exhausted"))]))
    assert set(every) == {*range(50), *range(1000, 1009), *range(2000, 2020)}
    assert max(every[number] for number in range(50)) >= 2
    loader = mix(tmp_path, lanes=1, stop="never")
    endless = [sample for _, batch in zip(range(200), loader, strict=False) for sample in batch]
    assert len(endless) == 800
    once = {str(plain(sample)) for sample in endless}
    assert len(once) == 800, "each pass has random numbers of its own"


def test_an_endless_mixture_goes_on_from_any_batch(tmp_path: Path) -> None:
    loader = mix(tmp_path, stop="never")
    batches, states = [], []
    for _, batch in zip(range(60), loader, strict=False):
        batches.append(plain(batch))
        states.append(stored(loader.state_dict()))
    for taken in (1, 7, 30, 59):
        again = mix(tmp_path, stop="never")
        again.load_state_dict(states[taken - 1])
        assert [plain(batch) for _, batch in zip(range(60 - taken), again, strict=False)] == batches[taken:]


@settings(max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(legs=LEGS, lanes=st.integers(1, 3))
def test_a_mixture_gives_the_same_samples_through_every_change(
    tmp_path: Path, legs: list[tuple[int, int, int]], lanes: int
) -> None:
    create = functools.partial(mix, tmp_path, lanes=lanes)
    seen, left = chained(create, legs, numbers)
    assert sorted(seen + left) == sorted(numbers(Ranks(create, 1).epoch()))


def test_map_style_and_parquet_datasets_can_be_in_a_mixture(tmp_path: Path) -> None:
    write(tmp_path / "p", "parquet", (10, 10))
    made = [ShardedDataset.from_path(tmp_path / "p", columns=["id"]), Noisy(20)]
    loader = StreamMixture(made, [1, 1]).create_dataloader(batch_size=2, collate_fn=list)
    kinds = Counter(type(sample).__name__ for batch in loader for sample in batch)
    assert min(kinds["dict"], kinds["tuple"]) >= 10
    assert max(kinds["dict"], kinds["tuple"]) == 20


def test_filters_of_the_parts_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "a", "jsonl", (20,))
    made = ShardedDataset.create_dataloader(tmp_path / "a", format="jsonl", filter=odd)[1]
    loader = StreamMixture([made]).create_dataloader(collate_fn=list)
    assert sorted(number_of(sample) for batch in loader for sample in batch) == list(range(1, 20, 2))


def test_a_dataset_without_a_share_in_a_lane_is_left_out_there(tmp_path: Path) -> None:
    loader = mix(tmp_path, lanes=3, stop="all_exhausted")  # the tar dataset has two files
    assert set(numbers([list(loader)])) == {*range(50), *range(1000, 1009), *range(2000, 2020)}


@pytest.mark.parametrize(
    ("change", "field"),
    [({"weights": (5, 1, 3)}, "weights"), ({"seed": 4}, "seed"), ({"stop": "never"}, "stop")],
)
def test_another_mixture_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    state = stored(mix(tmp_path).state_dict())
    with pytest.raises(CheckpointMismatchError, match=f"not the same {field}"):
        mix(tmp_path, **change).load_state_dict(state)


def test_a_change_of_files_names_the_part(tmp_path: Path) -> None:
    state = stored(mix(tmp_path).state_dict())
    write(tmp_path / "text", "text", (3,), first=5000, begin=8)
    with pytest.raises(
        CheckpointMismatchError, match=r"files of dataset 1 of the mixture[^!]*1 added \(shard-8\.txt\)"
    ):
        mix(tmp_path).load_state_dict(state)


def test_what_cannot_be_mixed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one weight for each"):
        StreamMixture(parts(tmp_path), [1])
    with pytest.raises(TypeError, match="Dataset 0 of the mixture is a generator"):
        StreamMixture([iter_of()]).create_dataloader()
    with pytest.raises(TypeError, match="read by its loader"):
        iter(StreamMixture(parts(tmp_path)))


def iter_of() -> Any:
    yield torch.zeros(1)
