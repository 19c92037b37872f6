"""Every rule against what it promises: the nearest of the inputs that come closest to the target."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rule_samples import (
    AFFINE,
    ALL,
    MAXIMUM,
    SCALAR,
    Inverted,
    Sample,
    WithBuffer,
    assert_is_dense_answer,
    dense_answer,
    jacobian,
)
from torch import Tensor, nn

import fxinvert
from fxinvert.errors import NoRuleError, SolveError
from fxinvert.linalg import factorize
from fxinvert.rules import Op, Status, key_of
from fxinvert.testing import check_rule

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

F64, F32 = torch.float64, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])


def made(sample: Sample, dtype: torch.dtype = F64) -> Any:
    op = sample.make()
    return op.to(dtype) if isinstance(op, nn.Module) else op


def samples(given: list[Sample]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", given, ids=str)


# --- what every rule promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
@samples(ALL)
def test_promises(sample: Sample, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and sample.key == "avg_pool3d":
        pytest.skip("torch has no avg_pool3d in bfloat16 on the CPU")
    report = check_rule(made(sample), sample.batch(dtype, spread=2), dtype=dtype)
    assert report.op == sample.key
    assert report.identity == 0  # bit for bit
    if sample.kind == "scalar" and dtype == F32:
        assert report.independence < 1e-6  # also where the function is flat


@samples(ALL)
def test_no_samples_one_sample_and_other_layouts(sample: Sample) -> None:
    op, x = made(sample), sample.batch()
    inverted = Inverted(op, x)
    with torch.no_grad():
        target = inverted.op(torch.randn_like(x))
    expected, certificate = inverted(x, target)
    if "method" not in sample.note:  # a shape with −1 in it is not defined for no samples
        _no_samples(inverted, x, target)
    value, own = inverted(x[:1], target[:1])
    torch.testing.assert_close(value, expected[:1])
    torch.testing.assert_close(own.residual, certificate.residual[:1])
    if sample.key == "view":  # torch's view is particular about strides
        return
    for strided in (_turned(x), x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
        torch.testing.assert_close(inverted(strided, _turned(target))[0], expected)


def _no_samples(inverted: Inverted, x: Tensor, target: Tensor) -> None:
    nothing, empty = inverted(x[:0], target[:0])
    assert nothing.shape == (0, *x.shape[1:])
    assert (empty.residual.shape, empty.distance.shape, empty.failed.shape) == ((0,), (0,), (0,))
    assert "residual 0.0e+00" in str(empty)


def _turned(x: Tensor) -> Tensor:
    """The same values with the strides the other way round."""
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


@samples([s for s in ALL if isinstance(s.make(), nn.Module)])
def test_a_module_class_is_known_by_the_key_of_its_op(sample: Sample) -> None:
    spelling = type(sample.make())
    # ReLU6 is a Hardtanh with other ends
    if spelling.__module__.startswith("torch") and spelling is not nn.ReLU6:
        assert key_of(spelling) == sample.key


# --- affine ops: the dense solution -------------------------------------------------------------------------


@DTYPES
@samples(AFFINE)
def test_affine_rules_give_the_dense_solution(sample: Sample, dtype: torch.dtype) -> None:
    x = sample.batch(dtype)
    inverted = Inverted(made(sample, dtype), x)
    with torch.no_grad():
        reachable = inverted.op(torch.randn_like(x))
        noise = inverted.op(x) + torch.randn_like(reachable)
    dense = assert_is_dense_answer(inverted, x, reachable)
    assert not dense.damped.any()
    _, certificate = inverted(x, reachable)
    assert certificate.status in (Status.EXACT, Status.NEAREST)
    assert float(certificate.residual.max()) <= (1e-8 if dtype == F64 else 1e-4)
    assert_is_dense_answer(inverted, x, noise)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    n, m = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    layer = nn.Linear(n, m, bias=draw(st.booleans()), dtype=F64)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rank = draw(st.integers(0, min(m, n)))
    layer.weight.data = torch.randn(m, rank, dtype=F64) @ torch.randn(rank, n, dtype=F64)
    return layer, (*draw(st.sampled_from([(), (3,), (2, 2)])), n)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    n = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    dilation = [draw(st.integers(1, 2)) for _ in range(n)]
    stride = [draw(st.integers(1, 3)) for _ in range(n)]
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = [1] * n
    elif padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(n))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    options = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups, "padding": padding}
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = kind(c_in, c_out, tuple(kernel), bias=draw(st.booleans()), dtype=F64, **options)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return layer, (c_in, *(draw(st.integers(span, max(span, 8 - 2 * n))) for span in spans))


@st.composite
def averages(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    n = draw(st.integers(1, 3))
    size = [draw(st.integers(3, 6 if n < 3 else 4)) for _ in range(n)]
    if draw(st.booleans()):
        adaptive: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1]
        return adaptive(tuple(draw(st.integers(1, 5)) for _ in range(n))), (2, *size)
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(n)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
    }
    if n > 1 and draw(st.booleans()):
        options["divisor_override"] = draw(st.integers(1, 5))
    kind: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1]
    return kind(tuple(kernel), **options), (2, *size)


def assert_exact(case: tuple[nn.Module, tuple[int, ...]], dtype: torch.dtype = F64) -> None:
    op, shape = case[0].to(dtype), case[1]
    x = torch.randn(3, *shape, dtype=dtype)
    inverted = Inverted(op, x)
    with torch.no_grad():
        reachable = inverted.op(torch.randn_like(x))
    for target in (reachable, torch.randn_like(reachable)):
        assert_is_dense_answer(inverted, x, target)


@given(linears())
def test_linear_is_exact(case: Any) -> None:
    assert_exact(case)


@given(convolutions())
def test_convolution_is_exact(case: Any) -> None:
    assert_exact(case)


@given(averages())
def test_average_pooling_is_exact(case: Any) -> None:
    assert_exact(case)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.one_of(linears(), convolutions(), averages()))
def test_affine_ops_are_exact_many(case: Any) -> None:
    assert_exact(case)


@given(st.data())
def test_arithmetic_broadcasts_as_torch_does(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), label="sample"))
    own = tuple(size if data.draw(st.booleans()) else 1 for size in shape)
    own = own[data.draw(st.integers(0, len(own))) :]
    alpha = data.draw(st.sampled_from([1.0, -2.0, 0.5]), label="alpha")
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    constant = torch.randn(own, dtype=F64)
    function = data.draw(
        st.sampled_from(
            [
                lambda x, c: torch.add(x, c, alpha=alpha),
                lambda x, c: torch.add(c, x, alpha=alpha),
                lambda x, c: torch.sub(x, c, alpha=alpha),
                lambda x, c: torch.sub(c, x, alpha=alpha),
                lambda x, c: torch.rsub(x, c, alpha=alpha),
                lambda x, c: torch.rsub(c, x, alpha=alpha),
                lambda x, c: x * c,
                lambda x, c: c * x,
                lambda x, c: x / c,
                lambda x, c: x.mul(alpha),
                lambda x, c: alpha - x,
                lambda x, c: -x,
            ]
        )
    )
    assert_exact((WithBuffer(function, constant), shape))


def test_gains_of_the_samples_own() -> None:
    class Masked(nn.Module):
        places: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.arange(5))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return x * ((self.places < lengths[:, None]) * lengths[:, None]).to(x.dtype)

    x, lengths = torch.randn(4, 5, dtype=F64), torch.tensor([5, 1, 3, 1000])
    inverse = fxinvert.invert(Masked(), (x, lengths), output_target=lambda outputs, labels: labels)
    target = torch.randn(4, 5, dtype=F64)
    found = inverse((x, lengths), target).targets["x"]
    kept = torch.arange(5) < lengths[:, None]
    torch.testing.assert_close(found, torch.where(kept, target / lengths[:, None], x))
    alone = [inverse((x[i : i + 1], lengths[i : i + 1]), target[i : i + 1]).targets["x"] for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), found)


def test_division_that_rounds_is_refused() -> None:
    x = torch.rand(2, 3) + 1
    with pytest.raises(NoRuleError, match=r"div: it rounds its quotient"):
        Inverted(lambda x: torch.div(x, 2, rounding_mode="floor"), x)(x, x)


def test_a_divisor_is_inverted() -> None:
    x, target = torch.rand(2, 3) + 1, torch.rand(2, 3) + 1
    found, _ = Inverted(lambda x: 2 / x, x)(x, target)
    torch.testing.assert_close(found, 2 / target)


# --- ill-conditioned, singular and broken weights -----------------------------------------------------------


def ill_conditioned(condition: float, dtype: torch.dtype, n: int = 40) -> nn.Linear:
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=F64))[0] for _ in range(2))
    values = 3 * torch.logspace(0, -math.log10(condition), n, dtype=F64)
    layer = nn.Linear(n, n, dtype=dtype)
    layer.weight.data = (u * values @ v.T).to(dtype)
    return layer


@DTYPES
def test_an_ill_conditioned_layer_damps_noise_and_reaches_what_can_be_reached(dtype: torch.dtype) -> None:
    layer, x = ill_conditioned(1e5, dtype), torch.randn(6, 40, dtype=dtype)
    inverted = Inverted(layer, x, condition_limit=1e3)
    with torch.no_grad():
        reachable = inverted.op(torch.randn_like(x))
        noise = inverted.op(x) + torch.randn_like(x)
    value, certificate = inverted(x, reachable)
    assert certificate.status is Status.EXACT
    assert certificate.damping == 0
    assert float(certificate.residual.max()) < (1e-8 if dtype == F64 else 1e-4)
    assert certificate.condition == pytest.approx(1e5, rel=1e-2)
    value, certificate = inverted(x, noise)
    assert certificate.status is Status.DAMPED
    assert certificate.damping == pytest.approx((3 / 1e3) ** 2, rel=1e-5)
    assert_is_dense_answer(inverted, x, noise, limit=1e3)
    # damped or not, no correction is blown up more than κ times
    assert (value - x).norm(dim=1).max() <= 1e3 / 3 * (noise - inverted.op(x)).norm(dim=1).max()


def test_the_condition_limit_is_passed_on() -> None:
    layer, x = ill_conditioned(1e4, F64), torch.randn(3, 40, dtype=F64)
    for limit in (1e2, 1e6):
        inverted = Inverted(layer, x, condition_limit=limit)
        assert_is_dense_answer(inverted, x, torch.randn_like(x), limit)
        assert (inverted(x, torch.randn_like(x))[1].status is Status.DAMPED) == (limit == 1e2)


@DTYPES
@pytest.mark.parametrize(
    "op", [nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(2)], ids=lambda op: type(op).__name__
)
def test_weights_of_zero_leave_the_anchor(op: nn.Module, dtype: torch.dtype) -> None:
    op = copy.deepcopy(op).to(dtype)
    assert isinstance(op.weight, Tensor)
    op.weight.data.zero_()
    x = torch.randn((3, 5) if isinstance(op, nn.Linear) else (3, 2, 5, 5), dtype=dtype)
    inverted = Inverted(op, x)
    target = inverted.op(x).detach() + 1
    value, certificate = inverted(x, target)
    assert torch.equal(value, x)
    assert certificate.status is Status.LEAST_SQUARES
    assert not certificate.distance.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error_that_says_where(value: float) -> None:
    layer, x = nn.Linear(3, 2), torch.randn(2, 3)
    assert layer.bias is not None
    layer.weight.data[0, 0] = value
    with pytest.raises(SolveError, match=r"'op', linear: its weight \(2, 3\) has NaN or infinite values"):
        Inverted(layer, x)(x, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory_limit": 1000}, "node 'fc', linear: no solver .* into memory_limit=1000: at least .* bytes"),
        ({"solvers": {"fc": "banded"}}, "node 'fc', linear: method='banded' cannot be taken"),
    ],
)
def test_solvers_that_cannot_be_taken_are_an_error_that_says_where(
    settings: dict[str, Any], says: str
) -> None:
    x = torch.randn(2, 30)
    inverse = fxinvert.invert(nn.Sequential(OrderedDict(fc=nn.Linear(30, 20))), x, **settings)
    with pytest.raises(SolveError, match=says):
        inverse(x, torch.tensor([0, 1]))


def test_batch_statistics_are_refused() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    op = Op(
        "batch_norm",
        "norm",
        {"input": x},
        norm(x).detach(),
        dict(norm.named_buffers()),
        {"training": True},
        norm,
    )
    with pytest.raises(NoRuleError, match=r"'norm', batch_norm.*statistics of the batch"):
        fxinvert.default_rules()["batch_norm"].invert(op, x)


# --- the iterative solver and the cache ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample", [s for s in AFFINE if s.key.startswith(("conv", "avg_pool", "adaptive", "linear"))], ids=str
)
def test_the_iterative_solver_agrees_with_the_direct_one(sample: Sample) -> None:
    op, x = made(sample), sample.batch()
    direct, iterative = Inverted(op, x), Inverted(op, x, method="iterative", max_iterations=3000)
    with torch.no_grad():
        reachable = direct.op(torch.randn_like(x))
    for target in (reachable, torch.randn_like(reachable)):
        expected, first = direct(x, target)
        value, second = iterative(x, target)
        assume_same = first.status is second.status or Status.DAMPED in (first.status, second.status)
        assert assume_same
        assert second.iterations > 0
        if first.status is not Status.DAMPED:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(second.residual, first.residual, rtol=1e-6, atol=1e-8)
    assert torch.equal(iterative(x, direct.op(x).detach())[0], x)


def test_samples_for_which_an_iteration_does_not_converge_are_left_at_their_anchors() -> None:
    layer, x = ill_conditioned(1e4, F32), torch.randn(3, 40)
    inverted = Inverted(layer, x, method="iterative", max_iterations=4)
    target = torch.randn_like(x)
    target[1] = inverted.op(x)[1].detach()  # nothing to be done
    value, certificate = inverted(x, target)
    assert certificate.status is Status.FAILED
    assert certificate.failed.tolist() == [True, False, True]
    assert torch.equal(value, x)
    assert not certificate.distance.any()
    assert certificate.iterations == 4
    assert re.search(
        r"2 samples failed, the solver did not converge: a relative error of \d.\de-\d+ was left after 4 iterations",
        str(certificate),
    )


def test_a_sample_is_left_at_its_anchor_where_one_of_its_positions_does_not_converge() -> None:
    layer, x = ill_conditioned(1e4, F32), torch.randn(3, 5, 40)
    inverted = Inverted(layer, x, method="iterative", max_iterations=4)
    target = inverted.op(x).detach()
    target[2, 3] += torch.randn(40)
    value, certificate = inverted(x, target)
    assert certificate.failed.tolist() == [False, False, True]
    assert torch.equal(value, x)


def test_what_does_not_converge_undamped_is_damped_if_that_does() -> None:
    layer, x = ill_conditioned(1e6, F32), torch.randn(3, 40)
    inverted = Inverted(layer, x, method="iterative", max_iterations=60, condition_limit=5.0)
    value, certificate = inverted(x, torch.randn_like(x))
    assert certificate.status is Status.DAMPED
    assert certificate.damping > 0
    assert (value != x).flatten(1).any(1).all()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever a factorization is computed."""
    made: list[str] = []

    def counted(*args: Any) -> Any:
        made.append("one")
        return factorize(*args)

    monkeypatch.setattr("fxinvert.rules.affine.factorize", counted)
    return made


