"""Attainable: how near its output target a model can come at all, whatever its earlier values are.

The last stretch of many models is affine, L, behind an op of bounded range: a ReLU gives nothing below 0, tanh nothing
beyond 1, a layer normalization nothing off a sphere. Whatever value x of a convex set C the op gives, for every unit
vector u of the output

    ‖L(x) − t‖ ≥ ⟨u, t − L(x)⟩ ≥ ⟨u, t − L(0)⟩ − max over C of ⟨Aᵀu, x⟩,   A the linear part of L,

which is a proof, for any u. The u of the residual at the nearest point of C makes it tight (duality: Boyd & Vandenberghe
2004, §5.2); that point is found by projected gradients with momentum (Beck & Teboulle, SIAM J. Imaging Sci. 2, 2009).
Where a range has no end, values beyond `FAR` times the largest of the sample's anchor are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.errors import SolveError
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


@dataclass(frozen=True)
class Bound:
    """What the range of an op proves.

    Attributes:
        node: the op.
        least: `(B,)`, ‖output − target‖ / ‖target‖ is at least that for any value before it; 0: nothing is proven.
    """

    node: fx.Node
    least: Tensor

    def forbids(self, rest: Rest) -> Tensor:
        """`(B,)`, the samples whose target no value comes near to from which the rest of a model begins."""
        return (self.least > TOLERANCE) & (self.node in rest.following)


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


def attainable(graph: fx.GraphModule, values: Mapping[fx.Node, Any], target: Tensor) -> Bound | None:
    """How near the output can come to its target behind the last op of bounded range; None: there is none.

    Args:
        graph: a graph with one output.
        values: of its forward pass.
        target: of the output.
    """
    flow = Flow(graph)
    wanted = by_sample(flow.exit, target)
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
                wanted,
            )
            return Bound(node, least)
        if op in RANGES:
            low, high = (torch.full_like(anchor[:, :1], end) for end in RANGES[op])
            far = FAR * anchor.abs().amax(1, keepdim=True).clamp(min=1)
            return Bound(node, _least(rest, Box(low, torch.minimum(high, far)), anchor, wanted))
    return None


def _least(function: Callable[[Tensor], Tensor], within: Box | Balls, like: Tensor, wanted: Tensor) -> Tensor:
    """`(B,)`, the relative distance of an affine function's values on a set from the wanted ones, at least."""
    jacobian = Jacobian(function, torch.zeros_like(like))
    offset = wanted - function(torch.zeros_like(like))
    # σ_max² by power iteration, and some more
    x = torch.ones_like(like)
    for _ in range(POWER):
        x = jacobian.adjoint(jacobian.apply(x))
        largest = x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x = x / largest
    rate = 1 / (1.1 * largest)
    x = y = within.nearest(torch.zeros_like(like))
    best, momentum = torch.zeros_like(wanted[:, 0]), 1.0
    for step in range(STEPS):
        residual = offset - jacobian.apply(y)
        slope = jacobian.adjoint(residual)
        if step % 20 == 0 or step == STEPS - 1:
            length = residual.norm(dim=1)
            proven = ((residual * offset).sum(1) - within.most(slope)) / length.clamp(min=1e-30)
            best = torch.maximum(best, proven)
        ahead = within.nearest(y + rate * slope)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y, x, momentum = ahead + (momentum - 1) / following * (ahead - x), ahead, following
    length = torch.linalg.vector_norm(wanted, dim=1)
    return best / torch.where(length > 0, length, 1)


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
