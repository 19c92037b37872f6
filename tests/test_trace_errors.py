"""Trace: what cannot be followed, or has no rule, is refused with what, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import NoRuleError, RuleError, TraceError
from fxinvert.passes.capture import raised_at


@fx.wrap
def unknown_function(x: Tensor) -> Tensor:
    return x.sinh()


@dataclass
class Compared:
    scores: Tensor
    features: Tensor


# --- what cannot be traced ----------------------------------------------------------------------------------


def _relu_then_add(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = self.act(y) if hasattr(self, "act") else y.relu_()
    return z + y


def _through_a_view(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).add_(1)
    return y


def _says_nothing(self: Any, x: Tensor) -> Tensor:
    raise AssertionError


def _says_nothing_at_a_node(self: Any, x: Tensor) -> Tensor:
    torch._assert(x.size(1) == 4, "")  # type: ignore[no-untyped-call]
    return x + 1


def _one_by_one(self: Any, x: Tensor) -> Tensor:
    return torch.stack([x[i] + 1 for i in range(x.shape[0])])


def _looks_nowhere(self: Any, x: Tensor) -> Tensor:
    tokens, hidden = x[:, None, :2], torch.ones_like(x[:, :1], dtype=torch.bool)
    found: Tensor = self.attention(tokens, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0]
    return found


def _counts_parts(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.flatten().shape[0] >= 64 else x * 1.0  # three of each sample


def _wrapped_and_centred(self: Any, x: Tensor) -> Tensor:
    x = F.pad(x[:, None], (1, 1), mode="circular")  # which takes memory as it is, to begin with
    return x - x.mean(0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (fx.symbolic_trace(Model(_relu_then_add)), r"'relu_'.*in place, and .*'add'.* reads it afterwards"),
        (
            fx.symbolic_trace(Model(_relu_then_add, act=nn.ReLU(inplace=True))),
            r"'act'.*in place, and .*reads it afterwards",
        ),
        (fx.symbolic_trace(Model(_through_a_view)), r"in place, and .*reads it afterwards"),
        (Model(lambda self, x: x if x.sum() > 0 else -x), "cannot be traced symbolically.*control flow"),
        (Model(lambda self, x: F.dropout(x + 1)), "random: two runs"),
        (Model(lambda self, x: x[:, torch.randint(3, (99,))]), r"random: two runs .*; randint, at File .* draws"),
        (Model(lambda self, x: x.view(2, -1) * 1.0), "batch size of the example|across the samples"),
        (Model(lambda self, x: self.fc(x.reshape(2, 3)), fc=nn.Linear(3, 2)), "computes with the batch size"),
        (Model(lambda self, x: x - x.mean(0)), "across the samples of a batch"),
        (Model(_wrapped_and_centred), r"across the samples of a batch.*first by mean, at File"),
        (Model(lambda self, x: x.sum(0)), "batch size of the example"),
        (Model(lambda self, x: x * 2 if x.shape[0] >= 64 else x * 1.0), r"computes with the batch size .*for 64 samples"),
        (Model(_counts_parts), r"computes with the batch size .*for 22 samples"),
        (Model(_one_by_one), r"batch size of the example at File .*test_trace_errors.py\", line .* in _one_by_one; let"),
        (Model(lambda self, x: x[x[:, 0].gt(9).nonzero()[:, 0]]), r"data-dependent.*'nonzero'.*selects by values"),
        (Model(lambda self, x: x[x > x.amin()]), r"data-dependent.*'getitem'.*selects by values"),
        (Model(lambda self, x: Compared(x @ x.mT, x.argmax(1))), r"compares samples.*\(4, 4\).*of 'scores', 'features' 'scores' was taken"),
        (Model(lambda self, x: x.flatten().unique()), r"data-dependent \(for twice the samples"),
        (Model(lambda self, x: self.fc(x), fc=nn.Linear(4, 2)), r"does not run on .*'fc'.*cannot be multiplied"),
        (
            Model(lambda self, x: self.fc(_relu_then_add(self, x)), fc=nn.Linear(4, 2)),
            r"does not run on .*cannot be multiplied",
        ),
        (nn.Linear(3, 2).double(), r"; input 0 is float32 \(2, 3\), the model's parameters are float64: convert one"),
        (nn.Embedding(3, 2), r"; input 0 is float32 \(2, 3\), the model's parameters are float32$"),
        (Model(_says_nothing), r"does not run on .*\(2, 3\): AssertionError"),
        (Model(_says_nothing_at_a_node), r"does not run on .*'_assert'.*: AssertionError"),
        (Model(lambda self, x: {"maps": (), "size": 3, "hidden": None}), r"returns dict, in which 'maps' is empty; a"),
        (nn.Sequential(nn.LazyLinear(3)), "lazy modules"),
        (torch.jit.trace(nn.Linear(3, 2), torch.randn(2, 3)), "TorchScript"),  # type: ignore[no-untyped-call]
        (nn.Linear(3, 2, device="meta"), "no values .*load its weights"),
        (3, "the model is int; a torch.nn.Module"),
        (nn.Linear, "the model is the class Linear; a torch.nn.Module, made"),
        (Model(_looks_nowhere, attention=nn.MultiheadAttention(2, 2, batch_first=True)), "gives NaN for the example"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_traced_are_refused(model: nn.Module, message: str) -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(model, x)


def test_what_neither_capture_follows_is_refused_without_any_other_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = Model(lambda self, x: self.one(x) if x.sum() > 0 else -x, one=nn.Linear(3, 3))
    asked = r"data-dependent.*asks for values at .*test_trace_errors.py.*__bool__.*changes what it computes"
    with pytest.raises(TraceError, match=asked):
        fxinvert.trace(model, torch.randn(2, 3))
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.one(x) + torch.rand_like(x), r"two runs .*; rand_like, at .*test_trace_errors.py"),
        # copies of a sample leave a maximum as it is; a sample alone does not
        (lambda self, x: self.one(x / x.max()), r"across the samples.*first by max, at .*test_trace_errors.py.*other axes"),
        (
            lambda self, x: self.one(x / x.max()) if x.sum() > 0 else x,
            r"changed first by sum, at .*besides, .*torch.export cannot capture",
        ),
        (  # of one sample, the transposed is no copy
            lambda self, x: torch.cat([self.one(x.T.reshape(-1).reshape(3, -1).T)] * 2),
            r"across the samples.*first by cat, at .*test_trace_errors.py",
        ),
        (  # frames in front of samples
            lambda self, x: torch.cat([self.one(x), self.one(-x) * 2]),
            r"2 rows of a sample stand apart, row i is of sample i mod 3.*by cat, at .*test_trace_errors.py.*torch.stack",
        ),
        (
            lambda self, x: torch.stack([r if torch.ones(1) > 0 else -r for r in x]) * self.one(x)[int(torch.zeros(1)) :],
            r"with more samples .*test_trace_errors.py.*loop over samples",
        ),
        (
            lambda self, x: self.one(x * (type(x) is not Tensor)) if x.shape[1] == 3 else x,
            r"does not reproduce.*first in what 'one' gives",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(forward: Any, message: str) -> None:
    x = torch.tensor([[1.0, -1.0, 0.5], [2.5, 0.0, 1.5], [0.5, 1.5, 1.0]])
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(Model(forward, one=nn.Linear(3, 3)), x)


class Masked(nn.Module):
    """Shuffles by noise that it draws, unless it is given some, deep inside; and asks for a length that is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, noise: Tensor | None = None, length: int | None = None) -> Tensor:
        return self._shuffled(self.fc(x), noise, length)

    def _shuffled(self, x: Tensor, noise: Tensor | None, length: int | None) -> Tensor:
        if length is None:
            length = int((x > 9).sum()) + 2
        x = x[:, :length]
        if noise is None:
            noise = torch.rand_like(x)
        found: Tensor = x.gather(1, noise.argsort(1))
        return found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 3}, r"rand_like, at .*test_trace_errors.py.*give forward.. 'noise', without which"),
        (
            {"noise": torch.rand(4, 2)},
            r"asks for values at .*__int__.*let it go on with the tensor.*give forward.. 'length'",
        ),
    ],
)
def test_inputs_that_would_spare_a_model_what_stops_it_are_named(given: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(Masked(), {"x": torch.randn(4, 3), **given})
    fxinvert.trace(Masked(), {"x": torch.randn(4, 3), "noise": torch.rand(4, 3), "length": 3})


class Pair(nn.Module):
    def forward(self, image: Tensor, token: Tensor) -> Tensor:
        return image + token


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 3), r"needs an input 'token'"),
        ((torch.randn(2, 3),) * 3, r"takes 2 inputs; 3 were given"),
        (
            (torch.randn(2, 3), torch.randn(2, 4)),
            r"does not run on the example inputs: node 'add'.*size of tensor a",
        ),
        ((torch.randn(0, 3), torch.randn(0, 3)), "holds no samples"),
        ((torch.randn(2, 3).numpy(),) * 2, "no tensor; torch.as_tensor"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    for model in (Pair(), fx.symbolic_trace(Pair())):
        with pytest.raises(TraceError, match=message):
            fxinvert.trace(model, inputs)


def test_what_is_given_instead_of_a_tensor_is_named_not_printed() -> None:
    inverse = fxinvert.invert(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(fxinvert.FxInvertError, match=r"takes \(tensor\), .*; it was given \(ndarray\)$"):
        inverse(torch.randn(2, 3).numpy(), torch.zeros(2).long())


def test_an_input_elsewhere_than_the_model_is_refused() -> None:
    with pytest.raises(TraceError, match=r"example input 0 is on device meta, the model on cpu"):
        fxinvert.trace(nn.Linear(3, 2), torch.randn(2, 3, device="meta"))


class MutatesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2


def test_a_whole_module_that_changes_its_input_is_refused() -> None:
    rules = fxinvert.default_rules().extend({MutatesItsInput: lambda op, target: target})
    with pytest.raises(TraceError, match=r"'1'.* changes its input in place"):
        fxinvert.trace(nn.Sequential(nn.ReLU(), MutatesItsInput()), torch.randn(2, 3), rules=rules)


def test_a_condition_that_samples_decide_together_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda v: self.a(v), lambda v: self.b(v), (x,))

    model = Model(forward, a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    with pytest.raises(
        TraceError, match=rf"node 'cond'.*{Path(__file__).name}.*for all samples.*torch\.where"
    ):
        fxinvert.trace(model, torch.randn(2, 3))


def test_an_op_on_sub_graphs_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        go_on: Any = torch._higher_order_ops.while_loop
        return go_on(lambda i, v: i < 3, lambda i, v: (i + 1, self.a(v)), (torch.tensor(0), x))[1]

    with pytest.raises(TraceError, match=r"node 'while_loop'.*sub-graphs.*torch\.where"):
        fxinvert.trace(Model(forward, a=nn.Linear(3, 3)), torch.randn(2, 3))


class Untracked(nn.Module):
    """Computes with a tensor that is none of its parameters, and changes its input; passes for one of torch's own."""

    __module__ = "torch.nn.modules.untracked"
    offset = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + self.offset
        x.relu_()
        return shifted + x


def test_a_module_that_is_not_followed_cannot_change_its_input_unnoticed() -> None:
    with pytest.raises(TraceError, match=r"'1', call_module 1.* changes its input in place"):
        fxinvert.trace(nn.Sequential(nn.Tanh(), Untracked()), torch.randn(2, 3))


# --- ops without a rule -------------------------------------------------------------------------------------


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


@fx.wrap
def clamped(x: Tensor) -> Tensor:
    result: Tensor = Clamped.apply(x)  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("unknown_function", Model(lambda self, x: unknown_function(self.fc(x)), fc=nn.Linear(3, 3))),
        ("clamped", Model(lambda self, x: clamped(self.fc(x)), fc=nn.Linear(3, 3))),
    ],
)
def test_an_unknown_function_stays_and_has_no_rule(name: str, model: nn.Module) -> None:
    x = torch.randn(2, 3)
    graph = fxinvert.trace(model, x)
    assert torch.equal(graph(x), model(x))
    (node,) = [n for n in graph.graph.nodes if n.meta.get("path") == name]
    assert node.target is globals()[name]
    place = rf"node '{name}', call_function {name}, at File .*test_trace_errors.py., line \d+"
    with pytest.raises(NoRuleError, match=rf"no inverse rule for op '.*{name}' \({place}.*inverse_rule"):
        fxinvert.invert(graph, rules=fxinvert.default_rules().without_fallback())


