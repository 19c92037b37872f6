"""Attainable: how near the outputs that are right a model can come at all, whatever its earlier values are.

The last stretch of many models is affine, L, behind an op of bounded range: a ReLU gives nothing below 0, tanh nothing
beyond 1, a layer normalization nothing off a sphere. The outputs that are right, S, are convex; let u be the unit vector
from any output o to its projection P(o) onto S, so that no point t of S has ⟨u, t⟩ < ⟨u, P(o)⟩. Whatever value x of a
convex set C the op gives,

    ‖L(x) − t‖ ≥ ⟨u, t − L(x)⟩ ≥ ⟨u, P(o) − L(0)⟩ − max over C of ⟨Aᵀu, x⟩,   A the linear part of L,

which is a proof, for any o. The output of the point of C that comes nearest to S makes it tight (duality: Boyd &
Vandenberghe 2004, §5.2); it is found by projected gradients with momentum (Beck & Teboulle, SIAM J. Imaging Sci. 2, 2009).
Where a range has no end, values beyond `FAR` times the largest of the sample's anchor are left out.

A margin that is proven to be out of reach is halved until it is not: the label then leads by as much as the model can give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.errors import SolveError
from fxinvert.inversion.goal import Goal
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stepping import TOLERANCE
from fxinvert.linalg.jacobian import Jacobian
from fxinvert.passes.flow import Flow, by_sample
from fxinvert.passes.inverse_op import call_arguments

#: the values of ops, from the least to the largest
RANGES: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "sigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "softmax": (0.0, 1.0),
    "gelu": (-0.17, math.inf),
    "silu": (-0.279, math.inf),
}
FAR, STEPS, POWER = 100.0, 400, 30
#: part of a distance that is enough of a proof
TIGHT = 0.99
#: the shares of a margin that are asked for where more is out of reach
SHARES = (0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Bound:
    """What the range of an op proves.

    Attributes:
        node: the op.
        least: `(B,)`, what any value before it makes the output miss at least, relative to the output target; 0: nothing is
            proven.
    """

    node: fx.Node
    least: Tensor

    def forbids(self, rest: Rest) -> Tensor:
        """`(B,)`, the samples that miss whatever the value is from which the rest of a model begins."""
        return self.proven & (self.node in rest.following)

    @property
    def proven(self) -> Tensor:
        """`(B,)`, the samples that miss whatever the value before the op is."""
        return self.least > TOLERANCE


@dataclass(frozen=True)
class Box:
    """Values between two ends, `(B, 1)` each."""

    low: Tensor
    high: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """The projection, `(B, n)`."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def most(self, slope: Tensor) -> Tensor:
        """The maximum of ⟨slope, x⟩ over the set, `(B, n)` → `(B,)`."""
        return torch.where(slope > 0, slope * self.high, slope * self.low).sum(1)


@dataclass(frozen=True)
class Balls:
    """Runs of n values of mean 0 and length √n at most: normalized values, and what lies inside of them."""

    size: int

    def nearest(self, x: Tensor) -> Tensor:
        """The projection, `(B, k·n)`."""
        z = self._centred(x)
        radius = math.sqrt(self.size)
        lengths: Tensor = torch.linalg.vector_norm(z, dim=2, keepdim=True)
        projected: Tensor = z * (radius / lengths.clamp(min=radius))
        return projected.flatten(1)

    def most(self, slope: Tensor) -> Tensor:
        """The maximum of ⟨slope, x⟩ over the set, `(B, k·n)` → `(B,)`."""
        lengths: Tensor = torch.linalg.vector_norm(self._centred(slope), dim=2)
        return math.sqrt(self.size) * lengths.sum(1)

    def _centred(self, x: Tensor) -> Tensor:
        z = x.reshape(len(x), -1, self.size)
        return z - z.mean(2, keepdim=True)


