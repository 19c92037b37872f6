"""Flexible: torch's `flex_attention`, as the attention that it is, where a model is captured.

    y = softmax(score(s QKᵀ, b, h, i, j), where mask(b, h, i, j)) V,   0 in rows of which nothing is to be seen.

torch hands the functions `score` and `mask` of a sample, a head and two positions to a kernel, which runs them for single
numbers and skips what is masked in blocks. They are called once here, on all scores and positions at the same time: in code that
computes with numbers and looks things up (`score + bias[h]`), these broadcast. That the model computes the same is checked as of
any capture, with torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flexible


def flexible_written() -> AbstractContextManager[Any]:
    """Runs the body with attention, and masks, that consist of tensor operations."""
    return patch.multiple(
        flexible,
        create=True,  # torch calls it a prototype: what a release has no longer must not stop all captures
        flex_attention_hop=_attended,
        create_mask=_masked,
        _FLEX_ATTENTION_DISABLE_COMPILE_DEBUG=True,  # or it would be compiled
    )


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V `(B, H, …, E)`; y, and of all rows the logarithm of the sum and the largest score, to base 2 as of the kernel."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    working = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(working) @ key.to(working).transpose(-2, -1) * scale
    places = _places(scores.shape, scores.device)
    seen = torch.where(block_mask[-1](*places), score(scores, *places), -math.inf)
    empty = (seen == -math.inf).all(-1, keepdim=True)
    weights = torch.where(empty, 0.0, seen.softmax(-1)).to(query.dtype)
    return weights @ value, seen.logsumexp(-1) / math.log(2), seen.amax(-1) / math.log(2)


def _masked(
    mask: Callable[..., Tensor],
    samples: int | None,
    heads: int | None,
    queries: int,
    keys: int,
    device: Any = None,
) -> Tensor:
    """`(B, H, queries, keys)`: what is seen."""
    shape = (samples or 1, heads or 1, queries, keys)
    return mask(*_places(shape, device)).expand(shape)


def _places(shape: Any, device: Any) -> list[Tensor]:
    """The numbers of samples, heads, queries and keys, each along its own axis."""
    return [torch.arange(n, device=device).reshape(-1, *[1] * (3 - axis)) for axis, n in enumerate(shape)]
