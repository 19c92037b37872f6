"""Convolutions and transposed convolutions as operators: padding of either kind, and their transposes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64
from torch import Tensor
from torch.nn import functional as F

from fxinvert.linalg import Convolution, LinearOperator, TransposedConvolution
from fxinvert.linalg.held import held_convolution
from fxinvert.linalg.padded import PaddedConvolution


def assert_transposes(a: LinearOperator, *, tolerance: float) -> None:
    x = torch.randn(2, *a.in_shape, dtype=a.dtype)
    r = torch.randn(2, *a.out_shape, dtype=a.dtype)
    left, right = (a.apply(x) * r).sum().double(), (x * a.adjoint(r)).sum().double()
    scale = float(a.apply(x).norm() * r.norm())
    assert abs(float(left - right)) <= tolerance * scale


@given(
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([torch.float32, F64]),
)
def test_padding_may_differ_at_either_end(
    before: tuple[int, int], after: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype
) -> None:
    weight, x = torch.randn(3, 2, 2, 3, dtype=dtype), torch.randn(2, 2, 5, 6, dtype=dtype)
    a = Convolution(weight, (2, 5, 6), (stride,) * 2, before, (dilation,) * 2, 1, after)
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    expected = F.conv2d(padded, weight, stride=stride, dilation=dilation)
    assert a.out_shape == expected.shape[1:]
    torch.testing.assert_close(a.apply(x), expected)
    assert_transposes(a, tolerance=1e-5 if dtype == torch.float32 else 1e-12)
    assert a.to(F64).out_shape == a.out_shape


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_strides_the_adjoint_of_any_groups_is_a_convolution(groups: int) -> None:
    weight = torch.randn(8, 4 // groups, 3, 2)
    a = Convolution(weight, (4, 5, 6), (1, 1), (1, 0), (2, 1), groups)
    assert_transposes(a, tolerance=1e-5)
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    held_convolution(x, weight, None, 1, (1, 0), (2, 1), groups).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * a.adjoint(a.apply(x.detach())))


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_transposed_convolution_is_torchs(output_padding: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(4, 1, 3, 3, dtype=dtype), torch.randn(2, 4, 5, 5, dtype=dtype)
    expected = F.conv_transpose2d(x, weight, None, 2, 1, output_padding, 2)
    a = TransposedConvolution(weight, x.shape[1:], expected.shape[1:], (2, 2), (1, 1), (1, 1), 2)
    torch.testing.assert_close(a.apply(x), expected)
    assert_transposes(a, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    "a",
    [
        Convolution(torch.randn(6, 2, 3, 3), (4, 7, 5), (2, 1), (1, 2), (1, 2), 2, (0, 1)),
        Convolution(torch.randn(4, 1, 3, 2, 1), (4, 5, 4, 3), (1, 2, 1), (1, 0, 0), (2, 1, 1), 4),
        TransposedConvolution(torch.randn(4, 3, 3, 3), (4, 3, 4), (6, 8, 10), (2, 2), (0, 0), (1, 1), 2),
        TransposedConvolution(torch.randn(4, 3, 2, 2), (4, 2, 2), (3, 7, 7), (3, 3), (0, 0), (1, 1), 1),
        PaddedConvolution(
            torch.randn(6, 4, 3, 3),
            (4, 4, 3),
            [[1, 0, 1, 2, 3, 2], [-1, 0, 0, 1, 1, 2, -1]],
            stride=(1, 2),
            padding=(1, 0),
            dilation=(1, 1),
            groups=1,
        ),
    ],
    ids=["uneven", "volume", "transposed", "cut", "mirrored"],
)
def test_the_matrix_is_the_kernel_put_where_it_meets_the_map(
    a: Convolution, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_unit_vectors = LinearOperator.blocks(a)
    # products with unit vectors take most of a factorization: none is needed
    for name in ("_forward", "_input_gradient"):
        monkeypatch.setattr(a, name, None)
    torch.testing.assert_close(a.blocks(), by_unit_vectors)


def test_the_cost_is_that_of_the_products() -> None:
    plain = Convolution(torch.randn(4, 2, 3, 3), (2, 8, 8), (1, 1), (1, 1), (1, 1), 1)
    assert plain.cost == 2 * 4 * 8 * 8 * 2 * 9
    turned = TransposedConvolution(torch.randn(4, 2, 3, 3), (4, 8, 8), (2, 8, 8), (1, 1), (1, 1), (1, 1), 1)
    assert turned.cost == plain.cost


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel", "sliding"),
    [
        ((4, 9), (6, 4, 3), ()),
        ((4, 5, 6), (6, 2, 3, 2), ([2], [1, 0], [1, 2], 2)),
        ((4, 5, 6), (4, 1, 3, 3), (1, 1, 1, 4)),
        ((2, 4, 4, 4), (3, 2, 2, 2, 2), ([1, 2, 1],)),
    ],
)
def test_a_held_convolution_is_torchs_up_to_its_second_derivatives(
    shape: tuple[int, ...], kernel: tuple[int, ...], sliding: tuple[Any, ...], batch: bool
) -> None:
    weight, bias = torch.randn(kernel, dtype=F64), torch.randn(kernel[0], dtype=F64)
    x = torch.randn(*([2] if batch else []), *shape, dtype=F64, requires_grad=True)
    torchs = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 2]
    torch.testing.assert_close(held_convolution(x, weight, bias, *sliding), torchs(x, weight, bias, *sliding))

    def sliced(value: Tensor) -> Tensor:
        return held_convolution(value, weight, bias, *sliding).sin()

    assert torch.autograd.gradcheck(sliced, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sliced, (x,))


def test_a_held_kernel_costs_a_product_nothing() -> None:
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    (pulled,) = torch.autograd.grad(
        held_convolution(x, weight, None, 1, 1), x, torch.ones_like(x), create_graph=True
    )
    assert weight.requires_grad
    assert not pulled.requires_grad, "the adjoint depends on neither the map nor, held, the kernel"
