"""Normalization by a sample's own statistics: against a convex oracle for the range, and a search for the pre-image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_samples import Inverted, WithBuffer
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.rules import Status
from fxinvert.rules.trust import Nodes, nearest_in_ball
from fxinvert.testing import check_rule

F64, F32 = torch.float64, torch.float32


def trained(norm: Any, zeros: int = 0) -> nn.Module:
    """A norm with scales as if trained; `zeros` of them are zero."""
    if getattr(norm, "running_var", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    if norm.weight is not None:
        nn.init.normal_(norm.weight, 1.0, 0.5)
        norm.weight.data.flatten()[:zeros] = 0
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    return norm  # type: ignore[no-any-return]


MAKES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: trained(nn.LayerNorm(12)), (4, 3, 12)),
    "layer_norm-plain": (lambda: nn.LayerNorm((3, 12), elementwise_affine=False), (4, 3, 12)),
    "layer_norm-no_bias": (lambda: trained(nn.LayerNorm((3, 12), bias=False)), (4, 3, 12)),
    "layer_norm-zeros": (lambda: trained(nn.LayerNorm(12), zeros=5), (4, 3, 12)),
    "layer_norm-large_eps": (lambda: trained(nn.LayerNorm(12, eps=0.5)), (4, 12)),
    "rms_norm": (lambda: trained(nn.RMSNorm(12, eps=1e-6)), (4, 3, 12)),
    "rms_norm-eps_of_the_dtype": (lambda: trained(nn.RMSNorm(12)), (4, 3, 12)),
    "group_norm": (lambda: trained(nn.GroupNorm(2, 6)), (4, 6, 3, 3)),
    "group_norm-one_group": (lambda: trained(nn.GroupNorm(1, 6), zeros=2), (4, 6, 5)),
    "group_norm-vectors": (lambda: trained(nn.GroupNorm(2, 6)), (4, 6)),
    "instance_norm": (lambda: trained(nn.InstanceNorm2d(3, affine=True)), (4, 3, 4, 5)),
    "instance_norm-zero": (lambda: trained(nn.InstanceNorm2d(3, affine=True), zeros=1), (4, 3, 4, 5)),
    "instance_norm-plain": (lambda: nn.InstanceNorm1d(3), (4, 3, 9)),
    "instance_norm-running": (
        lambda: trained(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)).eval(),
        (4, 3, 4, 5),
    ),
}
OPS = pytest.mark.parametrize("name", MAKES)


@OPS
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    make, shape = MAKES[name]
    report = check_rule(make(), torch.randn(shape, dtype=dtype) * 2, dtype=dtype)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@OPS
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_what_can_be_reached_is_reached_with_the_anchors_means(name: str, dtype: torch.dtype) -> None:
    make, shape = MAKES[name]
    op = make().to(dtype)
    x, other = torch.randn(shape, dtype=dtype) + 3, torch.randn(shape, dtype=dtype) * 2 - 1
    target = op(other).detach()
    value, certificate = Inverted(op, x)(x, target)
    assert certificate.status in (Status.NEAREST, Status.EXACT)
    assert certificate.projected == 0
    assert float(certificate.residual.max()) < (1e-8 if dtype == F64 else 1e-4)
    if dtype == F64 and name in ("layer_norm", "layer_norm-plain", "instance_norm-plain"):
        dims = {"layer_norm": (-1,), "layer_norm-plain": (-2, -1), "instance_norm-plain": (-1,)}[name]
        # the pre-image is unique but for its mean, which is the anchor's
        expected = other - other.mean(dims, keepdim=True) + x.mean(dims, keepdim=True)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@OPS
def test_no_samples_and_other_layouts(name: str) -> None:
    make, shape = MAKES[name]
    op, x = make().double(), torch.randn(shape, dtype=F64)
    inverted, target = Inverted(op, x), torch.randn(shape, dtype=F64)
    expected, _ = inverted(x, target)
    axes = list(reversed(range(x.dim())))
    turned = x.permute(axes).contiguous().permute(axes)
    torch.testing.assert_close(inverted(turned, target)[0], expected)
    if not name.startswith("instance_norm"):  # torch has none of no samples
        assert inverted(x[:0], target[:0])[0].shape == (0, *shape[1:])


# --- the nearest point of the range, and the nearest pre-image ----------------------------------------------


def nearest_value(
    weight: Tensor, bias: Tensor, target: Tensor, eps: float, centered: bool
) -> tuple[float, Tensor]:
    """The least ‖w z + b − t‖ over the closed ball, by a general convex solver; and z."""
    w, gap, n = weight.numpy(), (target - bias).numpy(), target.numel()
    constraints: list[dict[str, Any]] = [
        {"type": "ineq", "fun": lambda z: n - z @ z, "jac": lambda z: -2 * z}
    ]
    if centered:
        constraints.append({"type": "eq", "fun": lambda z: z.sum(), "jac": np.ones_like})
    found = minimize(
        lambda z: ((w * z - gap) ** 2).sum(),
        np.zeros(n),
        jac=lambda z: 2 * w * (w * z - gap),
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    return math.sqrt(max(found.fun, 0.0)), torch.from_numpy(found.x)


@given(st.data())
def test_the_residual_is_the_least(data: st.DataObject) -> None:
    n, centered = data.draw(st.integers(2, 6)), data.draw(st.booleans(), label="centered")
    eps = data.draw(st.sampled_from([1e-5, 0.1]), label="eps")
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    weight, bias = torch.randn(n, dtype=F64), torch.randn(n, dtype=F64)
    zeros = data.draw(st.integers(0, n - 1), label="zeros")
    weight[:zeros] = 0
    if not centered:
        bias = torch.zeros_like(bias)
    x = torch.randn(1, n, dtype=F64)
    size = data.draw(st.sampled_from([0.1, 1.0, 10.0]), label="size of the target")
    target = bias + size * torch.randn(1, n, dtype=F64)

    op = _weighted(weight, bias, eps, centered)
    value, certificate = Inverted(op, x)(x, target)
    residual = float((op(value) - target).norm())
    least, _ = nearest_value(weight, bias, target[0], eps, centered)
    if certificate.status is Status.DAMPED:
        assert residual <= float((op(x) - target).norm())
    else:
        assert residual <= least + 2e-5 * math.sqrt(n) * float(weight.abs().max()) + 1e-7


def _weighted(weight: Tensor, bias: Tensor, eps: float, centered: bool) -> nn.Module:
    n = len(weight)
    if not centered:
        return WithBuffer(lambda x, c: F.rms_norm(x, (n,), c, eps), weight)
    norm = nn.LayerNorm(n, eps=eps, dtype=F64).requires_grad_(False)
    norm.weight.data, norm.bias.data = weight, bias
    return norm


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("centered", [True, False])
def test_no_input_is_nearer_and_as_close(eps: float, centered: bool) -> None:
    n = 4
    op = _weighted(torch.ones(n, dtype=F64), torch.zeros(n, dtype=F64), eps, centered)
    x = torch.randn(40, n, dtype=F64)
    target = torch.randn(40, n, dtype=F64) * torch.linspace(0.2, 3, 40, dtype=F64)[:, None]
    value, certificate = Inverted(op, x)(x, target)
    assert certificate.status is Status.PROJECTED
    residual, distance = (op(value) - target).norm(dim=1), (value - x).norm(dim=1)
    # on the sphere, which is only approached, MARGIN in the residual is its root in the direction
    wanted = target - target.mean(1, keepdim=True) if centered else target
    slack = torch.where(wanted.norm(dim=1) < 0.9 * math.sqrt(n), 1e-6, 5e-3 * distance)
    # from its answer and from the anchor, in ever smaller steps
    for start in (value, x):
        for scale in (1.0, 0.1, 1e-2, 1e-3, 1e-4):
            tried = start + scale * torch.randn(4000, 40, n, dtype=F64)
            closer = (op(tried) - target).norm(dim=2) <= residual
            nearer = (tried - x).norm(dim=2) < distance - slack
            assert not (closer & nearer).any()
            assert ((op(tried) - target).norm(dim=2) >= residual - 1e-5).all()


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    "groups", ["a few scales each", "many scales", "many scales in each group"], ids=lambda name: str(name)
)
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_uneven_scales_take_a_step_or_two(groups: str, centered: bool, dtype: torch.dtype) -> None:
    """Off the range the point is the root of a scalar function; sums at few nodes give it to all digits."""
    size, limit = 96, math.sqrt(96)
    scales = torch.rand(1, 3 if "group" in groups or "few" in groups else 1, size, dtype=F64) * 1.5 + 0.5
    if "few" in groups:
        scales = scales[..., ::16].repeat_interleave(16, -1)
    wanted, weight = (2.5 * torch.randn(7, 3, size, dtype=F64)).to(dtype), scales.to(dtype)
    nodes, curvature = Nodes.of(scales.square(), torch.finfo(dtype).eps).to(dtype), weight.square()
    moved = torch.randn_like(wanted)
    found = nodes.nearest(nodes.sums(wanted, moved), limit, centered=centered)
    at_nodes = (curvature * wanted - found.shift) / (curvature + found.multiplier)
    z, eta, steps = nearest_in_ball(
        wanted * curvature,
        curvature,
        limit,
        torch.zeros_like(found.multiplier),
        found.multiplier,
        centered=centered,
    )
    assert steps <= (0 if "few" in groups and dtype == F32 else 2)
    digits = 1e-12 if dtype == F64 else 1e-5
    assert float((z.norm(dim=-1) / limit - 1).abs().max()) < digits
    # the gradient of the error is one multiple of z, and of the sum, in every group
    gradient = curvature * (wanted - z) - eta * z
    gradient = gradient - gradient.mean(-1, keepdim=True) if centered else gradient
    assert float(gradient.abs().max()) < 100 * digits
    misfit = (weight * (wanted - z)).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.misfit, misfit, rtol=1e-3, atol=0)
    torch.testing.assert_close(at_nodes, z, rtol=0, atol=10 * digits)
    torch.testing.assert_close(found.size, z.norm(dim=-1, keepdim=True), rtol=digits, atol=0)
    torch.testing.assert_close(found.inner, (moved * z).sum(-1, keepdim=True), rtol=0, atol=100 * digits)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("channels", [True, False], ids=["a scale each channel", "a scale each entry"])
@pytest.mark.parametrize(("dtype", "digits"), [(F64, 1e-9), (F32, 1e-6)], ids=["float64", "float32"])
def test_many_entries_come_as_close_as_a_root_by_bisection(
    channels: bool, centered: bool, dtype: torch.dtype, digits: float
) -> None:
    shape = (8, 16)
    scales = torch.rand(shape[0], 1 if channels else shape[1], dtype=F64) * 1.5 + 0.5
    weight = scales.expand(shape).clone()

    def op(x: Tensor) -> Tensor:
        w = weight.to(x)
        return F.layer_norm(x, shape, w) if centered else F.rms_norm(x, shape, w, 1e-5)

    x, other = torch.randn(2, 6, *shape, dtype=dtype)
    target = op(other)
    target[::2] += torch.randn_like(target[::2])  # every other is off the range
    value, certificate = Inverted(op, x)(x, target)
    assert certificate.projected == 3 * 128
    alone = torch.cat([Inverted(op, a[None])(a[None], t[None])[0] for a, t in zip(x, target, strict=True)])
    torch.testing.assert_close(alone, value, rtol=0, atol=1e-8 if dtype == F64 else 1e-4)
    assert torch.equal(alone[1::2], value[1::2])
    w, g = weight.flatten(), target[::2].double().flatten(1)
    low, high = torch.zeros(3, 1, dtype=F64), torch.full((3, 1), 1e3, dtype=F64)
    for _ in range(100):
        eta = (low + high) / 2
        pull, inverse = w * g, 1 / (w.square() + eta)
        nu = (pull * inverse).sum(1, keepdim=True) / inverse.sum(1, keepdim=True) if centered else 0
        z = (pull - nu) * inverse
        outside = z.square().mean(1, keepdim=True) > 1
        low, high = torch.where(outside, eta, low), torch.where(outside, high, eta)
    least = (w * z - g).norm(dim=1)
    residual = (op(value[::2].double()).flatten(1) - g).norm(dim=1)
    # the sphere itself is only approached, to MARGIN at most
    torch.testing.assert_close(residual, least, rtol=1e-5, atol=digits)
    reached = (op(value[1::2]) - target[1::2]).norm() / target[1::2].norm()
    assert float(reached) < (1e-8 if dtype == F64 else 1e-4)


def test_a_target_on_the_sphere_keeps_the_anchors_spread() -> None:
    norm = nn.LayerNorm(8, dtype=F64, elementwise_affine=False)
    # an anchor wide enough to be within MARGIN of the sphere itself
    x = torch.randn(5, 8, dtype=F64) * 10 + 2
    target = norm(x) * 1.3
    value, certificate = Inverted(norm, x)(x, target)
    torch.testing.assert_close(value, x, rtol=0, atol=1e-9)
    assert certificate.projected == target.numel()


def test_zero_scales_say_nothing_of_their_entries() -> None:
    norm = nn.LayerNorm(6, dtype=F64).requires_grad_(False)
    norm.weight.data[:2] = 0
    x = torch.randn(3, 6, dtype=F64)
    target = norm(x)
    target[:, :2] += 5  # nothing can be done about these
    value, certificate = Inverted(norm, x)(x, target)
    torch.testing.assert_close(value, x, rtol=0, atol=1e-7)
    norm.weight.data.zero_()
    value, certificate = Inverted(norm, x)(x, target)
    assert torch.equal(value, x)
    assert certificate.status is Status.PROJECTED


# --- conditioning and bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [1e-9, 1e-6, 1e-4, 1e-2])
def test_no_correction_is_blown_up_more_than_the_condition_limit(shrink: float) -> None:
    norm = nn.LayerNorm(16, dtype=F64, elementwise_affine=False)
    x = torch.randn(4, 16, dtype=F64)
    output = norm(x)
    target = output * (1 - shrink)  # reached only where ε is felt
    value, certificate = Inverted(norm, x)(x, target)
    spread = (x.var(1, correction=0) + 1e-5).sqrt()
    limit = 1e3 * spread * (target - output).norm(dim=1)
    assert ((value - x).norm(dim=1) <= limit * (1 + 1e-6)).all()
    if shrink <= 1e-4:
        assert certificate.status is Status.DAMPED
        assert certificate.damping > 0
        assert ((norm(value) - target).norm(dim=1) < (output - target).norm(dim=1)).all()
    else:
        assert certificate.status is Status.NEAREST
        # σ² + ε = ε n / (n − ‖z‖²)
        share = 1 - target.square().mean(1)
        torch.testing.assert_close(value.var(1, correction=0), 1e-5 / share - 1e-5, rtol=1e-6, atol=0)


def test_near_zero_scales_are_damped() -> None:
    norm = nn.LayerNorm(6, dtype=F64).requires_grad_(False)
    norm.weight.data[0] = 1e-6
    x = torch.randn(4, 6, dtype=F64)
    target = norm(x)
    target[:, 0] += 0.1
    value, certificate = Inverted(norm, x)(x, target)
    assert certificate.status is Status.DAMPED
    torch.testing.assert_close(value, x, rtol=0, atol=0.2)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-12])
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_odd_anchors_and_targets_stay_bounded(eps: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, dtype=dtype)
    x[0], x[1] = 0, 7  # constant: nothing to normalize
    x[2] *= 1e6
    x[3] *= 1e-20
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.layer_norm(x, (5,), eps=eps),
        lambda x: F.rms_norm(x, (5,), eps=eps),
    ]
    for target in (torch.zeros_like(x), torch.full_like(x, 1e6), torch.randn_like(x) * 1e3, -x):
        for function in functions:
            value, _ = Inverted(function, x)(x, target)
            assert value.isfinite().all()
            error, before = ((function(v) - target).norm(dim=1) for v in (value, x))
            assert (before.isnan() | (error <= before * (1 + 1e-6))).all()
            assert float(value[3:].abs().max()) < 1e4


@pytest.mark.parametrize(("dtype", "digits"), [(F64, 1e-8), (F32, 1e-4)], ids=["float64", "float32"])
def test_without_eps_the_opposite_of_the_anchor_is_reached(dtype: torch.dtype, digits: float) -> None:
    norm, x = nn.LayerNorm(12, eps=0.0).to(dtype), (2 * torch.randn(8, 12) + 1).to(dtype)
    _, certificate = Inverted(norm, x)(x, -norm(x).detach())
    assert float(certificate.residual.max()) <= digits


def test_a_single_entry_has_nothing_to_normalize() -> None:
    x = torch.randn(3, 1, dtype=F64)
    value, certificate = Inverted(nn.LayerNorm(1, dtype=F64), x)(x, torch.ones_like(x))
    assert torch.equal(value, x)
    assert certificate.projected == 3


@OPS
def test_infinite_and_missing_targets_fail_their_own_samples(name: str) -> None:
    make, shape = MAKES[name]
    op, x = make().double(), torch.randn(shape, dtype=F64)
    inverted, target = Inverted(op, x), torch.randn(shape, dtype=F64)
    expected, _ = inverted(x, target)
    target[0, 0] = math.inf
    target[1, -1] = math.nan
    value, certificate = inverted(x, target)
    assert certificate.failed.tolist() == [True, True, False, False]
    assert torch.equal(value[:2], x[:2])
    torch.testing.assert_close(value[2:], expected[2:])
