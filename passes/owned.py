"""Owned: which parameters an op is trained by, in closed form or by gradients."""

from __future__ import annotations

from torch import fx, nn

from fxinvert.passes.capture import attribute
from fxinvert.passes.computed import behind, is_affine, is_open, is_weight_norm, steps_to, weights_of
from fxinvert.passes.flow import Flow, has_target
from fxinvert.passes.synthesize import parameters_of, trainable_of
from fxinvert.rules import RuleSet

#: names of parameters by op
Owned = dict[fx.Node, tuple[str, ...]]


def trained_parameters(node: fx.Node, rules: RuleSet) -> tuple[str, ...]:
    """The names of the parameters of an op that closed-form training can change; empty if it cannot or must not."""
    trainable = trainable_of(node, rules)
    if trainable is None:
        return ()
    table, weights = trainable.diagonal, weights_of(node)
    beside = [n for n in node.all_input_nodes if not n.meta["active"] and "tensor_meta" in n.meta]
    if not table and any(n not in weights.values() for n in beside):
        return ()  # what the model's input has part in is no parameter
    owner = node.graph.owning_module
    assert owner is not None, "a graph outside of its module"
    read = parameters_of(node).values()
    names = [n for n in dict.fromkeys(read) if isinstance(attribute(owner, n), nn.Parameter)]
    reads = [n for n in node.graph.find_nodes(op="get_attr") if str(n.target) in names] if table else []
    if any(user is not node for n in reads for user in n.users):
        return ()  # a table that another op reads too, as the output layer may, is trained with that
    thawed = [n for n in names if is_open(owner, n)]
    computed = [v for v in weights.values() if v.op != "get_attr" and not is_weight_norm(v)]
    if not computed:
        return tuple(names) if thawed == names else ()
    return tuple(thawed) if all(is_affine(value, thawed) for value in computed) else ()


def trained_in(flow: Flow, rules: RuleSet) -> Owned:
    """By op, the parameters that closed-form training can change."""
    found = {n: trained_parameters(n, rules) for n in flow.nodes if "op" in n.meta and has_target(n)}
    return {node: names for node, names in found.items() if names}


def followed_in(flow: Flow, rules: RuleSet, trained: Owned) -> Owned:
    """By op, the parameters that only gradients tell how to change: those that its weights are computed from otherwise than affinely.

    In a model with nothing else to train, those of every op.
    """

    def computes(node: fx.Node) -> bool:
        trainable = rules.trainable(node.meta["op"])
        if trainable is None or trainable.diagonal:
            return False
        return any(n.op != "get_attr" for n in steps_to(node.all_input_nodes))

    ops = [n for n in flow.nodes if "op" in n.meta and n not in trained and has_target(n)]
    found = {n: behind(n) for n in ops if computes(n)}
    if not trained and not any(found.values()):
        found = {n: behind(n) for n in ops}
    return {node: names for node, names in found.items() if names}
