"""Linear layers and convolutions: one line per op."""

from __future__ import annotations

from torch import Tensor

from fxinvert.linalg import Convolution, Dense
from fxinvert.rules.affine import LAST_AXIS, PIXELS, invert_affine, invert_by_autograd
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.trainable import ConvolutionWeights, LinearWeights
from fxinvert.rules.windows import sliding


def linear(op: Op, target: Tensor) -> Inverse:
    """y = W x + b over the last axis; every position is a system of its own."""
    return invert_affine(op, target, lambda: Dense(op.parameters["weight"]), LAST_AXIS)


def convolution(op: Op, target: Tensor) -> Inverse:
    """y = W ∗ x + b; a kernel of one entry that meets every input once is a small dense system at every position."""
    weight, groups, anchor = op.parameters["weight"], op.attributes["groups"], op.anchor
    window = sliding(weight.shape[2:], op.attributes)
    if window.pointwise and groups == 1:
        return invert_affine(op, target, lambda: Dense(weight.flatten(1)), PIXELS)
    if not window.symmetric:
        return invert_by_autograd(op, target)
    return invert_affine(
        op,
        target,
        lambda: Convolution(weight, anchor.shape[1:], window.stride, window.before, window.dilation, groups),
    )


def rules() -> list[Rule]:
    return [
        Rule("linear", linear, Kind.AFFINE, trainable=LinearWeights()),
        Rule("conv1d", convolution, Kind.AFFINE, trainable=ConvolutionWeights()),
        Rule("conv2d", convolution, Kind.AFFINE, trainable=ConvolutionWeights()),
        Rule("conv3d", convolution, Kind.AFFINE, trainable=ConvolutionWeights()),
    ]
