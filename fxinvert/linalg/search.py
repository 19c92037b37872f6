"""The steps of damped Gauss–Newton, all samples of a batch at once, each at its own place (`gauss_newton.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg.jacobian import Explicit, Jacobian, Partly
from fxinvert.linalg.minimum import Minimum, Settings
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.recycled import Recycled
from fxinvert.linalg.solvers import Gradients, cgls
from fxinvert.linalg.vectors import flat, norm, per_sample

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
INNER, INNER_SLOPE = 0.1, 0.01
#: a Jacobian with so many rows or columns, or fewer, is written out, if it has no more entries than these; with up to
#: twice as many once a sample has taken so many products
EXPLICIT, ENTRIES, TRIAL = 12, 2**16, 5
#: how exactly systems with it are solved, which costs nothing; rounding would be all that more of it brings
EXPLICIT_INNER = 1e-3
#: of the largest singular value of a matrix: what counts as zero, where it is the Jacobian and where it has learnt
RANK = 1e-6, 1e-4
#: part of the drift that a product with the Jacobian, of which the matrix learns, may leave, before it is made anew
LEARNT = 0.9
#: of a step that does not lessen the error, before it is refused
HALVINGS = 3
#: part of the error that a step may leave before the directions of the steps before are given up, or a matrix
STALE = 0.5
#: a damped sample whose error falls no faster than this is given up
SLOW = 0.8


class Search:
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
        settings: Settings,
        *,
        sigma: Tensor | None = None,
    ) -> None:
        self.function, self.anchor, self.target, self.goal = function, anchor, target, goal
        self.settings, self.scalar = settings, sigma is not None
        self.x, self.output, self.multipliers = anchor, output, torch.zeros_like(target)
        self.error = norm(target - output)
        zero = torch.zeros_like(self.error)
        self.damping, self.largest_damping, self.least_damping = zero, zero, zero
        self.sigma = zero if sigma is None else sigma
        self.recycled = Recycled(zero)
        side, entries = min(anchor[:1].numel(), output[:1].numel()), anchor[:1].numel() * output[:1].numel()
        small = entries <= ENTRIES
        self.explicit: Explicit | None = None
        # the samples whose Jacobian is written out, and those for which that is still to be seen
        self.written = (zero == 0) & (small and side <= EXPLICIT)
        self.undecided = (zero == 0) & (small and EXPLICIT < side <= 2 * EXPLICIT)
        # whether a written-out Jacobian is that at x, and whether it is to be made anew
        self.exact, self.renewed = zero != 0, zero == 0
        self.inner, self.drifted = zero + INNER, zero + torch.inf
        self.products = torch.zeros(len(anchor), dtype=torch.long, device=anchor.device)
        self.refused = torch.zeros_like(self.products)
        self.nearest = self.error <= self.goal
        self.stationary = torch.zeros_like(self.nearest)
        self.done = idle | self.nearest

    def run(self) -> Search:
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
        known, stale = self._known(jacobian)
        reached = self.error <= self.goal
        drift, drifted = self._drift(jacobian, reached)
        near = drifted <= DRIFT[self.x.dtype] * norm(self.x - self.anchor)
        self.nearest = self.nearest | (reached & ~self.done & near)
        self.done = self.done | self.nearest
        if bool(self.done.all()):
            return
        # a sample far from its target takes plain steps; less of it after steps that were refused, unless it is those of
        # a matrix that is made anew then
        whole = 0.25 ** torch.where(self.written, 0, self.refused)
        drift = drift * per_sample(
            torch.where((self.damping <= self.least_damping) | reached, whole, 0), drift
        )
        missing = self.target - self.output
        if bool(drift.any()):
            missing = missing - known.apply(drift)
        missing = torch.where(per_sample(self.done, missing), 0, missing)
        size = norm(missing)
        tried = self._solved(known, missing, size, reached, self.done)
        hard = self.undecided & ~tried.converged & ~self.done
        self.undecided = self.undecided & ~hard
        if bool(hard.any()):
            self.written = self.written | hard
            known, renewed = self._known(jacobian)
            again = self._solved(known, missing, size, reached, self.done | ~hard)
            tried, stale = tried.replaced(hard, again), torch.where(hard, renewed, stale)
        self.sigma = tried.largest
        self._judge(drift, drifted, tried, size, reached, stale)

    def _known(self, jacobian: Jacobian) -> tuple[LinearOperator, Tensor]:
        """The Jacobian, written out where that is wanted; the samples that solve with what is known of earlier ones."""
        recycling = self.recycled.known & (self.damping == 0)
        if not bool(self.written.any()):
            return jacobian, recycling
        anew = self.renewed & self.written & ~self.done
        if self.explicit is None or bool(anew.any()):
            made = Explicit(jacobian)
            if self.explicit is not None:
                made.matrix = torch.where(anew[:, None, None], made.matrix, self.explicit.matrix)
            self.explicit = made
            self.products += torch.where(anew, made.pairs, 0)
        whole = bool((self.written | self.done).all())
        known = self.explicit if whole else Partly(self.explicit, jacobian, self.written)
        self.exact, self.renewed = self.exact | anew, self.renewed & ~anew
        return known, torch.where(self.written, ~self.exact, recycling)

    def _solved(
        self, jacobian: LinearOperator, missing: Tensor, size: Tensor, reached: Tensor, skip: Tensor
    ) -> Gradients:
        """The inner systems, but of some samples: with the directions of the steps before, or damped, from nothing.

        Where the Jacobian is written out, products cost nothing and the systems are solved as they are.
        """
        damped = (self.damping > 0) | self.scalar
        left = (self.settings.limit - self.products).clamp(min=1)
        left = torch.where(self.undecided, (TRIAL - self.products).clamp(min=1), left)
        left = torch.where(self.written, 4 * EXPLICIT, left)
        inner = torch.where(self.written, EXPLICIT_INNER, self.inner)
        self.recycled.forget(self.written)
        small_enough = torch.where(reached, 0.1 * self.goal, torch.maximum(inner * size, 0.3 * self.goal))
        known: dict[str, Any] = {
            "tolerance": 0.1 * self.settings.tolerance,
            "small_enough": small_enough,
            "limit": left,
            "slope": INNER_SLOPE * inner,
        }
        free = skip | damped
        brief = ~self.written & (self.settings.worthwhile > 0)
        found = self.recycled.solve(jacobian, missing, largest=self.sigma, skip=free, brief=brief, **known)
        self.products += torch.where(free | self.written, 0, found.iterations)
        if bool((damped & ~skip).any()):
            again = cgls(jacobian, missing, self.damping, largest=self.sigma, skip=skip | ~damped, **known)
            self.products += torch.where(damped & ~skip & ~self.written, again.iterations + 1, 0)
            found = found.replaced(damped, again)
        return found

    def _drift(self, jacobian: Jacobian, reached: Tensor) -> tuple[Tensor, Tensor]:
        """p, what takes x back to x0 + Jᵀ z, and how far that is at the multipliers z so far.

        Those of a matrix are made anew. Where it is not quite the Jacobian this is good enough on the way, unless it is
        wide, so that there is a null space for certain; else a product with the Jacobian tells, and the matrix learns from it.
        """
        corrected = flat(self.multipliers != 0).any(1) & ~self.done
        if self.scalar or not bool(corrected.any()):
            return torch.zeros_like(self.x), torch.zeros_like(self.error)
        moved = self.x - self.anchor
        wide = moved[:1].numel() > self.target[:1].numel()
        trusted = self.written & (self.exact | ~(reached | wide))
        self.products += corrected & ~trusted
        if self.explicit is None:
            drift = jacobian.adjoint(self.multipliers) - moved
            drifted = norm(drift)
        else:
            pulled = Partly(self.explicit, jacobian, trusted).adjoint(self.multipliers)
            asked = corrected & self.written & ~trusted
            self.explicit.learn_adjoint(
                torch.where(per_sample(asked, self.multipliers), self.multipliers, 0), pulled
            )
            drifted = norm(pulled - moved)
            known = self.explicit.multipliers(moved, torch.where(self.exact, *RANK))
            self.multipliers = torch.where(per_sample(self.written, known), known, self.multipliers)
            renewed = self.explicit.adjoint(self.multipliers)
            drift = torch.where(per_sample(self.written, moved), renewed, pulled) - moved
            drifted = torch.where(self.written & self.exact, norm(drift), drifted)
        return torch.where(per_sample(corrected, drift), drift, 0), drifted

    def _tried(self, step: Tensor, reached: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where a step leads, the output and the error there, and the part of the step that was gone."""
        trial = self.x + step
        output = self.function(trial)
        error = norm(self.target - output)
        part = torch.ones_like(error)
        for _ in range(HALVINGS):
            # the direction is right where the step is too long: shorter ones cost no product
            longer = ~reached & ~self.done & ~(error < self.error) & (self.damping == 0)
            if self.scalar or not bool(longer.any()):
                break
            part = torch.where(longer, part / 2, part)
            trial = self.x + per_sample(part, step) * step
            output = self.function(trial)
            error = norm(self.target - output)
        return trial, output, error, part

    def _judge(
        self, drift: Tensor, drifted: Tensor, tried: Gradients, size: Tensor, reached: Tensor, stale: Tensor
    ) -> None:
        """Takes the step where the error falls; where the target is reached, where the drift does.

        A step by directions of a Jacobian that has changed is not held against its sample: the next is made anew.
        """
        eps, sigma, tolerance = torch.finfo(self.x.dtype).eps, self.sigma, self.settings.tolerance
        trial, output, error, part = self._tried(drift + tried.correction, reached)
        # with a matrix, what is in the null space is known but for the products that have not been asked for
        less = (drifted < torch.where(self.written, LEARNT, 0.5) * self.drifted) | (self.written & ~stale)
        # from where curvature has taken it the target is soon reached again
        allowed = torch.where(self.written, torch.maximum(STALE * size, self.goal), self.goal)
        better = torch.where(reached, (error <= allowed) & less, error < self.error)
        amplified = sigma * norm(tried.correction) > self.settings.condition_limit * size
        amplified &= ~reached & (error > self.goal)
        self.least_damping = torch.where(
            amplified & ~stale, (sigma / self.settings.condition_limit).square(), self.least_damping
        )
        taken = better & ~amplified & ~self.done
        # no slope; or so small a one that a step was refused because rounding hides it
        steepness = (tried.slope / size).nan_to_num()
        slope = tried.slope / (sigma * size)
        hidden = ~better & (slope <= (100 * eps) ** 0.5)
        level = ~(slope > 0.1 * tolerance) if self.scalar else hidden | ~(slope > tolerance)
        self.stationary = self.stationary | (~self.done & ~reached & ~stale & level)
        ratio = torch.where(taken, error / self.error, 0)
        slow = (self.least_damping > 0) & (ratio > SLOW)
        spent = taken & ~stale & (self.damping == 0) & (ratio > 1 - self.settings.worthwhile)
        # directions of a Jacobian that has changed too much
        self.recycled.forget(~taken | (~reached & (ratio > STALE)))
        self.inner = torch.where(taken, ratio.square().clamp(tolerance, INNER), self.inner)
        if self.explicit is not None:
            moved, change = trial - self.x, output - self.output
            self.explicit.learn(torch.where(per_sample(taken & ~reached, moved), moved, 0), change)
            self.renewed = stale & (~taken | (~reached & (ratio > STALE)))
            self.exact = self.exact & ~taken
        self.largest_damping = self.largest_damping.maximum(torch.where(taken, self.damping, 0))
        dual = self.multipliers + per_sample(part, tried.dual) * tried.dual
        self.multipliers = torch.where(per_sample(taken, dual), dual, self.multipliers)
        self.x = torch.where(per_sample(taken, trial), trial, self.x)
        self.output = torch.where(per_sample(taken, output), output, self.output)
        self.error = torch.where(taken, error, self.error)
        self.drifted = torch.where(reached & taken, drifted, self.drifted)
        self._adapt(taken, amplified, steepness.square(), stale & ~taken)
        # what is reached, if not the nearest, is good enough when a step to the nearest was refused twice
        hopeless = (self.damping > LAST * steepness.square()) | ((slow | spent) & (self.error > self.goal))
        gave_up = torch.where(reached, self.refused > 1, hopeless)
        self.done = self.done | self.stationary | gave_up | (self.products >= self.settings.limit)

    def _adapt(self, taken: Tensor, amplified: Tensor, steepness: Tensor, excused: Tensor) -> None:
        """Less damping after a step that was taken, more after one that was refused."""
        square = self.sigma.square()
        less = torch.where(self.damping <= DROPPED * square, 0, self.damping / 30)
        more = torch.where(
            amplified,
            self.damping,
            torch.maximum(10 * self.damping, torch.minimum(FIRST * square, steepness)),
        )
        damping = torch.maximum(torch.where(taken, less, more), self.least_damping)
        self.damping = torch.where(excused, self.damping, damping)
        # where the target is reached, a matrix is made anew only once
        settled = self.written & (self.error <= self.goal)
        again = torch.where(taken | amplified, 0, self.refused + (~excused).long())
        self.refused = torch.where(settled, self.refused + (~taken).long(), again)
