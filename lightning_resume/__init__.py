"""Makes a resumed PyTorch Lightning run the same run."""

from lightning_resume.callback import ResumeCallback
from lightning_resume.checkpoint.retention import KeepAll, KeepBest, KeepEvery, KeepLast
from lightning_resume.data.adapters.protocol import LoaderAdapter
from lightning_resume.data.adapters.registry import register_adapter
from lightning_resume.data.capabilities import Capabilities, Change, Order, Randomness
from lightning_resume.data.dispatch import dispatched
from lightning_resume.data.mixture import Mixture
from lightning_resume.data.order import Tail
from lightning_resume.data.resumable import make_resumable
from lightning_resume.data.sample_rng import sample_rng
from lightning_resume.data.sampler import ElasticSampler, ResumableDataLoader
from lightning_resume.data.sharded.dataset import ShardedDataset
from lightning_resume.data.sharded.grouping import BatchByLength, Packing
from lightning_resume.data.sharded.mapped import stream_of
from lightning_resume.data.sharded.mixing import StreamMixture
from lightning_resume.data.weighted import WeightedSampler
from lightning_resume.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CheckpointVersionError,
    FallBackWarning,
    MissingPackageError,
    NonFiniteWarning,
    OutOfStepError,
    RankLostError,
    ReplicaMismatchError,
    ResumeError,
    ResumeWarning,
    StaleCheckpointWarning,
    StorageError,
    UnsafeCheckpointError,
    UnsafeResumeWarning,
)
from lightning_resume.export.consolidate import consolidate
from lightning_resume.manager import CheckpointInfo, CheckpointManager, list_checkpoints, prune
from lightning_resume.strategies import (
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
    ResumeMixin,
)
from lightning_resume.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "BatchByLength",
    "Capabilities",
    "Change",
    "CheckpointCorruptError",
    "CheckpointIncompleteError",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointSaveError",
    "CheckpointVersionError",
    "ElasticSampler",
    "FallBackWarning",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LoaderAdapter",
    "MissingPackageError",
    "Mixture",
    "NonFiniteWarning",
    "Order",
    "OutOfStepError",
    "Packing",
    "Randomness",
    "RankLostError",
    "ReplicaMismatchError",
    "ResumableDDPStrategy",
    "ResumableDataLoader",
    "ResumableFSDPStrategy",
    "ResumableModelParallelStrategy",
    "ResumableSingleDeviceStrategy",
    "ResumeCallback",
    "ResumeError",
    "ResumeMixin",
    "ResumeWarning",
    "ShardedDataset",
    "StaleCheckpointWarning",
    "StorageError",
    "StreamMixture",
    "Tail",
    "UnsafeCheckpointError",
    "UnsafeResumeWarning",
    "Verification",
    "WeightedSampler",
    "consolidate",
    "dispatched",
    "list_checkpoints",
    "make_resumable",
    "prune",
    "register_adapter",
    "sample_rng",
    "stream_of",
    "verify",
]
