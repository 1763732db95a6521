"""Chooses, for a loader of any kind, how its position is kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from lightning_resume import _distributed
from lightning_resume.data import order
from lightning_resume.data.adapters.iterable import IterableAdapter, WorkersAdapter
from lightning_resume.data.adapters.protocol import LoaderAdapter, is_from
from lightning_resume.data.adapters.registry import adapter_for
from lightning_resume.data.fingerprint import fingerprint
from lightning_resume.data.handshake import is_of_group
from lightning_resume.data.loader import BatchRequests, ElasticLoader, Share, enough_for_all, in_order
from lightning_resume.data.position import Resumable
from lightning_resume.data.source import UNSIZED, Permuted, Replayed, Source
from lightning_resume.data.stream import ResumableIterable, StreamLoader
from lightning_resume.data.weighted import WeightedSampler
from lightning_resume.state.component import Sharing


def make_resumable(
    loader: Iterable[Any],
    *,
    rank: int | None = None,
    world_size: int | None = None,
    seed: int | None = None,
    tail: order.Tail | str | None = None,
    shared: bool = False,
    strict: bool = True,
) -> Any:
    """Returns a loader that stands in for ``loader`` and knows its position.

    Map-style loaders get the elastic order; iterable datasets, loaders of other packages and other iterables keep
    their own (``capabilities`` says what a resume of them can do). The result has the attributes of ``loader`` and is
    an instance of its class; ``loader`` itself is not changed.

    Args:
        loader: A ``DataLoader``, or any iterable over batches that can be iterated over again.
        rank: This process's index among those that see different data; by default that of the loader's
            ``DistributedSampler``, else its rank in the process group.
        world_size: Number of processes that see different data; by default as for ``rank``.
        seed: Key of the order and of the samples' random numbers. By default what the loader's sampler or its
            ``generator`` was seeded with, or ``seed_everything``, or torch's initial seed, of rank 0 where ranks share
            one order.
        tail: What becomes of the samples that do not fill a step; by default as ``drop_last`` says.
        shared: Divide each step over the ranks although no ``DistributedSampler`` asks for it.
        strict: ``False`` lets a load go on at another world size, or number of workers or samples in a batch, where
            samples may then repeat or be lost; it warns about which. By default that is refused.

    Where rank and world size are those of the process group and the ranks share one order, all ranks must call this:
    they compare what the order depends on.

    Raises:
        ValueError: The dataset has fewer samples than there are ranks.
        OutOfStepError: The ranks' loaders differ; raised on all of them.
    """
    given = not (rank is None and world_size is None)
    rank, world_size = _share(loader, rank, world_size)
    if isinstance(loader, Resumable):
        if given:
            loader.share_by_default(rank=rank, world_size=world_size)
        loader.agree()
        return loader
    loader = in_order(loader)
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"{loader!r} is no loader: pass a DataLoader, or an iterable over batches.")
    tail = None if tail is None else order.Tail(tail)
    adapter = adapter_for(loader) or next((known for known in _FALLBACKS if known.matches(loader)), None)
    if adapter is None:
        assert isinstance(loader, DataLoader)
        made: Resumable = _elastic(loader, rank=rank, world_size=world_size, seed=seed, tail=tail, shared=shared)
        if (
            not given
            and made.sharing is Sharing.PER_RANK
            and _is_stock(_sampling(loader)[0], RandomSampler, SequentialSampler)
        ):
            warnings.warn(_NOT_DIVIDED.format(world_size=world_size), stacklevel=2)
    else:
        made = _stream(loader, adapter(loader, rank=rank, world_size=world_size, seed=_seed(loader, seed)[0]))
    made.strict = strict
    made.agree()
    return made


_NOT_DIVIDED = (
    "Each of the {world_size} ranks sees all samples of this DataLoader: it has no DistributedSampler. To divide them,"
    " give it one, or use ResumableDataLoader. If this is what you want, pass rank and world_size."
)


def _share(loader: Any, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, as the loader's sampler was given them, or those of the process group."""
    sampler = getattr(loader, "sampler", None)
    if rank is not None or world_size is not None:
        mine = _distributed.rank() if rank is None else rank
        return mine, (_distributed.world_size() if world_size is None else world_size)
    # classes derived need not have called its __init__
    if isinstance(sampler, DistributedSampler) and hasattr(sampler, "rank"):
        return sampler.rank, sampler.num_replicas
    of_group = _distributed.rank(), _distributed.world_size()
    return of_group if is_of_group(*of_group) else (0, 1)


