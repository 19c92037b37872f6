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
    "RuleError",
    "RuleSet",
    "SolveError",
    "TraceError",
    "default_rules",
    "inverse_rule",
    "invert",
    "trace",
]
