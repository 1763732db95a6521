"""Turns a checkpoint folder into one file that ``torch.load`` and ``load_from_checkpoint`` read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_resume.checkpoint.commit import commit_file
from lightning_resume.checkpoint.components import LeafComponents
from lightning_resume.checkpoint.exact import put_back_lost
from lightning_resume.checkpoint.filesystem import torch_save
from lightning_resume.checkpoint.paths import PathLike, as_path, exists
from lightning_resume.checkpoint.reader import CheckpointReader
from lightning_resume.errors import CheckpointCorruptError
from lightning_resume.loading import lost_of

_TRAINER_MARK = "pytorch-lightning_version"
_MODEL_NAMES = ("state_dict", "model")  # of ModelParallelStrategy and of FSDPStrategy
_OPTIMIZER = "optimizer_"
_OURS = "lightning_resume"


def consolidate(
    checkpoint: PathLike,
    output: PathLike | None = None,
    *,
    trust: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Path | str:
    """Writes a checkpoint folder, ours or a stock sharded one, into one file; returns its path or URL.

    Needs no GPU and no process group, but memory for the whole checkpoint. A Fabric checkpoint keeps the user's own
    names; a Trainer checkpoint becomes what the Trainer writes in one file, with optimizer states keyed by parameter
    name. Data position and RNG are left out: resume a run from the folder itself.

    Args:
        checkpoint: The checkpoint folder, a path or any fsspec URL.
        output: The file to write, a path or any fsspec URL; by default ``<checkpoint>.consolidated``.
        trust: Let stored objects be of any class, which can run code that the checkpoint's writer chose.
        storage_options: Arguments of the fsspec filesystems of both, beyond fsspec's own configuration.

    Raises:
        FileExistsError: There is something at ``output``.
        ResumeError: ``checkpoint`` is not a checkpoint folder, or it is incomplete, damaged or unsafe.
    """
    source = as_path(checkpoint, storage_options)
    target = source.with_name(f"{source.name}.consolidated") if output is None else as_path(output, storage_options)
    if exists(target):
        raise FileExistsError(f"{target} exists. Move or delete it, or choose another file with output (--output).")
    reader = CheckpointReader(source, trust=trust)
    state = reader.read()
    if reader.manifest is not None:
        put_back_lost(state, lost_of(LeafComponents(reader, trust=trust)))
    content = _content(state, _meta(reader))
    commit_file(target, lambda file: torch_save(content, file))
    return target if isinstance(target, Path) else str(target)


def _meta(reader: CheckpointReader) -> dict[str, Any]:
    meta = reader.meta()
    if not isinstance(meta, Mapping):
        raise CheckpointCorruptError(f"{reader.path}: meta.pt holds a {type(meta).__name__}, not a dict.")
    return {key: value for key, value in meta.items() if key != _OURS}


def _content(state: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    return {**(_as_trainer(state) if _TRAINER_MARK in meta else state), **meta}


def _as_trainer(state: dict[str, Any]) -> dict[str, Any]:
    """Renames the parts of a sharded Trainer checkpoint to those of the Trainer's single file."""
    renamed = {"state_dict" if key in _MODEL_NAMES else key: value for key, value in state.items()}
    names = sorted(filter(_is_optimizer, renamed), key=lambda key: int(key.removeprefix(_OPTIMIZER)))
    if names:
        renamed["optimizer_states"] = [renamed.pop(name) for name in names]
    return renamed


def _is_optimizer(key: str) -> bool:
    return key.startswith(_OPTIMIZER) and key.removeprefix(_OPTIMIZER).isdecimal()