_FALLBACKS: tuple[type[LoaderAdapter], ...] = (IterableAdapter, WorkersAdapter)


def _stream(loader: Any, adapter: LoaderAdapter) -> StreamLoader:
    stream: StreamLoader = _stand_in(StreamLoader, loader) if isinstance(loader, DataLoader) else ResumableIterable()
    stream.attach(loader, adapter)
    return stream


def _elastic(
    loader: DataLoader[Any], *, rank: int, world_size: int, seed: int | None, tail: order.Tail | None, shared: bool
) -> ElasticLoader:
    key, explicit = _seed(loader, seed)
    custom_batches = loader.batch_sampler is not None and not _is_stock(loader.batch_sampler, BatchSampler)
    sampler, batch_size = _sampling(loader)
    # what each rank draws for itself can only be gone on with by that rank: it is an order of its own
    own = custom_batches or (world_size > 1 and not shared and not _is_shared(sampler))
    source: Source = _replayed(sampler, key) if own else _shared_source(loader, sampler, key)
    if custom_batches:
        source = BatchRequests(source)
    share = Share(rank=rank, world_size=world_size, batch_size=batch_size)
    if own:
        share = Share(batch_size=batch_size)
    if not source.lazy:
        enough_for_all(source.length, share.world_size)
    elastic: ElasticLoader = _stand_in(ElasticLoader, loader)
    elastic.attach(
        loader,
        source=source,
        share=share,
        ranks=world_size if own else None,
        explicit_seed=explicit,
        start=order.OrderState(
            seed=key,
            length=UNSIZED if source.lazy else source.length,
            tail=_tail(loader, tail),
            shuffle=source.shuffle,
            fingerprint=fingerprint(loader.dataset),
        ),
    )
    bind = getattr(loader.dataset, "bind", None)
    if callable(bind):
        bind(elastic)
    return elastic


def _sampling(loader: DataLoader[Any]) -> tuple[Any, int]:
    """What decides on the order, and how many samples (or custom batches) of it a batch takes."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return loader.sampler, 1
    if not _is_stock(batches, BatchSampler):
        return batches, 1
    # not the loader's own: of one that is given a batch sampler, sampler and batch_size mean nothing
    return batches.sampler, batches.batch_size


def _tail(loader: DataLoader[Any], tail: order.Tail | None) -> order.Tail:
    """What becomes of the samples that do not fill a step."""
    unbatched, custom = loader.batch_sampler is None, not _is_stock(loader.batch_sampler, BatchSampler)
    tail = tail or (order.Tail.DROP if _drops_last(loader) and (unbatched or not custom) else order.Tail.EVEN)
    # a sample that comes without a batch, `batch_size=None`, has no place for another of the tail
    return order.Tail.CARRY if unbatched and tail is order.Tail.EVEN else tail


def _shared_source(loader: DataLoader[Any], sampler: Any, key: int) -> Source:
    """The order that all ranks share, of which each takes its part."""
    own_order = getattr(loader.dataset, "order_source", None)
    if callable(own_order) and (_takes_all_once(sampler, loader) or _asks_to_share(sampler)):
        return own_order(shuffle=_shuffles(sampler))  # type: ignore[no-any-return]
    if isinstance(sampler, WeightedSampler):
        return sampler.order_source()
    if _is_stock(sampler, DistributedSampler):
        return Permuted(_length(loader), shuffle=sampler.shuffle)
    if isinstance(sampler, DistributedSampler):  # Lightning's wrapper of the user's own sampler
        return _shared_source(loader, sampler.dataset._sampler, key)  # type: ignore[attr-defined]
    if _is_stock(sampler, SequentialSampler):
        return Permuted(_length(loader), shuffle=False)
    if _is_stock(sampler, RandomSampler) and _takes_all_once(sampler, loader):
        return Permuted(_length(loader), shuffle=True)
    return _replayed(sampler, key)


def _takes_all_once(sampler: Any, loader: DataLoader[Any]) -> bool:
    """Whether ``sampler`` is one of torch's that give every sample once an epoch."""
    if _is_stock(sampler, RandomSampler):
        # its length may take reading: asked for only where the user has chosen a number
        chosen = sampler._num_samples
        return not sampler.replacement and (chosen is None or chosen == _length(loader))
    return _is_stock(sampler, DistributedSampler, SequentialSampler)


