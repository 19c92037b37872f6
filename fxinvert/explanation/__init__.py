"""Explaining decisions: what every cut computed, what it should have computed, and where that would put it right."""

from fxinvert.explanation.explain import explain
from fxinvert.explanation.result import Attention, Cut, Explanation, Value

__all__ = ["Attention", "Cut", "Explanation", "Value", "explain"]
