"""Entries: which entries of a value follow the model's input.

Where a model puts rows of its own before those that it was given, adds positions, and takes them apart again, as windows
of patches that share one class token do, some values hold entries of both kinds, and what is taken of them may be of one.
Ops that move entries move this mark with them, ops of entries in one place keep it; behind all others every entry follows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.calls import evaluate
from fxinvert.passes.leaves import leaves, mapped
from fxinvert.rules import Kind, RuleSet
from fxinvert.rules.region import ARITHMETIC

#: in a node's `meta`: the truth values of its entries, if some follow the input and others do not
SOME = "entries"


def any_follows(node: fx.Node, value: Any, rules: RuleSet, value_of: Callable[[Any], Any]) -> bool:
    """Whether an entry of a node's value follows the input, where an input of the node does; which, is written into its `meta`.

    Args:
        node: an op; its inputs are marked already.
        value: its value in the example run.
        rules: the rules in force.
        value_of: gives the example values of a (nested) argument.
    """
    inputs = [n for n in node.all_input_nodes if n.meta["active"]]
    moves, placed = _kinds(node, rules)
    target: Any = node.target
    mixed = any(SOME in n.meta for n in inputs) or (
        moves and len(inputs) < sum(map(_is_real, node.all_input_nodes))
    )
    if not mixed or not isinstance(value, Tensor) or not (moves or placed):
        return True

    def marks(argument: fx.Node) -> Any:
        given = value_of(argument)
        if not _is_real(argument):
            return given
        whole = torch.full_like(given, float(argument.meta["active"]))
        return argument.meta.get(SOME, whole).to(given.dtype)

    if moves:
        args, kwargs = mapped((node.args, node.kwargs), marks)
        found = evaluate(target, args, kwargs) != 0
    else:
        given = [
            marks(n) != 0 for n in leaves((node.args, node.kwargs)) if isinstance(n, fx.Node) and _is_real(n)
        ]
        found = reduce(torch.logical_or, given).expand(value.shape)
    if not bool(found.all()):
        node.meta[SOME] = found
    return bool(found.any())


def _kinds(node: fx.Node, rules: RuleSet) -> tuple[bool, bool]:
    """Whether an op moves entries to places that no data decide, and whether it keeps them in their places."""
    rule = rules.get(node.meta.get("op", ""))
    if rule is None or node.op != "call_function":
        return False, False
    decided = any(n.meta["fed"] and not _is_real(n) for n in node.all_input_nodes)
    return rule.kind is Kind.MOVES and not decided, rule.kind is Kind.ELEMENTWISE or rule.key in ARITHMETIC


def _is_real(node: fx.Node) -> bool:
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)
