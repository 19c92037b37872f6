"""The matrix-free fallback: ops without a rule of their own, inverted by their derivatives alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import NoRuleError
from fxinvert.linalg import operators
from fxinvert.linalg.jacobian import Jacobian, differentiable
from fxinvert.linalg.search import DRIFT
from fxinvert.report import nodes_table
from fxinvert.rules import Inverse, Kind, Op, RuleSet, Status
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.testing import check_rule

Function = Callable[[Tensor], Tensor]
WIDTH = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def answer(function: Function, x: Tensor, target: Tensor, **known: Any) -> Inverse:
    """As `InverseOp` asks for it."""
    with torch.no_grad():
        return invert_matrix_free(Op("f", "f", {"x": x}, function(x), {}, known, function), target)


def mlp(outputs: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, outputs))


def layer_norm() -> nn.LayerNorm:
    """With scales and shifts as if trained."""
    norm = nn.LayerNorm(WIDTH)
    draw = torch.Generator().manual_seed(0)
    nn.init.normal_(norm.weight, 1.0, 0.3, generator=draw)
    nn.init.normal_(norm.bias, generator=draw)
    return norm.double().requires_grad_(False)


#: what is reached in thirty products: a function and the size of the changes of x that its targets come from
QUICK: dict[str, tuple[Function, float]] = {
    "softmax": (lambda x: x.softmax(1), 0.03),
    "log_softmax": (lambda x: x.log_softmax(1), 0.3),
    "affine layer_norm": (layer_norm(), 0.1),
    "gated": (lambda x: x * x.roll(1, 1).sigmoid(), 0.03),
    "a small MLP": (mlp().double().requires_grad_(False), 0.3),
}
SMOOTH: dict[str, Function] = {
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "x sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "silu of silu": lambda x: F.silu(F.silu(x)),
    "x + sin(x) / 2": lambda x: x + 0.5 * x.sin(),
    "normalize": lambda x: F.normalize(x, dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "std": lambda x: x.std(1, keepdim=True, correction=0),
    "a small MLP": mlp().double().requires_grad_(False),
}


# --- what is reached ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in SMOOTH for s in (0.03, 0.1) if (n, s) != ("a small MLP", 0.1)]
)
def test_smooth_ops_reach_a_small_target_in_thirty_products(name: str, size: float) -> None:
    function = SMOOTH[name]
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).float()
    x = torch.randn(32, WIDTH)
    target = function(x + size * torch.randn_like(x))
    value, certificate = answer(function, x, target)
    assert float(certificate.residual.max()) <= 1e-5
    assert certificate.iterations <= 30
    assert certificate.status is Status.NEAREST
    torch.testing.assert_close(certificate.distance, (value - x).norm(dim=1))


@pytest.mark.parametrize("name", QUICK)
def test_ill_conditioned_smooth_ops_reach_a_small_target_in_thirty_products(name: str) -> None:
    function, size = QUICK[name]
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).float()
    x = torch.randn(32, WIDTH)
    _, certificate = answer(function, x, function(x + size * torch.randn_like(x)))
    assert float(certificate.residual.max()) <= 1e-5
    assert certificate.iterations <= 30
    assert certificate.status in (Status.NEAREST, Status.EXACT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(1),
        lambda x: x.logcumsumexp(1),
        lambda x: (1 + x / 10).cumprod(1),
        lambda x: (x[:, :, None] * x[:, None]).softmax(-1) @ x[..., None],
        lambda x: x * x.roll(1, 1).sigmoid(),
        lambda x: torch.tanh(x @ torch.arange(64.0).sin().reshape(8, 8)) + x,
    ],
    ids=["softmax", "logcumsumexp", "cumprod", "attention", "gated", "mixed"],
)
def test_small_smooth_ops_reach_a_large_target_in_thirty_products(function: Function) -> None:
    """Their Jacobian is written out, and kept as long as steps by it lessen the error."""
    x = torch.randn(32, 8)
    _, certificate = answer(function, x, function(x + 0.3 * torch.randn_like(x).tanh()))
    assert float(certificate.residual.max()) <= 1e-5
    assert certificate.iterations <= 30
    assert certificate.status in (Status.NEAREST, Status.EXACT)


SQUARE: dict[str, Function] = {
    "cumprod": lambda x: torch.cumprod(1 + x / 10, 1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "softmax": lambda x: x.softmax(1),
    "attention": lambda x: (x[:, :, None] * x[:, None]).softmax(-1) @ x[..., None],
}


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("width", [6, 20])
def test_values_that_depend_on_each_other_take_thirty_products_at_most(name: str, width: int) -> None:
    for _ in range(3):
        x = torch.randn(8, width)
        _, certificate = answer(SQUARE[name], x, SQUARE[name](x + 0.2 * torch.randn_like(x).tanh()))
        assert float(certificate.residual.max()) <= 1e-5
        assert certificate.iterations <= 30
        assert certificate.status is Status.NEAREST


def test_values_by_themselves_take_few_products() -> None:
    x = torch.randn(8, 20)
    _, certificate = answer(torch.special.i0, x, torch.special.i0(x + 0.3 * torch.randn_like(x).tanh()))
    assert float(certificate.residual.max()) <= 1e-5
    assert certificate.iterations <= 10


@pytest.mark.parametrize("name", [n for n in SMOOTH if n != "layer_norm"])
def test_reachable_targets_are_reached_in_double_precision(name: str) -> None:
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    target = SMOOTH[name](x + 0.1 * torch.randn_like(x))
    value, certificate = answer(SMOOTH[name], x, target)
    assert value.dtype == torch.float64
    assert float(certificate.residual.max()) <= 1e-8
    assert certificate.status is Status.NEAREST


@pytest.mark.parametrize("name", ["normalize", "logsumexp", "std", "a small MLP"])
def test_no_input_that_reaches_the_target_is_nearer(name: str) -> None:
    """The correction lies in the row space of the Jacobian, up to what is declared."""
    function = SMOOTH[name]
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    value, _ = answer(function, x, function(x + 0.1 * torch.randn_like(x)))
    for row, anchor in zip(value, x, strict=True):
        jacobian = torch.func.jacrev(lambda v: function(v[None])[0])(row).reshape(-1, WIDTH)
        moved = row - anchor
        inside = torch.linalg.pinv(jacobian) @ (jacobian @ moved)
        assert float((moved - inside).norm()) <= 2 * DRIFT[torch.float64] * float(moved.norm())


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), "deficient"])
def test_an_affine_function_gets_the_pseudo_inverse(shape: Any) -> None:
    if shape == "deficient":
        a = torch.randn(6, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    else:
        a = torch.randn(*shape, dtype=torch.float64)
    b = torch.randn(len(a), dtype=torch.float64)
    x, target = torch.randn(4, a.shape[1]).double(), torch.randn(4, len(a)).double()
    value, certificate = answer(lambda v: v @ a.T + b, x, target)
    expected = x + (target - x @ a.T - b) @ torch.linalg.pinv(a).T
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    reached = len(a) <= a.shape[1] and shape != "deficient"
    assert certificate.status is (Status.NEAREST if reached else Status.LEAST_SQUARES)


def test_an_unreachable_target_ends_where_the_error_is_level() -> None:
    """x ↦ (x, x²) and a target off the parabola: the nearest point of the curve, by its roots."""
    x, target = torch.full((1, 1), 0.8).double(), torch.tensor([[1.5, 0.5]]).double()
    value, certificate = answer(lambda v: torch.cat([v, v.square()], 1), x, target)
    assert certificate.status is Status.LEAST_SQUARES
    # d/dx ((x − 1.5)² + (x² − 0.5)²) / 2 = 2 x³ − 1.5
    torch.testing.assert_close(value, torch.full((1, 1), 0.75 ** (1 / 3)).double(), rtol=1e-6, atol=0)


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_a_target_that_is_the_output_gives_the_anchor(name: str) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    value, certificate = answer(SMOOTH[name], x, SMOOTH[name](x))
    assert torch.equal(value, x)
    assert certificate.iterations == 0


@pytest.mark.parametrize("name", SMOOTH)
def test_samples_are_independent(name: str) -> None:
    function = SMOOTH[name]
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    target = function(x + torch.tensor([0, 0.01, 0.1, 0.2, 0.3])[:, None].double() * torch.randn_like(x))
    together, _ = answer(function, x, target)
    alone = torch.cat([answer(function, x[i : i + 1], target[i : i + 1]).target for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)
    assert torch.equal(together[0], x[0])


@pytest.mark.parametrize("name", ["x sigmoid(x)", "a small MLP"])
def test_what_is_not_finite_fails_alone(name: str) -> None:
    function = SMOOTH[name]
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    target = function(x + 0.1 * torch.randn_like(x))
    expected, _ = answer(function, x, target)
    spoiled, broken = target.clone(), x.clone()
    spoiled[1, 0], broken[2, 3] = torch.nan, torch.inf
    value, certificate = answer(function, broken, spoiled)
    assert certificate.failed.tolist() == [False, True, True, False]
    assert certificate.status is Status.FAILED
    torch.testing.assert_close(value[[0, 3]], expected[[0, 3]], rtol=1e-8, atol=1e-10)
    assert torch.equal(value[[1, 2]], broken[[1, 2]])


def test_a_sample_without_slope_keeps_its_anchor() -> None:
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    value, certificate = answer(torch.relu, x, torch.tensor([[1.0, 1.0], [1.5, 1.0]]))
    torch.testing.assert_close(value, torch.tensor([[-1.0, -2.0], [1.5, 1.0]]))
    assert certificate.status is Status.LEAST_SQUARES


@pytest.mark.parametrize("shape", [(0, WIDTH), (1, WIDTH)])
@pytest.mark.parametrize("name", SMOOTH)
def test_small_batches(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    target = SMOOTH[name](x + 0.01)
    value, certificate = answer(SMOOTH[name], x, target)
    assert value.shape == x.shape
    assert certificate.residual.shape == (len(x),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, WIDTH).to(dtype)
    target = F.normalize(x + 0.1 * torch.randn_like(x), dim=1)
    value, certificate = answer(lambda v: F.normalize(v, dim=1), x, target)
    assert value.dtype == dtype
    assert float(certificate.residual.max()) <= torch.finfo(dtype).eps ** 0.5


def test_steps_that_are_not_worthwhile_are_the_last() -> None:
    mix, x = torch.randn(40, 60), torch.randn(4, 40)

    def function(value: Tensor) -> Tensor:
        return torch.cat([value, (value @ mix / 12).sin()], 1)

    op = Op("f", "f", {"x": x}, function(x), {}, {}, function)
    target = op.output + torch.randn_like(op.output)
    with torch.no_grad():
        far, short = (invert_matrix_free(op, target, worthwhile=part) for part in (0.0, 1e-3))
    assert short.certificate.iterations < 0.75 * far.certificate.iterations
    assert bool((short.certificate.residual <= 1.01 * far.certificate.residual).all())


# --- derivatives --------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 2 * gradients[0]


class Once(torch.autograd.Function):
    """In forward mode, and in reverse mode once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return 2 * tangents[0]


