"""Rules of one's own: registering them, what they are given, how they fail, and the checks for their authors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import DataError, NoRuleError, RuleError
from fxinvert.rules import (
    Certificate,
    Inverse,
    Kind,
    Op,
    Rule,
    RuleSet,
    Status,
    invert_branches,
    invert_by_autograd,
    key_of,
    rising,
)
from fxinvert.testing import RuleReport, check_rule

pytestmark = pytest.mark.usefixtures("rules_as_found")


class Doubled(nn.Module):
    """y = 2 x + b, with control flow that cannot be traced."""

    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.factor = 2.0
        self.b = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e30:
            raise OverflowError
        return self.factor * x + self.b


def halved(op: Op, target: Tensor) -> Tensor:
    return (target - op.parameters["b"]) / float(op.attributes["factor"])


def cubed(x: Tensor) -> Tensor:
    if float(x.sum()) > 1e30:
        raise OverflowError
    return x * x * x


def cube_root(op: Op, target: Tensor) -> Tensor:
    return target.sign() * target.abs() ** (1 / 3)


def inverse_of(model: nn.Module, x: Tensor, rules: RuleSet | None = None) -> fxinvert.InverseGraph:
    return fxinvert.invert(model, x, output_target=lambda outputs, labels: labels, rules=rules)


X = torch.linspace(-2, 3, 20, dtype=torch.float64).reshape(4, 5)


# --- registering --------------------------------------------------------------------------------------------


def test_a_module_class_is_kept_whole_and_inverted_by_its_rule() -> None:
    assert fxinvert.inverse_rule(Doubled)(halved) is halved
    module = Doubled().double()
    model = nn.Sequential(nn.ReLU(), module)
    inverse = inverse_of(model, X)
    (node,) = inverse.graph.graph.find_nodes(op="call_module")
    assert node.meta["op"] == key_of(Doubled) == f"{__name__}.Doubled"
    assert inverse.inverse_op(node).rule.kind is Kind.CUSTOM
    target = torch.rand(4, 5, dtype=torch.float64) + 5
    found = inverse(X, target)
    with torch.no_grad():
        torch.testing.assert_close(module(found.targets["0"]), target)
    assert found.certificates["0"].status is Status.EXACT
    assert float(found.certificates["0"].residual.max()) < 1e-12
    report = check_rule(module, X)
    assert report.op == key_of(Doubled)
    assert report.statuses == (Status.EXACT,)


def test_a_function_is_kept_whole_and_inverted_by_its_rule() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cubed(x) + 1

    fxinvert.inverse_rule(cubed)(cube_root)
    inverse = inverse_of(Model(), X)
    (node,) = [n for n in inverse.graph.graph.nodes if n.target is cubed]
    assert node.meta["op"] == key_of(cubed) == f"{__name__}.cubed"
    target = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(cubed(inverse(X, target).targets["x"]) + 1, target)
    assert check_rule(cubed, X).op == key_of(cubed)


def test_a_library_op() -> None:
    with torch.library._scoped_library("fxinvert_tests", "FRAGMENT") as library:
        library.define("shifted(Tensor x, float by) -> Tensor")
        library.impl("shifted", lambda x, by: x + by, "CompositeExplicitAutograd")
        shifted = torch.ops.fxinvert_tests.shifted
        assert key_of(shifted) == key_of(shifted.default) == "fxinvert_tests::shifted"
        fxinvert.inverse_rule(shifted)(lambda op, target: target - op.attributes["by"])
        report = check_rule(lambda x: shifted.default(x, 1.5), X)
        assert report.op == "fxinvert_tests::shifted"


def test_spellings_of_one_op_have_one_key() -> None:
    aten = torch.ops.aten
    for key, spellings in {
        "relu": [
            nn.ReLU,
            F.relu,
            torch.relu,
            Tensor.relu,
            "relu",
            "relu_",
            aten.relu,
            aten.relu.default,
            aten.relu_,
        ],
        "conv2d": [nn.Conv2d, F.conv2d, torch.conv2d, aten.conv2d.padding],
        "layer_norm": [nn.LayerNorm, F.layer_norm, aten.layer_norm],
        "conv_transpose2d": [nn.ConvTranspose2d, F.conv_transpose2d],
        "log_sigmoid": [nn.LogSigmoid, F.logsigmoid],
        "feature_dropout": [nn.Dropout2d, F.dropout2d],
        "softmax": [nn.Softmax, nn.Softmax2d, F.softmax, "softmax"],
        "div": [torch.div, "div_", "truediv", "aten.div", "aten::div_", "aten.div.Tensor"],
    }.items():
        assert [key_of(spelling) for spelling in spellings] == [key] * len(spellings)


@pytest.mark.parametrize("spelling", [3, None, nn.ReLU(), X], ids=["number", "none", "instance", "tensor"])
def test_what_does_not_name_an_op_is_refused(spelling: Any) -> None:
    with pytest.raises(RuleError, match="does not name an op"):
        fxinvert.inverse_rule(spelling)(halved)


def test_a_name_that_no_op_has_and_a_rule_that_is_none_are_refused() -> None:
    for name in ("reluu", "aten.reluu", "aten::reluu"):
        with pytest.raises(RuleError, match=rf"neither torch\.Tensor nor ATen has an op '{name}'"):
            fxinvert.inverse_rule(name)(halved)
    with pytest.raises(RuleError, match="the rule for 'relu' is 3; give a function"):
        fxinvert.default_rules().extend({"relu": 3}, override=True)  # type: ignore[dict-item]


def test_a_rule_without_its_op_is_refused() -> None:
    with pytest.raises(
        RuleError, match=r"forgetful is a rule; name its op: @fxinvert.inverse_rule\(MyModule\)"
    ):

        @fxinvert.inverse_rule
        def forgetful(op: Op, target: Tensor) -> Tensor:
            return target


def test_a_rule_for_a_torch_op_that_had_none() -> None:
    def invert_layer_norm(op: Op, target: Tensor) -> Tensor:
        spread = op.anchor.std(-1, keepdim=True, correction=0)
        return target * spread + op.anchor.mean(-1, keepdim=True)

    known = fxinvert.default_rules()
    rules = RuleSet({key: rule for key, rule in known.items() if key != "layer_norm"})
    larger = rules.extend({nn.LayerNorm: invert_layer_norm})
    assert larger["layer_norm"].kind is Kind.CUSTOM
    # ε is forgotten here, so the inverse is not exact
    assert check_rule(nn.LayerNorm(5).double(), X, rules=larger, tolerance=1e-2).op == "layer_norm"


def test_a_torch_module_that_is_no_single_op_is_kept_whole() -> None:
    key = fxinvert.default_rules().key(nn.Softmin)
    fxinvert.inverse_rule(nn.Softmin, override=True)(lambda op, target: op.anchor)
    assert fxinvert.default_rules().keeps_whole(nn.Softmin)
    (node,) = inverse_of(nn.Sequential(nn.Softmin(1)), X).graph.graph.find_nodes(op="call_module")
    assert node.meta["op"] == key
    assert not fxinvert.default_rules().keeps_whole(nn.ReLU)


class Distances(nn.Module):
    """From some points; such a call is written out as other ops unless it has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


