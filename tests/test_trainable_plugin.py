"""A user's whole module with parameters is partitioned, trained in closed form and exported like ours."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import fxinvert
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
