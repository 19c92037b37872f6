"""Weights behind a weight norm, W = g v / ‖v‖ (Salimans & Kingma, arXiv 1602.07868): what a change of W is for g and v.

An op is affine in W, not in g and v; so ΔW is solved for, and taken apart. With s = g / ‖v‖, W = s v, and

    Δv = ΔW / s,    Δg = ± ‖W + ΔW‖ − g,    the sign that of g,

give W + ΔW. They do so for the direction v of any part α of the step, too: v + α Δv = (W + α ΔW) / s. Where g = 0, W has
no direction yet: v takes that of ΔW, at its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.passes.capture import attribute
from fxinvert.passes.inverse_op import call_arguments
from fxinvert.passes.synthesize import is_weight_norm, parameters_of

#: v, g, what is of W, and the axis of the norm -> what is of v and of g
Apart = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def by_argument(node: fx.Node, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an op, and for a weight behind a weight norm its direction, which has its shape."""
    normed = () if node.op == "call_module" else call_arguments(node.target, node.args, node.kwargs).items()
    behind = [name for name, value in normed if isinstance(value, fx.Node) and is_weight_norm(value)]
    return dict(parameters) | {name: parameters[f"{name}.v"] for name in behind}


def split(
    node: fx.Node, parameters: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Changes of an op's arguments, those of a weight behind a weight norm as changes of its length and direction.

    Args:
        node: the op.
        parameters: the values of its parameters, named as by `parameters_of`.
        changes: by argument.
    """
    return _by_parameter(node, parameters, changes, _split)


def pulled(
    node: fx.Node, parameters: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Derivatives in an op's arguments, `(N, …)` each, those in a weight behind a weight norm as in its length and direction."""
    return _by_parameter(node, parameters, slopes, _pulled)


def changes_of(inverse: InverseGraph, node: fx.Node, change: Tensor) -> dict[str, Tensor]:
    """ΔΘ `(groups, outputs, inputs [+ 1])` of an affine op as changes of its parameters, by name."""
    names = parameters_of(node)
    parameters: dict[str, Any] = {
        argument: attribute(inverse.graph, name) for argument, name in names.items()
    }
    own = by_argument(node, parameters)
    changes = split(node, parameters, inverse.trainable(node).changes(own, change))
    return {names[argument]: change for argument, change in changes.items()}


def _by_parameter(
    node: fx.Node, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], apart: Apart
) -> dict[str, Tensor]:
    found = {}
    for argument, value in values.items():
        if argument in parameters:
            found[argument] = value
            continue
        v, g = (parameters[f"{argument}.{part}"] for part in "vg")
        found[f"{argument}.v"], found[f"{argument}.g"] = apart(v, g, value, _axis(node))
    return found


def _axis(node: fx.Node) -> int:
    """The axis whose entries have a length each; −1: there is one for all."""
    (weight,) = filter(is_weight_norm, node.all_input_nodes)
    return int(call_arguments(weight.target, weight.args, weight.kwargs)["dim"])


def _split(v: Tensor, g: Tensor, change: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Δv and Δg in float64; in what is normed to length 0 v takes the direction of ΔW."""
    v, g, change = v.double(), g.double(), change.double()
    size = torch.norm_except_dim(v, 2, dim)
    wanted = v * (g / size) + change
    length = torch.norm_except_dim(wanted, 2, dim)
    turned = torch.where(length > 0, wanted * (size / length), v) - v
    return (
        torch.where(g == 0, turned, change * (size / torch.where(g == 0, 1, g))),
        torch.where(g < 0, -length, length) - g,
    )


def _pulled(v: Tensor, g: Tensor, slope: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Derivatives in v and g."""
    back = torch.func.vjp(lambda v, g: v * (g / torch.norm_except_dim(v, 2, dim)), v.detach(), g.detach())[1]
    in_v, in_g = torch.func.vmap(back)(slope)
    return in_v, in_g