def _shuffles(sampler: object) -> bool:
    return bool(getattr(sampler, "shuffle", _is_stock(sampler, RandomSampler)))


def _is_stock(sampler: object, *classes: type) -> bool:
    """Whether ``sampler`` is just one of torch's, or what torchdata's loader has in its place; not a class derived."""
    kind = type(sampler)
    if kind.__module__ == "torchdata.stateful_dataloader.sampler":
        return kind.__name__.removeprefix("Stateful") in {cls.__name__ for cls in classes}
    return kind in classes


def _is_shared(sampler: object) -> bool:
    """Whether Lightning, or the user with torch's class, asked for one order that is divided over the ranks."""
    if _is_stock(sampler, DistributedSampler) or _asks_to_share(sampler):
        return True
    return hasattr(getattr(sampler, "dataset", None), "_sampler")


def _asks_to_share(sampler: object) -> bool:
    return getattr(sampler, "shares_with_ranks", False) is True


def _replayed(sampler: Iterable[Any], key: int) -> Source:
    try:
        length = len(sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        length = UNSIZED
    return Replayed(sampler, key, length=length)


def _length(loader: DataLoader[Any]) -> int:
    if not isinstance(loader.dataset, Sized):
        raise TypeError(
            f"The dataset {type(loader.dataset).__name__} has no `__len__`. Add one, or make it an IterableDataset."
        )
    return len(loader.dataset)


def _drops_last(loader: DataLoader[Any]) -> bool:
    return bool(getattr(loader.batch_sampler, "drop_last", False) or getattr(loader.sampler, "drop_last", False))


def _seed(loader: Any, seed: int | None) -> tuple[int, bool]:
    """The key of the order, and whether anybody chose it."""
    if seed is not None:
        return seed, True
    sampler = getattr(loader, "sampler", None)
    generator = getattr(loader, "generator", None)
    # torchdata's sampler makes itself a generator, which differs between ranks, where the user gave none
    if generator is None and not is_from(sampler, "torchdata", "RandomSampler"):
        generator = getattr(sampler, "generator", None)
    if isinstance(generator, torch.Generator):
        return generator.initial_seed() & SEEDS, True
    chosen = os.environ.get("PL_GLOBAL_SEED")
    sampler_seed = getattr(sampler, "seed", None)
    if isinstance(sampler_seed, int):  # DistributedSampler: Lightning seeds it from PL_GLOBAL_SEED, else with 0
        return sampler_seed & SEEDS, chosen is not None or sampler_seed != 0
    return (int(chosen), True) if chosen is not None else (torch.initial_seed() & SEEDS, False)


SEEDS = (1 << 63) - 1
"""Those of the order; torch's may be larger."""


def _stand_in(cls: type, loader: object) -> Any:
    """An instance of both ``cls`` and the user's class, so that the user's ``isinstance`` checks go on working."""
    users: Any = type(loader)
    # made anew, as Lightning makes loaders to predict with, it is the user's and nothing of ours
    namespace = {"__new__": lambda _, *args, **kwargs: users(*args, **kwargs)}
    return object.__new__(type(f"{cls.__name__}[{users.__name__}]", (cls, users), namespace))