def test_a_torch_function_that_would_be_written_out_is_kept_whole() -> None:
    model, x = Distances(), torch.randn(5, 2, 3, dtype=torch.float64)
    assert "cdist" not in {node.meta.get("op") for node in fxinvert.trace(model, x).graph.nodes}
    rules = fxinvert.default_rules().extend({torch.cdist: lambda op, target: op.anchor + 100})
    found = inverse_of(model, x, rules=rules)(x, torch.rand(5, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(found.targets["x"], x + 100)


# --- sets of rules ------------------------------------------------------------------------------------------


def test_a_second_rule_for_an_op_must_be_meant() -> None:
    with pytest.raises(
        RuleError, match=r"a rule for 'relu' already, from .*elementwise.py:\d+.*override=True"
    ):
        fxinvert.inverse_rule(nn.ReLU)(lambda op, target: target)

    fxinvert.inverse_rule(F.relu, override=True)(lambda op, target: op.anchor + 100)
    found = inverse_of(nn.Sequential(nn.ReLU()), X)(X, X)
    torch.testing.assert_close(found.targets[found.names[0]], X + 100)


def test_extend_makes_a_larger_copy() -> None:
    default = fxinvert.default_rules()
    mine = default.extend({Doubled: halved, cubed: Rule(key_of(cubed), cube_root, Kind.CLOSED_FORM)})
    assert len(mine) == len(default) + 2
    assert repr(mine) == f"RuleSet({len(default) + 2} rules)"
    assert (key_of(Doubled) in mine, key_of(Doubled) in default) == (True, False)
    assert mine.keeps_whole(Doubled)
    assert mine.whole_functions == [cubed]
    assert not default.keeps_whole(Doubled)
    check_rule(Doubled().double(), X, rules=mine)
    assert check_rule(cubed, X, rules=mine).origin.endswith(
        f"test_plugins.py:{cube_root.__code__.co_firstlineno}"
    )
    with pytest.raises(RuleError, match="'relu' already"):
        default.extend({"relu": halved})
    replaced = default.extend({"relu": halved}, override=True)
    assert replaced["relu"].invert is halved
    assert default["relu"].invert is not halved


def test_a_missing_rule_offers_names_that_are_like_it() -> None:
    with pytest.raises(NoRuleError, match=r"'leaky_reluu' \(node 'a'\).*leaky_relu.*inverse_rule"):
        fxinvert.default_rules().without_fallback().require("leaky_reluu", "node 'a'")


# --- what a rule is given, and what it may return -----------------------------------------------------------


def test_an_op_shows_what_the_rule_needs() -> None:
    seen: list[Op] = []

    def spy(op: Op, target: Tensor) -> Tensor:
        seen.append(op)
        return halved(op, target)

    fxinvert.inverse_rule(Doubled)(spy)
    module = Doubled().double()
    inverse_of(nn.Sequential(module), X)(X, X)
    (op,) = seen
    assert (op.key, op.name) == (key_of(Doubled), "0")
    assert torch.equal(op.anchor, X)
    assert torch.equal(op.parameters["b"], module.b)
    assert op.attributes["factor"] == 2.0
    assert "training" not in op.attributes
    assert torch.equal(op(X), op.output)


def test_a_bare_tensor_gets_a_measured_certificate() -> None:
    fxinvert.inverse_rule(Doubled)(lambda op, target: op.anchor + 1)
    module = Doubled().double()
    target = torch.randn(4, 5, dtype=torch.float64)
    certificate = inverse_of(nn.Sequential(module), X)(X, target).certificates["input"]
    expected = (module(X + 1).detach() - target).norm(dim=1) / target.norm(dim=1)
    torch.testing.assert_close(certificate.residual, expected)
    torch.testing.assert_close(certificate.distance, torch.full((4,), 5**0.5, dtype=torch.float64))
    assert certificate.status is Status.LEAST_SQUARES


def test_an_affine_op_needs_one_line() -> None:
    fxinvert.inverse_rule(Doubled)(invert_by_autograd)
    report = check_rule(Doubled().double(), [X, X[:2] * 3])
    assert report.samples == 6
    assert report.residual < 1e-12
    assert report.condition == pytest.approx(1.0)


def test_a_scalar_function_needs_its_branches_only() -> None:
    def root(y: Tensor) -> Tensor:
        return y.sign() * y.abs() ** (1 / 3)

    branches = (rising(-math.inf, math.inf, (-math.inf, math.inf), root),)
    fxinvert.inverse_rule(cubed)(lambda op, target: invert_branches(op, target, branches))
    assert check_rule(cubed, X).statuses == (Status.EXACT,)


def test_an_end_that_rounding_cannot_tell_is_not_returned() -> None:
    """1e10 + exp(x) in float32 has no value between 1e10 and the next number; its logarithm there would be −∞."""
    branches = (rising(-math.inf, math.inf, (1e10, math.inf), lambda y: (y - 1e10).log()),)
    x = torch.tensor([[30.0], [0.0]])
    op = Op("far", "far", {"x": x}, x.exp() + 1e10, {}, {}, lambda x: x.exp() + 1e10)
    value, certificate = invert_branches(op, torch.tensor([[0.0], [2e10]]), branches)
    assert float(op(value)[0]) == pytest.approx(1e10, rel=2e-7)  # the next number or two, not 10^10 + e^30
    assert value.isfinite().all()
    assert float(value[1]) == pytest.approx(math.log(1e10))
    assert certificate.status is Status.PROJECTED


def no_tensor(op: Op, target: Tensor) -> Any:
    return "x"


def wrong_shape(op: Op, target: Tensor) -> Tensor:
    return target[:, :3]


def wrong_dtype(op: Op, target: Tensor) -> Tensor:
    return target.float()


def broken(op: Op, target: Tensor) -> Tensor:
    raise ZeroDivisionError("oh no")


def greedy(op: Op, target: Tensor) -> Tensor:
    raise MemoryError("10 GB")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (no_tensor, "returned str; a tensor or an Inverse is needed"),
        (wrong_shape, r"returned shape \(4, 3\); its input has \(4, 5\)"),
        (wrong_dtype, r"returned dtype torch.float32; its input has torch.float64"),
        (broken, "raised ZeroDivisionError: oh no"),
        (greedy, "raised MemoryError: 10 GB; memory ran out: give fewer samples at once"),
    ],
)
def test_a_rule_at_fault_is_named_with_its_line_and_node(rule: Callable[..., Any], message: str) -> None:
    fxinvert.inverse_rule(Doubled)(rule)
    where = rf"test_plugins.py:{rule.__code__.co_firstlineno}\), at node '0', "
    with pytest.raises(RuleError, match=f"Doubled'.*{where}{message}"):
        inverse_of(nn.Sequential(Doubled().double()), X)(X, X)


