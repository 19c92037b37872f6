"""Attention weights: what the attention ops of a graph look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.inversion.replay import forward_values
from fxinvert.passes.inverse_op import call_arguments

SDPA, SOFTMAX, PRODUCTS = "scaled_dot_product_attention", "softmax", ("matmul", "bmm", "einsum")

Values = Mapping[fx.Node, Any]


def attentions(graph: fx.GraphModule) -> list[fx.Node]:
    """The attention ops: fused ones, and every softmax over four axes whose result multiplies something."""
    return [
        node
        for node in graph.graph.nodes
        if node.meta.get("op") == SDPA
        or (
            node.meta.get("op") == SOFTMAX
            and len(node.meta["tensor_meta"].shape) == 4
            and any(user.meta.get("op") in PRODUCTS for user in node.users)
        )
    ]


def attention_weights(
    graph: fx.GraphModule, values: Values, node: fx.Node, start: fx.Node, value: Tensor
) -> Tensor | None:
    """The weights `(B, heads, queries, keys)` of an attention op, if an earlier node has some value.

    Args:
        graph: with both nodes.
        values: of the forward pass.
        node: one of `attentions`.
        start: the earlier node.
        value: its value, `(B, …)`.
    """
    found = forward_values(graph, _held(graph, values, start, value))
    if node.meta["op"] == SOFTMAX:
        return found[node]  # type: ignore[no-any-return]
    given = call_arguments(node.target, *fx.node.map_arg((node.args, node.kwargs), lambda n: found[n]))
    return weights(
        **{k: v for k, v in given.items() if k in ("query", "key", "attn_mask", "is_causal", "scale")}
    )


def weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·Q·Kᵀ + mask), as `torch.nn.functional.scaled_dot_product_attention` defines it."""
    if key.dim() == query.dim() and query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    return scores.softmax(-1)


def _held(graph: fx.GraphModule, values: Values, start: fx.Node, value: Tensor) -> dict[fx.Node, Any]:
    """The values that do not follow from a node, and that node's other value."""
    changed = {start}
    for node in graph.graph.nodes:
        if any(n in changed for n in node.all_input_nodes):
            changed.add(node)
    return {n: v for n, v in values.items() if n not in changed} | {start: value}
