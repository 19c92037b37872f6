"""Matrix products and transposed convolutions: against the pseudo-inverse, and their weights against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_samples import (
    Inverted,
    WithParameter,
    assert_is_dense_answer,
    assert_solves,
    dense_answer,
    jacobian,
)
from torch import Tensor, nn

import fxinvert
from fxinvert.linalg import SolveSettings, each
from fxinvert.linalg.each import EachFunction, decomposed, solve_batched, solve_each
from fxinvert.passes.flow import Flow
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.passes.owned import trained_parameters
from fxinvert.testing import check_rule

F64, F32 = torch.float64, torch.float32


class WithTwo(nn.Module):
    """`function(x, a, b)` with parameters a and b."""

    def __init__(self, function: Callable[..., Tensor], a: tuple[int, ...], b: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Parameter(torch.randn(a)), nn.Parameter(torch.randn(b))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.a, self.b)


def product(function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Callable[[], nn.Module]:
    return lambda: WithParameter(function, *shape)


#: key and note, the op, the shape of a batch
OPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matmul-rows": (product(lambda x, w: x @ w, 5, 4), (3, 5)),
    "matmul-left": (product(lambda x, w: x @ w, 5, 7), (3, 2, 5)),
    "matmul-right": (product(lambda x, w: w @ x, 4, 3), (3, 3, 5)),
    "matmul-heads": (product(lambda x, w: x @ w, 2, 5, 4), (3, 2, 3, 5)),
    "matmul-heads_right": (product(lambda x, w: w @ x, 2, 4, 3), (3, 2, 3, 5)),
    "matmul-one_head": (product(lambda x, w: x @ w, 1, 5, 4), (3, 2, 5)),
    "matmul-part": (product(lambda x, w: x @ w, 2, 1, 5, 4), (3, 2, 2, 3, 5)),
    "matmul-spread": (product(lambda x, w: x @ w, 2, 5, 4), (3, 1, 3, 5)),
    "matmul-vector": (product(lambda x, w: x @ w, 5), (3, 2, 5)),
    "matmul-vector_right": (product(lambda x, w: w @ x, 3), (3, 3, 5)),
    "mm": (product(lambda x, w: torch.mm(x, w), 5, 4), (3, 5)),
    "linalg_matmul": (product(torch.linalg.matmul, 5, 4), (3, 5)),
    "einsum": (product(lambda x, w: torch.einsum("bi,oi->bo", x, w), 4, 5), (3, 5)),
    "einsum-heads": (product(lambda x, w: torch.einsum("bti,ihd->bhtd", x, w), 5, 2, 3), (3, 4, 5)),
    "einsum-experts": (product(lambda x, w: torch.einsum("beci,eio->beco", x, w), 2, 5, 4), (3, 2, 3, 5)),
    "einsum-splines": (product(lambda x, w: torch.einsum("bik,iok->bo", x, w), 5, 4, 3), (3, 5, 3)),
    "einsum-dots": (product(lambda x, w: torch.einsum("oi,...i->...o", w, x), 4, 5), (3, 2, 5)),
    "einsum-scale": (product(lambda x, w: torch.einsum("bti,i->bti", x, w), 5), (3, 2, 5)),
    "einsum-alone": (product(lambda x, w: torch.einsum("bhwc->bchw", x), 1), (3, 2, 4, 5)),
    "einsum-alone_summed": (product(lambda x, w: torch.einsum("bij->bi", x), 1), (3, 4, 5)),
    "inner": (product(torch.inner, 4, 5), (3, 2, 5)),
    "einsum-tensordot": (product(lambda x, w: torch.tensordot(x, w, 1), 5, 4), (3, 2, 5)),
    "einsum-tensordot_axes": (
        product(lambda x, w: torch.tensordot(x, w, ([-1, 1], [0, 1])), 5, 2, 3),
        (3, 2, 5),
    ),
    "cumsum": (product(lambda x, w: x.cumsum(1), 1), (3, 5, 2)),
    "cumsum-last": (product(lambda x, w: torch.cumsum(x, -1), 1), (3, 5, 2)),
    "addmm": (lambda: WithTwo(lambda x, a, b: torch.addmm(a, x, b), (4,), (5, 4)), (3, 5)),
    "addmm-scaled": (
        lambda: WithTwo(lambda x, a, b: torch.addmm(a, x, b, beta=2, alpha=-3), (4,), (5, 4)),
        (3, 5),
    ),
    "conv1d-tiles": (lambda: nn.Conv1d(3, 7, 2, stride=2), (3, 3, 5)),
    "conv2d-apart": (lambda: nn.Conv2d(3, 5, (2, 3), stride=3, dilation=(2, 1)), (3, 3, 9, 7)),
    "conv2d-pointwise_strided": (lambda: nn.Conv2d(6, 4, 1, stride=2), (3, 6, 3, 4)),
    "conv2d-lines": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), groups=2), (3, 4, 3, 4)),
    "conv3d-lines": (
        lambda: nn.Conv3d(2, 3, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
        (3, 2, 4, 2, 3),
    ),
    "conv3d-maps": (lambda: nn.Conv3d(2, 2, (1, 3, 2), stride=(1, 1, 2)), (3, 2, 2, 4, 5)),
    "conv3d-tiles": (lambda: nn.Conv3d(2, 3, 2, stride=2), (3, 2, 4, 2, 5)),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1),
        (3, 3, 5),
    ),
    "conv_transpose1d-far": (
        lambda: nn.ConvTranspose1d(3, 2, 2, dilation=3, padding=2, output_padding=2),
        (3, 3, 5),
    ),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2), (3, 4, 3, 4)),
    "conv_transpose2d-tiles": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (3, 4, 3, 4)),
    "conv_transpose2d-tiles_lost": (lambda: nn.ConvTranspose2d(9, 2, 2, stride=2, bias=False), (3, 9, 2, 2)),
    "conv_transpose2d-cropped": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1), (3, 2, 3, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (3, 2, 2, 3, 2)),
    "addcmul": (lambda: WithTwo(lambda x, a, b: torch.addcmul(x, a, b), (5,), (5,)), (3, 5)),
    "addcmul-factor": (lambda: WithTwo(lambda x, a, b: torch.addcmul(a, x, b, value=2), (5,), (5,)), (3, 5)),
    "addcmul-spread": (lambda: WithTwo(lambda x, a, b: torch.addcmul(a, b, x), (4, 5), (4, 1)), (3, 1, 5)),
    "lerp": (product(lambda x, w: torch.lerp(x, w, 0.3), 5), (3, 5)),
    "lerp-end": (product(lambda x, w: torch.lerp(w, x, 0.3), 5), (3, 5)),
}
EACH = pytest.mark.parametrize("name", OPS)
TRAINABLE = [
    name
    for name in OPS
    if name.split("-")[0] in ("matmul", "linalg_matmul", "mm", "addmm", "einsum") and "alone" not in name
]
TRAINABLE += [name for name in OPS if name.startswith("conv_transpose")]


@pytest.mark.parametrize(
    ("kernel", "side"), [((3, 1, 1), 2 * 4), ((1, 3, 3), 2 * 5 * 6), ((1, 1, 3), 2 * 6), ((1, 2, 1), 2 * 5)]
)
def test_axes_with_a_single_tap_are_right_hand_sides(kernel: Any, side: int) -> None:
    padding: Any = tuple(k // 2 for k in kernel)
    conv, x = nn.Conv3d(2, 2, kernel, padding=padding), torch.randn(2, 2, 4, 5, 6)
    inverse = fxinvert.invert(conv, x, output_target="regression")
    inverse(x, conv(x).detach())
    # a solver of the whole map would have two channels on all of its 120 positions
    assert f" × {side}, " in inverse.explain()


@EACH
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    make, shape = OPS[name]
    report = check_rule(make(), torch.randn(shape, dtype=dtype), dtype=dtype)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@EACH
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_the_answer_is_that_of_the_pseudo_inverse(name: str, dtype: torch.dtype) -> None:
    make, shape = OPS[name]
    x = torch.randn(shape, dtype=dtype)
    inverted = Inverted(make().to(dtype), x)
    reachable = assert_solves(inverted, x)
    for few in (0, 1):
        assert inverted(x[:few], reachable[:few])[0].shape == (few, *shape[1:])


def test_windows_apart_are_a_small_system_each() -> None:
    layer, x = nn.Conv2d(6, 4, 2, stride=(3, 2)), torch.randn(3, 6, 8, 8)
    inverse = fxinvert.invert(layer, x, output_target="regression")
    inverse(x, torch.randn(3, 4, 3, 4))
    assert "Dense 4 × 24" in inverse.explain()


def test_a_vector_gives_one_number_per_sample() -> None:
    layer, x = WithParameter(lambda x, w: torch.mv(x, w), 5).double(), torch.randn(4, 5, dtype=F64)
    assert check_rule(layer, x).op == "mv"
    inverted, target = Inverted(layer, x), torch.randn(4, dtype=F64)
    w = layer.p.detach()
    expected = x + (target - x @ w)[:, None] * w / w.square().sum()
    torch.testing.assert_close(inverted(x, target)[0], expected)


class Chosen(nn.Module):
    """`function(x, table[i])`: a matrix for each sample."""

    table: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], table: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", table)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.function(x, self.table[i])


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (torch.bmm, (4, 2, 3)),
        (torch.matmul, (4, 2, 3)),
        (lambda x, w: torch.bmm(w.mT, x), (4, 3, 2)),
        (lambda x, w: torch.baddbmm(torch.ones(1, 2, 1, dtype=F64), x, w, beta=2, alpha=-1), (4, 2, 3)),
    ],
    ids=["bmm", "matmul", "bmm-right", "baddbmm"],
)
@pytest.mark.parametrize("columns", [2, 5])
def test_a_matrix_for_each_sample(function: Any, shape: tuple[int, ...], columns: int) -> None:
    table = torch.randn(6, 3, columns, dtype=F64)
    table[5] = 0
    table[4, 1:] = 0
    x, chosen = torch.randn(shape, dtype=F64), torch.tensor([1, 4, 5, 1])
    model = Chosen(function, table)
    inverse = fxinvert.invert(model, (x, chosen), output_target=lambda outputs, labels: labels)
    output = model(x, chosen)
    for target in (model(torch.randn_like(x), chosen), torch.randn_like(output), output):
        found = inverse((x, chosen), target).targets["x"]
        for n in range(4):
            own = chosen[n : n + 1]
            a = jacobian(lambda v, own=own: model(v, own), x[n : n + 1])  # type: ignore[misc]
            expected = dense_answer(a, x[n : n + 1], output[n : n + 1], target[n : n + 1])
            torch.testing.assert_close(found[n : n + 1].flatten(1), expected.value, rtol=1e-6, atol=1e-8)
        if target is output:
            assert torch.equal(found, x)


def test_a_batch_of_matrices_is_damped_row_by_row() -> None:
    u, v = (torch.linalg.qr(torch.randn(2, 4, 4, dtype=F64))[0] for _ in range(2))
    values = torch.tensor([[2.0, 1, 1, 1], [2.0, 1, 1e-6, 1e-40]], dtype=F64)
    a, r = u * values[:, None] @ v, torch.randn(2, 3, 4, dtype=F64)
    solved = solve_batched(a, r, 1e3)
    assert solved.damped.flatten().tolist() == [False] * 3 + [True] * 3
    assert solved.damping == pytest.approx((2 / 1e3) ** 2)
    for n in range(2):
        empty = torch.zeros(3, 4, dtype=F64)
        expected = dense_answer(a[n], empty, empty, r[n])
        torch.testing.assert_close(solved.value[n], expected.value)
    spoiled = a.clone()
    spoiled[1, 0, 0] = torch.nan
    value = solve_batched(spoiled, r, 1e3).value
    torch.testing.assert_close(value[0], solved.value[0])
    assert value[1].isnan().all()


@pytest.mark.parametrize("lead", [(6, 1, 2), (2,)], ids=["each", "shared"])
def test_a_batch_of_matrices_is_decomposed_in_parts(
    lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, r = torch.randn(*lead, 4, 7), torch.randn(6, 3, 2, 5, 4)[:, : lead[1] if len(lead) > 1 else 3]
    a[..., 0, :] *= 1e-5  # some rows are damped, some are not
    r[:3, ..., 0] *= 1e-5
    once, sizes = solve_batched(a, r, 1e3), []

    def counted(matrices: Tensor, *, exactly: bool) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(matrices.numel())
        return decomposed(matrices, exactly=exactly)

    monkeypatch.setattr(each, "decomposed", counted)
    monkeypatch.setattr(each, "AT_ONCE", 100)
    parts = solve_batched(a, r, 1e3)
    assert max(sizes) < a.numel()
    assert torch.equal(parts.value, once.value)
    assert torch.equal(parts.damped, once.damped)
    assert once.damped.any()
    assert not once.damped.all()
    assert (parts.damping, parts.condition) == (once.damping, once.condition)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_an_operator_of_every_sample_is_damped_sample_by_sample(dtype: torch.dtype) -> None:
    u, v = (torch.linalg.qr(torch.randn(3, 4, 4, dtype=F64))[0] for _ in range(2))
    values = torch.tensor([[2.0, 1, 1, 1], [2.0, 1, 1, 1e-5], [1.0, 1, 0.5, 0]], dtype=F64)
    a, r = u * values[:, None] @ v, torch.randn(3, 4, dtype=F64)
    held, settings = a.to(dtype), SolveSettings(condition_limit=1e3)
    operator = EachFunction(lambda x: (held @ x[..., None])[..., 0] + 3, torch.zeros(3, 4, dtype=dtype))
    solved = solve_each(operator, r.to(dtype), settings)
    assert solved.damped.tolist() == [False, True, False]
    assert solved.damping == pytest.approx((2 / 1e3) ** 2, rel=0.2)  # from the largest value that was met
    for n in (0, 2):
        torch.testing.assert_close(
            solved.value[n].double(), torch.linalg.pinv(a[n], rtol=1e-9) @ r[n], rtol=1e-4, atol=1e-4
        )
    normal = a[1].T @ a[1] + solved.damping * torch.eye(4, dtype=F64)
    expected = torch.linalg.solve(normal, a[1].T @ r[1])
    costs = [
        (a[1] @ x - r[1]).square().sum() + solved.damping * x.square().sum()
        for x in (solved.value[1].double(), expected)
    ]
    assert float(costs[0]) <= float(costs[1]) * (1 + 1e-4)


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    n, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    stride, dilation = ([draw(st.integers(1, 3)) for _ in range(n)] for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    size = [draw(st.integers(2, 5 - n)) if n < 3 else 2 for _ in range(n)]
    room = [(i - 1) * s + d * (k - 1) for i, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "padding": [draw(st.integers(0, min(2, most // 2))) for most in room],
        "output_padding": [
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ],
    }
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    layer = kind(2 * groups, groups * draw(st.integers(1, 2)), kernel, groups=groups, **options)
    return layer.double(), (2 * groups, *size)


@given(transposed())
def test_transposed_convolution_is_exact(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    x = torch.randn(3, *shape, dtype=F64)
    inverted = Inverted(layer, x)
    with torch.no_grad():
        reachable = inverted.op(torch.randn_like(x))
    assert_is_dense_answer(inverted, x, reachable)
    assert_is_dense_answer(inverted, x, torch.randn_like(reachable))
    assert_rows_are_the_output(layer, x)


# --- weights ------------------------------------------------------------------------------------------------


def assert_rows_are_the_output(layer: nn.Module, x: Tensor) -> None:
    """Θ ã, for a change ΔΘ of the weights, is the change of the output."""
    inverted = Inverted(layer, x)
    graph = inverted.inverse
    node = Flow(inverted.op).exit
    step = graph.inverse_op(node)
    assert isinstance(step, InverseOp)
    trainable = graph.trainable(node)
    with torch.no_grad():
        before = layer(x)
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: x if n.op == "placeholder" else _read(inverted.op, str(n.target)),
        )
        op = step.op(before, args, kwargs)
        features = trainable.features(op)
        rows = trainable.outputs(op, before)
        assert rows.shape[:2] == features.shape[:2]
        matrix = torch.randn(len(rows), rows.shape[2], features.shape[2], dtype=x.dtype)
        for name, change in trainable.changes(op.parameters, matrix).items():
            op.parameters[name].add_(change)
        change = trainable.outputs(op, layer(x) - before)
    torch.testing.assert_close(features @ matrix.mT, change)


def _read(graph: nn.Module, target: str) -> Tensor:
    *path, name = target.split(".")
    value: Tensor = getattr(graph.get_submodule(".".join(path)), name)
    return value


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_weights_are_those_of_the_rows(name: str) -> None:
    make, shape = OPS[name]
    assert_rows_are_the_output(make().double(), torch.randn(shape, dtype=F64))


@pytest.mark.parametrize(
    ("equation", "shape", "x"),
    [
        ("bi,oij->bo", (4, 5, 3), (3, 5)),
        ("bij,oi->bo", (4, 5), (3, 5, 2)),
        ("bii,oi->bo", (4, 5), (3, 5, 5)),
        ("bi,oi,bi->bo", (4, 5), (3, 5)),
    ],
    ids=["summed-in-the-weight", "summed-in-the-input", "diagonal", "three"],
)
def test_what_is_no_matrix_is_not_trained(equation: str, shape: tuple[int, ...], x: tuple[int, ...]) -> None:
    def function(value: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(equation, *[value, weight, value.detach()][: equation.count(",") + 1])

    graph = fxinvert.trace(WithParameter(function, *shape), torch.randn(x))
    assert trained_parameters(Flow(graph).exit, fxinvert.rules.default_rules()) == ()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(3).eval(), (4, 3, 5)),
        (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
        (lambda: nn.LayerNorm([3, 5]), (4, 2, 3, 5)),
        (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
        (lambda: nn.RMSNorm(5), (4, 2, 5)),
    ],
    ids=["batch_norm", "group_norm", "layer_norm", "layer_norm-without-bias", "rms_norm"],
)
def test_scales_of_norms_are_weights_too(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert_rows_are_the_output(make().double(), torch.randn(shape, dtype=F64))
