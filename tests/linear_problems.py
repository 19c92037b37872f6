"""Matrices and convolutions to try solvers on."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64


def matrix(m: int, n: int, condition: float = 10.0, rank: int | None = None) -> Tensor:
    """A random `(m, n)` matrix of norm 1 with singular values spaced by their ratios down to 1 / condition."""
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, dtype=F64))[0] for size in (m, n))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), k, dtype=F64)
    values[k if rank is None else rank :] = 0
    made: Tensor = u * values @ v.T
    return made


def damped_inverse(a: Tensor, damping: float) -> Tensor:
    """(AᵀA + λI)⁻¹Aᵀ."""
    inverse: Tensor = torch.linalg.solve(a.T @ a + damping * torch.eye(a.shape[1], dtype=F64), a.T)
    return inverse


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    """Weight, input shape and options of a convolution that fits."""
    n = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    largest = {1: 9, 2: 6, 3: 4}[n]
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    padding = [draw(st.integers(0, 2)) for _ in range(n)]
    dilation = [draw(st.integers(1, 2)) for _ in range(n)]
    shape = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), max(largest, d * (k - 1) + 1)))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    options = {
        "stride": [draw(st.integers(1, 3)) for _ in range(n)],
        "padding": padding,
        "dilation": dilation,
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(c_out, c_in // groups, *kernel, generator=generator, dtype=F64)
    return weight, (c_in, *shape), {**options, "groups": groups}
