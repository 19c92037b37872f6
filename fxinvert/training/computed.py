"""What a change of an op's weights is for the parameters that they are computed from.

An op y = Θ ã is affine in its weights Θ, and these may follow from parameters p, as a mask times a weight does, or a part of a
vector. Of the change ΔΘ that was solved for, p takes what comes closest in what it does to the outputs:

    Δp = argmin ⟨(M Δp − ΔΘ) S, M Δp − ΔΘ⟩,    M = ∂Θ/∂p,    S = G + λI,

of all that do the one of least norm, by conjugate gradients on MᵀSM, preconditioned by MᵀS⁻¹M: if M moves numbers to other places,
and all of an output's weights may move, that is the inverse, and what may not move costs a few iterations. As ΔΘ = C S⁻¹, Δp is the
least-squares solution among the weights that p can give, with the same damping, where Θ is affine in p; where it is affine in
each of several parameters by itself, as in a product of two, it is so to first order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.linalg.jacobian import Jacobian
from fxinvert.passes.capture import attribute
from fxinvert.passes.computed import evaluated, is_open, is_weight_norm, weights_of
from fxinvert.passes.inverse_op import call_arguments
from fxinvert.passes.synthesize import parameters_of
from fxinvert.training.statistics import Metric
from fxinvert.training.weight_norm import split

#: of conjugate gradients, at most, and the residual that is as good as none, relative to the first
ITERATIONS, ENOUGH = 100, 1e-6
#: what no sums tell: all numbers count alike
ALIKE = Metric(lambda x: x, lambda x: x)


@dataclass(frozen=True)
class Pulled:
    """What a change of an op's weights is for its parameters.

    Attributes:
        changes: of the parameters, by name.
        kept: how much of what the change does to the outputs they do, from 0 to 1.
    """

    changes: dict[str, Tensor]
    kept: float = 1.0


def changes_of(
    inverse: InverseGraph, node: fx.Node, change: Tensor, metric: Callable[[], Metric] = lambda: ALIKE
) -> Pulled:
    """ΔΘ `(groups, outputs, inputs [+ 1])` of an affine op as changes of its parameters.

    Args:
        inverse: of the graph.
        node: the op.
        change: ΔΘ.
        metric: makes what tells how far a change is from another where weights are computed.
    """
    graph, trainable = inverse.graph, inverse.trainable(node)
    if node.op == "call_module":
        own = parameters_of(node)
        held = {argument: attribute(graph, name) for argument, name in own.items()}
        return Pulled({own[a]: value for a, value in trainable.changes(held, change).items()})
    weights = weights_of(node)
    by_weight = partial(trainable.changes, evaluated(graph, weights, {}))
    found = by_weight(change)
    names = [n for n in dict.fromkeys(parameters_of(node).values()) if is_open(graph, n)]
    if all(_is_free(weights[argument], names) for argument in found):
        return Pulled({n: v for a, c in found.items() for n, v in _split(weights[a], c).items()})
    return _nearest(graph, by_weight, weights, names, change, metric())


def pulled(graph: fx.GraphModule, node: fx.Node, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives in an op's weights, `(N, …)` each, by argument, as those in its parameters, by name."""
    if node.op == "call_module":
        names = parameters_of(node)
        return {names[argument]: value for argument, value in slopes.items()}
    weights = {argument: value for argument, value in weights_of(node).items() if argument in slopes}
    read = dict.fromkeys(parameters_of(node).values())
    leaves = {name: attribute(graph, name).detach() for name in read if is_open(graph, name)}
    if all(value.op == "get_attr" for value in weights.values()):
        found = {str(weights[argument].target): value for argument, value in slopes.items()}
        return {name: value for name, value in found.items() if name in leaves}
    back = torch.func.vjp(lambda own: evaluated(graph, weights, own), leaves)[1]
    by_name: dict[str, Tensor] = torch.func.vmap(back)(dict(slopes))[0]
    return by_name


def _is_free(weight: fx.Node, names: list[str]) -> bool:
    """Whether a weight may be anything."""
    known = weight.op == "get_attr" or is_weight_norm(weight)
    return known and all(
        str(n.target) in names for n in (weight, *weight.all_input_nodes) if n.op == "get_attr"
    )


def _split(weight: fx.Node, change: Tensor) -> dict[str, Tensor]:
    """The change of a weight as that of a parameter, or of a direction and a length."""
    if weight.op == "get_attr":
        return {str(weight.target): change}
    graph = weight.graph.owning_module
    assert graph is not None, "a graph outside of its module"
    dim = int(call_arguments(weight.target, weight.args, weight.kwargs)["dim"])
    names = [str(n.target) for n in weight.all_input_nodes]
    v, g = (attribute(graph, name) for name in names)
    return dict(zip(names, split(v, g, change, dim), strict=True))


def _nearest(
    graph: fx.GraphModule,
    by_weight: Callable[[Tensor], dict[str, Tensor]],
    weights: Mapping[str, fx.Node],
    names: list[str],
    change: Tensor,
    metric: Metric,
) -> Pulled:
    """What comes closest to a change of weights that not all of these can follow."""
    leaves = {name: attribute(graph, name).detach() for name in names}
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in leaves.values()), torch.float32)
    # it moves numbers, and its transpose moves them back
    moved, back, *_ = torch.func.vjp(by_weight, torch.zeros_like(change))

    def parts(flat: Tensor) -> dict[str, Tensor]:
        own = torch.split(flat, [leaf.numel() for leaf in leaves.values()])
        return {n: part.reshape(leaf.shape) for (n, leaf), part in zip(leaves.items(), own, strict=True)}

    def matrix(flat: Tensor) -> Tensor:
        given = {name: own.to(leaves[name].dtype) for name, own in parts(flat[0]).items()}
        made = evaluated(graph, weights, given)
        found: tuple[Tensor] = back({argument: made[argument].to(change.dtype) for argument in moved})
        return found[0][None].to(dtype)

    jacobian = Jacobian(matrix, torch.cat([leaf.flatten().to(dtype) for leaf in leaves.values()])[None])

    def made(flat: Tensor) -> Tensor:
        return jacobian.apply(flat[None].to(dtype))[0].to(change.dtype)

    def pulled_back(own: Tensor) -> Tensor:
        return jacobian.adjoint(own[None].to(dtype))[0].to(change.dtype)

    found = _conjugate_gradients(
        lambda flat: pulled_back(metric.times(made(flat))),
        lambda flat: pulled_back(metric.divided(made(flat))),
        pulled_back(metric.times(change)),
    )
    left, whole = (float((own * metric.times(own)).sum()) for own in (made(found) - change, change))
    return Pulled(parts(found), 1 - left / whole if whole > 0 else 1.0)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], r: Tensor
) -> Tensor:
    """x with A x = r, of a positive semidefinite A whose range r lies in (Saad, Iterative methods for sparse linear systems, §9.2)."""
    x, p, before, first = torch.zeros_like(r), torch.zeros_like(r), 1.0, 0.0
    for _ in range(ITERATIONS):
        z = precondition(r)
        size = float(r @ z)
        first = first or size
        if not size > ENOUGH**2 * first:
            break
        p = z + size / before * p
        q = apply(p)
        bent = float(p @ q)
        if not bent > 0:
            break
        x, r, before = x + size / bent * p, r - size / bent * q, size
    return x
