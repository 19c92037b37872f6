"""What an iteration towards f(x) = t has found so far, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.linalg.vectors import norm, per_sample


class Track:
    """The best point of every sample, and which samples are done.

    Attributes:
        best: `(B, …)`, the point of the least error.
        least: `(B,)`, ‖t − f(x)‖ there.
        goal: `(B,)`, the error at which a sample is done.
        done: `(B,)`; samples that are not finite are, and those that have reached the goal.
        evaluations: `(B,)`, of f, while the sample was not done.
    """

    def __init__(self, anchor: Tensor, residual: Tensor, goal: Tensor) -> None:
        self.best, self.least, self.goal = anchor, norm(residual), goal
        self.done = ~(self.least > goal) | ~torch.isfinite(self.least)
        self.evaluations = torch.zeros_like(self.least, dtype=torch.long)
        self._marks = [self.least]

    def take(self, x: Tensor, residual: Tensor, active: Tensor) -> None:
        """One more point of the active samples, `(B,)`."""
        error = norm(residual)
        better = (error < self.least) & active
        self.best = chosen(better, x, self.best)
        self.least = torch.where(better, error, self.least)
        self.evaluations += active
        self._marks.append(self.least)
        self.done = self.done | (self.least <= self.goal) | ~torch.isfinite(error)

    def fell(self, steps: int) -> Tensor:
        """`(B,)`, what part of the error the last steps have left; 0 before there were so many."""
        if len(self._marks) <= steps:
            return torch.zeros_like(self.least)
        return self.least / self._marks[-1 - steps]


def chosen(rows: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """The value in some rows, `(B,)`, and the other in the rest; either as it is where these are all rows."""
    if bool(rows.all()):
        return value
    return torch.where(per_sample(rows, value), value, other) if bool(rows.any()) else other