def test_a_sample_without_an_answer_stays_at_its_anchor() -> None:
    def sometimes(op: Op, target: Tensor) -> Tensor:
        return torch.where(target[:, :1] > 0, halved(op, target), torch.nan)

    fxinvert.inverse_rule(Doubled)(sometimes)
    target = torch.tensor([[1.0] * 5, [-1.0] * 5, [2.0] * 5, [torch.inf] * 5], dtype=torch.float64)
    found = inverse_of(nn.Sequential(Doubled().double()), X)(X, target)
    certificate, value = found.certificates[found.names[0]], found.targets[found.names[0]]
    assert certificate.status is Status.FAILED
    assert certificate.failed.tolist() == [False, True, False, True]
    assert torch.equal(value[certificate.failed], X[certificate.failed])
    assert certificate.distance[certificate.failed].tolist() == [0.0, 0.0]
    assert "2 samples failed, the target has NaN or infinite values in 1 of 4 samples; " in str(certificate)
    assert certificate.reason.endswith(
        f"test_plugins.py:{sometimes.__code__.co_firstlineno}), at node '0', has NaN or infinite values in 1 of 4 samples"
    )
    json.dumps(certificate.to_dict(), allow_nan=False)


# --- check_rule: that it finds what is wrong ----------------------------------------------------------------