def test_an_unknown_function_can_be_given_a_rule() -> None:
    x = torch.rand(2, 3)
    model = Model(lambda self, x: unknown_function(x))
    rules = fxinvert.default_rules().extend({unknown_function: lambda op, target: target.asinh()})
    inverse = fxinvert.invert(model, x, output_target="regression", rules=rules)
    torch.testing.assert_close(inverse(x, torch.ones(2, 3).sinh()).targets["x"], torch.ones(2, 3))


def test_a_rule_that_raises_or_returns_nonsense_is_named() -> None:
    x = torch.rand(2, 3)
    model = Model(lambda self, x: unknown_function(x))
    nonsense: list[tuple[Any, str]] = [
        (
            lambda op, target: target[:, :1],
            r"unknown_function.*returned shape \(2, 1\); its input has \(2, 3\)",
        ),
        (lambda op, target: target.double(), r"returned dtype torch.float64; its input has torch.float32"),
        (lambda op, target: None, r"returned NoneType; a tensor or an Inverse is needed"),
        (lambda op, target: 1 / 0, r"raised ZeroDivisionError: division by zero"),
    ]
    for rule, message in nonsense:
        rules = fxinvert.default_rules().extend({unknown_function: rule})
        with pytest.raises(RuleError, match=message):
            fxinvert.invert(model, x, output_target="regression", rules=rules)(x, x)


def test_a_number_that_two_overloads_read_differently_keeps_the_users_call() -> None:
    class Variance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.var(1)  # to ATen's first overload, 1 is a flag

    graph = fxinvert.trace(Variance(), torch.randn(4, 6))
    x = torch.randn(3, 6)
    assert torch.equal(graph(x), x.var(1))


def test_memory_that_runs_out_on_more_samples_is_not_blamed_on_the_model() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise RuntimeError(
                    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"
                )
            return x.relu()

    rules = fxinvert.default_rules().extend({Large: lambda op, target: target})
    with pytest.raises(TraceError, match=r"memory ran out.*give fewer example inputs"):
        fxinvert.trace(nn.Sequential(Large()), torch.randn(2, 3), rules=rules)


def test_lines_of_code_made_by_eval_are_not_the_users() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        eval("(lambda: 1 / 0)()")
    assert Path(__file__).name in raised_at(caught.value)
