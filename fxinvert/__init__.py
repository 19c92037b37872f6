"""fxinvert: post-train pretrained PyTorch networks without back-propagating through them."""

from fxinvert.errors import (
    CutError,
    DataError,
    ExportMismatchError,
    FxInvertError,
    NoRuleError,
    RuleError,
    SolveError,
    TraceError,
)
from fxinvert.inverse import InverseGraph, Reconstruction, invert
from fxinvert.passes import trace
from fxinvert.passes.partition import Plan, Segment, partition
from fxinvert.post_training import post_train
from fxinvert.result import PostTrainingResult
from fxinvert.rules import RuleSet, default_rules, inverse_rule

__version__ = "0.1.0"

__all__ = [
    "CutError",
    "DataError",
    "ExportMismatchError",
    "FxInvertError",
    "InverseGraph",
    "NoRuleError",
    "Reconstruction",
    "Plan",
    "PostTrainingResult",
    "RuleError",
    "RuleSet",
    "Segment",
    "SolveError",
    "TraceError",
    "default_rules",
    "inverse_rule",
    "invert",
    "partition",
    "post_train",
    "trace",
]
