"""Makes a resumed PyTorch Lightning run the same run."""

from lightning_resume.callback import ResumeCallback
from lightning_resume.strategies import (
    ResumableDDPStrategy,
    ResumableFSDPStrategy,
    ResumableModelParallelStrategy,
    ResumableSingleDeviceStrategy,
    ResumeMixin,
)

__all__ = [
    "ResumableDDPStrategy",
    "ResumableFSDPStrategy",
    "ResumableModelParallelStrategy",
    "ResumableSingleDeviceStrategy",
    "ResumeCallback",
    "ResumeMixin",
]
