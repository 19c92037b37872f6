"""The last layer to its end: the loss of an affine last layer is as small as any, and its parameters alone change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.training import ClosedForm
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.data import Batches
from fxinvert.training.last_layer import DAMPINGS, descend, last_layer, path_of


def problem(truths: bool, rows: int = 200) -> dict[str, Any]:
    torch.manual_seed(0)
    features = torch.randn(rows, 6, dtype=torch.float64)
    logits = torch.randn(rows, 4, dtype=torch.float64)
    noisy = logits + 2 * torch.randn_like(logits)
    wanted = (noisy > 0).double() if truths else F.one_hot(noisy.argmax(1), 4).double()
    return {
        "features": features,
        "logits": logits,
        "wanted": wanted,
        "weights": torch.rand(rows, 1, dtype=torch.float64),
        "truths": truths,
    }


def objective(given: dict[str, Any], change: Tensor, damping: float) -> Tensor:
    features, weights = given["features"], given["weights"]
    z = given["logits"] + features @ change.mT
    if given["truths"]:
        losses = F.binary_cross_entropy_with_logits(z, given["wanted"], reduction="none").sum(1)
    else:
        losses = -(given["wanted"] * z.log_softmax(1)).sum(1)
    ridge = damping * (features.mT @ (weights * features)).diagonal().mean()
    bound = 0.25 if given["truths"] else 0.5
    total: Tensor = (weights[:, 0] * losses).sum() + bound / 2 * ridge * change.square().sum()
    return total


@pytest.mark.parametrize("truths", [False, True])
def test_the_loss_is_nearly_the_least(truths: bool) -> None:
    """Against Newton's method with the dense Hessian."""
    given = problem(truths)
    (damping, _), last = DAMPINGS[-1], path_of(**given)[-1]
    best = torch.zeros(24, dtype=torch.float64)

    def value(flat: Tensor) -> Tensor:
        return objective(given, flat.reshape(4, 6), damping)

    for _ in range(20):
        slope, hessian = torch.func.grad(value)(best), torch.func.hessian(value)(best)
        best = best - torch.linalg.solve(hessian, slope)
    begun, reached, least = value(torch.zeros_like(best)), value(last.flatten()), value(best)
    assert least <= reached < least + 1e-3 * (begun - least)


@pytest.mark.parametrize("truths", [False, True])
def test_every_fit_is_a_least_squares_fit_that_cannot_raise_the_loss(truths: bool) -> None:
    given = problem(truths)
    ends = path_of(**given)
    losses = [objective(given, torch.zeros_like(ends[0]), 0.0), *(objective(given, e, 0.0) for e in ends)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("truths", [False, True])
def test_fewer_rows_than_features_are_no_other_problem(truths: bool) -> None:
    """Rows of no weight make them more."""
    given = problem(truths, rows=4)
    nothing = problem(truths, rows=5) | {"weights": torch.zeros(5, 1, dtype=torch.float64)}
    more = {name: torch.cat([given[name], nothing[name]]) for name in given if name != "truths"}
    for few, many in zip(path_of(**given), path_of(**more, truths=truths), strict=True):
        torch.testing.assert_close(few, many, rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    def __init__(self, head: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x))
        return output


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    line, maps = torch.randn(60, 5), torch.randn(20, 2, 4, 5)
    classes, pixels = torch.arange(60) % 3, torch.arange(400).reshape(20, 4, 5) % 3
    pixels[3, 1:, 2] = -100
    body = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    convs = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    return {
        "classes": (Net(nn.Linear(8, 3), body), line, classes),
        "truth values": (Net(nn.Linear(8, 2), body), line, torch.rand(60, 2) < 0.3),
        "pixels, some of which are not asked for": (Net(nn.Conv2d(4, 3, 1), convs), maps, pixels),
        "positions": (Net(nn.Linear(8, 3), body), torch.randn(20, 4, 5), torch.arange(80).reshape(20, 4) % 3),
        "a weight norm": (Net(normed, body), line, classes),
    }


def changes(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> list[dict[str, Tensor]]:
    context = Context(model.eval(), {"train": source_of([(x, y)])}, **settings)
    plan = fxinvert.partition(context.graph)
    path = last_layer(context, plan.segments)
    assert path is not None
    return descend(context, Batches([(x, y)], torch.device("cpu")), path=path, samples=len(x))


@pytest.mark.parametrize("name", cases())
def test_the_loss_that_is_measured_falls_from_damping_to_damping(name: str) -> None:
    model, x, y = cases()[name]
    found = changes(model, x, y)
    assert len(found) == len(DAMPINGS)
    named, losses = dict(model.named_parameters()), []
    for own in ({}, *found):
        state = {key: value.detach() + own.get(key, torch.zeros(())).float() for key, value in named.items()}
        out = torch.func.functional_call(model, state, (x,))
        if y.dtype == torch.bool:
            losses.append(float(F.binary_cross_entropy_with_logits(out, y.float())))
        else:
            losses.append(float(F.cross_entropy(out if out.dim() != 3 else out.mT, y, reduction="mean")))
    assert losses == sorted(losses, reverse=True)
    assert all(key.startswith("head.") for own in found for key in own)


def test_tied_layers_and_models_that_end_otherwise_have_none() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    for model in (tied, nn.Sequential(nn.Linear(4, 4), nn.ReLU())):
        context = Context(model, {"train": source_of([(torch.randn(8, 4), torch.zeros(8).long())])})
        assert last_layer(context, fxinvert.partition(context.graph).segments) is None


def test_labels_along_another_axis_than_the_layers_outputs_have_none() -> None:
    """Classes along axis 1, of a layer whose outputs are the last one."""
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    assert changes(model, torch.randn(12, 3, 5), torch.arange(36).reshape(12, 3) % 2) == []


def test_a_layer_that_works_in_groups_has_none() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, groups=2))
    x, y = torch.randn(6, 2, 4, 5), torch.rand(6, 2, 4, 5) < 0.5
    assert changes(model, x, y) == []
    method = ClosedForm(last_layer=True)
    assert fxinvert.estimate(model, x, samples=100, batch=10, method=method).is_known
    result = fxinvert.post_train(
        model, [(x, y)], validation_data=[(x, y)], method=method, output_target="cross_entropy", sweeps=1
    )
    assert result.final.loss <= result.baseline.loss


def test_as_many_samples_are_used_as_fit() -> None:
    model, x, y = cases()["classes"]
    assert len(changes(model, x, y, memory_limit=2**14)) == len(DAMPINGS)


def test_it_is_what_comes_out_where_nothing_else_helps() -> None:
    """The rest of the network is at its best already; a target that does not stand for the loss is not left."""
    model, x, y = cases()["classes"]
    settings: dict[str, Any] = {"validation_data": [(x, y)], "sweeps": 1, "progress": False}
    alone = ClosedForm(damping=1e30, last_layer=True)
    result = fxinvert.post_train(model, [(x, y)], method=alone, output_target="cross_entropy", **settings)
    assert set(result.changed) == {"head.weight", "head.bias"}
    assert result.final.loss < 0.95 * result.baseline.loss
    other = fxinvert.post_train(model, [(x, y)], method=alone, output_target="nearest", **settings)
    assert other.final.loss > result.final.loss
