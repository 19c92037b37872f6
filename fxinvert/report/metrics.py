"""What `metrics.json` and `timing.json` hold: the figures, which are the same every time, and the times, which are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import fxinvert
from fxinvert.export import ExportReport
from fxinvert.result import PostTrainingResult
from fxinvert.training import Metrics

TIMES = "seconds"

#: before and after
Change = tuple[Metrics, Metrics]


def metrics_record(
    result: PostTrainingResult, measured: Mapping[str, Change], exported: ExportReport | None, **more: Any
) -> dict[str, Any]:
    """Everything that a run has measured, JSON-ready, without times.

    Args:
        result: of post-training; its held-out metrics come under `held_out`.
        measured: metrics before and after on other data, by the data's name.
        exported: the proof of the ONNX file.
        **more: further figures.
    """
    changes = {"held_out": (result.baseline, result.final), **measured}
    record = {
        "fxinvert": fxinvert.__version__,
        "torch": torch.__version__,
        "metrics": {
            name: {"before": before.to_dict(), "after": after.to_dict()}
            for name, (before, after) in changes.items()
        },
        "post_training": _without_times(result.to_dict()),
        "onnx": None if exported is None else exported.to_dict() | {"path": exported.path.name},
    }
    return record | more


def timing_record(result: PostTrainingResult, **more: Any) -> dict[str, Any]:
    """How long the parts took, JSON-ready."""
    updates = [
        {"sweep": record.sweep, "segments": list(record.segments), "seconds": record.seconds}
        for record in result.history
    ]
    return {"post_training": result.seconds, "updates": updates} | more


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != TIMES}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value
