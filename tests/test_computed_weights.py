"""Weights that are computed from parameters: solved for as they are, and pulled back to what they are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fxinvert
from fxinvert.training import Auto
from fxinvert.training.computed import changes_of, pulled
from fxinvert.training.op_sums import use_of
from fxinvert.training.statistics import NormalEquations

F64 = torch.float64
QUICK = Auto(learning_rates=(1e-2,), runs=1, folds=1)


class Made(nn.Module):
    """y = W x + b, both made of some parameters, and of a constant mask."""

    def __init__(self, make: Callable[..., tuple[Tensor, Tensor | None]], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.p = make, nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.register_buffer("mask", (torch.rand(3, 5) > 0.4).float())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.make(self.mask, *self.p)
        return F.linear(x, weight, bias)


#: what weight and bias are made of: a mask and parameters of some shapes
MADE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "masked": (lambda m, w, b: (w * m, b), ((3, 5), (3,))),
    "parts of a vector": (lambda m, p: (p[:15].view(3, 5), p[15:]), ((18,),)),
    "split": (lambda m, p: (p.split([15, 3])[0].view(3, 5), p.split([15, 3])[1]), ((18,),)),
    "turned and scaled": (lambda m, w: (w.T * 0.3, None), ((5, 3),)),
    "beside a constant": (lambda m, w, b: (m + w, 0.1 * b), ((3, 5), (3,))),
    "stacked": (lambda m, u, v: (torch.cat([u, v]), None), ((1, 5), (2, 5))),
    "shared by outputs": (lambda m, w: (w.expand(3, 5), None), ((1, 5),)),
    "symmetric": (lambda m, w: ((w + w.T)[:3], None), ((5, 5),)),
    "scaled by a parameter": (lambda m, w, s: (w * s, None), ((3, 5), (1,))),
    "of low rank": (lambda m, u, v: (u @ v, None), ((3, 2), (2, 5))),
}
#: those that are affine in each of several parameters, but not in all
PRODUCTS = ("scaled by a parameter", "of low rank")


def made(name: str) -> Made:
    make, shapes = MADE[name]
    return Made(make, *shapes)


@pytest.mark.parametrize("name", MADE)
def test_the_change_is_the_least_squares_one(name: str) -> None:
    model = made(name).double()
    x, errors = torch.randn(40, 5, dtype=F64), torch.randn(40, 3, dtype=F64)
    inverse = fxinvert.invert(model, x)
    node = inverse.output_node

    def matrix(flat: Tensor) -> Tensor:
        parts = [
            v.view(p.shape)
            for v, p in zip(torch.split(flat, [p.numel() for p in model.p]), model.p, strict=True)
        ]
        weight, bias = model.make(model.mask, *parts)
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    point = torch.cat([p.detach().flatten() for p in model.p])
    jacobian = torch.func.jacrev(matrix)(point)  # (outputs, inputs [+ 1], parameters)
    features = x if jacobian.shape[1] == 5 else torch.cat([x, torch.ones(40, 1, dtype=F64)], 1)
    known = NormalEquations.of(features[None], errors[None], torch.ones(40, dtype=F64))
    solved = known.solve(1e-2)
    found = changes_of(inverse, node, solved.change, partial(known.metric, solved.damping))
    # the same, dense: errors of all rows and outputs, and the damping of what changes in the weights
    root = (1e-2 * known.gram[0].diagonal().mean()).sqrt()
    seen = torch.cat(
        [torch.einsum("ri,oip->rop", features, jacobian).flatten(0, 1), root * jacobian.flatten(0, 1)]
    )
    wanted = torch.cat([errors.flatten(), torch.zeros(jacobian[..., 0].numel(), dtype=F64)])
    dense = torch.linalg.pinv(seen) @ wanted
    got = torch.cat([found.changes[f"p.{i}"].flatten() for i in range(len(model.p))])
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-6)
    missed = [solved.change[0] - jacobian @ d for d in (got, 0 * got)]
    left = [float((own * known.metric(1e-2).times(own[None])[0]).sum()) for own in missed]
    assert found.kept == pytest.approx(1 - left[0] / left[1], abs=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_slopes_are_those_in_the_parameters(name: str) -> None:
    model = made(name).double()
    graph = fxinvert.trace(model, torch.randn(4, 5, dtype=F64))
    (node,) = graph.graph.output_node().all_input_nodes
    weight, bias = model.make(model.mask, *model.p)
    slopes = {"weight": torch.randn(2, 3, 5, dtype=F64)}
    slopes |= {} if bias is None else {"bias": torch.randn(2, 3, dtype=F64)}
    found = pulled(graph, node, slopes)
    for i in range(2):
        own = [(weight * slopes["weight"][i]).sum()] + (
            [] if bias is None else [(bias * slopes["bias"][i]).sum()]
        )
        wanted = torch.autograd.grad(torch.stack(own).sum(), list(model.p), retain_graph=True)
        torch.testing.assert_close([found[f"p.{k}"][i] for k in range(len(model.p))], list(wanted))


def test_parts_of_one_vector_are_used_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(x, self.flat[0]).relu(), self.flat[1]).relu(), self.flat[0])

    graph = fxinvert.trace(Twice(), torch.randn(3, 4))
    first, second, third = (use_of(node) for node in graph.graph.nodes if node.meta.get("op") == "linear")
    assert first == third != second


class Layer(nn.Module):
    """A linear layer whose weight is made from what it holds."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, make: Callable[[Layer], Tensor]) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs)), make
        self.u, self.v = nn.Parameter(torch.zeros(outputs, 2)), nn.Parameter(torch.randn(2, inputs))
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.make(self))


