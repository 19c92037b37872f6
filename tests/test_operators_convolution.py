"""Convolutions and transposed convolutions as operators: padding of either kind, and their transposes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64
from torch.nn import functional as F

from fxinvert.linalg import Convolution, LinearOperator, TransposedConvolution


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


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_transposed_convolution_is_torchs(output_padding: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(4, 1, 3, 3, dtype=dtype), torch.randn(2, 4, 5, 5, dtype=dtype)
    expected = F.conv_transpose2d(x, weight, None, 2, 1, output_padding, 2)
    a = TransposedConvolution(weight, x.shape[1:], expected.shape[1:], (2, 2), (1, 1), (1, 1), 2)
    torch.testing.assert_close(a.apply(x), expected)
    assert_transposes(a, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


def test_the_cost_is_that_of_the_products() -> None:
    plain = Convolution(torch.randn(4, 2, 3, 3), (2, 8, 8), (1, 1), (1, 1), (1, 1), 1)
    assert plain.cost == 2 * 4 * 8 * 8 * 2 * 9
    turned = TransposedConvolution(torch.randn(4, 2, 3, 3), (4, 8, 8), (2, 8, 8), (1, 1), (1, 1), (1, 1), 1)
    assert turned.cost == plain.cost
