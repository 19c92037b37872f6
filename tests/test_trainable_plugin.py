"""A user's whole module with parameters is partitioned, trained in closed form and exported like ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxinvert
from fxinvert import RuleError
from fxinvert.rules import Op, Trainable, invert_by_autograd


class Mix(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(n) + 0.1 * torch.randn(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class MixWeights(Trainable):
    def features(self, op: Op) -> Tensor:
        return op.anchor[None]

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return value[None]

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        assert list(parameters) == ["matrix"]
        return {"matrix": matrix[0].T}


@pytest.fixture
def mix_rule(rules_as_found: None) -> None:
    fxinvert.inverse_rule(Mix, trainable=MixWeights())(invert_by_autograd)


@pytest.mark.usefixtures("mix_rule")
def test_a_whole_module_is_a_segment_of_its_own() -> None:
    model = nn.Sequential(Mix(4), nn.Tanh(), nn.Linear(4, 2))
    plan = fxinvert.partition(fxinvert.trace(model, torch.randn(2, 4)))
    assert [segment.parameters for segment in plan.segments] == [("0.matrix",), ("2.weight", "2.bias")]
    assert plan.segments[0].parameter_count == 16


@pytest.mark.usefixtures("mix_rule")
def test_its_parameters_are_solved_for() -> None:
    x = torch.randn(200, 4, dtype=torch.float64)
    wanted = torch.randn(4, 4, dtype=torch.float64)
    model = nn.Sequential(Mix(4)).double()
    result = fxinvert.post_train(model, [(x, x @ wanted)], damping=0.0, sweeps=1)
    assert result.changed == ("0.matrix",)
    assert torch.allclose(result.model.get_parameter("0.matrix"), wanted)


@pytest.mark.usefixtures("mix_rule")
def test_what_it_says_of_its_parameters_is_checked() -> None:
    layer, x = Mix(4).double(), torch.randn(8, 4, dtype=torch.float64)
    before = layer.matrix.detach().clone()
    fxinvert.testing.check_rule(layer, x)
    assert torch.equal(layer.matrix, before)


class Wrong(MixWeights):
    """One of the three is wrong."""

    def __init__(self, what: str, made: Callable[..., Any]) -> None:
        setattr(self, what, made)


@pytest.mark.parametrize(
    ("what", "made", "message"),
    [
        (
            "changes",
            lambda parameters, matrix: {"matrix": matrix[0]},
            "does not change the output as its trainable says",
        ),
        ("features", lambda op: op.anchor.flip(0)[None], "does not change the output as its trainable says"),
        (
            "changes",
            lambda parameters, matrix: {"weight": matrix[0].T},
            r"gave weight \(4, 4\); .*: matrix \(4, 4\)",
        ),
        ("changes", lambda parameters, matrix: {"matrix": matrix}, r"gave matrix \(1, 4, 4\)"),
        ("changes", lambda parameters, matrix: None, "gave no mapping, but NoneType"),
        (
            "features",
            lambda op: op.anchor,
            r"features\(\) gave \(\d, 4\); a tensor \(groups, rows, columns\)",
        ),
        ("features", lambda op: op.anchor[None, 1:], r"features\(\) gave .* and outputs\(\) .* equally many"),
        (
            "outputs",
            lambda op, value: value.no_such,
            "Wrong, the trainable of .*Mix.*outputs.* raised AttributeError",
        ),
    ],
)
@pytest.mark.usefixtures("rules_as_found")
def test_a_trainable_that_is_wrong_is_refused(what: str, made: Callable[..., Any], message: str) -> None:
    fxinvert.inverse_rule(Mix, trainable=Wrong(what, made))(invert_by_autograd)
    with pytest.raises(AssertionError, match=message):
        fxinvert.testing.check_rule(Mix(4), torch.randn(8, 4))
    if "trainable says" not in message:  # what is not of the right form is no use in training either
        with pytest.raises(RuleError, match=message):
            fxinvert.post_train(
                nn.Sequential(Mix(4), nn.Tanh(), Mix(4)), (torch.randn(60, 4), torch.randn(60, 4))
            )


@pytest.mark.usefixtures("rules_as_found")
def test_a_class_is_no_trainable() -> None:
    with pytest.raises(RuleError, match="the class MixWeights; give an object"):
        fxinvert.inverse_rule(Mix, trainable=MixWeights)  # type: ignore[arg-type]
