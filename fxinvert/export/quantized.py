"""Quantized values that stay in floating point, as networks are trained for quantization with: torch's capture knows no such op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FakeQuantized(TorchFunctionMode):
    """While it is on, calls that quantize are written out; those that would observe values, too, observe none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call, or what replaces it."""
        name = getattr(func, "__name__", "")
        if name == "fake_quantize_per_tensor_affine":
            return _quantized(*args, **(kwargs or {}))
        if name == "fake_quantize_per_channel_affine":
            return _by_channel(*args, **(kwargs or {}))
        if name == "fused_moving_avg_obs_fake_quant":
            return _observed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _quantized(input: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    """`(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale`, rounded as torch does."""
    size, zero = (torch.as_tensor(v, dtype=input.dtype) for v in (scale, zero_point))
    levels = (input * (1 / size)).round() + zero
    return (levels.clamp(quant_min, quant_max) - zero) * size


def _by_channel(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    shape = [1] * input.dim()
    shape[axis] = -1
    return _quantized(input, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


def _observed(
    input: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> Tensor:
    """What is quantized where that is switched on; observers are off where a model is in use."""
    if per_row_fake_quant:
        quantized = _by_channel(input, scale, zero_point, ch_axis, quant_min, quant_max)
    else:
        quantized = _quantized(input, scale, zero_point, quant_min, quant_max)
    return torch.where(fake_quant_on == 1, quantized, input)