def attention(x: Tensor) -> Tensor:
    heads = x.reshape(len(x), 1, 4, -1)
    return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3).double()).tanh().flatten(1),
        lambda x: Doubled.apply(x).tanh(),  # type: ignore[no-untyped-call]
        lambda x: Once.apply(x).tanh(),  # type: ignore[no-untyped-call]
        lambda x: x.logcumsumexp(1).square(),
        attention,
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval(),
    ],
    ids=["convolution", "reverse mode only", "once in reverse", "kink at 0", "attention", "fused attention"],
)
def test_products_are_those_of_the_jacobian(function: Any) -> None:
    fused = isinstance(function, nn.Module)
    x = torch.randn(3, 2, 4).double() if fused else torch.randn(3, 8).double()
    differentiate: Any = torch.autograd.functional.jacobian
    dense = [differentiate(lambda v: function(v[None])[0], row) for row in x]
    with torch.no_grad():
        jacobian = Jacobian(function, x)
        v, u = torch.randn_like(x), torch.randn(3, *jacobian.out_shape).double()
        pushed, pulled = jacobian.apply(v), jacobian.adjoint(u)
    with torch.enable_grad(), differentiable():
        before = (x / 2).requires_grad_()
        leaf = 2 * before
        recorded = Jacobian.several([lambda v: function(2 * v), function], [before, leaf], function(leaf))
    for several, scale in zip(recorded, (2, 1), strict=True):
        torch.testing.assert_close(several.apply(v), scale * pushed)
        torch.testing.assert_close(several.adjoint(u), scale * pulled)
    for i, matrix in enumerate(dense):
        flat = matrix.reshape(u[0].numel(), -1)
        torch.testing.assert_close(pushed[i].flatten(), flat @ v[i].flatten())
        torch.testing.assert_close(pulled[i].flatten(), flat.T @ u[i].flatten())
    assert torch.backends.mha.get_fastpath_enabled()
    single = jacobian.to(torch.float32)
    torch.testing.assert_close(single.apply(v.float()), pushed.float(), rtol=1e-4, atol=1e-5)
    assert isinstance(jacobian, operators.LinearOperator)


