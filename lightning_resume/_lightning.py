"""The only place that imports Lightning, under either of its package names, and that knows its private parts.

``lightning`` is taken where it is installed; with ``pytorch_lightning`` or ``lightning_fabric`` alone these are taken.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.strategies import (
        DDPStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
else:
    _BOTH = importlib.util.find_spec("lightning") is not None
    _fabric = importlib.import_module("lightning.fabric.strategies" if _BOTH else "lightning_fabric.strategies")
    DDPStrategy, FSDPStrategy = _fabric.DDPStrategy, _fabric.FSDPStrategy
    ModelParallelStrategy, SingleDeviceStrategy = _fabric.ModelParallelStrategy, _fabric.SingleDeviceStrategy
    Strategy = _fabric.Strategy


def user_checkpoint_io(strategy: Any) -> Any:
    """The ``CheckpointIO`` that the user gave the strategy, ``None`` where it has none but Lightning's own."""
    checkpoint_io = getattr(strategy, "_checkpoint_io", None)
    return None if type(checkpoint_io).__name__ == "TorchCheckpointIO" else checkpoint_io
