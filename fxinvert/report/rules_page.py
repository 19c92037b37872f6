"""The page of rules: every op that has one, its spellings, how it is inverted, what can be trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.rules import Rule, RuleSet, key_of
from fxinvert.rules.constants import CONSTANTS

_HEAD = """# Rules

Every op that is inverted by a rule of its own. All spellings of an op share one rule. An op that is not listed, and is
differentiable, is inverted matrix-free (damped Gauss–Newton on Jacobian-vector products). This page is generated:
`fxinvert rules --markdown`.

| op | spellings | how | trained in closed form | the inverse |
|---|---|---|---|---|
"""

_SEVERAL = """
## Ops of several tensors, and ops that are solved

| op | how |
|---|---|
"""

_SHARED = "several unknown inputs share the target, jointly or one at a time (`fxinvert.rules.joint`)"
_TUPLE = "gives several tensors: to be inverted with branching graphs"
_SOLVED = "matrix-free"
_OTHERS = {
    "cat": _SHARED,
    "stack": _SHARED,
    "split": _TUPLE,
    "split_with_sizes": _TUPLE,
    "chunk": _TUPLE,
    "unbind": _TUPLE,
    "lstm": _TUPLE,
    "scaled_dot_product_attention": _SOLVED,
    "einsum": _SOLVED,
}

_CONSTANTS = """
## Constants of the computation

Ops that need no rule, because what they give does not depend on the model's input as a value.

| op | why |
|---|---|
"""


def rules_page(rules: RuleSet) -> str:
    """The page, in Markdown, the same for the same rules."""
    rows = "".join(_row(rules[key]) for key in sorted(rules))
    constants = "".join(f"| `{key}` | {why} |\n" for key, why in sorted(CONSTANTS.items()))
    others = "".join(f"| `{key}` | {how} |\n" for key, how in _OTHERS.items())
    return _HEAD + rows + _SEVERAL + others + _CONSTANTS + constants


def spellings(key: str) -> list[str]:
    """How an op is written in PyTorch."""
    places = (("torch", torch), ("F", F), ("Tensor", Tensor))
    found = [f"{place}.{name}" for place, home in places for name in _names(home, key)]
    return [*found, *(f"nn.{name}" for name, cls in _modules() if key_of(cls) == key)]


def _row(rule: Rule) -> str:
    written = ", ".join(f"`{s}`" for s in spellings(rule.key)) or f"`aten.{rule.key}`"
    parameters = "yes" if rule.trainable else ""
    summary = (inspect.getdoc(rule.invert) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| `{rule.key}` | {written} | {rule.kind.value} | {parameters} | {summary} |\n"


def _names(home: object, key: str) -> Iterator[str]:
    for name in dir(home):
        public = not name.startswith("_") and not name.endswith("_")
        if (
            public
            and callable(getattr(home, name))
            and not isinstance(getattr(home, name), type)
            and key_of(name) == key
        ):
            yield name


def _modules() -> Iterator[tuple[str, type[nn.Module]]]:
    for name in dir(nn):
        value = getattr(nn, name)
        if isinstance(value, type) and issubclass(value, nn.Module):
            yield name, value
