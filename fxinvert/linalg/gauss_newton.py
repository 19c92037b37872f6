"""The one equation for a function that is known by its values and derivatives only.

    x* = argmin ‖f(x) − t‖² + λ‖x − x0‖²,  λ → 0

by damped Gauss–Newton (Levenberg 1944, Marquardt 1963), matrix-free. A solution is stationary where x = x0 + Jᵀ z for
some multipliers z: no part of the correction lies in the null space of J. So every step goes from x to

    x0 + Jᵀ z + e,    e = argmin ‖J e − (t − f(x) − J p)‖² + μ‖e‖²,    p = x0 + Jᵀ z − x,

where p removes what the curvature of f has left in the null space, and e = Jᵀ y, by conjugate gradients, renews the
multipliers, z ← z + y. For an affine f the first step is x0 + A⁺(t − f(x0)). Every sample has its own damping μ, which
grows when a step is refused and shrinks when one is taken; a step is taken by the samples whose error falls. The
inner systems are solved as exactly as the outer iteration deserves (Eisenstat & Walker, SIAM J. Sci. Comput. 17, 1996).
A correction that is amplified beyond κ is damped with μ ≥ (σ_max/κ)², as in `fxinvert.linalg.anchored`.

Where f acts on every value by itself (J is diagonal), the values are solved as samples of their own. The answer is a
local one: another branch of f may hold a nearer one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.jacobian import Jacobian, acts_on_values
from fxinvert.linalg.operators import flat
from fxinvert.linalg.solvers import Gradients, cgls

#: part of the correction in the null space of J, relative to the correction, at which an answer counts as the nearest
#: (it is longer than the nearest by half the square); in float32 as much as its rounding can tell
DRIFT = {torch.float64: 1e-4, torch.float32: 3e-3}
#: largest number of steps, refused ones included
STEPS = 60
#: damping, relative to σ², after the first refused step (or the squared slope ‖Jᵀ b‖²/‖b‖², if less) and below which
#: it is dropped; relative to the squared slope, at which a sample gives up
FIRST, DROPPED, LAST = 1e-3, 1e-9, 1e6
#: how exactly the inner systems are solved, relative to their right-hand side: at first and at least; the slope
#: matters more than the residual, which need not vanish
INNER, INNER_SLOPE = 0.02, 0.01
#: a damped sample whose error falls no faster than this is given up
SLOW = 0.8


@dataclass(frozen=True)
class Minimum:
    """What damped Gauss–Newton has found, sample by sample.

    Attributes:
        value: `(B, …)`, x*.
        reached: `(B,)`, f(x*) is the target up to the tolerance.
        nearest: `(B,)`, x* − x0 has no part in the null space of the Jacobian there.
        stationary: `(B,)`, the error has no slope at x*.
        failed: `(B,)`, the target, the anchor or its output is not finite.
        products: `(B,)`, pairs of products with J and Jᵀ.
        damping: `(B,)`, largest damping of a step that was taken.
    """

    value: Tensor
    reached: Tensor
    nearest: Tensor
    stationary: Tensor
    failed: Tensor
    products: Tensor
    damping: Tensor


def gauss_newton(
    function: Callable[[Tensor], Tensor],
    anchor: Tensor,
    output: Tensor,
    target: Tensor,
    *,
    tolerance: float,
    condition_limit: float,
    limit: int,
) -> Minimum:
    """The nearest of the inputs that come closest to the target, near the anchor, for every sample by itself.

    Args:
        function: f, `(B, …)` → `(B, …)`, samples independent.
        anchor: x0.
        output: f(x0).
        target: t.
        tolerance: ‖f(x) − t‖ / ‖t‖ at which a sample has reached its target.
        condition_limit: κ.
        limit: on the pairs of products per sample.

    Raises:
        SolveError: the function cannot be differentiated.
    """
    size = _norm(target)
    goal = tolerance * torch.where(size > 0, size, 1)
    failed = ~torch.isfinite(_norm(target - output) + _norm(anchor))
    idle = failed | (_norm(target - output) <= goal)
    settings = _Settings(tolerance, condition_limit, limit)
    if bool(idle.all()):
        return _Search(function, anchor, output, target, goal, idle, settings).found(failed)
    jacobian = Jacobian(function, anchor)
    alone = acts_on_values(jacobian) & ~idle
    search = _Search(function, anchor, output, target, goal, idle | alone, settings)
    search.products += torch.where(idle, 0, 2 if anchor.shape == output.shape else 0)
    found = search.run().found(failed)
    if not bool(alone.any()):
        return found
    shape, per_value = anchor.shape, anchor[0].numel()
    values = _Search(
        lambda x: function(x.reshape(shape)).reshape(-1, 1),
        anchor.reshape(-1, 1),
        output.reshape(-1, 1),
        target.reshape(-1, 1),
        (goal / per_value**0.5).repeat_interleave(per_value),
        (~alone).repeat_interleave(per_value),
        _Settings(tolerance, condition_limit**2, limit),
        sigma=flat(jacobian.apply(torch.ones_like(anchor)).abs()).amax(1).repeat_interleave(per_value),
    )
    return _merged(alone, values.run().found(failed.repeat_interleave(per_value)), found)


def _merged(alone: Tensor, values: Minimum, samples: Minimum) -> Minimum:
    """The answers found value by value for the rows in `alone`, the others' as they are."""
    shape = (len(alone), -1)
    every = {name: getattr(values, name).reshape(shape).all(1) for name in ("reached", "nearest")}
    settled = (values.stationary | values.reached).reshape(shape).all(1)
    of_rows = Minimum(
        value=values.value.reshape(samples.value.shape),
        reached=every["reached"],
        nearest=every["nearest"],
        stationary=settled,
        failed=samples.failed,
        products=values.products.reshape(shape).amax(1) + samples.products,
        damping=values.damping.reshape(shape).amax(1),
    )
    return Minimum(
        **{
            name: torch.where(_rows(alone, value), value, getattr(samples, name))
            for name, value in vars(of_rows).items()
        }
    )