def test_a_factorization_is_computed_again_only_when_the_weights_change(builds: list[str]) -> None:
    layer, x = nn.Conv2d(2, 3, 3, dtype=F64), torch.randn(3, 2, 5, 5, dtype=F64)
    inverted = Inverted(layer, x)
    target = torch.randn(3, 3, 3, 3, dtype=F64)
    inverted(x, target)
    inverted(x[:2], target[:2])
    assert len(builds) == 1
    layer.weight.data[0, 0, 0, 0] += 1  # in place, behind autograd's back
    assert_is_dense_answer(inverted, x, target)
    assert len(builds) == 2
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    assert_is_dense_answer(inverted, x, target)
    assert len(builds) == 3
    inverted(x, target)
    assert len(builds) == 3


# --- scalar functions: a dense grid of candidates -----------------------------------------------------------


@samples(SCALAR)
def test_scalar_functions_give_the_nearest_pre_image(sample: Sample) -> None:
    function = made(sample)
    grid = torch.linspace(-30, 30, 20001, dtype=F64)
    step = float(grid[1] - grid[0])
    anchor = torch.rand(1, 150, dtype=F64) * 12 - 6
    with torch.no_grad():
        image = function(grid)
        reachable = function(torch.rand(1, 150, dtype=F64) * 12 - 6)
        target = torch.where(torch.rand(1, 150) < 0.5, reachable, torch.rand(1, 150, dtype=F64) * 8 - 4)
        target[0, :10] = function(anchor)[0, :10]
        inverted = Inverted(function, anchor)
        value, certificate = inverted(anchor, target)
        error = (function(value) - target).abs()[0]
    # where f − t changes sign or vanishes on the grid, there is a pre-image
    above = image[:, None] - target
    crossing = (above[:-1] * above[1:] <= 0) & ((above[:-1].abs() < 1) | (above[1:].abs() < 1))
    roots = torch.where(crossing, (grid[:-1, None] - anchor).abs(), torch.inf).amin(0)
    has_root = roots.isfinite()
    moved = (value - anchor).abs()[0]
    assert float(error[has_root].max()) < 1e-9
    assert (moved[has_root] <= roots[has_root] + 2 * step).all()
    closest = above.abs().amin(0)
    assert (error <= closest + 1e-5).all()
    assert (error <= (function(anchor) - target).abs()[0] + 1e-15).all()
    # also where the target lies beyond an end that is only approached; softsign approaches its ends slowly
    assert float(value.abs().max()) < (1e6 if sample.key == "softsign" else 40)
    assert torch.equal(value[0, :10], anchor[0, :10])
    unreached = int((error > 1e-6).sum())
    assert unreached <= certificate.projected <= int((error > 0).sum())
    assert (certificate.status is Status.PROJECTED) == (certificate.projected > 0)


