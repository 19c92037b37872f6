"""What the rules of one file have in common: what they say of an op that says nothing of its own, and their source."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from fxinvert.rules.rule import Kind, Rule

EQUATION = "the one equation (design, §3)"
DIAGONAL = f"{EQUATION}, with a diagonal matrix"
BALL = "Moré & Sorensen, SIAM J. Sci. Stat. Comput. 4, 1983"
SIMPLEX = "Duchi et al., ICML 2008"
DIRECT = "direct"


class Family(NamedTuple):
    """Of the rules of one file: how they invert, in a sentence, and from where the method is."""

    summary: str
    reference: str


FAMILIES: dict[str, Family] = {
    "affine": Family("Nearest solution of a linear system.", EQUATION),
    "arithmetic": Family("The target less the constant, divided by the gain.", DIAGONAL),
    "attention": Family(
        "Every head is a system of its own.", f"{EQUATION}; Gauss–Newton in queries and keys"
    ),
    "contractions": Family("Every row of the unknown is a system of its own.", EQUATION),
    "derived": Family("The rule of another op, of a changed input or target.", DIRECT),
    "elementwise": Family("The nearest pre-image over the monotone branches of a scalar function.", DIRECT),
    "fallback": Family("Damped Gauss–Newton.", "Levenberg 1944, Marquardt 1963"),
    "functions": Family("The nearest pre-image over the monotone branches of a scalar function.", DIRECT),
    "linear": Family("Nearest solution of a linear system.", EQUATION),
    "movement": Family("Every input gets the mean of the targets of its copies.", DIAGONAL),
    "normalization": Family("The nearest point of a ball, group by group.", BALL),
    "norms": Family("The nearest point of a sphere, a ray or a cone.", DIRECT),
    "padded": Family("One linear system with the padding.", EQUATION),
    "pooling": Family("One linear system, the same for every channel.", EQUATION),
    "reduction": Family("The nearest entries that have the value that is asked for.", DIRECT),
    "resampling": Family("A linear system for every sample.", EQUATION),
    "selection": Family("Its own part of the target.", DIAGONAL),
    "shape": Family("The target in the input's shape.", DIRECT),
    "simplex": Family("The nearest pre-image of the nearest point of the range.", DIRECT),
}

#: where one op of a family has a source of its own
OWN: dict[str, str] = {
    "batch_norm": DIAGONAL,
    "softmax": f"projection onto the simplex: {SIMPLEX}",
    "softmin": f"projection onto the simplex: {SIMPLEX}",
    "norm": f"direct; order 1: {SIMPLEX}",
    "linalg_norm": f"direct; order 1: {SIMPLEX}",
    "linalg_vector_norm": f"direct; order 1: {SIMPLEX}",
    "normalize": f"direct; order 1: {SIMPLEX}",
    "sum": DIAGONAL,
    "mean": DIAGONAL,
    **dict.fromkeys(("div", "addcdiv"), f"{DIAGONAL}; below the line direct"),
    **dict.fromkeys((f"{kind}max_pool{n}d" for n in (1, 2, 3) for kind in ("", "adaptive_")), DIRECT),
    **dict.fromkeys(("grid_sample", "grid_sampler"), f"{EQUATION}; Gauss–Newton in the grid"),
}


def summary(rule: Rule) -> str:
    """What a rule does, in a sentence: the first of its own documentation, or its family's."""
    own = (inspect.getdoc(rule.invert) or "").split("\n\n")[0].replace("\n", " ")
    family = _family(rule)
    return own or (family.summary if family else "")


def reference(rule: Rule) -> str:
    """The source of a rule's method."""
    if rule.kind is Kind.MATRIX_FREE:
        return FAMILIES["fallback"].reference
    family = _family(rule)
    return rule.reference or (OWN.get(rule.key) or family.reference if family else "")


def _family(rule: Rule) -> Family | None:
    package, _, name = getattr(rule.invert, "__module__", "").rpartition(".")
    return FAMILIES.get(name) if package == "fxinvert.rules" else None
