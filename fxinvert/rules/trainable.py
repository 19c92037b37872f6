"""How an op depends on its parameters: affinely, so that closed-form training is one linear solve.

An op y = f(a; θ) that is affine in θ is, for every sample and position, y = Θ ã, where ã holds what the op saw there
(with a 1 appended for the bias) and Θ is its weights as a matrix. A `Trainable` tells the three things that training
needs: the rows ã, the same rows of an output-shaped value, and how a change of Θ is a change of the parameters.
Groups are independent problems and come first: `(groups, rows, columns)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.rules.op import Op
from fxinvert.rules.windows import Sliding, each, sliding


class Lookups(NamedTuple):
    """Which rows of a table an op reads.

    Attributes:
        indices: int64, as many as rows of features, of any shape.
        size: rows of the table.
        padding: the index whose row stays; negative: none.
    """

    indices: Tensor
    size: int
    padding: int = -1


class Trainable(ABC):
    """The parameter side of an affine op."""

    #: whether ã is 1 at one place and 0 elsewhere, so that G is diagonal: `lookups` tells where
    diagonal: ClassVar[bool] = False

    @abstractmethod
    def features(self, op: Op) -> Tensor:
        """ã for every sample and position: `(groups, B·positions, inputs [+ 1])`, samples in order."""

    @abstractmethod
    def outputs(self, op: Op, value: Tensor) -> Tensor:
        """An output-shaped value in the same rows: `(groups, B·positions, outputs)`."""

    @abstractmethod
    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        """ΔΘ `(groups, outputs, inputs [+ 1])` as changes of the parameters, by argument name."""

    def lookups(self, op: Op) -> Lookups:
        """Where each ã is 1, of one group; only where G is diagonal."""
        raise NotImplementedError

    def of_call(self, arguments: Mapping[str, Any]) -> Trainable | None:
        """The parameter side of one call of the op; None where its parameters cannot be trained.

        Args:
            arguments: by name; of a value that follows from the model's input its shape.
        """
        return self


class LinearWeights(Trainable):
    """y = W a + b over the last axis."""

    def features(self, op: Op) -> Tensor:
        return _with_one(op.anchor.flatten(0, -2), op)[None]

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return value.flatten(0, -2)[None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


class LookupWeights(Trainable):
    """y = W[i], rows of a table: ã is 1 at the index and 0 elsewhere, so that G is diagonal (`training/lookups.py`).

    The row of the padding stays.
    """

    diagonal = True

    def features(self, op: Op) -> Tensor:
        indices, count, padding = self.lookups(op)
        rows = F.one_hot(indices.reshape(-1), count).masked_fill_(
            (indices.reshape(-1) == padding)[:, None], 0
        )
        return rows.to(op.output.dtype)[None]

    def lookups(self, op: Op) -> Lookups:
        padding = op.attributes["padding_idx"]
        return Lookups(op.anchor, len(op.parameters["weight"]), -1 if padding is None else int(padding))

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return value.flatten(0, -2)[None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix[0].mT.reshape(parameters["weight"].shape)}


class ByPosition(Trainable):
    """The parameter side of an op whose output has many positions, each a row: some of them can be had alone."""

    @abstractmethod
    def sliding(self, op: Op) -> tuple[Sliding, Tensor]:
        """The window that slides over a map, and the map `(B, C, *spatial)`."""

    def features(self, op: Op, at: Tensor | None = None) -> Tensor:
        """ã, as for every op, or only at the positions `at` `(B, p)`, counted in the order of the flattened map."""
        window, value = self.sliding(op)
        windows = _by_group(window.unfold(value), op.attributes["groups"])
        n, bias = (windows.dim() - 3) // 2, op.parameters.get("bias") is not None
        if at is None:
            # a row of positions at a time is copied, which is many times faster than a window at a time
            patches = windows.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
        else:
            picked = windows.movedim((1, 2), (n + 1, n + 2))[_places(at, windows.shape[3 : 3 + n])]
            patches = picked.flatten(0, 1).movedim(0, -1)
        width, rows = math.prod(patches.shape[1 : 2 + n]), math.prod(patches.shape[2 + n :])
        made = windows.new_empty(len(patches), width + bias, rows)
        made[:, width:] = 1
        made[:, :width].view(patches.shape).copy_(patches)
        return made.mT

    def outputs(self, op: Op, value: Tensor, at: Tensor | None = None) -> Tensor:
        """An output-shaped value in the same rows."""
        by_group = _by_group(value, op.attributes["groups"])
        if at is None:
            return by_group.movedim(0, 2).flatten(2).mT
        picked = by_group.movedim((1, 2), (-2, -1))[_places(at, value.shape[2:])]
        return picked.flatten(0, 1).movedim(1, 0)


class ConvolutionWeights(ByPosition):
    """y = W ∗ a + b: the rows are the patches under the kernel (im2col)."""

    def sliding(self, op: Op) -> tuple[Sliding, Tensor]:
        return sliding(op.parameters["weight"].shape[2:], op.attributes), op.anchor

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


class TransposedConvolutionWeights(ByPosition):
    """y = Wᵀ ∗ a + b: a convolution, by the flipped kernel, of the input with zeros between its entries."""

    def sliding(self, op: Op) -> tuple[Sliding, Tensor]:
        weight = op.parameters["weight"]
        window, n = sliding(weight.shape[2:], op.attributes), weight.dim() - 2
        anchor = op.anchor
        spread = [(size - 1) * s + 1 for size, s in zip(anchor.shape[2:], window.stride, strict=True)]
        spaced = anchor.new_zeros(*anchor.shape[:2], *spread)
        spaced[(slice(None), slice(None), *(slice(None, None, s) for s in window.stride))] = anchor
        reach = [d * (k - 1) for k, d in zip(window.kernel, window.dilation, strict=True)]
        before = tuple(r - p for r, p in zip(reach, window.before, strict=True))
        after = tuple(b + o for b, o in zip(before, each(op.attributes["output_padding"], n), strict=True))
        return Sliding(window.kernel, (1,) * n, window.dilation, before, after), spaced

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        weight, (groups, outputs) = parameters["weight"], matrix.shape[:2]
        like = {
            **parameters,
            "weight": weight.new_empty(groups, outputs, len(weight) // groups, *weight.shape[2:]),
        }
        found = _unpacked(like, matrix)
        flipped = found["weight"].transpose(1, 2).reshape(weight.shape)
        return found | {"weight": flipped.flip(tuple(range(2, weight.dim())))}


class MatrixWeights(Trainable):
    """y = α a @ W + β b, or α W @ a + β b, for a matrix W or a batch of them; `left`, `right`, `added`: argument names."""

    def __init__(self, left: str, right: str, added: str = "") -> None:
        self.left, self.right, self.added = left, right, added

    def features(self, op: Op) -> Tensor:
        anchor = op.anchor if self.left in op.anchors else op.anchor.mT
        rows = self._grouped(op, anchor * op.attributes.get("alpha", 1))
        if self.added not in op.parameters:
            return rows
        return torch.cat([rows, rows.new_full((*rows.shape[:-1], 1), op.attributes["beta"])], dim=-1)

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        if op.parameters[self._matrix(op.parameters)].dim() == 1:
            value = value.unsqueeze(-1)
        elif self.left not in op.anchors:
            value = value.mT
        return self._grouped(op, value)

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        name, added = self._matrix(parameters), parameters.get(self.added)
        found = {}
        if added is not None:
            found, matrix = {self.added: matrix[..., -1].reshape(added.shape)}, matrix[..., :-1]
        turned = matrix.mT if name == self.right else matrix
        return {name: turned.reshape(parameters[name].shape), **found}

    def _matrix(self, parameters: Mapping[str, Tensor]) -> str:
        return self.right if self.right in parameters else self.left

    def _grouped(self, op: Op, value: Tensor) -> Tensor:
        """`(B, …, n)` → `(groups, rows, n)`: one group for every matrix."""
        matrix = op.parameters[self._matrix(op.parameters)]
        vectors = 1 if matrix.dim() == 1 else 2
        lead = op.output.shape[: op.output.dim() - 2 + (vectors == 1)]
        value = value.expand(*lead, *value.shape[-2:]) if vectors == 2 else value
        own = (1,) * (len(lead) - matrix.dim() + 2) + tuple(matrix.shape[:-2])
        groups = [axis for axis in range(len(own)) if own[axis] > 1]
        value = value.movedim(groups, tuple(range(len(groups))))
        return value.flatten(len(groups), -2).reshape(
            matrix[..., :1, :1].numel() if vectors == 2 else 1, -1, value.shape[-1]
        )


class Scale(Trainable):
    """y = w ⊙ x̂ + b, x̂ the normalized input: every number of w is a group of its own.

    Args:
        normalized: x̂ of an op, `(B, …)`.
        channels: whether w belongs to the second axis, or else to the last ones, as many as it has itself.
    """

    def __init__(self, normalized: Callable[[Op], Tensor], *, channels: bool) -> None:
        self.normalized, self.channels = normalized, channels

    def features(self, op: Op) -> Tensor:
        rows = self.outputs(op, self.normalized(op))
        # without a weight only the shift could be trained, and b alone is no group of numbers
        return _with_one(rows, op) if "weight" in op.parameters else rows

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        if self.channels:
            return value.movedim(1, 0).flatten(1)[..., None]
        return value.flatten(-op.parameters["weight"].dim()).movedim(-1, 0).flatten(1)[..., None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        return _unpacked(parameters, matrix)


#: ops that make values of integers: no target comes back through them, but one reaches their output, and trains them
SOURCES: dict[str, Trainable] = {"embedding": LookupWeights()}


def by_statistics(op: Op) -> Tensor:
    """x̂ of a batch norm in evaluation mode."""
    mean, variance = op.parameters["running_mean"], op.parameters["running_var"]
    shape = (1, -1, *[1] * (op.anchor.dim() - 2))
    scale: Tensor = (variance + op.attributes["eps"]).rsqrt()
    return (op.anchor - mean.reshape(shape)) * scale.reshape(shape)


def by_layer(op: Op) -> Tensor:
    """x̂ of a layer norm."""
    return F.layer_norm(op.anchor, list(op.attributes["normalized_shape"]), eps=op.attributes["eps"])


def by_size(op: Op) -> Tensor:
    """x̂ of a root-mean-square norm."""
    return F.rms_norm(op.anchor, list(op.attributes["normalized_shape"]), eps=op.attributes["eps"])


def by_group(op: Op) -> Tensor:
    """x̂ of a group norm."""
    # `F.group_norm` refuses a single sample whose groups have one value each
    return torch.group_norm(op.anchor, op.attributes["num_groups"], eps=op.attributes["eps"])


def _by_group(value: Tensor, groups: int) -> Tensor:
    """`(B, C, …)` → `(B, groups, C / groups, …)`."""
    return value.reshape(len(value), groups, value.shape[1] // groups, *value.shape[2:])


def _places(at: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Positions `(B, p)` of the maps of a batch as an index `(sample, *position)`."""
    samples = torch.arange(len(at), device=at.device)[:, None].expand_as(at)
    return (samples, *torch.unravel_index(at, tuple(shape)))


def _with_one(rows: Tensor, op: Op) -> Tensor:
    if op.parameters.get("bias") is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _unpacked(parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    weight, bias = parameters["weight"], parameters.get("bias")
    if bias is None:
        return {"weight": matrix.reshape(weight.shape)}
    return {"weight": matrix[..., :-1].reshape(weight.shape), "bias": matrix[..., -1].reshape(bias.shape)}
