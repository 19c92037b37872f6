"""Inverse rules: how one op is inverted, and the registry that holds them."""

from fxinvert.linalg import FactorCache
from fxinvert.rules.affine import invert_affine, invert_by_autograd, invert_diagonal
from fxinvert.rules.branches import Branch, falling, flat, rising
from fxinvert.rules.certificate import Certificate, Inverse, Status
from fxinvert.rules.entrywise import invert_branches
from fxinvert.rules.keys import key_of
from fxinvert.rules.op import Op
from fxinvert.rules.registry import RuleSet, default_rules, inverse_rule
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.trainable import ByPosition, Trainable

__all__ = [
    "Branch",
    "ByPosition",
    "Certificate",
    "FactorCache",
    "Inverse",
    "Kind",
    "Op",
    "Rule",
    "RuleSet",
    "Status",
    "Trainable",
    "default_rules",
    "falling",
    "flat",
    "inverse_rule",
    "invert_affine",
    "invert_branches",
    "invert_by_autograd",
    "invert_diagonal",
    "key_of",
    "rising",
]