@DTYPES
@samples(SCALAR)
def test_saturated_targets_stay_bounded(sample: Sample, dtype: torch.dtype) -> None:
    function = made(sample, dtype)
    far = torch.tensor([[-1e6, -30.0, -1.0, 0.0, 1.0, 30.0, 1e3]], dtype=dtype)
    anchor = torch.tensor([[-80.0, -10.0, -0.5, 0.0, 0.5, 10.0, 80.0]], dtype=dtype)
    for target in (far, far.flip(1)):
        value, certificate = Inverted(function, anchor)(anchor, target)
        assert not certificate.failed.any()
        assert value.isfinite().all()
        with torch.no_grad():
            error, before = (function(value) - target).abs(), (function(anchor) - target).abs()
        assert (error <= before * (1 + 1e-6)).all()


def test_saturated_targets_in_half_precision_move_to_where_the_function_saturates() -> None:
    anchor = torch.zeros(1, 2, dtype=torch.bfloat16)
    value, certificate = Inverted(nn.Tanh(), anchor)(
        anchor, torch.tensor([[1.5, -1.0]], dtype=torch.bfloat16)
    )
    assert value.tolist() == [[pytest.approx(6.9, abs=0.1), pytest.approx(-6.9, abs=0.1)]]
    assert certificate.projected == 2


