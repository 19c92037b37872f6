"""Folded: a normalization with fixed statistics, and the convolution before it, as one convolution; ops as they are differentiated.

y = γ (W ∗ x + b − m) / √(v + ε) + β is the convolution of x with s W and offset s (b − m) + β, s = γ / √(v + ε): where a
function is evaluated and differentiated many times, one pass less over its maps in either direction. Where it is not folded,
it is a product and a sum: torch's own derivative of it takes several times as long to be differentiated.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.linalg.held import held_convolution

CONVOLUTIONS = (
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
)
BATCH_NORM = torch.ops.aten.batch_norm.default
#: the place of `training` among the arguments of a batch normalization, and that of ε
TRAINING, EPSILON = 5, 7


def fold_normalizations(graph: fx.Graph) -> None:
    """Folds every batch normalization in evaluation mode that alone reads a convolution."""
    for node in graph.find_nodes(op="call_function", target=BATCH_NORM):
        before = node.args[0]
        if not _fixed(node) or before.target not in CONVOLUTIONS or len(before.users) > 1:
            continue
        x, weight, *others = before.args
        bias, *rest = others or (None,)
        with graph.inserting_before(node):
            arguments = (weight, bias, *node.args[1:TRAINING], node.args[EPSILON])
            affine = graph.call_function(folded, arguments)
            parts = [graph.call_function(operator.getitem, (affine, i)) for i in (0, 1)]
            made = graph.call_function(before.target, (x, *parts, *rest), before.kwargs)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.erase_node(before)


def differentiate(graph: fx.Graph, entry: fx.Node) -> None:
    """Takes for what follows from the entry what is `differentiated`, in place."""
    following = {entry}
    for node in graph.nodes:
        if following.isdisjoint(node.all_input_nodes):
            continue
        node.target = differentiated(node, following)
        following.add(node)


def differentiated(node: fx.Node, following: Collection[fx.Node]) -> Any:
    """What to call for a node where derivatives are wanted in what follows from some node, and in nothing else.

    Convolutions are differentiated in their inputs alone where their kernels do not follow from it, and what torch differentiates
    only once, or twice at several times the cost, is put together from what it differentiates as often as one likes.
    """
    others = (a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node))
    if node.target in CONVOLUTIONS and not any(other in following for other in others):
        return held_convolution
    if node.target is BATCH_NORM and _fixed(node):
        return scaled
    return TWICE.get(node.target, node.target)


def _fixed(normalization: fx.Node) -> bool:
    """Whether its statistics are given."""
    return normalization.args[TRAINING - 1] is not None and not normalization.args[TRAINING]


def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.hardtanh(x + 3, 0.0, 6.0) / 6


#: ops whose derivative torch cannot differentiate, by others
TWICE: dict[Any, Any] = {torch.ops.aten.hardsigmoid.default: _hardsigmoid}


def folded(
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """s W and s (b − m) + β."""
    scale, offset = _affine(bias, gain, shift, mean, variance, epsilon)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), offset


def scaled(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn: bool,
) -> Tensor:
    """s x − s m + β for `(B, C, …)`, in the precision of the statistics."""
    axes = (-1, *[1] * (x.dim() - 2))
    scale, offset = (value.reshape(axes) for value in _affine(None, gain, shift, mean, variance, epsilon))
    return torch.addcmul(offset, x.to(scale.dtype), scale).to(x.dtype)


def _affine(
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """s and s (b − m) + β."""
    scale = torch.rsqrt(variance + epsilon)
    scale = scale if gain is None else scale * gain
    offset = (-mean if bias is None else bias - mean) * scale
    return scale, offset if shift is None else offset + shift
