"""Reads a checkpoint folder: ours, or one that stock Lightning or torch.distributed.checkpoint wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from lightning_resume._distributed import agree, is_distributed
from lightning_resume.checkpoint._dcp import (
    ObjectPath,
    flatten,
    flatten_state_dict,
    is_distributed_tensor,
    set_element,
    unflatten_state_dict,
)
from lightning_resume.checkpoint.catalog import TensorInfo
from lightning_resume.checkpoint.indexed import Filling, IndexedContent
from lightning_resume.checkpoint.items import ItemSource
from lightning_resume.checkpoint.layout import Kind, classify, list_checkpoints, resolve
from lightning_resume.checkpoint.manifest import Manifest, read_manifest
from lightning_resume.checkpoint.names import MANIFEST_NAME, META_NAME, is_staged
from lightning_resume.checkpoint.paths import AnyPath, PathLike, as_path, size_of
from lightning_resume.checkpoint.safe import safe_load
from lightning_resume.checkpoint.stock import StockContent, StockFilling
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ResumeError,
)

__all__ = ["CheckpointReader", "TensorInfo"]

T = TypeVar("T")

_READERS = 8  # at once, of whole files


class CheckpointReader:
    """One checkpoint folder, opened; every byte of ours is verified against the manifest before it is used.

    Args:
        path: The checkpoint folder.
        trust: Let stored objects be of any class, which can run code that the checkpoint's writer chose.

    Raises:
        CheckpointNotFoundError: There is no checkpoint folder at ``path``.
        CheckpointIncompleteError: The save that wrote it did not finish.
        CheckpointVersionError: It is of a newer format.
        CheckpointCorruptError: The manifest or the index is damaged; of a stock checkpoint, ``.metadata``.
        UnsafeCheckpointError: It is a stock checkpoint whose ``.metadata`` could run code.
    """

    def __init__(self, path: PathLike, *, trust: bool = False) -> None:
        self.path: AnyPath = as_path(path)
        self.manifest: Manifest | None = _open(self.path)
        self.trust: bool = trust
        self._source = ItemSource(resolve(self.path), self.manifest)
        self._content = StockContent(self._source) if self.manifest is None else IndexedContent(self._source)
        if isinstance(self._content, StockContent) and self._content.leaves:
            raise CheckpointIncompleteError(
                f"{self.path} was written by lightning-resume but has lost its manifest: it was copied or deleted in "
                "part. Load another checkpoint, or copy it again."
            )

    @property
    def keys(self) -> Mapping[str, TensorInfo | None]:
        """Every flat key but our leaves, with the global shape and dtype of a tensor, None for any other object."""
        return self._content.keys

    @property
    def mappings(self) -> Mapping[str, ObjectPath]:
        """The path of every flat key in the nested state."""
        return self._content.mappings

    def leaf_names(self) -> list[str]:
        return list(self._content.leaves)

    def has_leaf(self, name: str) -> bool:
        return name in self._content.leaves

    def leaf(self, name: str) -> bytes:
        """Returns the bytes that some rank saved under ``name``.

        Raises:
            KeyError: There is no such leaf.
            CheckpointCorruptError: What is stored differs from what was saved.
        """
        if not isinstance(self._content, IndexedContent) or not self.has_leaf(name):
            raise KeyError(name)
        return self._content.leaf(name)

    def load_into(self, state: dict[str, Any], *, together: bool | None = None) -> None:
        """Fills the tensors in ``state`` in place and replaces its other values, as ``dcp.load`` does.

        Every rank reads what it needs; of a remote store, what all of them need is read once and sent to the others.
        When reading itself fails, tensors may be filled in part.

        Args:
            state: What to fill.
            together: Whether this is called on all ranks, and an error on one is raised on all. By default it must be
                and is where ``state`` holds distributed tensors.

        Raises:
            CheckpointMismatchError: A key is missing, or of another kind or shape; raised before anything is read.
            CheckpointCorruptError: What is stored differs from what was saved.
            UnsafeCheckpointError: An object's class is not on the allow-list.
        """
        flat, mappings = flatten(state)
        # before DCP drops the ShardedTensors of which this rank has no shard: the others wait for this rank
        if together is None:
            together = is_distributed() and any(map(is_distributed_tensor, flatten_state_dict(state)[0].values()))
        run: Callable[[str, Callable[[], Any]], Any] = agree if together else _alone
        run(f"checking the state against {self.path}", partial(self._check_fits, flat))
        filling: Filling | StockFilling = run(f"finding what to load of {self.path}", partial(self._fill, flat))
        if together:
            filling.share()
        for key, value in run(f"loading {self.path}", filling.run).items():
            set_element(state, mappings[key], value)

    def read(self, prefixes: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the nested state with whole tensors on the CPU; needs no process group and calls no collective.

        Args:
            prefixes: The top-level names to read; all of them by default. A name that is not there is left out.

        Raises:
            CheckpointCorruptError: What is stored differs from what was saved.
            UnsafeCheckpointError: An object's class is not on the allow-list.
        """
        wanted = [key for key, path in self.mappings.items() if prefixes is None or path[0] in prefixes]
        for key in wanted:
            self._content.check_covered(key)  # before room is made for what may not be there
        flat = {key: _empty(self.keys[key]) for key in wanted}
        flat |= self._fill(flat).run()
        return unflatten_state_dict(flat, dict(self.mappings))

    def meta(self, *, weights_only: bool = True) -> Any:
        """Returns the object of ``meta.pt``, an empty dict where there is none.

        Args:
            weights_only: False lets it be of any class, which can run code that the checkpoint's writer chose.

        Raises:
            UnsafeCheckpointError: It holds classes that are not on the allow-list; names them.
            CheckpointCorruptError: The file differs from what was saved.
        """
        if self.manifest is None and not self._source.has(META_NAME):
            return {}
        data = self._source.whole(META_NAME)
        return self._decode(META_NAME, partial(safe_load, data, trust=self.trust or not weights_only))

    @property
    def folder(self) -> AnyPath:
        """Where its files lie."""
        return self._source.folder

    @property
    def file_bytes(self) -> dict[str, int]:
        """The bytes of every file that can be verified; none of a stock checkpoint."""
        return {} if self.manifest is None else {name: entry.bytes for name, entry in self.manifest.files.items()}

    def verify(self, files: Iterable[str] | None = None, *, read: Callable[[int], None] = lambda _: None) -> None:
        """Reads the ``files``, by default all, in parallel, and checks them; ``read`` is told of every so many bytes.

        Of a stock checkpoint there is nothing to check.

        Raises:
            CheckpointCorruptError: A file is missing or differs from what was saved; names it.
        """
        if not isinstance(self._content, IndexedContent):
            return
        with ThreadPoolExecutor(_READERS) as readers:
            wanted = self.file_bytes if files is None else files
            checks = [readers.submit(self._content.verify, name, read) for name in wanted]
            try:
                for check in checks:
                    check.result()
            finally:
                readers.shutdown(cancel_futures=True)

    def _check_fits(self, flat: Mapping[str, Any]) -> None:
        for key, value in flat.items():
            if key not in self.keys:
                raise _mismatch(key, "key", saved=_neighbours(key, self.keys), current=_describe(value))
            saved = self.keys[key]
            if (saved is None) != (not isinstance(value, torch.Tensor) and not is_distributed_tensor(value)):
                raise _mismatch(key, "kind of value", saved=_describe(saved), current=_describe(value))
            if saved is not None and tuple(value.size()) != saved.shape:
                raise _mismatch(key, "global shape", saved=saved.shape, current=tuple(value.size()))
            if getattr(value, "is_meta", False):
                raise _mismatch(key, "device", saved=_describe(saved), current="meta; materialize it first")

    def _fill(self, flat: dict[str, Any]) -> Filling | StockFilling:
        """What is stored of the tensors of ``flat``, found and not yet read."""

        def decode(key: str, data: bytes) -> Any:
            return self._decode(f"item {key!r}", partial(safe_load, data, trust=self.trust))

        return self._content.fill(flat, decode)

    def _decode(self, what: str, load: Callable[..., Any]) -> Any:
        try:
            return load(name=f"{self.path}: {what}")
        except ResumeError:
            raise
        except Exception as error:
            # what torch raises for damaged bytes is any of a dozen kinds
            raise CheckpointCorruptError(
                f"The checkpoint {self.path} is damaged: {what} cannot be read ({type(error).__name__}: {error}). "
                "Load another checkpoint, or copy this one again from its source."
            ) from error


