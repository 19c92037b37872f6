"""fxinvert: post-train pretrained PyTorch networks without back-propagating through them.

The names below are imported when they are first used, so that `fxinvert --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fxinvert.errors import (
    CutError,
    DataError,
    ExportMismatchError,
    FxInvertError,
    NoRuleError,
    RuleError,
    SolveError,
    TraceError,
    UnknownNameError,
)

if TYPE_CHECKING:
    from fxinvert.estimates import Estimate
    from fxinvert.estimating import estimate
    from fxinvert.explanation import Explanation, explain
    from fxinvert.export import export_onnx
    from fxinvert.inversion import InverseGraph, Reconstruction, invert
    from fxinvert.passes import trace
    from fxinvert.passes.partition import partition
    from fxinvert.passes.plan import Plan, Segment
    from fxinvert.post_training import post_train
    from fxinvert.repairs import Repairs, repair_alone
    from fxinvert.result import PostTrainingResult
    from fxinvert.rules import RuleSet, default_rules, inverse_rule

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until the application says otherwise

_HOMES = {
    "estimates": ("Estimate",),
    "estimating": ("estimate",),
    "export": ("export_onnx",),
    "explanation": ("Explanation", "explain"),
    "inversion": ("InverseGraph", "Reconstruction", "invert"),
    "passes": ("trace",),
    "passes.partition": ("partition",),
    "passes.plan": ("Plan", "Segment"),
    "post_training": ("post_train",),
    "repairs": ("Repairs", "repair_alone"),
    "result": ("PostTrainingResult",),
    "rules": ("RuleSet", "default_rules", "inverse_rule"),
}
_ROOMS = ("linalg", "models", "rules", "testing", "training")
_HOME = {name: f"fxinvert.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"fxinvert.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fxinvert' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


__all__ = [
    "CutError",
    "DataError",
    "Estimate",
    "Explanation",
    "ExportMismatchError",
    "FxInvertError",
    "InverseGraph",
    "NoRuleError",
    "Plan",
    "PostTrainingResult",
    "Reconstruction",
    "Repairs",
    "RuleError",
    "RuleSet",
    "Segment",
    "SolveError",
    "TraceError",
    "UnknownNameError",
    "default_rules",
    "estimate",
    "explain",
    "export_onnx",
    "inverse_rule",
    "invert",
    "partition",
    "post_train",
    "repair_alone",
    "trace",
]
