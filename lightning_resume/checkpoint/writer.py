"""Writes one checkpoint: all ranks plan, each item is hashed and made durable as it is written, then the commit."""

from __future__ import annotations

import errno
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful

from lightning_resume._distributed import RemoteError, agree, all_gather_object, broadcast_object, on_rank_zero, rank
from lightning_resume.checkpoint.commit import Commit, begin, clean_leftovers
from lightning_resume.checkpoint.filesystem import HashedFile, or_warn, torch_save
from lightning_resume.checkpoint.layout import beside
from lightning_resume.checkpoint.manifest import ComponentEntry, Manifest, checked_json
from lightning_resume.checkpoint.names import LEAF_PREFIX, META_NAME
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path
from lightning_resume.checkpoint.shards import Written, write_shards
from lightning_resume.errors import CheckpointSaveError, MissingPackageError, NonFiniteWarning, StaleCheckpointWarning

_PACKAGES = {
    "lightning_resume": ("lightning-resume",),
    "torch": ("torch",),
    "lightning": ("lightning", "pytorch-lightning", "lightning-fabric"),
    "numpy": ("numpy",),
}


class Packed(bytes):
    """What ``torch.save`` made of an object."""


def write_checkpoint(
    path: PathLike,
    *,
    state: dict[str, Any],
    leaves: Mapping[str, bytes],
    meta: object,
    components: Mapping[str, ComponentEntry] | None = None,
    step: int | None = None,
    epoch: int | None = None,
    topology: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    weights: Collection[str] = (),
    before_commit: Callable[[], None] | None = None,
) -> Manifest:
    """Saves one checkpoint; when this returns on any rank, it is whole and durable at ``path``.

    Must be called on all ranks. ``path`` and everything but ``state`` and ``leaves`` is taken from rank 0. A plain
    value that several ranks hold under one key is stored as the lowest of these ranks has it.

    Args:
        path: A folder, local (of a filesystem that all ranks share) or by URL. A checkpoint there is replaced at once.
        state: Nested dict of tensors, DTensors, ShardedTensors and plain values, stored as ``dcp.save`` would.
        leaves: Opaque bytes of this rank by key; every key begins with ``resume.`` and belongs to one rank, or to
            several ranks that give the same bytes.
        meta: The object of ``meta.pt``, or that packed already; None is stored as an empty dict.
        components: What the manifest says of each component.
        step: Optimizer steps so far.
        epoch: Epochs so far.
        topology: What the manifest says of the topology, as JSON can hold it.
        metadata: The user's own, as JSON can hold it.
        metrics: What the checkpoint may be chosen by.
        weights: The flat keys of the tensors that training changes, which are looked at for values that are not
            finite, and for having changed since the last save beside it.
        before_commit: Called once all is written; the save fails where it raises. On all ranks or none.

    Raises:
        CheckpointSaveError: Something failed on at least one rank. Raised on every rank; what was at ``path`` is
            still there and nothing else is left.
        MissingPackageError: ``path`` is a URL whose package is not installed.
    """
    draft = Manifest(
        step=step,
        epoch=epoch,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sequence=0,
        topology=dict(topology or {}),
        versions=dict(_versions()),
        components=dict(components or {}),
        files={},
        save_seconds=0.0,
        save_bytes_per_second=0.0,
        metadata=dict(metadata or {}),
        metrics=dict(metrics or {}),
    )
    target: AnyPath | None = None
    try:
        target = broadcast_object(agree("checking the path", partial(as_path, path)))
        return _save(target, _gather_state(state, leaves), meta, draft, weights, before_commit)
    except (CheckpointSaveError, MissingPackageError):
        raise
    except Exception as error:
        raise _explain(error, target or path) from error


def _save(
    target: AnyPath,
    state: dict[str, Any],
    meta: object,
    draft: Manifest,
    weights: Collection[str],
    before_commit: Callable[[], None] | None,
) -> Manifest:
    started = time.perf_counter()
    commit = on_rank_zero("making the folder", partial(_begin, target, draft))
    try:
        written = write_shards(commit.folder, state, weights=weights)
        if before_commit is not None:
            agree("looking at what was copied", before_commit)
        return on_rank_zero("the commit", partial(_finish, target, commit, written, meta, draft, started))
    except BaseException:
        if rank() == 0:
            commit.abandon()
        raise


def _begin(target: AnyPath, draft: Manifest) -> Commit:
    # what JSON cannot hold is found before the long writing
    checked_json(draft)
    return begin(target)


