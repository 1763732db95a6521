"""What torchmetrics in a module have accumulated: most keep it out of the module's ``state_dict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module


def metrics_state(modules: Iterable[tuple[str, Module]]) -> dict[str, Any]:
    """The accumulated state of each metric among ``modules``, by its name."""
    return {
        name: {
            "updates": metric._update_count,
            "state": {key: _copied(getattr(metric, key)) for key in metric._defaults},
        }
        for name, metric in _metrics(modules)
    }


def load_metrics_state(module: Module, state: Mapping[str, Any]) -> None:
    """Goes on accumulating from ``state``; a metric that is not in it is left as it is."""
    for name, metric in _metrics(module.named_modules()):
        if name in state:
            for key, value in state[name]["state"].items():
                setattr(metric, key, _moved(value, metric.device))
            metric._update_count = state[name]["updates"]
            metric._computed = None


def _metrics(modules: Iterable[tuple[str, Module]]) -> Iterator[tuple[str, Any]]:
    torchmetrics = sys.modules.get("torchmetrics")  # a module with a metric has imported it
    if torchmetrics is not None:
        kind = torchmetrics.Metric
        yield from ((name, module) for name, module in modules if isinstance(module, kind))


def _copied(value: Any) -> Any:
    return [_copied(item) for item in value] if isinstance(value, list) else value.detach().clone()


def _moved(value: Any, device: torch.device) -> Any:
    return [_moved(item, device) for item in value] if isinstance(value, list) else value.to(device)