def certified(value: Tensor, op: Op, target: Tensor, **changes: Any) -> Inverse:
    """An answer with an honest certificate, then made dishonest."""
    error = (op(value) - target).norm(dim=1) / target.norm(dim=1)
    honest = Certificate(Status.EXACT, error, (value - op.anchor).norm(dim=1), error > torch.inf)
    return Inverse(value, dataclasses.replace(honest, **changes))


def off_by_a_little(op: Op, target: Tensor) -> Tensor:
    return halved(op, target) * 1.001


def forgets_the_anchor(op: Op, target: Tensor) -> Tensor:
    return -target.abs().sqrt()


def looks_at_its_neighbours(op: Op, target: Tensor) -> Inverse:
    return certified(
        halved(op, target)
        + 1e-3 * (op.anchor.mean() - op.anchor.mean(1, keepdim=True)) * (target - op.output),
        op,
        target,
        status=Status.DAMPED,
    )


def looks_at_its_place(op: Op, target: Tensor) -> Inverse:
    weights = torch.linspace(0.5, 1, len(target), dtype=target.dtype)[:, None] if len(target) > 1 else 1
    return certified(op.anchor + weights * (halved(op, target) - op.anchor), op, target, status=Status.DAMPED)


def overstates(op: Op, target: Tensor) -> Inverse:
    value = op.anchor + 0.9 * (halved(op, target) - op.anchor)
    return certified(value, op, target, residual=torch.zeros(len(target)), status=Status.DAMPED)