def test_targets_out_of_range_are_counted() -> None:
    anchor = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 2.0]], dtype=F64)
    value, certificate = Inverted(nn.ReLU(), anchor)(
        anchor, torch.tensor([[-1.0, 5.0, -2.0], [0.0, 1.0, 3.0]], dtype=F64)
    )
    assert value.tolist() == [[0.0, 5.0, -1.0], [0.0, 1.0, 3.0]]
    assert certificate.projected == 2
    assert certificate.status is Status.PROJECTED
    assert "2 values projected" in str(certificate)


# --- maxima: brute force ------------------------------------------------------------------------------------


@given(st.data())
def test_disjoint_maxima_give_the_nearest_point(data: st.DataObject) -> None:
    kernel = data.draw(st.integers(1, 3))
    size = kernel * data.draw(st.integers(1, 2)) + data.draw(st.integers(0, kernel - 1))
    numbers = st.integers(-3, 3).map(float)  # ties on purpose
    x = torch.tensor([[data.draw(st.lists(numbers, min_size=size, max_size=size))]], dtype=F64)
    out = size // kernel
    target = torch.tensor([[data.draw(st.lists(numbers, min_size=out, max_size=out))]], dtype=F64)
    value, certificate = Inverted(nn.MaxPool1d(kernel), x)(x, target)
    assert torch.equal(nn.functional.max_pool1d(value, kernel), target)
    assert certificate.status is Status.NEAREST
    assert float(certificate.distance[0]) == pytest.approx(
        _nearest_by_trying(x, target, nn.MaxPool1d(kernel))
    )


