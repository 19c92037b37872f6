"""Attention as torch's translation to ONNX takes it, and gives it.

It takes four axes: batch, heads, positions and features. Where a mask lets a position attend to nothing, as that of padding
before a text, torch gives zeros; its translation, the mean over all positions or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Attention(TorchFunctionMode):
    """While it is on, `scaled_dot_product_attention` is given four axes: those before the heads are one, missing ones are added.

    What attends to nothing is zero, in so many words.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call, or what replaces it."""
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            return _attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    mixed = _four_axes(func, query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is None:
        return mixed
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
    return mixed.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def _four_axes(
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    given = (query, key, value)
    if all(x.dim() == 4 for x in given):
        return func(*given, attn_mask, *args, **kwargs)
    shapes = [x.shape for x in (*given, attn_mask) if x is not None]
    before = torch.broadcast_shapes(*(shape[:-3] for shape in shapes))  # type: ignore[no-untyped-call]

    def four(x: Tensor) -> Tensor:
        x = x.expand((1,) * (4 - x.dim()) + x.shape)
        return x.expand(before + x.shape[-3:]).flatten(0, -4) if before else x

    mask = attn_mask if attn_mask is None or attn_mask.dim() < 4 else four(attn_mask)
    mixed = func(*map(four, given), mask, *args, **kwargs)
    return torch.unflatten(mixed, 0, before) if before else mixed[(0,) * (4 - max(map(len, shapes)))]
