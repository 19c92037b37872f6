"""Every linear operator against its dense matrix: products, sizes, norm, cost, and the solver that its structure allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_problems import F64, matrix, relative
from torch.nn import functional as F

from fxinvert.errors import SolveError
from fxinvert.linalg import (
    BlockDiagonal,
    Composition,
    Convolution,
    Dense,
    Diagonal,
    DiagonalFactor,
    Function,
    LinearOperator,
    PaddedConvolution,
    Selection,
    SolveSettings,
    SpectralFactor,
    Sum,
    Transpose,
    TransposedConvolution,
    choose,
    factorize,
    solve_anchored,
)


def operators(device: str) -> list[LinearOperator]:
    torch.manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=F64).to(device)

    scale, like = made(2, 3), made(1)
    scale[0, 1] = 0
    index = torch.tensor([[0, 3, 3], [-1, 5, 1]], device=device)
    padding = Selection.padding((2, 4, 5), (2, 1, 1, 2), "reflect", like)
    convolution = Convolution(made(3, 2, 3, 2), padding.out_shape, (2, 1), (0, 0), (1, 1), 1)
    sliding: dict[str, Any] = {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 1), "groups": 1}
    grouped = {**sliding, "padding": (0, 0), "groups": 2}
    low_rank = Composition(Dense(made(6, 2)), Dense(made(2, 6)))
    return [
        Dense(made(4, 6)),
        Diagonal(scale),
        Selection(index, (2, 3), like),
        Selection(torch.randperm(6, device=device), (6,), like),
        Selection.padding((2, 3, 4), (1, 2, 0, 0), "circular", like),
        Selection.padding((2, 3, 4), (1, 2, 0, 1), "constant", like),
        BlockDiagonal(made(3, 2, 4)),
        Sum(Diagonal(made(6)), low_rank),
        convolution,
        Composition(convolution, padding),
        PaddedConvolution(made(3, 2, 3, 2), (2, 4, 5), [[1, 0, 1, 2, 3, 2], [0, 0, 1, 1, -1, 4]], **sliding),
        PaddedConvolution(made(4, 1, 2, 3), (2, 4, 6), [[3, 0, 1, 2, 3], [*range(6), 0, 1]], **grouped),
        Transpose(Composition(convolution, padding)),
        TransposedConvolution(made(2, 3, 3), (2, 4), (3, 8), (2,), (1,), (1,), 1),
        Function(lambda x: F.avg_pool2d(x, 2, stride=1) + 1, (1, 4, 5), like),
    ]


CASES = [(device, i) for device in ("cpu", "cuda") for i in range(len(operators("cpu")))]


def case(device: str, i: int) -> LinearOperator:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return operators(device)[i]


@pytest.mark.parametrize(("device", "i"), CASES)
def test_products_are_those_of_the_dense_matrix(device: str, i: int) -> None:
    a = case(device, i)
    m, n = a.size
    dense = a.dense()
    assert dense.shape == (m, n)
    assert dense.device.type == a.device.type == device
    x = torch.randn(3, *a.in_shape, dtype=F64, device=device)
    r = torch.randn(3, *a.out_shape, dtype=F64, device=device)
    assert a.apply(x).shape == r.shape
    torch.testing.assert_close(a.apply(x).flatten(1), x.flatten(1) @ dense.T)
    torch.testing.assert_close(a.adjoint(r).flatten(1), r.flatten(1) @ dense)
    single = a.to(torch.float32)
    assert single.dtype == single.apply(x.float()).dtype == single.adjoint(r.float()).dtype == torch.float32
    assert 0 < a.cost <= 100 * m * n
    largest = float(torch.linalg.matrix_norm(dense, 2))
    assert 0.8 * largest <= a.norm() <= largest * (1 + 1e-9)
    if a.squares is not None:
        torch.testing.assert_close(torch.diag(a.squares.flatten()), dense.T @ dense)


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize(("device", "i"), CASES)
def test_every_solver_answers_as_singular_values_do(device: str, i: int, damping: float) -> None:
    a = case(device, i)
    r = torch.randn(3, *a.out_shape, dtype=F64, device=device)
    exact = SpectralFactor(a)
    expected = exact.solve(r, damping).correction
    deficient = exact.rank < min(a.size)
    for candidate in choose(a, SolveSettings(max_iterations=2000)).candidates:
        if candidate.method == "qr" and deficient:
            with pytest.raises(SolveError, match="tell its rank"):
                candidate.make()
        elif not candidate.why_not:
            solved = candidate.make().solve(r, damping)
            assert solved.correction.device.type == device
            torch.testing.assert_close(solved.correction, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_of_any_mode_is_torchs(mode: str) -> None:
    x = torch.randn(2, 3, 5, 6)
    a = Selection.padding(x.shape[1:], (2, 1, 0, 3), mode, x)
    torch.testing.assert_close(a.apply(x), F.pad(x, (2, 1, 0, 3), mode=mode))


def test_a_convolution_behind_any_padding_reaches_what_can_be_reached() -> None:
    like = torch.randn(1)
    padding = Selection.padding((2, 6, 6), (1, 1, 1, 1), "circular", like)
    a = Composition(
        Convolution(torch.randn(2, 2, 3, 3), padding.out_shape, (1, 1), (0, 0), (1, 1), 1), padding
    )
    r = a.apply(torch.randn(4, *a.in_shape))
    settings = SolveSettings()
    solved = solve_anchored(factorize(a, settings), r, settings)
    assert relative(a.apply(solved.value), r) < 1e-5


def test_structure_is_made_use_of() -> None:
    scale = torch.logspace(0, -2, 3000)
    a = Diagonal(scale)
    factor = factorize(a, SolveSettings())
    assert isinstance(factor, DiagonalFactor)
    assert "diagonal" in factor.explain()
    assert factor.condition == pytest.approx(100, rel=1e-5)
    assert factor.nbytes == scale.nbytes
    with pytest.raises(SolveError, match=r"AᵀA is diagonal, which Dense 3 × 4 is not"):
        factorize(Dense(torch.randn(3, 4)), SolveSettings(method="diagonal"))
    with pytest.raises(SolveError, match="NaN or infinite"):
        factorize(Diagonal(torch.tensor([1.0, torch.inf])), SolveSettings())


def test_operators_that_do_not_fit_together_are_refused() -> None:
    a, b = Dense(matrix(3, 4)), Dense(matrix(5, 2))
    with pytest.raises(SolveError, match=r"composed operators differ: \(4,\) and \(5,\)"):
        Composition(a, b)
    with pytest.raises(SolveError, match=r"added operators differ: \(4,\) and \(2,\)"):
        Sum(a, b)


@pytest.mark.parametrize("i", range(len(operators("cpu"))))
def test_operators_stay_on_their_device(i: int) -> None:
    a = operators("cpu")[i]
    assert a.apply(torch.zeros(0, *a.in_shape, dtype=F64)).shape == (0, *a.out_shape)
    assert a.adjoint(torch.zeros(0, *a.out_shape, dtype=F64)).shape == (0, *a.in_shape)
