"""How an op depends on its parameters: affinely, so that closed-form training is one linear solve.

An op y = f(a; θ) that is affine in θ is, for every sample and position, y = Θ ã, where ã holds what the op saw there
(with a 1 appended for the bias) and Θ is its weights as a matrix. A `Trainable` tells the three things that training
needs: the rows ã, the same rows of an output-shaped value, and how a change of Θ is a change of the parameters.
Groups are independent problems and come first: `(groups, rows, columns)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from fxinvert.rules.op import Op
from fxinvert.rules.windows import sliding


class Trainable(ABC):
    """The parameter side of an affine op."""

    @abstractmethod
    def features(self, op: Op) -> Tensor:
        """ã for every sample and position: `(groups, B·positions, inputs [+ 1])`, samples in order."""

    @abstractmethod
    def outputs(self, op: Op, value: Tensor) -> Tensor:
        """An output-shaped value in the same rows: `(groups, B·positions, outputs)`."""

    @abstractmethod
    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        """ΔΘ `(groups, outputs, inputs [+ 1])` as changes of the parameters, by argument name."""


class LinearWeights(Trainable):
    """y = W a + b over the last axis."""

    def features(self, op: Op) -> Tensor:
        return _with_one(op.anchor.flatten(0, -2), op)[None]

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return value.flatten(0, -2)[None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


class ConvolutionWeights(Trainable):
    """y = W ∗ a + b: the rows are the patches under the kernel (im2col)."""

    def features(self, op: Op) -> Tensor:
        weight, groups = op.parameters["weight"], op.attributes["groups"]
        windows = sliding(weight.shape[2:], op.attributes).unfold(op.anchor)
        # (B, C, *positions, *kernel) → (B·positions, groups, C/groups·∏kernel)
        patches = windows.movedim(1, windows.dim() // 2)
        rows = patches.reshape(-1, groups, weight[0].numel())
        return _with_one(rows.transpose(0, 1), op)

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        groups = op.attributes["groups"]
        rows = value.movedim(1, -1).flatten(0, -2)
        return rows.reshape(len(rows), groups, -1).transpose(0, 1)

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


class ChannelScale(Trainable):
    """y = w ⊙ x̂ + b per channel, x̂ the normalized input: every channel is a group of its own."""

    def features(self, op: Op) -> Tensor:
        weight, bias = op.parameters["weight"], op.parameters.get("bias")
        mean, variance = op.parameters["running_mean"], op.parameters["running_var"]
        shape = (1, -1, *[1] * (op.anchor.dim() - 2))
        normalized = (op.anchor - mean.reshape(shape)) * (variance + op.attributes["eps"]).rsqrt().reshape(
            shape
        )
        rows = normalized.movedim(1, 0).flatten(1)[..., None]
        return rows if bias is None or weight is None else _with_one(rows, op)

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return value.movedim(1, 0).flatten(1)[..., None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


def _with_one(rows: Tensor, op: Op) -> Tensor:
    if op.parameters.get("bias") is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _unpacked(parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    weight, bias = parameters["weight"], parameters.get("bias")
    if bias is None:
        return {"weight": matrix.reshape(weight.shape)}
    return {"weight": matrix[..., :-1].reshape(weight.shape), "bias": matrix[..., -1].reshape(bias.shape)}
