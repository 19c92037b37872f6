"""The inverse of a function that is applied entry by entry, as plain tensor operations."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxinvert.rules.branches import Branch

#: makes any difference in the distance from the target count for more than the distance from the anchor
FIRST = 1e30


class Nearest(nn.Module):
    """The nearest pre-image over all branches; the anchor where nothing comes closer to the target.

    As `fxinvert.rules.choice` finds it, with all candidates compared: no shortcut that looks at the values.
    """

    def __init__(self, branches: tuple[Branch, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.branches, self.dtype = tuple(map(_floating, branches)), dtype
        self.least = min(float(branch.least) for branch in branches)
        self.most = max(float(branch.most) for branch in branches)
        # makes the tables, which could not be made while the file is
        self(*torch.zeros(3, 1, dtype=dtype))

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        # of a target beyond everything, rounding would tell no difference
        target = target.clamp(self.least, self.most)
        found, errors = [anchor], [(output - target).abs()]
        for branch in self.branches:
            value = _reached(branch, target)
            found.append(branch.input(value, anchor, self.dtype))
            errors.append((value - target).abs())
        gap = torch.stack(errors).amin(0)
        best, score = anchor, (errors[0] - gap) * FIRST
        for candidate, error in zip(found[1:], errors[1:], strict=True):
            own = (candidate - anchor).abs() + (error - gap) * FIRST
            best = torch.where(own < score, candidate, best)
            score = torch.minimum(own, score)
        return best


def plain(branches: tuple[Branch, ...]) -> bool:
    """Whether the branches are the same for all entries."""
    ends = [end for b in branches for end in (b.low, b.high, b.least, b.most)]
    return not any(isinstance(end, Tensor) for end in ends)


def _floating(branch: Branch) -> Branch:
    """The branch with ends of one type, as ONNX wants them."""
    low, high, least, most = (float(end) for end in (branch.low, branch.high, branch.least, branch.most))
    return replace(branch, low=low, high=high, least=least, most=most)


def _reached(branch: Branch, target: Tensor) -> Tensor:
    """The value of a branch that is nearest to the target; an end that is only approached is missed by a margin."""
    value = target
    low, high = branch.last(target.dtype)
    if branch.least > -math.inf:
        value = torch.where(target <= branch.least, low, value)
    if branch.most < math.inf:
        value = torch.where(target >= branch.most, high, value)
    return value
