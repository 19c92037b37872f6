"""The inverses of single ops as modules of plain tensor operations, for those ops whose inverse is that plain.

A step takes the target of an op's output, the output and the anchor, and gives the target of its input. It computes what the op's
rule computes: the proof of the file compares the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxinvert.errors import NoRuleError
from fxinvert.linalg import Dense, factorize
from fxinvert.rules import Op
from fxinvert.rules.branches import Branch
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.shape import reshaped

#: entries of the largest matrix that is put into a file: 32 MB in double precision
MATRIX_LIMIT = 4_000_000

#: differences of the output, relative to its largest entry, that count as none
ROUNDING = 1e-5


class Unmoved(nn.Module):
    """The feature of samples whose output is its target, up to rounding, and what was reconstructed of the others.

    With no correction at all an entry of a ReLU stays where it is below zero, with the least positive one it comes to zero: the
    rounding by which onnxruntime and torch differ must not decide that.
    """

    def forward(self, target: Tensor, output: Tensor, feature: Tensor, found: Tensor) -> Tensor:
        """`(B, …)` each → `(B, …)`, as the feature."""
        missing = (target - output).abs().flatten(1).amax(1)
        same = missing <= ROUNDING * output.abs().flatten(1).amax(1)
        return torch.where(same.reshape(-1, *[1] * (feature.dim() - 1)), feature, found)


class Reshape(nn.Module):
    """The target in the anchor's shape."""

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        return target.reshape(anchor.shape)


class Increasing(nn.Module):
    """A function that increases on one interval and is constant beyond it: the inverse of the target, moved into what it reaches.

    The anchor stays where the output is the target already, and where both lie at or beyond the same end of what is reached.
    """

    def __init__(self, branch: Branch, dtype: torch.dtype) -> None:
        super().__init__()
        self.inverse = branch.inverse
        self.low, self.high = (float(end) for end in branch.last(dtype))

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        kept = target == output
        if self.low > -math.inf:
            kept = kept | ((target <= self.low) & (output <= self.low))
        if self.high < math.inf:
            kept = kept | ((target >= self.high) & (output >= self.high))
        return torch.where(kept, anchor, self.inverse(target.clamp(self.low, self.high), anchor))


class Solved(nn.Module):
    """An affine op: anchor + A⁺_λ (target − output), the factorization multiplied out to one matrix in double precision.

    Where a correction is amplified beyond κ, the damped matrix is taken, as `fxinvert.linalg.anchored` does.
    """

    def __init__(self, op: Op, matrix: Tensor, rows: int) -> None:
        super().__init__()
        factor = factorize(Dense(matrix.detach().double()), op.settings)
        self.rows, self.limit = rows, op.settings.limit(op.anchor.dtype)
        self.largest = factor.largest
        unit = torch.eye(len(matrix), dtype=torch.float64)
        self.register_buffer("inverse", factor.solve(unit, 0.0).correction)
        self.sure = factor.condition is not None and 2 * factor.condition <= self.limit
        if not self.sure:
            damping = (factor.largest / self.limit) ** 2
            self.register_buffer("damped", factor.solve(unit, damping).correction)

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        missing = (target - output).flatten(self.rows).double()
        correction = missing @ self.get_buffer("inverse")
        if not self.sure:
            size, moved = (value.square().sum(-1, keepdim=True).sqrt() for value in (missing, correction))
            amplified = self.largest * moved > self.limit * size
            correction = torch.where(amplified, missing @ self.get_buffer("damped"), correction)
        return anchor + correction.to(anchor.dtype).reshape(anchor.shape)


def step_of(rule: Rule, op: Op, described: str) -> nn.Module:
    """The inverse of an op as a module.

    Args:
        rule: how it is inverted.
        op: with anchors of any batch size; its other operands are the same for all samples.
        described: the node, for messages.

    Raises:
        NoRuleError: it has no inverse of plain operations, or too large a matrix; the message names it.
    """
    if rule.invert is reshaped:
        return Reshape()
    branch = _only_rise(rule.branches(op)) if rule.branches and op.anchor.shape == op.output.shape else None
    if branch is not None:
        return Increasing(branch, op.anchor.dtype)
    if rule.kind is Kind.AFFINE:
        return _solved(op, described)
    raise NoRuleError(
        f"{described} cannot be exported inverted: {rule.kind.value} has no form in ONNX here. What can: affine ops with "
        "a small matrix, reshapes, and functions that rise on one interval and are constant elsewhere, such as relu, hardtanh, elu, "
        "softplus, tanh and sigmoid. Take a node behind it."
    )


def _solved(op: Op, described: str) -> Solved:
    if op.key == "linear":
        return Solved(op, op.parameters["weight"], op.anchor.dim() - 1)
    inner, outer = op.anchor[0].numel(), op.output[0].numel()
    if inner * outer > MATRIX_LIMIT:
        raise NoRuleError(
            f"{described} cannot be exported inverted: its matrix of {outer} × {inner} entries exceeds {MATRIX_LIMIT:,}. "
            "Take a node behind it, or smaller inputs."
        )

    def sample(value: Tensor) -> Tensor:
        return op.evaluate(value[None])[0].flatten()

    jacobian = torch.func.jacrev(sample)(torch.zeros_like(op.anchor[0]))
    return Solved(op, jacobian.reshape(outer, inner), 1)


def _only_rise(branches: tuple[Branch, ...]) -> Branch | None:
    """The branch on which a function rises, if it is constant on the others and jumps nowhere."""
    moving = [branch for branch in branches if not branch.flat]
    if len(moving) != 1:
        return None
    (branch,) = moving
    ends = (branch.low, branch.high, branch.least, branch.most)
    plain = not (branch.open_low or branch.open_high or any(isinstance(end, Tensor) for end in ends))
    return branch if plain and branch.rises else None
