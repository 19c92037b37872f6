"""Partition: cuts from dominators, balanced segments, ties kept together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxinvert
from fxinvert import CutError, Plan
from fxinvert.models import digits_cnn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.inner(x))
        result: Tensor = self.last(x)
        return result


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x))
        result: Tensor = self.c(x)
        return result


@pytest.fixture
def cnn() -> fx.GraphModule:
    return fxinvert.trace(digits_cnn(), torch.rand(2, 1, 8, 8))


def names(plan: Plan) -> list[str]:
    return [segment.name for segment in plan.segments]


def test_by_default_one_segment_per_trained_op(cnn: fx.GraphModule) -> None:
    plan = fxinvert.partition(cnn)
    assert names(plan) == ["conv1", "conv2", "fc1", "fc2"]
    assert [segment.trained for segment in plan.segments] == [("conv1",), ("conv2",), ("fc1",), ("fc2",)]
    assert plan.segments[1].parameters == ("conv2.weight", "conv2.bias")
    assert plan.segments[1].parameter_count == 12 * 8 * 9 + 12
    assert (plan.segments[1].in_shape, plan.segments[1].out_shape) == ((8, 6, 6), (192,))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_segments_cover_every_op_once_and_meet_at_cuts(cnn: fx.GraphModule, count: int) -> None:
    plan = fxinvert.partition(cnn, segments=count)
    assert len(plan.segments) == count
    ops = [n.meta["path"] for n in cnn.graph.nodes if n.meta.get("active") and n.op != "placeholder"]
    assert [path for segment in plan.segments for path in segment.nodes] == ops
    for before, after in zip(plan.segments, plan.segments[1:], strict=False):
        assert before.exit == after.entry
    assert sum(segment.cost for segment in plan.segments) == sum(
        s.cost for s in fxinvert.partition(cnn).segments
    )


def test_balance_no_other_cut_makes_the_dearest_segment_cheaper(cnn: fx.GraphModule) -> None:
    costs = [segment.cost for segment in fxinvert.partition(cnn).segments]
    dearest = max(segment.cost for segment in fxinvert.partition(cnn, segments=2).segments)
    assert dearest == min(max(sum(costs[:i]), sum(costs[i:])) for i in range(1, len(costs)))


def test_cuts_by_name(cnn: fx.GraphModule) -> None:
    plan = fxinvert.partition(cnn, cuts=["relu2", "conv1"])
    assert [segment.exit for segment in plan.segments] == ["conv1", "relu2", "fc2"]


def test_a_module_is_cut_after_its_last_op() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    plan = fxinvert.partition(fxinvert.trace(model, torch.rand(2, 4)), cuts=["0"])
    assert plan.segments[0].exit == "0.1"


def test_inside_a_residual_block_there_is_no_cut() -> None:
    graph = fxinvert.trace(Residual(), torch.rand(2, 4))
    plan = fxinvert.partition(graph)
    assert [segment.trained for segment in plan.segments] == [("first",), ("inner",), ("last",)]
    with pytest.raises(
        CutError,
        match=r"'inner' is not a cut: the edge 'relu' → 'add' leads past it.*nearest cut is 'relu' before it or 'add' after it",
    ):
        fxinvert.partition(graph, cuts=["inner"])


def test_tied_parameters_stay_in_one_segment() -> None:
    graph = fxinvert.trace(Tied(), torch.rand(2, 4))
    plan = fxinvert.partition(graph)
    assert [segment.trained for segment in plan.segments] == [("a", "b", "c")]
    with pytest.raises(CutError, match=r"'a.weight' is used on both sides"):
        fxinvert.partition(graph, cuts=["b"])


def test_a_table_shows_the_plan_before_any_work(cnn: fx.GraphModule) -> None:
    text = str(fxinvert.partition(cnn, segments=2))
    assert "images → flatten" in text
    assert "1×8×8 → 192" in text
    assert "7,462" in text


def test_a_plan_is_json_ready(cnn: fx.GraphModule) -> None:
    assert fxinvert.partition(cnn).to_dict()["segments"][0]["name"] == "conv1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuts": ["rellu1"]}, "no module or node 'rellu1'.*did you mean relu1"),
        ({"cuts": ["fc2"]}, "'fc2' is the model's output"),
        ({"segments": 5}, "4 segments at most; 5 were asked for"),
        ({"segments": 0}, "0 were asked for, and 1 is the least"),
        ({"segments": "2"}, "segments='2' is str; a whole number"),
        ({"segments": 2, "cuts": ["conv1"]}, "not both"),
        ({"cuts": [1]}, r"cuts=\[1\]; a name, or a list of names"),
    ],
)
def test_cuts_that_are_none_are_refused(
    cnn: fx.GraphModule, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(CutError, match=message):
        fxinvert.partition(cnn, **arguments)  # type: ignore[arg-type]


def test_what_is_not_traced_is_refused() -> None:
    with pytest.raises(CutError, match=r"Linear is not traced; .* from fxinvert.trace"):
        fxinvert.partition(nn.Linear(3, 2))  # type: ignore[arg-type]


def test_an_op_that_gives_several_tensors_does_not_stop_the_plan() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.enter(x).chunk(2, dim=1)
            result: Tensor = self.leave(first * second)
            return result

    plan = fxinvert.partition(fxinvert.trace(Halves(), torch.rand(2, 4)))
    assert names(plan) == ["enter", "leave"]


def test_a_model_of_one_block_has_no_cut() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + self.inner(x)
            return result

    with pytest.raises(CutError, match=r"the edge 'x' → 'add' leads past it; this model has none"):
        fxinvert.partition(fxinvert.trace(Block(), torch.rand(2, 4)), cuts=["inner"])


def test_a_cut_before_what_cannot_be_differentiated_is_refused_with_that_op() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.leave(torch.round(self.enter(x)) * 0.5)
            return result

    graph = fxinvert.trace(Rounded(), torch.rand(2, 4))
    assert names(fxinvert.partition(graph, cuts=["mul"])) == ["mul", "leave"]
    for name in ("enter", "x"):
        with pytest.raises(CutError, match=f"{name!r} is not a cut: .*'round'.* cannot be differentiated"):
            fxinvert.partition(graph, cuts=[name])


def test_a_complex_value_is_no_cut() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return self.last(torch.fft.rfft(self.first(x)).abs())

    graph = fxinvert.trace(Spectrum(), torch.rand(2, 4))
    with pytest.raises(CutError, match=r"not one real tensor.*; the nearest cut is 'first' before it"):
        fxinvert.partition(graph, cuts=["fft_rfft"])


def test_a_weight_that_is_cast_to_its_own_type_is_trained() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight.to(x.dtype), self.fc.bias.float())

    model, x = Model(forward, fc=nn.Linear(3, 2)), torch.randn(4, 3)
    (segment,) = fxinvert.partition(fxinvert.trace(model, x)).segments
    assert segment.parameters == ("fc.weight", "fc.bias")