def within_reach(
    graph: fx.GraphModule, values: Mapping[fx.Node, Any], goal: Goal
) -> tuple[Goal, Bound | None]:
    """The goal with as much of the margin as is not proven to be out of reach, and what is proven of that.

    Args:
        graph: a graph with one output.
        values: of its forward pass.
        goal: the outputs that are right.
    """
    bound = attainable(graph, values, goal)
    for share in SHARES if goal.project else ():
        if bound is None or not bool(bound.proven.any()):
            break
        goal = goal.eased(torch.where(bound.proven, share, goal.share))
        bound = attainable(graph, values, goal)
    return goal, bound


def attainable(graph: fx.GraphModule, values: Mapping[fx.Node, Any], goal: Goal) -> Bound | None:
    """How near the output can come to what is right behind the last op of bounded range; None: there is none.

    Args:
        graph: a graph with one output.
        values: of its forward pass.
        goal: the outputs that are right.
    """
    flow = Flow(graph)
    for node in reversed(flow.line[:-1]):
        rest, anchor, op = Rest(graph, values, node), by_sample(node, values[node]), node.meta.get("op")
        if not _is_affine(rest, anchor):
            return None
        if op == "layer_norm":
            size = math.prod(node.args[1])  # type: ignore[arg-type]
            shape = values[node].shape
            scale = _operand(node, "weight", values, 1.0)
            shift = _operand(node, "bias", values, 0.0)
            least = _least(
                lambda z: rest(z.reshape(shape) * scale + shift),  # noqa: B023 - called in this turn
                Balls(size),
                anchor,
                goal,
            )
            return Bound(node, least)
        if op in RANGES:
            low, high = (torch.full_like(anchor[:, :1], end) for end in RANGES[op])
            far = FAR * anchor.abs().amax(1, keepdim=True).clamp(min=1)
            return Bound(node, _least(rest, Box(low, torch.minimum(high, far)), anchor, goal))
    return None


def _least(function: Callable[[Tensor], Tensor], within: Box | Balls, like: Tensor, goal: Goal) -> Tensor:
    """`(B,)`, how much an affine function's values on a set miss at least, relative to the output target."""
    jacobian = Jacobian(function, torch.zeros_like(like))
    offset = function(torch.zeros_like(like))
    # σ_max² by power iteration, and some more
    x = torch.ones_like(like)
    for _ in range(POWER):
        x = jacobian.adjoint(function(x) - offset)
        largest = x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x = x / largest
    rate = 1 / (1.1 * largest)
    x = y = within.nearest(torch.zeros_like(like))
    best, momentum = torch.zeros_like(offset[:, 0]), 1.0
    for step in range(STEPS):
        output = function(y)
        right = goal.nearest(output)
        residual = right - output
        length = residual.norm(dim=1)
        reached = length <= TOLERANCE * goal.size
        slope = jacobian.adjoint(residual)
        if step % 10 == 0 or step == STEPS - 1:
            proven = ((residual * (right - offset)).sum(1) - within.most(slope)) / length
            # of a short one the direction is rounding
            best = torch.where(reached, best, torch.maximum(best, proven))
            if bool((reached | (best >= TIGHT * length)).all()):
                break
        ahead = within.nearest(y + rate * slope)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y, x, momentum = ahead + (momentum - 1) / following * (ahead - x), ahead, following
    return best / goal.size


def _operand(node: fx.Node, name: str, values: Mapping[fx.Node, Any], default: float) -> Any:
    given = call_arguments(node.target, node.args, node.kwargs).get(name)
    return values[given] if isinstance(given, fx.Node) else default


def _is_affine(rest: Rest, anchor: Tensor) -> bool:
    """Whether f(x + d) = f(x) + J d for a large d, the same for every sample."""
    generator = torch.Generator().manual_seed(0)
    size = anchor.abs().amax(1, keepdim=True).clamp(min=1)
    step = 3 * size * torch.randn(anchor.shape[1:], generator=generator).to(anchor)
    try:
        told = Jacobian(rest, anchor).apply(step)
    except SolveError:
        return False
    missed = rest(anchor + step) - rest(anchor) - told
    return bool((missed.norm(dim=1) <= 1e-4 * told.norm(dim=1)).all())
