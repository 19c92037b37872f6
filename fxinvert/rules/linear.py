"""Linear layers, matrix products, convolutions and their transposes: one line per op."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxinvert.linalg import Convolution, Dense, TransposedConvolution
from fxinvert.rules.affine import LAST_AXIS, PIXELS, Rows, invert_affine, invert_by_autograd
from fxinvert.rules.arithmetic import invert_scaled
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.groups import axes
from fxinvert.rules.op import Op
from fxinvert.rules.products import invert_product
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.trainable import (
    ConvolutionWeights,
    LinearWeights,
    MatrixWeights,
    Trainable,
    TransposedConvolutionWeights,
)
from fxinvert.rules.windows import Sliding, each, sliding


def linear(op: Op, target: Tensor) -> Inverse:
    """y = W x + b over the last axis; every position is a system of its own."""
    return invert_affine(op, target, lambda: Dense(op.parameters["weight"]), LAST_AXIS)


def inner(op: Op, target: Tensor) -> Inverse:
    """y = W x over the last axis, W the other operand."""
    if "self" not in op.anchors or op.parameters["other"].dim() != 2:
        return invert_by_autograd(op, target)
    return invert_affine(op, target, lambda: Dense(op.parameters["other"]), LAST_AXIS)


def cumulative(op: Op, target: Tensor) -> Inverse:
    """Running sums along an axis; every line is a triangular system of its own."""
    (axis,) = axes(op, op.attributes["dim"])
    size = op.anchor.shape[axis]
    lines = Rows(
        lambda value: value.movedim(axis, -1).flatten(0, -2),
        lambda value, like: value.reshape(like.movedim(axis, -1).shape).movedim(-1, axis),
    )
    return invert_affine(op, target, lambda: Dense(op.anchor.new_ones(size, size).tril()), lines)


def product(key: str, left: str, right: str, added: str = "", trainable: Trainable | None = None) -> Rule:
    """A rule for y = β c + α (left @ right), one of the three unknown, with the names of these operands."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """The nearest operand of a matrix product, the others held; every row or column is a system of its own."""
        if added in op.anchors:
            return invert_scaled(op, target, op.anchor.new_tensor(op.attributes["beta"]))
        matrix = op.parameters[right if left in op.anchors else left]
        return invert_product(op, target, matrix * op.attributes.get("alpha", 1), left=left in op.anchors)

    return Rule(key, invert, Kind.AFFINE, trainable=trainable)


def convolution(op: Op, target: Tensor) -> Inverse:
    """y = W ∗ x + b; windows that meet no input twice are a small dense system at every position of the output.

    Axes along which the kernel has a single tap join nothing: every position along them is a system of its own, and
    solved for with the same factorization.
    """
    weight, groups, anchor = op.parameters["weight"], op.attributes["groups"], op.anchor
    window = sliding(weight.shape[2:], op.attributes)
    if window.apart and groups == 1:
        rows = PIXELS if window.pointwise else _read(window)
        return invert_affine(op, target, lambda: Dense(weight.flatten(1)), rows)
    # one axis stays, for there is no convolution without any
    alone = window.alone[: len(window.kernel) - 1]
    joined = [axis for axis in range(len(window.kernel)) if axis not in alone]
    slid = window.along(joined)
    shape = anchor.shape[1], *(anchor.shape[2 + axis] for axis in joined)
    kernel = weight.reshape(*weight.shape[:2], *slid.kernel)
    return invert_affine(
        op,
        target,
        lambda: Convolution(kernel, shape, slid.stride, slid.before, slid.dilation, groups, slid.after),
        _maps(alone),
    )


def transposed_convolution(op: Op, target: Tensor) -> Inverse:
    """y = Wᵀ ∗ x + b; windows that meet without overlap are a small dense system at every position of the input."""
    weight, groups, anchor = op.parameters["weight"], op.attributes["groups"], op.anchor
    window = sliding(weight.shape[2:], op.attributes)
    tiles = window.kernel == window.stride and set(window.dilation) == {1}
    if (
        tiles
        and groups == 1
        and not any(window.before + each(op.attributes["output_padding"], weight.dim() - 2))
    ):
        return invert_affine(op, target, lambda: Dense(weight.flatten(1).T), _patches(window))
    return invert_affine(
        op,
        target,
        lambda: TransposedConvolution(
            weight, anchor.shape[1:], target.shape[1:], window.stride, window.before, window.dilation, groups
        ),
    )


def _maps(alone: Sequence[int]) -> Rows:
    """The maps at every position along some spatial axes: `(B, C, *spatial)` → `(B·positions, C, *others)`."""
    axes, first = [2 + axis for axis in alone], [*range(1, 1 + len(alone))]

    def join(value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(like.movedim(axes, first).shape).movedim(first, axes)

    return Rows(lambda value: value.movedim(axes, first).flatten(0, len(alone)), join)


def _read(window: Sliding) -> Rows:
    """The window that each position of a convolution reads: `(B·positions, C·∏kernel)` → `(B, C, *in)`, zero between them."""
    n = len(window.kernel)

    def join(value: Tensor, like: Tensor) -> Tensor:
        made = value.new_zeros(like.shape)
        windows = window.unfold(made)
        positions, kernel = windows.shape[2 : 2 + n], windows.shape[2 + n :]
        windows.copy_(value.reshape(len(like), *positions, like.shape[1], *kernel).movedim(n + 1, 1))
        return made

    return Rows(PIXELS.split, join)


def _patches(window: Sliding) -> Rows:
    """The patch that each position of a transposed convolution writes: `(B, C, *out)` → `(B·positions, C·∏kernel)`."""
    n = len(window.kernel)

    def split(value: Tensor) -> Tensor:
        return window.unfold(value).movedim(1, n + 1).flatten(n + 1).flatten(0, n)

    return Rows(split, PIXELS.join)


def rules() -> list[Rule]:
    return [
        Rule("linear", linear, Kind.AFFINE, trainable=LinearWeights()),
        Rule("inner", inner, Kind.AFFINE),
        Rule("cumsum", cumulative, Kind.AFFINE),
        product("matmul", "self", "other", trainable=MatrixWeights("self", "other")),
        product("linalg_matmul", "self", "other", trainable=MatrixWeights("self", "other")),
        product("mm", "self", "mat2", trainable=MatrixWeights("self", "mat2")),
        product("bmm", "self", "mat2"),
        product("mv", "self", "vec", trainable=MatrixWeights("self", "vec")),
        product("addmm", "mat1", "mat2", "self", trainable=MatrixWeights("mat1", "mat2", "self")),
        product("baddbmm", "batch1", "batch2", "self"),
        product("addmv", "mat", "vec", "self"),
        *[Rule(f"conv{n}d", convolution, Kind.AFFINE, trainable=ConvolutionWeights()) for n in (1, 2, 3)],
        *[
            Rule(
                f"conv_transpose{n}d",
                transposed_convolution,
                Kind.AFFINE,
                trainable=TransposedConvolutionWeights(),
            )
            for n in (1, 2, 3)
        ],
    ]
