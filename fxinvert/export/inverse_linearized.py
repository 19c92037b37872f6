"""The linearized inverse as a module of plain tensor operations: the output's derivative, and a small solve.

Between a feature v and the output o the model is taken by its derivative J, sample by sample, as `fxinvert.inversion.linearized` does:

    t_v = v + Jᵀ(JJᵀ + λI)⁻¹ (t − o),   λ = trace(JJᵀ)/κ²

The backward pass is traced into plain operations once. Every sample is repeated once per number of the output, so that one backward
pass gives all rows of J. The damped matrix has a condition of κ² at most, so that a fixed number of Newton's steps inverts it
(Schulz, ZAMM 13, 1933): products alone, no pivots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxinvert.export.inverse_steps import Unmoved
from fxinvert.linalg.jacobian import differentiable

aten = torch.ops.aten


class Linearized(nn.Module):
    """The nearest feature whose output, to first order, is the target."""

    def __init__(self, rest: nn.Module, feature: Tensor, size: int, condition_limit: float) -> None:
        """
        Args:
            rest: from the feature to the output, `(B, …)` each.
            feature: an example.
            size: how many numbers the output has per sample.
            condition_limit: κ.
        """
        super().__init__()
        self.size, self.limit = size, condition_limit
        # the error of an inverse is squared in every step, once it is below 1: from 1 − κ⁻² it takes log₂ κ² to get there
        self.steps = math.ceil(2 * math.log2(condition_limit)) + 6
        self.register_buffer("unit", torch.eye(size, dtype=feature.dtype))
        self.derivative = _derivative(rest, feature, size)

    def forward(self, feature: Tensor, output_target: Tensor) -> dict[str, Tensor]:
        """`(B, …)` twice → the feature's target, `(B, …)`."""
        count, unit = feature.shape[0], self.get_buffer("unit")
        many = feature.unsqueeze(1).expand(-1, self.size, *[-1] * (feature.dim() - 1)).flatten(0, 1)
        chosen = unit.expand(count, -1, -1).reshape(-1, self.size)
        outputs, rows = self.derivative(many, chosen)
        output = outputs.reshape(count, self.size, self.size)[:, 0]
        jacobian = rows.reshape(count, self.size, -1)
        target = output_target.reshape(count, self.size)
        missing = (target - output).double()
        weights = self._solved((jacobian @ jacobian.mT).double(), missing).to(feature.dtype)
        correction = (weights.unsqueeze(1) @ jacobian).reshape(feature.shape)
        return {"reconstructed": Unmoved()(target, output, feature, feature + correction)}

    def _solved(self, gram: Tensor, missing: Tensor) -> Tensor:
        """(G + trace(G)/κ² I)⁻¹ r: `(B, m, m)`, `(B, m)` → `(B, m)`."""
        unit = self.get_buffer("unit")
        least, unit = torch.finfo(unit.dtype).tiny ** 0.5, unit.double()
        size = (gram * unit).sum((1, 2)).clamp(min=least)[:, None, None]
        system = gram / size + unit / self.limit**2
        found = unit / (1 + self.limit**-2)
        for _ in range(self.steps):
            found = found @ (2 * unit - system @ found)
        return (found @ missing.unsqueeze(-1)).squeeze(-1) / size[:, 0]


def _derivative(rest: nn.Module, feature: Tensor, size: int) -> fx.GraphModule:
    """`(feature, cotangent)` → the output `(B, m)`, and the cotangent times its derivative."""

    def both(x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = rest(x).flatten(1)
            (pulled,) = torch.autograd.grad(output, x, cotangent)
        return output.detach(), pulled

    example = feature[:1].repeat_interleave(2 * size, 0)
    trace = make_fx(both, BACKWARD, "symbolic", _allow_non_fake_inputs=True)
    with differentiable():
        traced = trace(example, torch.eye(size, dtype=feature.dtype).repeat(2, 1))
    traced.graph.eliminate_dead_code()  # sizes of constants, which ONNX has no word for
    traced.recompile()
    return traced


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, None, None]:
    """The derivative for the input alone, as a convolution."""
    if transposed:
        found = aten.convolution(
            gradient, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return found, None, None
    ends = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(
            x.shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, ends, groups), None, None


def _average_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
    padded: bool,
    divisor: int | None,
) -> Tensor:
    """The derivative of an average over windows of rows and columns, which is the product of one over each."""
    stride = stride or kernel
    scale = 1.0 if divisor is None else math.prod(kernel) / divisor
    rows, columns = (
        functional.avg_pool1d(
            torch.eye(int(n), dtype=x.dtype)[None], k, s, p, ceil, padded or divisor is not None
        )[0]
        for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)
    )
    return rows @ gradient @ columns.mT * scale


def _adaptive_average_backward(gradient: Tensor, x: Tensor) -> Tensor:
    rows, columns = (
        functional.adaptive_avg_pool1d(torch.eye(int(n), dtype=x.dtype)[None], int(m))[0]
        for n, m in zip(x.shape[2:], gradient.shape[2:], strict=True)
    )
    return rows @ gradient @ columns.mT


#: derivatives in plain operations: torch's own, and those that it leaves to kernels
BACKWARD: dict[Any, Callable[..., Any]] = {
    **{op: function for op, function in decomposition_table.items() if "backward" in str(op)},
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d_backward.default: _average_backward,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward,
}