def _open(path: AnyPath) -> Manifest | None:
    """Returns the manifest of our checkpoint at ``path``, None for a stock one; raises where there is neither."""
    found = resolve(path)
    if size_of(found / MANIFEST_NAME) is not None and not is_staged(found):
        return read_manifest(path)
    kind = classify(path)
    if kind is Kind.SHARDED:
        return None
    if kind is Kind.INCOMPLETE:
        raise CheckpointIncompleteError(
            f"{path} is what an unfinished save left: {MANIFEST_NAME}, which a save writes last, is missing. "
            "Load an older checkpoint."
        )
    raise CheckpointNotFoundError(f"There is no checkpoint folder at {path}: found {kind.value}.{_hint(path, kind)}")


def _hint(path: AnyPath, kind: Kind) -> str:
    if kind is Kind.RUN_FOLDER:
        names = [checkpoint.name for checkpoint in list_checkpoints(path)]
        return f" Name one of its checkpoints, newest first: {', '.join(names) or 'none of them is complete'}."
    if kind is Kind.SINGLE_FILE:
        return " Read a single-file checkpoint with torch.load or the strategy's own load_checkpoint."
    return " Check the path."


def _alone(_what: str, act: Callable[[], T]) -> T:
    return act()


def _empty(info: TensorInfo | None) -> torch.Tensor | None:
    return None if info is None else torch.empty(info.shape, dtype=info.dtype)


def _mismatch(key: str, field: str, *, saved: object, current: object) -> CheckpointMismatchError:
    advice = "Load into the model, optimizer and settings that were saved, or load only the parts that fit."
    return CheckpointMismatchError(f"state {key!r}", field, saved=saved, current=current, advice=advice)


def _describe(value: Any) -> str:
    if isinstance(value, TensorInfo):
        return f"a {value.dtype} tensor of shape {value.shape}"
    if isinstance(value, torch.Tensor) or is_distributed_tensor(value):
        return f"a {value.dtype} tensor of shape {tuple(value.size())}"
    return "an object that is not a tensor" if value is None else f"a {type(value).__name__}"


def _neighbours(key: str, keys: Mapping[str, Any]) -> str:
    top = key.split(".")[0]
    near = [name for name in keys if name.split(".")[0] == top][:5]
    return f"no such key; under {top!r}: {', '.join(near)}" if near else f"nothing under {top!r}"