def _finish(
    target: AnyPath, commit: Commit, written: Written | None, meta: object, draft: Manifest, started: float
) -> Manifest:
    assert written is not None  # on rank 0
    shards = written.describe(commit.folder)
    with HashedFile(commit.folder / META_NAME) as file:
        if isinstance(meta, Packed):
            file.write(meta)
        else:
            torch_save({} if meta is None else meta, file)
    files = {**shards.files, META_NAME: file.entry()}
    seconds = time.perf_counter() - started
    last = max((found.manifest for found in beside(target) if found.manifest), key=lambda m: m.sequence, default=None)
    manifest = replace(
        draft,
        sequence=0 if last is None else last.sequence + 1,
        files=files,
        save_seconds=round(seconds, 6),
        save_bytes_per_second=round(sum(entry.bytes for entry in files.values()) / seconds, 3),
        weights_hash=shards.weights_hash,
        nonfinite=shards.nonfinite,
    )
    checked_json(manifest)
    commit.publish(manifest)
    with or_warn(target):
        clean_leftovers(target.parent, name=target.name)
    _warn_of_weights(target, last, manifest)
    return manifest


def _warn_of_weights(target: AnyPath, last: Manifest | None, saved: Manifest) -> None:
    if saved.nonfinite:
        warnings.warn(
            f"The checkpoint {target} holds weights that are not finite: {', '.join(saved.nonfinite)}. It is saved,"
            " and marked so in its manifest. Go on from an older one.",
            NonFiniteWarning,
            stacklevel=2,
        )
    if last is None or saved.weights_hash is None or saved.weights_hash != last.weights_hash:
        return
    if (saved.step or 0) > (last.step or 0):
        warnings.warn(
            f"No weight has changed between step {last.step} and step {saved.step}, whose checkpoint is {target}. Is"
            " the optimizer given the parameters of this model, and is its learning rate above 0?",
            StaleCheckpointWarning,
            stacklevel=2,
        )


def _gather_state(state: dict[str, Any], leaves: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns this rank's state with its leaves as tensors, once the leaves of all ranks are found to agree."""
    _check_same_leaves(agree("hashing the leaves", partial(_hash_leaves, leaves)))
    return agree("preparing the state", partial(_merge, state, leaves))


def _hash_leaves(leaves: Mapping[str, bytes]) -> dict[str, str]:
    for key in leaves:
        if not key.startswith(LEAF_PREFIX):
            raise CheckpointSaveError(f"The leaf {key!r} must have a name that begins with {LEAF_PREFIX!r}.")
    return {key: xxhash.xxh3_128_hexdigest(data) for key, data in leaves.items()}


def _check_same_leaves(hashes: Mapping[str, str]) -> None:
    told: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for r, hashes_of_rank in enumerate(all_gather_object(dict(hashes))):
        for key, digest in hashes_of_rank.items():
            told[key][digest].append(r)
    for key, ranks_by_hash in told.items():
        if len(ranks_by_hash) > 1:
            found = "; ".join(f"ranks {ranks}: {digest}" for digest, ranks in ranks_by_hash.items())
            raise CheckpointSaveError(
                f"The leaf {key!r} was given on several ranks with different bytes ({found}). Nothing was saved. "
                "Make it the same on these ranks, or give it a name of its own on each (as in '.rank_00003')."
            )


def _merge(state: dict[str, Any], leaves: Mapping[str, bytes]) -> dict[str, Any]:
    for key in state:
        if str(key).startswith(LEAF_PREFIX):
            raise CheckpointSaveError(f"The name {key!r} is reserved: those that begin with {LEAF_PREFIX!r} are ours.")
    plain = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}
    return {**plain, **{key: _as_tensor(data) for key, data in leaves.items()}}


def _as_tensor(data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    # a bytearray, because torch warns of read-only memory
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@cache
def _versions() -> Mapping[str, str]:
    found = {name: _version_of(packages) for name, packages in _PACKAGES.items()}
    return {**{name: text for name, text in found.items() if text is not None}, "python": platform.python_version()}


def _version_of(packages: Sequence[str]) -> str | None:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _explain(error: Exception, target: object) -> CheckpointSaveError:
    told = error.__cause__ if isinstance(error.__cause__, RemoteError) else error
    text = str(told) if isinstance(told, RemoteError) else f"rank {rank()}: {type(error).__name__}: {error}"
    return CheckpointSaveError(
        f"Saving the checkpoint {target} failed: {text}. {_advice([error] if isinstance(error, OSError) else [])} "
        "A checkpoint that was there before is untouched."
    )


def _advice(errors: list[OSError]) -> str:
    numbers = {error.errno for error in errors}
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "Free some space there or save to another filesystem."
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "Make its folder writable for this user or save elsewhere."
    if numbers & {errno.ENOENT}:
        return "Every rank must see the same folder: save to a filesystem that all nodes share."
    return "Save again once the cause is removed."
