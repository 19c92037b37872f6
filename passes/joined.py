"""Joined: batches that are joined along the batch axis and cut apart again, with the rows of each sample side by side.

Siamese networks compute on the k maps of a sample, x₁ … x_k, in one call: `cat([x₁ … x_k], 0)` has the rows of all x₁ first, so that
none of the values up to where it is cut apart has rows of a sample. What treats every row alike does so in any order:
`stack([x₁ … x_k], 1).flatten(0, 1)` has k rows of a sample, one after another, and the i-th of each are `[:, i]` of
`unflatten(0, (-1, k))`. Whether all ops in between treat rows alike is not looked at: the graph is run and compared with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.inverse_op import call_arguments

aten = torch.ops.aten
#: the number of all batches, along a first axis
ALL = -1


def side_by_side(graph: fx.GraphModule, values: Mapping[fx.Node, Any], samples: int) -> fx.GraphModule | None:
    """A normalized graph whose joined batches have the rows of each sample side by side; None if it joins none.

    It is a raw graph again, to be normalized and compared with the model.

    Args:
        graph: as captured.
        values: of its nodes, for the example.
        samples: of the example.
    """
    joins = {node: count for node in graph.graph.nodes if (count := _joined(node, values, samples))}
    found = {node: ends for node, count in joins.items() if (ends := _ends(node, values, count, samples))}
    if not found:
        return None
    copies: dict[fx.Node, fx.Node] = {}
    changed = fx.Graph()
    changed.output(changed.graph_copy(graph.graph, copies))
    for join, ends in found.items():
        _join(changed, copies[join])
        _cut(changed, {copies[end]: index for end, index in ends.items()}, joins[join])
    return Interpreted(graph, changed, type(graph).__name__)


def _joined(node: fx.Node, values: Mapping[fx.Node, Any], samples: int) -> int:
    """How many batches a node joins along the batch axis; 0: it does something else."""
    if node.target is not aten.cat.default:
        return 0
    named = call_arguments(node.target, node.args, node.kwargs)
    batches = named["tensors"]
    shapes = {values[batch].shape for batch in batches}
    alike = len(batches) > 1 and len(shapes) == 1 and len(values[node]) == len(batches) * samples
    followed = all(batch.meta["active"] for batch in batches)
    return len(batches) if named["dim"] == 0 and alike and followed else 0


def _ends(join: fx.Node, values: Mapping[fx.Node, Any], batches: int, samples: int) -> dict[fx.Node, int]:
    """Where what follows is cut apart into as many batches: the ops, and which of them they give.

    Nothing if not all of it is.
    """
    ends: dict[fx.Node, int] = {}
    inside = {join}
    for node in join.graph.nodes:
        if not inside.intersection(node.all_input_nodes):
            continue
        if node.op == "output":
            return {}
        value, first = values[node], node.args[0] if node.args else None
        part = _part(values[first], value, batches, samples) if first in inside else None
        if part is not None:
            ends[node] = part
        elif isinstance(value, Tensor):
            inside.add(node)
    return ends


def _part(whole: Tensor, value: Any, batches: int, samples: int) -> int | None:
    """Which of the batches that are joined in a tensor a value is, by where it lies in memory; `ALL`; or None, if it is none."""
    if not isinstance(value, Tensor) or whole.shape[:1] != (batches * samples,):
        return None
    if value.shape == (batches, samples, *whole.shape[1:]):
        return ALL
    cut_out = value.shape == (samples, *whole.shape[1:]) and value.stride() == whole.stride()
    if not cut_out or value.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    number, rest = divmod(
        int(value.storage_offset() - whole.storage_offset()), samples * whole.stride(0) or 1
    )
    return None if rest else number


def _join(graph: fx.Graph, join: fx.Node) -> None:
    with graph.inserting_before(join):
        stacked = graph.call_function(aten.stack.default, (join.args[0], 1))
    join.target, join.args, join.kwargs = aten.flatten.using_ints, (stacked, 0, 1), {}


def _cut(graph: fx.Graph, ends: Mapping[fx.Node, int], batches: int) -> None:
    rows: dict[fx.Node, fx.Node] = {}  # what is cut apart, by samples first
    for end, index in ends.items():
        (source, *_) = end.all_input_nodes
        if source not in rows:
            with graph.inserting_before(end):
                rows[source] = graph.call_function(aten.unflatten.int, (source, 0, [-1, batches]))
        if index != ALL:
            end.target, end.args, end.kwargs = aten.select.int, (rows[source], 1, index), {}
            continue
        end.target, end.args, end.kwargs = aten.transpose.int, (rows[source], 0, 1), {}
        for user in list(end.users):
            if user.target is aten.select.int and user.args[1] == 0:
                user.args = (rows[source], 1, user.args[2])