def test_products_evaluate_the_function_once() -> None:
    calls = []
    x = torch.randn(3, 8).double()
    jacobian = Jacobian(lambda v: calls.append(v) or v.tanh(), x)  # type: ignore[func-returns-value]
    for _ in range(3):
        torch.testing.assert_close(jacobian.apply(x), x * (1 - x.tanh().square()))
        jacobian.adjoint(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "function",
    [lambda x: x.detach() * 2, lambda x: torch.tensor(x.tolist()), lambda x: (x > 0).double()],
    ids=["detached", "rebuilt", "compared"],
)
def test_what_cannot_be_differentiated_is_refused(function: Function) -> None:
    x = torch.randn(2, 3).double()
    with pytest.raises(NoRuleError, match=r"node 'f', op 'f' .*differentiated.*@fxinvert.inverse_rule"):
        answer(function, x, function(x) + 1)


# --- in a model ---------------------------------------------------------------------------------------------


@fx.wrap
def bent(x: Tensor) -> Tensor:
    return x + 0.5 * (x * x).sum(1, keepdim=True).sqrt().sin() * x.tanh()


@fx.wrap
def halted(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist())


class Whole(nn.Module):
    """Kept whole, parameters and all, by a rule set that knows its class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(self.fc(x))


def kept(cls: type[nn.Module]) -> RuleSet:
    return fxinvert.default_rules().extend({cls: invert_matrix_free})


def test_an_op_without_a_rule_is_inverted_and_shown() -> None:
    model = Model(lambda self, x: bent(self.fc(x)), fc=nn.Linear(4, 4)).double()
    x = torch.randn(6, 4).double()
    inverse = fxinvert.invert(model, x, output_target=lambda outputs, labels: labels)
    assert "bent, matrix-free" in repr(inverse)
    target = model(x + 0.1 * torch.randn_like(x)).detach()
    found = inverse(x, target)
    assert found.certificates["fc"].status is Status.NEAREST
    torch.testing.assert_close(model(found.targets["x"]), target)
    (cells,) = (column._cells for column in nodes_table(inverse.graph, fxinvert.default_rules()).columns[3:4])
    assert list(cells) == ["linear solve", "matrix-free"]
    saved = io.BytesIO()
    torch.save(inverse.graph_module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert loaded.bent_inverse.rule.kind is Kind.MATRIX_FREE


def test_the_fallback_can_be_forbidden() -> None:
    model = Model(lambda self, x: bent(self.fc(x)), fc=nn.Linear(4, 4))
    rules = fxinvert.default_rules().without_fallback()
    assert rules.lookup("no_such_op") is None
    with pytest.raises(NoRuleError, match=r"no inverse rule for op '.*bent'"):
        fxinvert.invert(model, torch.randn(2, 4), rules=rules.extend({Whole: invert_matrix_free}))


@pytest.mark.parametrize("op", ["round", "sign", "floor"])
def test_an_op_that_does_not_follow_its_input_stops_the_target(op: str) -> None:
    model = Model(
        lambda self, x: self.last(getattr(torch, op)(self.fc(x)) * 1),
        fc=nn.Linear(4, 4),
        last=nn.Linear(4, 3),
    )
    x = torch.randn(2, 4)
    inverse = fxinvert.invert(model, x)
    assert f"the target stops at {op!r}" in repr(inverse)
    assert inverse(x, torch.tensor([0, 1])).names == [op, "mul", "last"]


def test_an_output_that_does_not_follow_the_input_is_refused() -> None:
    model = Model(lambda self, x: torch.zeros_like(self.fc(x)) * 1, fc=nn.Linear(4, 4))
    with pytest.raises(NoRuleError, match=r"the way ends at node 'zeros_like'.*do not follow"):
        fxinvert.invert(model, torch.randn(2, 4))


def test_a_function_without_derivative_is_named_when_it_is_met() -> None:
    model = Model(lambda self, x: halted(self.fc(x)), fc=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with pytest.raises(NoRuleError, match=r"node 'halted', op '.*halted' has no inverse rule"):
        fxinvert.invert(model, x, output_target="regression")(x, torch.randn(2, 4))


def test_a_module_kept_whole() -> None:
    report = check_rule(Whole().double(), torch.randn(5, 4).double(), rules=kept(Whole))
    assert report.residual <= 1e-8
    model = nn.Sequential(nn.Linear(4, 4), Whole(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 4).double()
    found = fxinvert.invert(model, x, rules=kept(Whole))(x, torch.tensor([0, 1, 2, 0, 1]))
    assert found.certificates["0"].status is Status.NEAREST
    assert all(parameter.requires_grad for parameter in model.parameters())


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(bent(self.fc(x)))
        return result


def test_what_lies_before_an_op_without_a_rule_is_trained() -> None:
    teacher, x = Bent(), torch.randn(200, 4)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.fc.weight.add_(0.5 * torch.randn(4, 4))
        labels = teacher(x).argmax(1)
    plan = fxinvert.partition(fxinvert.trace(model, x[:2]), cuts=["bent"])
    result = fxinvert.post_train(model, [(x, labels)], plan=plan, sweeps=2)
    changed = dict(result.model.named_parameters())["fc.weight"]
    assert not torch.equal(changed, model.fc.weight)
    assert result.final.loss < result.baseline.loss
