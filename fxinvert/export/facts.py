"""What the file says about itself, by default and by what the user adds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxinvert.content import content_of, tensors_of
from fxinvert.errors import DataError
from fxinvert.export.annotate import PREFIX
from fxinvert.result import PostTrainingResult

FIXED = ("version", "weights", "precision", "proven")
"""Facts that nobody else may state."""


def facts_of(
    model: nn.Module, result: PostTrainingResult | None, given: Mapping[str, str] | None, **more: str
) -> dict[str, str]:
    """The metadata of a file.

    Args:
        model: The frozen model.
        result: What it came from, if that is known.
        given: The user's own facts; keys get the prefix `fxinvert.`.
        **more: Facts on the export.

    Raises:
        DataError: A fact is no string, or its key is taken.
    """
    own = {
        "version": _version(),
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "weights": fingerprint(model),
        **more,
        **(_post_training(result) if result is not None else {}),
    }
    facts = {PREFIX + key: value for key, value in own.items()}
    added: set[str] = set()
    for key, value in (given or {}).items():
        if not isinstance(key, str) or not isinstance(value, str) or not key:
            raise DataError(
                f"metadata maps names to strings; got {key!r}: {value!r}. Convert the value with str()."
            )
        full = key if key.startswith(PREFIX) else PREFIX + key
        if full in added or full.removeprefix(PREFIX) in FIXED:
            raise DataError(
                f"the metadata key {key!r} is taken ({full}, given twice or set by fxinvert); rename it"
            )
        added.add(full)
        facts[full] = value
    return facts


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all parameters and buffers, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(content_of(tensor))
    return digest.hexdigest()


def _post_training(result: PostTrainingResult) -> dict[str, str]:
    changed = set(result.changed)
    told: dict[str, Any] = {
        "held_out": {"before": result.baseline.to_dict(), "after": result.final.to_dict()},
        "segments": [s.name for s in result.plan.segments if changed.intersection(s.parameters)],
    }
    return {"output_target": result.output_target} | {key: json.dumps(value) for key, value in told.items()}


def _version() -> str:
    try:
        return importlib.metadata.version("fxinvert")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
