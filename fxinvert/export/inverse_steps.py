"""The inverses of single ops as modules of plain tensor operations, for those ops whose inverse is that plain.

A step takes the target of an op's output, the output and the anchor, and gives the target of its input. It computes what the op's
rule computes: the proof of the file compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxinvert.errors import NoRuleError
from fxinvert.export.inverse_entries import Maxima, Moved, Reduced, disjoint_windows
from fxinvert.export.inverse_scalar import Nearest, plain
from fxinvert.linalg import Dense, factorize
from fxinvert.linalg.vectors import per_sample
from fxinvert.rules import Op
from fxinvert.rules.groups import axes
from fxinvert.rules.movement import invert_movement
from fxinvert.rules.pooling import MAXIMA
from fxinvert.rules.reduction import largest_to, mean_to, smallest_to, sum_to
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.shape import reshaped

#: entries of the largest matrix that is put into a file: 32 MB in double precision
MATRIX_LIMIT = 4_000_000

#: reductions whose rule is made of what ONNX has, too
REDUCTIONS = {"mean": mean_to, "sum": sum_to, "amax": largest_to, "amin": smallest_to}

#: differences of the output, relative to its largest entry, that count as none
ROUNDING = 1e-5


class Unmoved(nn.Module):
    """The feature of samples whose output is its target, up to rounding, and what was reconstructed of the others.

    With no correction at all an entry of a ReLU stays where it is below zero, with the least positive one it comes to zero: the
    rounding by which onnxruntime and torch differ must not decide that.
    """

    def forward(self, target: Tensor, output: Tensor, feature: Tensor, found: Tensor) -> Tensor:
        """`(B, …)` each → `(B, …)`, as the feature."""
        missing, size = (
            value.abs().reshape(value.shape[0], -1).amax(1) for value in (target - output, output)
        )
        same = missing <= ROUNDING * size
        return torch.where(per_sample(same, feature), feature, found)


class Reshape(nn.Module):
    """The target in the anchor's shape."""

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        return target.reshape(anchor.shape)


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
    if rule.branches and op.anchor.shape == op.output.shape and plain(branches := rule.branches(op)):
        return Nearest(branches, op.anchor.dtype)
    match rule.kind:
        case Kind.MOVES if rule.invert is invert_movement:
            return Moved(op)
        case Kind.AFFINE:
            return _solved(op, described)
        case Kind.CLOSED_FORM if rule.key in REDUCTIONS:
            return Reduced(REDUCTIONS[rule.key], axes(op, op.attributes.get("dim")))
        case Kind.CLOSED_FORM if rule.key in MAXIMA:
            return _maxima(op, described)
    raise NoRuleError(
        f"{described} cannot be exported inverted: {rule.kind.value} has no form in ONNX here. What can: affine ops with "
        "a small matrix, ops that move or copy entries, functions applied entry by entry, such as relu, gelu and sigmoid, "
        "sums, means and maxima, over axes or windows that do not overlap. Take a node behind it."
    )


def _maxima(op: Op, described: str) -> Maxima:
    index = disjoint_windows(op)
    if index is None:
        raise NoRuleError(
            f"{described} cannot be exported inverted: its windows overlap, and which of their entries to raise is a search of "
            "as many steps as it takes. Take a node behind it."
        )
    return Maxima(index, op.anchor[0, 0].numel())


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
