"""What a batch of samples looks like where the user says nothing of it."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch

from lightning_resume.data.sharded.dataset import Output
from lightning_resume.errors import MissingPackageError


@final
class Columns:
    """Makes a dict of columns of samples that are dicts, a list of columns of tuples, and one column of any others.

    A column is a tensor (an array) where all its values are numbers, or lists of numbers, arrays or tensors of one
    shape; else a list. What a sample lacks is None.

    Args:
        output: Whether tensors, arrays, lists or an Arrow table.
    """

    def __init__(self, output: Output) -> None:
        self.output = output

    def __call__(self, samples: Sequence[Any]) -> Any:
        if self.output is Output.ARROW:
            return _table(samples)
        if _are_tuples(samples):
            return [self(part) for part in zip(*samples, strict=True)]
        if not all(isinstance(sample, Mapping) for sample in samples):
            return self._column(samples)
        names = dict.fromkeys(name for sample in samples for name in sample)
        return {name: self._column([sample.get(name) for sample in samples]) for name in names}

    def _column(self, values: Sequence[Any]) -> Any:
        if self.output is Output.PYTHON:
            return list(values)
        if all(isinstance(value, torch.Tensor) for value in values):
            return _stacked(values)
        array = _array(values)
        if array is None:
            return list(values)
        return array if self.output is Output.NUMPY else torch.from_numpy(array)


def _are_tuples(samples: Sequence[Any]) -> bool:
    return all(isinstance(sample, tuple) for sample in samples) and len(set(map(len, samples))) == 1


def _stacked(values: Sequence[torch.Tensor]) -> Any:
    alike = len({(value.shape, value.dtype) for value in values}) == 1
    return torch.stack(list(values)) if alike else list(values)


def _array(values: Sequence[Any]) -> Any:
    if all(isinstance(value, (np.ndarray, np.generic)) for value in values):
        alike = len({(value.shape, value.dtype) for value in values}) == 1
        return np.stack(values) if alike and values[0].dtype.kind in "biuf" else None
    first = values[0]
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(first, numbers.Real):
        return None
    try:
        array = np.array(values)
    except (ValueError, OverflowError):  # of different lengths, or too large
        return None
    if array.dtype.kind not in "bif" or array.dtype.itemsize > 8 or _rounded(array, values):
        return None
    return array


def _rounded(array: Any, values: Sequence[Any]) -> bool:
    """Whether a whole number became a float that is another: NumPy makes such of those beyond 64 bits."""
    if array.dtype.kind != "f" or not (np.abs(array) >= 2.0**53).any():
        return False
    return any(isinstance(one, int) and int(float(one)) != one for one in _flat(values))


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _table(samples: Sequence[Any]) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingPackageError(
            "Arrow tables need pyarrow: `pip install 'lightning-resume[data]'`, or `pip install pyarrow`."
        ) from error
    return pa.Table.from_pylist([sample if isinstance(sample, Mapping) else {"value": sample} for sample in samples])