@dataclass(frozen=True)
class _Settings:
    """See `gauss_newton`."""

    tolerance: float
    condition_limit: float
    limit: int


class _Search:
    """All samples, each at its own place. With `sigma`, every one is a single value of a sample.

    Its J is a number; it is damped where that is less than σ/κ², σ the largest derivative in the sample.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        anchor: Tensor,
        output: Tensor,
        target: Tensor,
        goal: Tensor,
        idle: Tensor,
        settings: _Settings,
        *,
        sigma: Tensor | None = None,
    ) -> None:
        self.function, self.anchor, self.target, self.goal = function, anchor, target, goal
        self.settings, self.scalar = settings, sigma is not None
        self.x, self.output, self.multipliers = anchor, output, torch.zeros_like(target)
        self.error = _norm(target - output)
        zero = torch.zeros_like(self.error)
        self.damping, self.largest_damping, self.least_damping = zero, zero, zero
        self.sigma = zero if sigma is None else sigma
        self.inner, self.drifted = zero + INNER, zero + torch.inf
        self.products = torch.zeros(len(anchor), dtype=torch.long, device=anchor.device)
        self.refused = torch.zeros_like(self.products)
        self.nearest = self.error <= self.goal
        self.stationary = torch.zeros_like(self.nearest)
        self.done = idle | self.nearest

    def run(self) -> _Search:
        """Steps until every sample is done."""
        for _ in range(STEPS):
            if bool(self.done.all()):
                break
            self.step()
        return self

    def found(self, failed: Tensor) -> Minimum:
        return Minimum(
            value=self.x,
            reached=(self.error <= self.goal) & ~failed,
            nearest=self.nearest & ~failed,
            stationary=self.stationary,
            failed=failed,
            products=self.products,
            damping=self.largest_damping,
        )

    def step(self) -> None:
        """One step of every sample that is not done: tried, and taken or refused."""
        jacobian = Jacobian(self.function, self.x)
        drift = self._drift(jacobian)
        reached = self.error <= self.goal
        near = _norm(drift) <= DRIFT[self.x.dtype] * _norm(self.x - self.anchor)
        self.nearest = self.nearest | (reached & ~self.done & near)
        self.done = self.done | self.nearest
        if bool(self.done.all()):
            return
        # a sample far from its target takes plain steps; less of it after steps that were refused
        near = (self.damping <= self.least_damping) | reached
        drift = drift * _rows(torch.where(near, 0.25**self.refused, 0), drift)
        missing = self.target - self.output
        if bool(drift.any()):
            missing = missing - jacobian.apply(drift)
        missing = torch.where(_rows(self.done, missing), 0, missing)
        size = _norm(missing)
        tried = cgls(
            jacobian,
            missing,
            self.damping,
            largest=self.sigma,
            tolerance=0.1 * self.settings.tolerance,
            small_enough=torch.where(
                reached, 0.1 * self.goal, torch.maximum(self.inner * size, 0.3 * self.goal)
            ),
            limit=(self.settings.limit - self.products).clamp(min=1),
            slope=INNER_SLOPE * self.inner,
            skip=self.done,
        )
        self.products += torch.where(self.done, 0, tried.iterations + 1)
        self.sigma = tried.largest
        self._judge(drift, tried, size, reached)

    def _drift(self, jacobian: Jacobian) -> Tensor:
        """p, what takes x back to x0 + Jᵀ z."""
        corrected = flat(self.multipliers != 0).any(1) & ~self.done
        if self.scalar or not bool(corrected.any()):
            return torch.zeros_like(self.x)
        self.products += corrected
        drift = jacobian.adjoint(self.multipliers) - (self.x - self.anchor)
        return torch.where(_rows(corrected, drift), drift, 0)

    def _judge(self, drift: Tensor, tried: Gradients, size: Tensor, reached: Tensor) -> None:
        """Takes the step where the error falls; where the target is reached, where the drift does."""
        eps, sigma = torch.finfo(self.x.dtype).eps, self.sigma
        trial = self.x + drift + tried.correction
        output = self.function(trial)
        error = _norm(self.target - output)
        drifted = _norm(drift)
        better = torch.where(
            reached, (error <= self.goal) & (drifted < 0.5 * self.drifted), error < self.error
        )
        amplified = ~reached & (sigma * _norm(tried.correction) > self.settings.condition_limit * size)
        amplified = amplified & (error > self.goal)
        self.least_damping = torch.where(
            amplified, (sigma / self.settings.condition_limit).square(), self.least_damping
        )
        taken = better & ~amplified & ~self.done
        # no slope; or so small a one that a step was refused because rounding hides it
        steepness = (tried.slope / size).nan_to_num()
        slope = tried.slope / (sigma * size)
        hidden = ~better & (slope <= (100 * eps) ** 0.5)
        level = (
            ~(slope > 0.1 * self.settings.tolerance)
            if self.scalar
            else hidden | ~(slope > self.settings.tolerance)
        )
        self.stationary = self.stationary | (~self.done & ~reached & level)
        ratio = torch.where(taken, error / self.error, 0)
        slow = (self.least_damping > 0) & (ratio > SLOW)
        self.inner = torch.where(taken, ratio.square().clamp(self.settings.tolerance, INNER), self.inner)
        largest = torch.maximum(self.largest_damping, self.damping)
        self.largest_damping = torch.where(taken, largest, self.largest_damping)
        dual = self.multipliers + tried.dual
        self.multipliers = torch.where(_rows(taken, dual), dual, self.multipliers)
        self.x = torch.where(_rows(taken, trial), trial, self.x)
        self.output = torch.where(_rows(taken, output), output, self.output)
        self.error = torch.where(taken, error, self.error)
        self.drifted = torch.where(reached & taken, drifted, self.drifted)
        self._adapt(taken, amplified, steepness.square())
        # what is reached, if not the nearest, is good enough when a step to the nearest was refused twice
        hopeless = (self.damping > LAST * steepness.square()) | (slow & (self.error > self.goal))
        gave_up = torch.where(reached, self.refused > 1, hopeless)
        self.done = self.done | self.stationary | gave_up | (self.products >= self.settings.limit)

    def _adapt(self, taken: Tensor, amplified: Tensor, steepness: Tensor) -> None:
        """Less damping after a step that was taken, more after one that was refused."""
        square = self.sigma.square()
        less = torch.where(self.damping <= DROPPED * square, 0, self.damping / 30)
        more = torch.where(
            amplified,
            self.damping,
            torch.maximum(10 * self.damping, torch.minimum(FIRST * square, steepness)),
        )
        self.damping = torch.maximum(torch.where(taken, less, more), self.least_damping)
        self.refused = torch.where(taken | amplified, 0, self.refused + 1)


def _norm(value: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(flat(value), dim=1)
    return norms


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """Per-sample values `(B,)` that broadcast to `(B, …)`."""
    return rows.reshape(-1, *[1] * (like.dim() - 1))
