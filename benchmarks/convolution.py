"""Convolution solves against the conjugate gradients of the paper's code, and against libraries, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator  # type: ignore[import-untyped]
from scipy.sparse.linalg import lsmr, lsqr
from torch import Tensor, nn

from benchmarks.measure import Ratio, ratio, seconds
from fxinvert.linalg import Convolution, Factor, SolveSettings, choose, solve_anchored

#: channels in and out, kernel, padding, pixels: the layers of the reference measurement
LAYERS = ((8, 16, 3, 1, 32), (16, 8, 3, 1, 32), (64, 64, 3, 1, 16), (3, 10, 5, 0, 32), (10, 10, 3, 0, 14))
BATCH = 32


def layer(c_in: int, c_out: int, kernel: int, padding: int, pixels: int) -> tuple[str, Convolution]:
    """A convolution with weights as torch starts with."""
    weight = nn.Conv2d(c_in, c_out, kernel).weight.detach()
    shape = (c_in, pixels, pixels)
    name = f"{c_in}→{c_out} k{kernel} p{padding} {pixels}²"
    return name, Convolution(weight, shape, (1, 1), (padding, padding), (1, 1), 1)


def reference(a: Convolution, r: Tensor, iterations: int = 100, tolerance: float = 1e-8) -> Tensor:
    """A⁺ r as the paper's code finds it: float32 conjugate gradients on AAᵀ or AᵀA after ten power iterations."""
    x = torch.randn(1, *a.in_shape)
    for _ in range(10):
        x = a.adjoint(a.apply(x))
        x = x / x.norm()
    m, n = a.size
    dual = m <= n
    residual = r if dual else a.adjoint(r)
    y, p = torch.zeros_like(residual), residual
    rho = _dot(residual, residual)
    for _ in range(iterations):
        q = a.apply(a.adjoint(p)) if dual else a.adjoint(a.apply(p))
        alpha = rho / _dot(p, q).clamp(min=1e-30)
        y, residual = y + alpha * p, residual - alpha * q
        renewed = _dot(residual, residual)
        if float(renewed.max().sqrt()) < tolerance:
            break
        p, rho = residual + renewed / rho.clamp(min=1e-30) * p, renewed
    return a.adjoint(y) if dual else y


def run() -> Iterator[Ratio]:
    """Time for a batch of 32, factorization kept, over the reference's; aims 1/10 in the mean, 1 everywhere."""
    torch.manual_seed(0)
    settings, found = SolveSettings(), []
    for shape in LAYERS:
        name, a = layer(*shape)
        choice = choose(a, settings)
        made: list[Factor] = []
        cold = seconds(lambda c=choice, made=made: made.append(c.chosen.make()), warm=False)  # type: ignore[misc]
        (factor,) = made
        x = torch.randn(BATCH, *a.in_shape)
        y = a.apply(x)
        for kind, target in (
            ("noisy", y + 0.1 * y.std() * torch.randn_like(y)),
            ("reachable", a.apply(torch.randn_like(x))),
        ):
            r = target - y
            answers = solve_anchored(factor, r, settings), reference(a, r)
            ours, theirs = (
                float((a.apply(x + d) - target).norm() / target.norm())
                for d in (answers[0].value, answers[1])
            )
            measured = ratio(
                f"{name}, {kind}",
                lambda f=factor, r=r: solve_anchored(f, r, settings),  # type: ignore[misc]
                "conjugate gradients of the paper's code",
                lambda a=a, r=r: reference(a, r),  # type: ignore[misc]
                aim=1.0,
                note=f"residual {ours:.1e} against {theirs:.1e}; condition {factor.condition:.0f}; "
                f"made in {cold:.1f} s: {factor.explain()}",
            )
            found.append(measured)
            yield measured
    mean = math.exp(sum(math.log(m.ratio) for m in found) / len(found))
    yield replace(found[0], what="geometric mean of the five layers", ratio=mean, aim=0.1, note="")
    yield from _libraries(settings)


def _libraries(settings: SolveSettings) -> Iterator[Ratio]:
    """The same against least-squares solvers of scipy, sample by sample, and of torch on the dense matrix."""
    for shape in ((3, 10, 5, 0, 16), (4, 8, 3, 1, 16)):
        name, a = layer(*shape)
        factor = choose(a, settings).chosen.make()
        r = a.apply(torch.randn(BATCH, *a.in_shape))
        one = r[:1].numpy().ravel()
        operator = ScipyOperator(
            a.size,
            matvec=lambda v, a=a: a.apply(_vector(v, a.in_shape)).numpy().ravel(),
            rmatvec=lambda v, a=a: a.adjoint(_vector(v, a.out_shape)).numpy().ravel(),
            dtype=np.float32,
        )
        dense = a.dense()
        rows = r.flatten(1)

        def solved(factor: Factor = factor, r: Tensor = r) -> Tensor:
            return solve_anchored(factor, r, settings).value

        left = float((a.apply(solved()) - r).norm() / r.norm())
        for label, solve in (
            ("lsqr", partial(lsqr, operator, one, atol=1e-6, btol=1e-6)),
            ("lsmr", partial(lsmr, operator, one, atol=1e-6, btol=1e-6)),
        ):
            found, *_ = solve()
            theirs = float(
                np.linalg.norm(operator.matvec(found.astype(np.float32)) - one) / np.linalg.norm(one)
            )
            measured = ratio(name, solved, f"scipy {label}, sample by sample", solve)
            yield replace(
                measured,
                ratio=measured.ratio / BATCH,
                aim=0.1,
                note=f"residual {left:.1e} against {theirs:.1e}",
            )
        yield ratio(
            name,
            solved,
            "torch.linalg.lstsq on the dense matrix",
            lambda d=dense, b=rows: torch.linalg.lstsq(d, b.T, driver="gelsy"),  # type: ignore[misc]
            aim=0.1,
        )


def _vector(value: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.asarray(value, dtype=np.float32)).reshape(1, *shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))
