"""Gram matrices by the shift structure of patches, against those of the rows themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_positions import LAYERS, op_of
from torch import Tensor, nn

from fxinvert.rules.windows import Sliding
from fxinvert.training import NormalEquations, blocks, grams, op_sums
from fxinvert.training.grams import Shifts, gram, products
from fxinvert.training.op_sums import _sums_of

F64 = torch.float64


def patches(window: Sliding, value: Tensor) -> Tensor:
    """`(B, c, *spatial)` → `(1, rows, c · taps)`."""
    windows, n = window.unfold(value), len(window.kernel)
    return (
        windows.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)).flatten(1 + n).flatten(0, n)[None]
    )


@st.composite
def sliding(draw: st.DrawFn) -> tuple[Sliding, tuple[int, ...]]:
    """A window, and the size of a map that it fits on; often only just."""
    axes = draw(st.integers(1, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    kernel, stride, before, after = each(1, 3 if axes < 3 else 2), each(1, 2), each(0, 2), each(0, 2)
    dilation = tuple(s * m for s, m in zip(stride, each(1, 2), strict=True))
    window = Sliding(kernel, stride, dilation, before, after)
    size = tuple(
        max(1, d * (k - 1) + 1 - b - a) + more
        for k, d, b, a, more in zip(kernel, dilation, before, after, each(0, 4), strict=True)
    )
    return window, size


@given(sliding(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_lags_give_the_gram_matrix_of_the_rows(
    given: tuple[Sliding, tuple[int, ...]], channels: int, samples: int, bias: bool, seed: int
) -> None:
    window, size = given
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(samples, channels, *size, generator=generator, dtype=F64)
    positions = window.unfold(value).shape[2 : 2 + len(size)]
    rows = patches(window, value)
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    weights = torch.rand(samples, generator=generator, dtype=F64).repeat_interleave(math.prod(positions))
    weighted = rows * weights[:, None]
    assert window.steps is not None
    shifts = Shifts(window.kernel, tuple(positions), window.steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "ROWS", 3)
        patch.setattr(grams, "COLUMNS", 2)
        found = gram(products(rows, weighted, shifts), shifts)
        direct = gram(products(rows, weighted, None), None)
    expected = weighted.mT @ rows
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(direct, expected)


def test_a_window_whose_stride_leaves_its_taps_apart_has_no_lags() -> None:
    assert Sliding((3,), (2,), (3,), (0,), (0,)).steps is None
    assert Sliding((3, 3), (1, 2), (1, 4), (0, 0), (0, 0)).steps == (1, 2)


CASES = [*LAYERS[1:], (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 6, 5))]


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("alike", [True, False])
def test_the_sums_of_an_op_are_the_same_by_lags(
    layer: nn.Module, shape: tuple[int, ...], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, trainable = op_of(layer, torch.randn(shape, dtype=F64))
    errors, weights = torch.randn_like(op.output), torch.rand(len(op.output), dtype=F64)
    if alike:
        weights = torch.full_like(weights, 0.3)
    used: list[Any] = []
    taken = blocks.equations_over

    def looking(*arguments: Any) -> Any:
        used.append(arguments[4])
        return taken(*arguments)

    monkeypatch.setattr(op_sums, "equations_over", looking)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(Shifts, "pay", lambda *_, pays=pays: pays)
        found.append(_sums_of(op, trainable, errors, weights, None, None, block=2**11))
    assert all(isinstance(shifts, Shifts) for shifts in used)
    lags, rows = found
    assert isinstance(lags, NormalEquations)
    assert isinstance(rows, NormalEquations)
    torch.testing.assert_close(lags.gram, rows.gram)
    torch.testing.assert_close(lags.cross, rows.cross)
    assert lags.error == pytest.approx(rows.error)


def test_lags_pay_for_many_channels_on_large_maps() -> None:
    def pays(channels: int, kernel: int, size: int, samples: int) -> bool:
        shifts = Shifts((kernel, kernel), (size, size), (1, 1))
        return shifts.pay(channels * kernel**2 + 1, samples * size**2)

    assert pays(64, 3, 16, 64)
    assert pays(32, 5, 16, 64)
    assert not pays(64, 3, 16, 1)  # putting G together would cost more
    assert not pays(8, 3, 32, 256)
    assert not pays(512, 3, 2, 256)
    assert not pays(512, 1, 16, 256)