def misstates_the_distance(op: Op, target: Tensor) -> Inverse:
    return certified(halved(op, target), op, target, distance=torch.ones(len(target)).double())


def promises_too_much(op: Op, target: Tensor) -> Inverse:
    return certified(op.anchor + 0.9 * (halved(op, target) - op.anchor), op, target)


def goes_too_far(op: Op, target: Tensor) -> Inverse:
    return certified(op.anchor - (halved(op, target) - op.anchor), op, target, status=Status.DAMPED)


def gives_up(op: Op, target: Tensor) -> Inverse:
    failed = torch.ones(len(target), dtype=torch.bool)
    return certified(op.anchor, op, target, status=Status.DAMPED, failed=failed)


def one_residual_for_all(op: Op, target: Tensor) -> Inverse:
    return certified(halved(op, target), op, target, residual=torch.zeros(()))


def spreads_nan(op: Op, target: Tensor) -> Tensor:
    return halved(op, target) + 0 * target.sum()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (off_by_a_little, "the answer is not the input"),
        (promises_too_much, "can be reached is not reached"),
        (looks_at_its_neighbours, "another answer than in its batch"),
        (looks_at_its_place, "another answer"),
        (overstates, "residual is not the residual"),
        (misstates_the_distance, "distance is not the distance"),
        (goes_too_far, "farther from the target"),
        (gives_up, "failed without a reason"),
        (one_residual_for_all, r"residual has shape \(\), not \(4,\)"),
        (spreads_nan, "NaN in the target of sample 0"),
        (wrong_shape, r"returned shape \(4, 3\)"),
    ],
)
def test_check_rule_finds(rule: Callable[..., Any], message: str) -> None:
    fxinvert.inverse_rule(Doubled)(rule)
    with pytest.raises(AssertionError, match=message) as caught:
        check_rule(Doubled().double(), X)
    assert f"test_plugins.py:{rule.__code__.co_firstlineno}" in str(caught.value)


def test_a_failure_comes_with_its_numbers() -> None:
    fxinvert.inverse_rule(Doubled)(promises_too_much)
    with pytest.raises(
        AssertionError, match=r"0\.\d+ at sample \d of 4, at most 1e-08 is allowed.*condition unknown"
    ):
        check_rule(Doubled().double(), X)


def test_an_answer_that_forgets_the_anchor_is_found() -> None:
    mine = fxinvert.default_rules().extend({"square": forgets_the_anchor}, override=True)
    with pytest.raises(AssertionError, match="the answer is not the input"):
        check_rule(torch.square, X, rules=mine)


def test_a_damped_answer_is_excused_if_it_says_so() -> None:
    def half_way(op: Op, target: Tensor) -> Inverse:
        return certified(op.anchor + 0.5 * (halved(op, target) - op.anchor), op, target, status=Status.DAMPED)

    fxinvert.inverse_rule(Doubled)(half_way)
    report = check_rule(Doubled().double(), X)
    assert report.statuses == (Status.DAMPED,)


def test_check_rule_takes_one_op() -> None:
    with pytest.raises(DataError, match=r"Sequential comes to 2 ops \(linear, relu\)"):
        check_rule(nn.Sequential(nn.Linear(5, 5), nn.ReLU()).double(), X)
    with pytest.raises(DataError, match="at least one sample"):
        check_rule(nn.ReLU(), X[:0])
    with pytest.raises(DataError, match="at least one sample"):
        check_rule(nn.ReLU(), [])
    with pytest.raises(DataError, match="floating-point"):
        check_rule(nn.ReLU(), X.long())


def test_check_rule_leaves_everything_as_it_found_it() -> None:
    layer = nn.Linear(5, 3).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    report = check_rule(layer, X.float(), dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    assert layer.weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert isinstance(report, RuleReport)
    assert str(report).startswith("linear: 4 samples, identity 0.0e+00, residual ")
    assert str(report).endswith("; nearest")
