"""Interpolation against the pseudo-inverse, adaptive maxima against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_samples import Inverted, assert_solves
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.inversion.replay import forward_values
from fxinvert.rules import Inverse, Op, Status
from fxinvert.testing import check_rule

F64, F32 = torch.float64, torch.float32
SEQUENCE, MAP, VOLUME = (3, 2, 7), (3, 2, 4, 5), (2, 2, 3, 3, 3)
ATEN = torch.ops.aten


def resize(mode: str, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, mode=mode, **options)


#: key and note, the op, the shape of a batch
OPS: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "interpolate-linear": (resize("linear", scale_factor=2), SEQUENCE),
    "interpolate-linear_corners": (resize("linear", size=5, align_corners=True), SEQUENCE),
    "interpolate-bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), MAP),
    "interpolate-bilinear_corners": (nn.UpsamplingBilinear2d(size=(3, 9)), MAP),
    "interpolate-bilinear_smooth": (resize("bilinear", size=(3, 3), antialias=True), MAP),
    "interpolate-bicubic": (resize("bicubic", scale_factor=1.5), MAP),
    "interpolate-bicubic_smooth": (resize("bicubic", size=(2, 3), antialias=True), MAP),
    "interpolate-trilinear": (resize("trilinear", scale_factor=2), VOLUME),
    "interpolate-area": (resize("area", size=(3, 2)), MAP),
    "upsample_linear1d": (lambda x: ATEN.upsample_linear1d(x, None, False, [2.0]), SEQUENCE),
    "upsample_bilinear2d": (lambda x: ATEN.upsample_bilinear2d(x, None, False, [2.0, 2.0]), MAP),
    "upsample_bicubic2d": (lambda x: ATEN.upsample_bicubic2d(x, None, True, [2.0, 1.0]), MAP),
    "upsample_trilinear3d": (lambda x: ATEN.upsample_trilinear3d(x, None, False, [1.0, 2.0, 1.0]), VOLUME),
}
EACH = pytest.mark.parametrize("name", OPS)


@EACH
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    op, shape = OPS[name]
    if dtype == torch.bfloat16 and name.endswith("_smooth"):
        pytest.skip("torch has no antialiasing in bfloat16 on the CPU")
    report = check_rule(op, torch.randn(shape, dtype=dtype), dtype=dtype)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@EACH
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_the_answer_is_that_of_the_pseudo_inverse(name: str, dtype: torch.dtype) -> None:
    op, shape = OPS[name]
    x = torch.randn(shape, dtype=dtype)
    inverted = Inverted(op, x)
    reachable = assert_solves(inverted, x)
    torch.testing.assert_close(inverted(x[:1], reachable[:1])[0], inverted(x, reachable)[0][:1])


# --- adaptive maxima ----------------------------------------------------------------------------------------


def adaptive(x: Tensor, target: Tensor) -> Inverse:
    """The rule's answer for an adaptive max pooling from the shape of x to that of the target."""
    n = x.dim() - 2
    pool: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[n - 1]
    out = tuple(target.shape[2:])
    rule = fxinvert.default_rules()[f"adaptive_max_pool{n}d"]
    op = Op(rule.key, "pool", {"input": x}, pool(x, out), {}, {}, lambda v: pool(v, out))
    found = rule.invert(op, target)
    assert isinstance(found, Inverse)
    return found


def pooled(x: Tensor, out: tuple[int, ...]) -> Tensor:
    pool: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(out) - 1]
    result: Tensor = pool(x, out)
    return result


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3), st.integers(0, 99))
def test_adaptive_maxima_are_reached(sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 2, *(n for n, _ in sizes), dtype=F64)
    out = tuple(m for _, m in sizes)
    same, _ = adaptive(x, pooled(x, out))
    assert torch.equal(same, x)
    target = pooled(torch.randn_like(x), out)
    value, certificate = adaptive(x, target)
    assert torch.equal(pooled(value, out), target)
    disjoint = all(n % m == 0 for n, m in sizes)
    assert certificate.status in ((Status.NEAREST,) if disjoint else (Status.NEAREST, Status.EXACT))
    torch.testing.assert_close(
        torch.cat([adaptive(x[i : i + 1], target[i : i + 1])[0] for i in range(3)]), value
    )


def test_disjoint_adaptive_maxima_are_nearest() -> None:
    x = torch.randn(20, 1, 6, dtype=F64)
    target = torch.randn(20, 1, 2, dtype=F64)
    value, certificate = adaptive(x, target)
    lowered = torch.minimum(x, target.repeat_interleave(3, 2))
    best = torch.full((20,), torch.inf, dtype=F64)
    for choice in itertools.product(range(3), range(3, 6)):
        tried = lowered.clone()
        tried[:, :, list(choice)] = target
        best = torch.minimum(best, (tried - x).flatten(1).norm(dim=1))
    torch.testing.assert_close((value - x).flatten(1).norm(dim=1), best)
    torch.testing.assert_close(certificate.distance, best)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(3),
        nn.MaxPool2d(2),
        nn.MaxPool2d((3, 1)),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d(3, ceil_mode=True),
        nn.MaxPool2d(3, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool3d((2, 3, 1)),
    ],
    ids=repr,
)
def test_maxima_of_a_forward_pass_are_those_of_torch(pool: nn.Module) -> None:
    axes = int(type(pool).__name__[-2])
    x = torch.randn(2, 3, *(7, 8, 5)[:axes])
    x[0, 0, 0] = torch.nan
    graph = fxinvert.trace(pool, torch.randn_like(x))
    (given,) = graph.graph.find_nodes(op="placeholder")
    (output,) = graph.graph.find_nodes(op="output")
    with torch.no_grad():
        values = forward_values(graph, {given: x})
    torch.testing.assert_close(values[output.args[0]], pool(x), rtol=0, atol=0, equal_nan=True)
    followed = x.clone().requires_grad_()
    value = forward_values(graph, {given: followed})[output.args[0]]
    assert value.requires_grad
