"""Activity: which values follow the model's input, so that they can have a target.

A value is *active* if it depends on an input through ops that can be differentiated (or that have a rule). Inputs that
are numbers start it; so does what an embedding makes of integer inputs: the target stops there.
Masks, positions and sizes that are computed from inputs are constants of the computation. Only where nothing active
reaches the output does activity start later, behind the ops that stopped it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from fxinvert.passes.entries import any_follows
from fxinvert.passes.leaves import leaves
from fxinvert.rules import RuleSet
from fxinvert.rules.constants import CONSTANTS

#: makes values of integers
_EMBEDDING = "embedding"
#: ops that take no more than shape and dtype of one of their arguments, and its position
_SHAPE_OF = {"copy": 0, "fill": 0, "expand_as": 1, "reshape_as": 1, "to": 1, "type_as": 1, "view_as": 1}


def mark(node: fx.Node, value: Any, rules: RuleSet, value_of: Callable[[Any], Any]) -> None:
    """Writes into a node's `meta` whether its value is `active`, and whether it is `fed`: made from input data at all.

    Args:
        node: its inputs are marked already.
        value: its value in the example run.
        rules: an op with a rule is active whatever it is.
        value_of: gives the example values of a (nested) argument.
    """
    key = node.meta.get("op", "")
    tensors = [v for v in leaves(value) if isinstance(v, Tensor)]
    given = any(n.meta["fed"] for n in node.all_input_nodes)
    starts = node.op == "placeholder" or (given and key == _EMBEDDING)
    goes_on = bool(followed(node)) and follows(key, rules) and any_follows(node, value, rules, value_of)
    real = any(v.is_floating_point() or v.is_complex() for v in tensors)
    # `zeros_like(x)` and `x.new_ones(…)` take no more than a shape
    shape_only = key.endswith("_like") or key.startswith("new_")
    node.meta["fed"] = node.op == "placeholder" or (given and bool(tensors) and not shape_only)
    node.meta["active"] = real and (starts or goes_on)


def followed(node: fx.Node) -> list[fx.Node]:
    """The active values that a node's value follows."""
    inputs = [n for n in node.all_input_nodes if n.meta["active"]]
    position = _SHAPE_OF.get(node.meta.get("op", ""))
    if position is None:
        return inputs
    values = leaves((*node.args[:position], *node.args[position + 1 :], node.kwargs))
    return [n for n in inputs if n in values]


def follows(key: str, rules: RuleSet) -> bool:
    """Whether an op's values follow its input: it can be differentiated, or there is a rule for it."""
    return key in rules or key not in CONSTANTS


def start_later(graph: fx.GraphModule, rules: RuleSet) -> None:
    """Makes what follows the ops that stop a target active instead, if nothing else reaches the output."""
    (output,) = graph.graph.find_nodes(op="output")
    if not isinstance(output.args[0], fx.Node) or output.args[0].meta["active"]:
        return
    reached: set[fx.Node] = set()
    for node in graph.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n.meta["fed"]]
        stops = not follows(node.meta.get("op", ""), rules) or not any(map(_is_real, inputs))
        fed = node.op != "output" and node.meta["fed"] and _is_real(node)
        if inputs and fed and (stops or not reached.isdisjoint(inputs)):
            reached.add(node)
    if not reached.isdisjoint(output.args[0].all_input_nodes):
        for node in graph.graph.nodes:
            if node.op != "output":
                node.meta["active"] = node in reached


def _is_real(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return isinstance(meta, TensorMetadata) and (meta.dtype.is_floating_point or meta.dtype.is_complex)