def network(make: Callable[[Layer], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(6, 16, make), nn.ReLU(), Layer(16, 3, make))


def masked(layer: Layer) -> Tensor:
    return layer.weight * layer.mask


def of_low_rank_beside(layer: Layer) -> Tensor:
    return layer.weight + layer.u @ layer.v


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(300, 6)
    return x, (x.tanh() @ torch.randn(6, 3)).argmax(1)


@pytest.mark.parametrize("method", ["closed_form", "gauss_newton", "gradient", QUICK])
def test_a_network_of_masked_weights_is_trained(method: Any) -> None:
    model = network(masked)
    result = fxinvert.post_train(model, data(), method=method, sweeps=1, progress=False)
    assert result.final.loss < 0.95 * result.baseline.loss
    assert {"0.weight", "2.weight"} & set(result.changed)
    if method == "closed_form":  # what a mask hides is not touched
        for layer, before in zip(result.model.children(), model.children(), strict=True):
            if isinstance(layer, Layer) and isinstance(before, Layer):
                hidden = layer.mask == 0
                torch.testing.assert_close(layer.weight[hidden], before.weight[hidden], rtol=0, atol=1e-6)


def test_only_what_is_not_frozen_moves_and_the_state_fits_the_module(tmp_path: Path) -> None:
    model = network(of_low_rank_beside)
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    result = fxinvert.post_train(model, data(), method="closed_form", sweeps=2, progress=False)
    assert result.final.loss < 0.9 * result.baseline.loss
    assert "2.u" in result.changed
    assert not {"0.weight", "2.weight"} & set(result.changed)
    fresh = network(of_low_rank_beside)
    fresh.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(fresh(data()[0]), result.model(data()[0]), rtol=0, atol=0)
    fxinvert.export_onnx(result.model, data()[0][:3], tmp_path / "model.onnx")


def test_pruned_weights_are_trained_and_stay_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    prune.l1_unstructured(model[2], "weight", 0.5)  # type: ignore[no-untyped-call]
    result = fxinvert.post_train(model, data(), method="closed_form", sweeps=1, progress=False)
    assert "2.weight_orig" in result.changed
    result.model(data()[0])
    last = result.model.get_submodule("2")
    assert isinstance(last, nn.Linear)
    assert not last.weight[last.get_buffer("weight_mask") == 0].any()


NOT_AFFINE: dict[str, Callable[[Layer], Tensor]] = {
    "tanh": lambda own: own.weight.tanh(),
    "standardized": lambda own: (own.weight - own.weight.mean(1, True)) / own.weight.std(1, keepdim=True),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_is_not_solved_for_but_follows_gradients(name: str) -> None:
    model = network(NOT_AFFINE[name])
    plan = fxinvert.partition(fxinvert.trace(model, data()[0]))
    assert [segment.parameters for segment in plan.segments] == [("0.weight",), ("2.weight",)]
    assert not any(segment.trained for segment in plan.segments)
    with pytest.raises(
        fxinvert.DataError, match=r"trained in closed form: .* '0.linear' .*'auto', 'gradient'"
    ):
        fxinvert.post_train(model, data(), method="closed_form", progress=False)
    for method in ("gradient", "joint", QUICK):
        result = fxinvert.post_train(model, data(), method=method, sweeps=1, confidence=0.5, progress=False)
        assert "0.weight" in result.changed, method
        assert not result.notes, method


def test_what_closed_form_leaves_is_noted() -> None:
    model = nn.Sequential(Layer(6, 16, NOT_AFFINE["tanh"]), nn.ReLU(), nn.Linear(16, 3))
    result = fxinvert.post_train(model, data(), method="closed_form", sweeps=1, progress=False)
    assert result.changed == ("2.weight", "2.bias")
    assert any("methods that follow gradients, as 'auto', train 0.weight" in note for note in result.notes)


def test_what_has_nothing_to_solve_for_follows_gradients() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x[..., None] * self.scale).sum(1) + self.shift

    result = fxinvert.post_train(Scaled(), data(), method=QUICK, confidence=0.5, progress=False)
    assert result.changed == ("scale", "shift")
    with pytest.raises(
        fxinvert.DataError, match="no segment with parameters that can be trained in closed form"
    ):
        fxinvert.post_train(Scaled(), data(), method="closed_form", progress=False)


def test_what_a_parameter_tells_besides_its_numbers_is_no_weight() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.outer(self.inner(x.to(self.inner.weight.dtype)).to(x.dtype))
            return 2 * hidden

    plan = fxinvert.partition(fxinvert.trace(Typed(), torch.randn(4, 5)))
    assert [segment.parameters for segment in plan.segments] == [
        ("inner.weight", "inner.bias"),
        ("outer.weight", "outer.bias"),
    ]
