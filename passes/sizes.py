"""Sizes: values whose number of rows is computed from data, as a mask's selection, so that no rows are a sample's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.leaves import leaves

#: ops that give as many rows as their values say
_SELECT = (
    "_unique2", "argwhere", "masked_select", "nonzero", "nonzero_numpy", "unique", "unique_consecutive", "unique_dim",
)  # fmt: skip
#: ops that read a number off a tensor
_READ = ("item", "_local_scalar_dense")
#: ops that give what their first argument is, with some of it changed, in its shape
_IN_FIRST = (
    "copy", "index_add", "index_copy", "index_fill", "index_put", "masked_fill", "masked_scatter", "scatter", "scatter_add",
    "scatter_reduce",
)  # fmt: skip


def of_computed_size(graph: fx.GraphModule, values: Any) -> set[fx.Node]:
    """The nodes whose tensors have a size that is computed from data.

    Args:
        graph: a normalized graph.
        values: of its nodes, for an example.
    """
    found: set[fx.Node] = set()
    numbers: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        key, inputs = node.meta.get("op", ""), node.all_input_nodes
        # what a mask that is made of sizes alone selects has as many rows as the batch says
        from_data = any(n.meta["fed"] or n in found for n in inputs)
        if not isinstance(values[node], Tensor | tuple | list):
            if (from_data and key in _READ) or not numbers.isdisjoint(inputs):
                numbers.add(node)
            continue
        given = inputs[:1] if key in _IN_FIRST else inputs
        sized_by = numbers.intersection(leaves(node.args[1:])) if numbers and _takes_sizes(node) else ()
        selects = from_data and (key in _SELECT or _is_masked(node, values))
        if selects or sized_by or not found.isdisjoint(given):
            found.add(node)
    return found


def _takes_sizes(node: fx.Node) -> bool:
    """Whether an op takes whole numbers, such as sizes; those of arithmetic take numbers of any kind."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any("int" in str(a.type).lower() for a in schema.arguments)


def _is_masked(node: fx.Node, values: Any) -> bool:
    """Whether an op picks what truth values say that depend on data."""
    if node.meta.get("op") not in ("index", "getitem"):
        return False
    masks = [values[n] for n in leaves(node.args[1]) if isinstance(n, fx.Node) and n.meta["fed"]]
    return any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks)
