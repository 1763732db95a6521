"""Makes a resumed PyTorch Lightning run the same run."""

from lightning_resume.callback import ResumeCallback
from lightning_resume.data.order import Tail
from lightning_resume.data.resumable import make_resumable
from lightning_resume.data.sampler import ElasticSampler, ResumableDataLoader
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
    ResumeError,
    UnsafeCheckpointError,
)
from lightning_resume.export.consolidate import consolidate
from lightning_resume.strategies import (
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
    ResumeMixin,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointCorruptError",
    "CheckpointIncompleteError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointSaveError",
    "CheckpointVersionError",
    "ElasticSampler",
    "ResumableDDPStrategy",
    "ResumableDataLoader",
    "ResumableFSDPStrategy",
    "ResumableModelParallelStrategy",
    "ResumableSingleDeviceStrategy",
    "ResumeCallback",
    "ResumeError",
    "ResumeMixin",
    "Tail",
    "UnsafeCheckpointError",
    "consolidate",
    "make_resumable",
]
