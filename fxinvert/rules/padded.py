"""Convolutions of maps that are padded or repeated first: the two are one affine op.

Inverted one after the other, the convolution asks its input for values that no padding gives, and the nearest that it
does give miss the target. Together they are

    y = W ∗ (P x + c) + b,

P a matrix whose rows pick an entry of x each, or none, and so one linear system like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.linalg import (
    Composition,
    Convolution,
    LinearOperator,
    PaddedConvolution,
    Selection,
    rows_of,
)
from fxinvert.rules.affine import invert_affine
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.keys import op_named
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.windows import sliding

#: ops that copy entries of maps, with the arguments behind the map: `("aten.pad.default", ([1, 1], "reflect"), {})`
Copy = tuple[str, Sequence[Any], Mapping[str, Any]]

#: torch's function for resizing, which is no single ATen op
INTERPOLATE = "interpolate"

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def padded_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    groups: int,
    copies: Sequence[Copy],
) -> Tensor:
    """The convolution of a map, `(B, C, *spatial)`, that ops in turn pad or repeat first.

    Args:
        input: the map.
        weight, bias, stride, padding, dilation, groups: of the convolution, as in torch.
        copies: the ops before it.
    """
    convolve = _CONVOLUTION[weight.dim() - 2]
    convolved: Tensor = convolve(_copied(input, copies), weight, bias, stride, padding, dilation, groups)
    return convolved


def invert_padded(op: Op, target: Tensor) -> Inverse:
    """The padding or repetition and the convolution behind it, as one linear system."""
    return invert_affine(op, target, lambda: _operator(op))


def _operator(op: Op) -> LinearOperator:
    weight, shape = op.parameters["weight"], op.anchor.shape[1:]
    window = sliding(weight.shape[2:], op.attributes)
    options: dict[str, Any] = {
        "stride": window.stride,
        "padding": window.before,
        "dilation": window.dilation,
        "groups": op.attributes["groups"],
        "after": window.after,
    }
    index = _index(op.attributes["copies"], shape, weight.device)
    rows = rows_of(index, shape)
    if rows is None:
        return Composition(Convolution(weight, index.shape, **options), Selection(index, shape, weight))
    ends = [_constant_ends(along, size) for along, size in zip(rows, shape[1:], strict=True)]
    if None in ends:
        return PaddedConvolution(weight, shape, rows, **options)
    for name, added in zip(("padding", "after"), zip(*ends, strict=True), strict=True):
        options[name] = [own + more for own, more in zip(options[name], added, strict=True)]
    return Convolution(weight, shape, **options)


def _index(copies: Sequence[Copy], shape: Sequence[int], device: torch.device) -> Tensor:
    """Which entry of the flattened map each entry of the copied one is, −1 for none."""
    blank = torch.zeros(1, *shape, dtype=torch.float64, device=device)
    numbers = torch.arange(1, blank.numel() + 1, dtype=torch.float64, device=device).reshape(blank.shape)
    # what is constant makes no difference
    index: Tensor = (_copied(numbers, copies) - _copied(blank, copies))[0].round().long() - 1
    return index


def _constant_ends(rows: Sequence[int], size: int) -> tuple[int, int] | None:
    """What a padding by a constant has added before and after; None where it is not one."""
    before = rows.index(0) if 0 in rows else 0
    after = len(rows) - size - before
    return (before, after) if rows == [-1] * before + [*range(size)] + [-1] * after else None


def _copied(value: Tensor, copies: Sequence[Copy]) -> Tensor:
    for name, arguments, options in copies:
        op = F.interpolate if name == INTERPOLATE else op_named(name)
        value = op(value, *arguments, **options)
    return value


#: the key of a convolution with what pads or repeats its input
PADDED = "padded_convolution"


def rules() -> list[Rule]:
    return [Rule(PADDED, invert_padded, Kind.AFFINE)]
