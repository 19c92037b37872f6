"""The page of rules: every op that has one, its spellings, how it is inverted, what can be trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.rules import Rule, RuleSet, key_of
from fxinvert.rules.constants import CONSTANTS
from fxinvert.rules.families import reference, summary
from fxinvert.rules.joint import JOINT
from fxinvert.rules.padded import PADDED

_HEAD = """# Rules

Every op that is inverted by a rule of its own. All spellings of an op share one rule. An op that is not listed, and is
differentiable, is inverted matrix-free (damped Gauss–Newton on Jacobian-vector products). This page is generated:
`fxinvert rules --markdown`.

| op | spellings | how | trained in closed form | the inverse | reference |
|---|---|---|---|---|---|
"""

_SEVERAL = """
## Ops of several tensors, and ops that are solved

| op | how |
|---|---|
"""

_TUPLE = "gives several tensors: taken apart while tracing, every part is a slice"
_SOLVED = "matrix-free: Levenberg 1944, Marquardt 1963"
_INSIDE = "taken apart while tracing: the ops inside have their rules"
_FIXED = "a weight computed from parameters alone: a constant as far as the activation goes"
_OTHERS = {
    "split": _TUPLE,
    "split_with_sizes": _TUPLE,
    "chunk": _TUPLE,
    "unbind": _TUPLE,
    "lstm": "gives several tensors: no rule of its own; cut the graph after it",
    "multiheadattention": _INSIDE,
    "relu6": "spelled `hardtanh` while tracing",
    "upsample": "spelled `interpolate` while tracing",
    "torchvision.models.swin_transformer.shifted_window_attention": _SOLVED,
    "torchvision.models.swin_transformer._get_relative_position_bias": _FIXED,
    "_weight_norm": _FIXED,
    "_weight_norm_interface": _FIXED,
}

#: what is no op of torch's own
_WRITTEN = {
    PADDED: ["nn.Conv2d(…, padding_mode=…)", "nn.Conv2d(…)(F.pad(…))", "nn.Conv2d(…)(F.interpolate(…))"]
}

_JOINT = """
## Targets shared by several unknown inputs

Each of these ops has a rule of its own above, for one unknown input with the others held. Where several inputs are
unknown, `fxinvert.rules.joint` moves them together to the nearest of the tuples that come closest to the target.

| op | how |
|---|---|
"""

_CONSTANTS = """
## Constants of the computation

Ops that need no rule, because what they give does not follow the model's input as a value. A target that comes to one
of them stops there.

| op | why |
|---|---|
"""


def rules_page(rules: RuleSet) -> str:
    """The page, in Markdown, the same for the same rules."""
    rows = "".join(_row(rules[key]) for key in sorted(rules))
    constants = "".join(f"| `{key}` | {why} |\n" for key, why in sorted(CONSTANTS.items()))
    others = "".join(f"| `{key}` | {how} |\n" for key, how in _OTHERS.items())
    shared = "".join(f"| `{key}` | {joint.how} |\n" for key, joint in JOINT.items())
    return _HEAD + rows + _JOINT + shared + _SEVERAL + others + _CONSTANTS + constants


def spellings(key: str) -> list[str]:
    """How an op is written in PyTorch."""
    places = (("torch", torch), ("F", F), ("Tensor", Tensor))
    found = [f"{place}.{name}" for place, home in places for name in _names(home, key)]
    return [*found, *(f"nn.{name}" for name, cls in _modules() if key_of(cls) == key)]


def _row(rule: Rule) -> str:
    named = (
        _WRITTEN.get(rule.key) or spellings(rule.key) or [rule.key if "." in rule.key else f"aten.{rule.key}"]
    )
    written = ", ".join(f"`{name}`" for name in named)
    parameters = "yes" if rule.trainable else ""
    cells = (rule.kind.value, parameters, summary(rule), reference(rule))
    row = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| `{rule.key}` | {written} | {row} |\n"


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