def _nearest_by_trying(x: Tensor, target: Tensor, pool: nn.Module) -> float:
    """Distance to the nearest input with these maxima: every entry stays, or becomes one of the targets."""
    choices = [{float(v), *map(float, target.flatten())} for v in x.flatten()]
    tried = torch.tensor(list(itertools.product(*choices)), dtype=F64)[:, None]
    reached = (pool(tried) == target).flatten(1).all(1)
    return float((tried - x).flatten(1).norm(dim=1)[reached].min())


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(2, 1),
        nn.MaxPool1d(3, 1),
        nn.MaxPool1d(3, 2),
        nn.MaxPool1d(2, 2, dilation=2),
        nn.MaxPool1d(4, 1),
    ],
    ids=str,
)
def test_overlapping_maxima_claim_to_be_nearest_only_where_they_are(pool: nn.Module) -> None:
    """Mostly they are, and say so; where the bound does not prove it, they claim no more than that they are exact."""
    claimed = 0
    for _ in range(12):
        x = torch.randn(1, 1, 6, dtype=F64)
        target = pool(x + 0.5 * torch.randn_like(x))
        value, certificate = Inverted(pool, x)(x, target)
        assert torch.equal(pool(value), target)
        best = _nearest_by_trying(x, target, pool)
        assert float(certificate.distance[0]) <= 1.5 * best + 1e-12
        if certificate.status is Status.NEAREST:
            claimed += 1
            assert float(certificate.distance[0]) == pytest.approx(best)
        else:
            assert certificate.status is Status.EXACT
    assert claimed >= 8


