"""Decompose: torch functions that hide trainable ops, or which of their results follows what, written out in ops that have rules."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in evaluation mode, samples first and apart from each other throughout.

    The arguments are that function's; query, key and value are `(L, B, E)`.

    Raises:
        NotImplementedError: for inputs without a batch, or keys and values that are given as they are.
    """
    if query.dim() != 3 or static_k is not None or static_v is not None:
        raise NotImplementedError("unbatched inputs, or keys and values that are given as they are")
    same = key is query and value is query
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if same and not use_separate_proj_weight:
        projected: Any = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        own = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights: Any = own if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    query, key, value = projected
    if bias_k is not None and bias_v is not None:
        pairs = ((key, bias_k), (value, bias_v))
        key, value = (torch.cat([x, torch.zeros_like(x[:, :1]) + own], 1) for x, own in pairs)
    if add_zero_attn:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    q, k, v = (torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = _mask(attn_mask, key_padding_mask, num_heads, q.dtype)
    seen = (bias_k is not None) + add_zero_attn  # what is added to the keys is always seen
    mask = mask if mask is None or not seen else F.pad(mask, (0, seen))
    mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None)
    output = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return output, None
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    shares = torch.softmax(scores if mask is None else scores + mask, -1)
    return output, shares.mean(1) if average_attn_weights else shares


def _mask(attended: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores `(B, heads, L, S)`: −∞ where nothing is to be seen."""
    if attended is not None:
        attended = _additive(attended, dtype)
        if attended.dim() == 3:
            attended = torch.unflatten(attended, 0, (-1, heads))
    if padding is None:
        return attended
    hidden = _additive(padding, dtype)[:, None, None, :]
    return hidden if attended is None else attended + hidden


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )


def broadcast(*tensors: Any) -> tuple[Tensor, ...]:
    """`torch.broadcast_tensors`, of which each result follows one tensor alone.

    Raises:
        NotImplementedError: none of them is as large as the results.
    """
    given = tensors[0] if isinstance(tensors[0], tuple | list) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in given))  # type: ignore[no-untyped-call]
    largest = next((x for x in given if x.shape == shape), None)
    if largest is None:
        raise NotImplementedError("none is as large as the results")
    return tuple(x.expand_as(largest) for x in given)


def distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """`torch.cdist`, `(…, P, M)` and `(…, R, M)` → `(…, P, R)`; from 25 rows R on by products, as there, where the mode asks for none."""
    rows = x2.shape[-2]
    found: Tensor
    if p != 2 or "donot" in str(compute_mode) or compute_mode == 2 or (isinstance(rows, int) and rows <= 25):
        found = torch.linalg.vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)
        return found
    squares = [(x * x).sum(-1) for x in (x1, x2)]
    products = x1 @ x2.transpose(-2, -1)
    found = squares[0][..., :, None] - 2 * products + squares[1][..., None, :]
    return found.clamp(min=0).sqrt()


def contracted(x: Tensor, y: Tensor, dims: Any = 2, dims_other: Any = None) -> Tensor:
    """`torch.tensordot` as einsum.

    Raises:
        NotImplementedError: its axes are a tensor.
    """
    if isinstance(dims, Tensor):
        raise NotImplementedError("axes that are a tensor")
    if dims_other is not None:
        dims = dims, dims_other
    elif isinstance(dims, int):
        dims = range(x.dim() - dims, x.dim()), range(dims)
    own, others = list(ascii_letters[: x.dim()]), list(ascii_letters[x.dim() :][: y.dim()])
    for axis, other in zip(*dims, strict=True):
        others[other] = own[axis]
    left = [name for name in (*own, *others) if (name in own) != (name in others)]
    found: Tensor = torch.einsum(f"{''.join(own)},{''.join(others)}->{''.join(left)}", x, y)
    return found


#: torch function → the same, written out
DECOMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: attend,
    torch.broadcast_tensors: broadcast,
    torch.ops.aten.broadcast_tensors.default: broadcast,
    torch.cdist: distances,
    torch.ops.aten.cdist.default: distances,
    torch.tensordot: contracted,
    torch.ops.aten.tensordot.default: contracted,
}
