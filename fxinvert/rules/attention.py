"""Attention with one unknown operand, the others held at their anchors (Vaswani et al., arXiv 1706.03762).

    y = P v,   P = softmax(q kᵀ / √n + mask)

is affine in v: every head of every sample is a system with its own matrix P, and every column of v a right-hand side.
In q and k it is not: each query is then a problem of its own, and so are the keys of a head, solved matrix-free with
steps of their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxinvert.linalg.each import solve_batched
from fxinvert.rules.affine import invert_by_autograd, moved, shortfall
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule


def attention(op: Op, target: Tensor) -> Inverse:
    """Values by the attention matrix of every head; queries and keys matrix-free, query by query and head by head."""
    if "value" in op.anchors:
        return invert_value(op, target)
    lead = op.anchor.shape[:-2]
    if "query" in op.anchors and lead == target.shape[:-2]:
        return invert_matrix_free(op, target, apart=op.anchor.dim() - 1)
    if lead[:-1] != target.shape[:-3]:
        return invert_matrix_free(op, target)
    # heads that share their keys are one problem
    shape = (*lead, _sharing(target, lead), *target.shape[-2:])
    shared = replace(op, output=op.output.reshape(shape), evaluate=lambda x: op(x).reshape(shape))
    return invert_matrix_free(shared, target.reshape(shape), apart=len(lead))


def invert_value(op: Op, target: Tensor) -> Inverse:
    """Nearest v with P v = t: for every head, and every column of v."""
    anchor, missing = op.anchor, shortfall(op, target)
    weights = attention_matrix(op, missing.dtype)
    lead = anchor.shape[:-2]
    if weights.shape[:-2] != missing.shape[:-2] or lead[:-1] != missing.shape[:-3]:
        return invert_by_autograd(op, target)
    # heads that share their values ask for them together
    queries = _sharing(weights, lead) * weights.shape[-2]
    matrices = weights.reshape(*lead, queries, anchor.shape[-2])
    columns = missing.reshape(*lead, queries, anchor.shape[-1]).mT
    solved = solve_batched(matrices, columns, op.settings.limit(target.dtype))
    return moved(op, target, solved.value.mT, solved)


def _sharing(value: Tensor, lead: torch.Size) -> int:
    """How many heads of a value share one head of the keys and values."""
    return max(1, value.shape[-3] // max(1, lead[-1]))


def attention_matrix(op: Op, dtype: torch.dtype) -> Tensor:
    """P, `(…, queries, keys)`; a query that may look nowhere has a row of zeros, as in torch."""
    query, key = (op.parameters[name].to(dtype) for name in ("query", "key"))
    given = op.attributes
    if given.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = given.get("scale")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = op.parameters.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.where(nowhere, 0, scores.softmax(-1))


def rules() -> list[Rule]:
    return [Rule("scaled_dot_product_attention", attention, Kind.AFFINE)]