def test_a_choice_of_maxima_that_is_not_the_best_is_not_called_nearest() -> None:
    """What is raised costs 22; another choice of entries, one in every three neighbours, costs 18."""
    x = -torch.tensor([[[1.0, 4, 2, 1, 4, 4, 4, 4, 2]]], dtype=F64)
    _, certificate = Inverted(nn.MaxPool1d(3, 1), x)(x, torch.zeros(1, 1, 7, dtype=F64))
    assert certificate.status is Status.EXACT
    assert float(certificate.residual) == 0


@st.composite
def maxima(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    n = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    dilation = [draw(st.integers(1, 2)) for _ in range(n)]
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(n)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": tuple(dilation),
        "ceil_mode": draw(st.booleans()),
    }
    kind: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 1]
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return kind(tuple(kernel), **options), (
        2,
        *(draw(st.integers(span, max(span, 8 - 2 * n))) for span in spans),
    )


def assert_maxima_are_reached(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    pool, shape = case
    x = torch.randn(3, *shape, dtype=F64)
    assume(bool(pool(x).isfinite().all()))  # a window that lies in the padding has no maximum
    inverted = Inverted(pool, x)
    reachable = pool(torch.randn(3, *shape, dtype=F64))
    value, certificate = inverted(x, reachable)
    assert torch.equal(pool(value), reachable)
    assert certificate.projected == 0
    noise = torch.randn_like(reachable)
    value, certificate = inverted(x, noise)
    missed = pool(value) != noise
    assert certificate.projected == int(missed.sum()) or certificate.status is Status.PROJECTED
    assert ((pool(value) - noise).flatten(1).norm(dim=1) <= (pool(x) - noise).flatten(1).norm(dim=1)).all()


@given(maxima())
def test_maxima_that_can_be_reached_are_reached(case: Any) -> None:
    assert_maxima_are_reached(case)


@pytest.mark.slow
@settings(max_examples=400)
@given(maxima())
def test_maxima_that_can_be_reached_are_reached_many(case: Any) -> None:
    assert_maxima_are_reached(case)


@samples([s for s in MAXIMUM if s.note != "disjoint"])
def test_maxima_change_no_more_than_they_must(sample: Sample) -> None:
    pool, x = made(sample), sample.batch()
    target = pool(sample.batch())
    value, _ = Inverted(pool, x)(x, target)
    raised, lowered = value > x, value < x
    # what is raised becomes a target, what is lowered comes down to the least target above it
    assert torch.isin(value[raised | lowered], target).all()
    undone = pool(torch.where(lowered, x, value))
    assert (undone >= target).all()


# --- the parameter side -------------------------------------------------------------------------------------

TRAINABLE = [
    s
    for s in AFFINE
    if s.key in ("linear", "conv1d", "conv2d", "conv3d", "batch_norm") and s.note != "not_affine"
]


@samples(TRAINABLE)
def test_the_output_is_linear_in_the_parameters(sample: Sample) -> None:
    op, x = made(sample).eval(), sample.batch()
    inverted = Inverted(op, x)
    (node,) = [n for n in inverted.op.graph.nodes if n.meta.get("op") == sample.key]
    values = inverted.inverse.forward(x)
    seen, trainable = inverted.inverse.op(node, values), inverted.inverse.inverse_op(node).rule.trainable
    assert trainable is not None
    features = trainable.features(seen)
    rows = trainable.outputs(seen, values[node])
    assert features.shape[:2] == rows.shape[:2]
    # a change of the matrix is a change of the parameters, and the output changes by Θ ã
    change = torch.randn(len(rows), rows.shape[2], features.shape[2], dtype=F64)
    changes = trainable.changes(seen.parameters, change)
    changed = copy.deepcopy(op)
    for name, parameter in changed.named_parameters():
        parameter.data += changes.pop(name)
    assert not changes
    with torch.no_grad():
        difference = trainable.outputs(seen, changed(x) - op(x))
    torch.testing.assert_close(difference, features @ change.mT)


def test_the_oracle_is_not_the_code_it_checks() -> None:
    layer, x = nn.Linear(4, 3, dtype=F64), torch.randn(2, 4, dtype=F64)
    target = torch.randn(2, 3, dtype=F64)
    output = layer(x).detach()
    dense = dense_answer(jacobian(layer, x[:1]), x, output, target)
    expected = x + (target - output) @ torch.linalg.pinv(layer.weight.detach()).T
    torch.testing.assert_close(dense.value, expected)
