"""Rows of a Jacobian in the parameters, and damped least squares with them, on whichever side is smaller.

With rows J (R of them, for P parameters), a gradient g and a damping λ > 0

    d = (JᵀJ + λI)⁻¹ g = (g − Jᵀ (JJᵀ + λI)⁻¹ J g) / λ.

The left side solves P equations, the right one R. A linear layer that is met once per sample has rows u ⊗ ã, of which the
factors are kept: their products are the entry-wise (u uᵀ) ∘ (ã ãᵀ), so that no row of all weights is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxinvert.training.statistics import NormalEquations, Solved

#: the least relative damping: the formula of the right side divides by it
LEAST = 1e-6


@dataclass
class JacobianRows:
    """R rows.

    Attributes:
        whole: by a parameter's name, `(R, *its shape)`.
        factors: by the names of a weight and, if there is one, its bias: u `(R, outputs)` and ã `(R, inputs [+ 1])`.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[tuple[str, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        (first, *_) = [*self.whole.values(), *(u for u, _ in self.factors.values())]
        return len(first)

    @classmethod
    def joined(cls, parts: Sequence[JacobianRows]) -> JacobianRows:
        """The rows of all parts, which are of the same parameters, in their order."""
        if not parts:
            return cls()
        first = parts[0]
        return cls(
            {name: torch.cat([part.whole[name] for part in parts]) for name in first.whole},
            {
                names: (
                    torch.cat([part.factors[names][0] for part in parts]),
                    torch.cat([part.factors[names][1] for part in parts]),
                )
                for names in first.factors
            },
        )

    @property
    def size(self) -> int:
        """P."""
        factors = sum(u.shape[1] * a.shape[1] for u, a in self.factors.values())
        return sum(value[:1].numel() for value in self.whole.values()) + factors

    def operations(self, rows: int, dampings: int) -> float:
        """Multiply-adds of the products of `solve`, were there so many rows."""
        if self.size <= rows:
            return float(rows * self.size**2)
        width = sum(value[:1].numel() for value in self.whole.values())
        width += sum(u.shape[1] + a.shape[1] for u, a in self.factors.values())
        return float(rows**2 * width + (1 + 2 * dampings) * rows * self.size)

    def kernel(self) -> Tensor:
        """JJᵀ `(R, R)`, float64: products in the rows' dtype, the sum over parameters in float64."""
        parts = [value.flatten(1) @ value.flatten(1).T for value in self.whole.values()]
        parts += [(u @ u.T) * (a @ a.T) for u, a in self.factors.values()]
        return torch.stack([part.double() for part in parts]).sum(0)

    def dense(self) -> Tensor:
        """J `(R, P)`, parameters in the order of `flat`."""
        factors = [(u[:, :, None] * a[:, None]).flatten(1) for u, a in self.factors.values()]
        return torch.cat([*(value.flatten(1) for value in self.whole.values()), *factors], 1)

    def times(self, vector: Tensor) -> Tensor:
        """J v for v `(P,)`, float64: `(R,)`."""
        found = torch.zeros(len(self), dtype=torch.float64, device=vector.device)
        for value, own in self._blocks(vector):
            if isinstance(value, Tensor):
                found += (value.flatten(1) @ own.to(value.dtype)).double()
            else:
                u, a = value
                found += ((a @ own.reshape(u.shape[1], -1).T.to(a.dtype)) * u).sum(1, dtype=torch.float64)
        return found

    def transposed_times(self, vector: Tensor) -> Tensor:
        """Jᵀ w for w `(R,)`, float64: `(P,)`."""
        found = [(vector.to(value.dtype) @ value.flatten(1)).double() for value in self.whole.values()]
        for u, a in self.factors.values():
            found.append(((u * vector.to(u.dtype)[:, None]).T @ a).double().flatten())
        return torch.cat(found)

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters, by name, in one vector `(P,)`, float64."""
        found = [values[name].double().flatten() for name in self.whole]
        for names in self.factors:
            columns = [values[name].double().reshape(len(values[name]), -1) for name in names]
            found.append(torch.cat(columns, 1).flatten())
        return torch.cat(found)

    def by_name(self, vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back from `flat`, with the shapes of `like`."""
        found: dict[str, Tensor] = {}
        names = [*((name,) for name in self.whole), *self.factors]
        for own, (value, part) in zip(names, self._blocks(vector), strict=True):
            if isinstance(value, Tensor):
                found[own[0]] = part.reshape(like[own[0]].shape)
            else:
                matrix = part.reshape(value[0].shape[1], -1)
                widths = [like[name].numel() // len(matrix) for name in own]
                for name, columns in zip(own, torch.split(matrix, widths, 1), strict=True):
                    found[name] = columns.reshape(like[name].shape)
        return found

    def solve(self, gradient: Tensor, dampings: Sequence[float], scale: float, error: float) -> list[Solved]:
        """d = (s JᵀJ + λI)⁻¹ g, λ relative to the mean of s JᵀJ's diagonal, or of s JJᵀ's if that is shorter.

        Args:
            gradient: g `(P,)`, float64.
            dampings: relative, above 0, one for each solution; raised tenfold as long as the system is not positive definite.
            scale: s.
            error: what g is half the gradient of: `explained` is the share of it that the full change removes.
        """
        if self.size <= len(self):
            rows = self.dense()
            gram = scale * (rows.T @ rows).double()
            made = NormalEquations(gram[None], gradient[None, None], len(self), error)
            return [made.solve(damping) for damping in dampings]
        kernel, seen = scale * self.kernel(), scale * self.times(gradient)[:, None]
        return [self._solved(gradient, kernel, seen, damping, scale, error) for damping in dampings]

    def _solved(
        self, gradient: Tensor, kernel: Tensor, seen: Tensor, damping: float, scale: float, error: float
    ) -> Solved:
        """By the right side: the kernel is s JJᵀ, and seen is s J g."""
        mean, used = float(kernel.diagonal().mean()), max(damping, LEAST)
        while True:
            ridge = used * mean if mean > 0 else 1.0
            shifted = kernel.clone()
            shifted.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not int(failed):
                break
            used *= 10
        change = (gradient - self.transposed_times(torch.cholesky_solve(seen, factor)[:, 0])) / ridge
        curved = scale * float(self.times(change).square().sum())
        explained = (2 * float(change @ gradient) - curved) / error if error > 0 else 0.0
        return Solved(change[None, None], used, explained, dead=0)

    def _blocks(self, vector: Tensor) -> list[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
        values: list[Tensor | tuple[Tensor, Tensor]] = [*self.whole.values(), *self.factors.values()]
        sizes = [v[:1].numel() if isinstance(v, Tensor) else v[0].shape[1] * v[1].shape[1] for v in values]
        return list(zip(values, torch.split(vector, sizes), strict=True))
