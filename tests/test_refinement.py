"""Refinement: Gauss–Newton steps bring targets to the output target, and never away from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxinvert
import fxinvert.models as zoo
from fxinvert.errors import DataError
from fxinvert.inversion import refinement, stepping
from fxinvert.inversion.attainable import attainable, within_reach
from fxinvert.inversion.goal import Goal, Miss
from fxinvert.inversion.refinement import stepped
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stationary import REACH, first_order_error
from fxinvert.inversion.stepping import TOLERANCE, Run
from fxinvert.output_target import OutputTarget, automatic_margin, margin, nearest
from fxinvert.rules.certificate import Status, relative


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    digits = zoo.digits()
    return digits.x_test[:64], digits.y_test[:64]


def refine(run: Run, start: Tensor, anchor: Tensor, goal: Tensor, steps: int) -> Tensor:
    """Steps towards one output."""
    size = goal.flatten(1).norm(dim=1)[:, None]
    with torch.no_grad():
        return stepped(lambda x: (run(x) - goal).flatten(1) / size, start, anchor, steps)[0]


def test_one_step_solves_an_affine_model_by_the_nearest_value() -> None:
    weight, bias = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    start, goal = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    value = refine(lambda x: x @ weight.T + bias, start, start, goal, 1)
    expected = start + (goal - start @ weight.T - bias) @ torch.linalg.pinv(weight).T
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Hardtanh(), nn.GELU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_samples_error_ever_grows(activation: nn.Module, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4), activation).to(dtype)
    start, anchor, goal = (
        3 * torch.randn(50, 6, dtype=dtype),
        torch.randn(50, 6, dtype=dtype),
        torch.randn(50, 4, dtype=dtype),
    )

    def error(value: Tensor) -> Tensor:
        with torch.no_grad():
            return relative(model(value) - goal, goal)

    before = torch.minimum(error(start), error(anchor))
    assert bool((error(refine(model, start, anchor, goal, 0)) <= before).all())
    for steps in (1, 2, 5):
        after = error(refine(model, start, anchor, goal, steps))
        assert bool((after <= before).all())
        before = after
    assert float((before < error(start)).float().mean()) > 0.5


def test_samples_end_one_by_one() -> None:
    seen: list[Tensor] = []

    def cube(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x**3

    start, goal = torch.tensor([[1.0], [2.0], [1.5]]), torch.tensor([[1.0005], [8.3], [100.0]])
    value = refine(cube, start, start, goal, 20)
    assert float(relative(value**3 - goal, goal).max()) <= TOLERANCE
    assert float(value[0]) == 1.0, "within the tolerance already"
    once = refine(cube, start, start, goal, 1)
    done = relative(once**3 - goal, goal) <= TOLERANCE
    assert done.tolist() == [True, True, False]
    assert torch.equal(value[done], once[done]), "what is done is left alone"
    moved = [len({float(x[i]) for x in seen}) for i in range(3)]
    assert moved[0] == 1 < moved[1] < moved[2]
    assert len(seen) < 40, "it stops when all are done"


def test_what_cannot_be_reached_stays_put() -> None:
    start, goal = torch.randn(3, 4), torch.ones(3, 2)
    for run in (lambda x: x[:, :2] * 0.0, lambda x: x[:, :2].detach(), lambda x: (x[:, :2] > 0).float() - 2):
        assert torch.equal(refine(run, start, start, goal, 5), start)
    broken = start.clone()
    broken[1] = torch.nan
    value = refine(lambda x: x[:, :2].tanh() * 2, broken, broken, goal, 5)
    assert bool(value[1].isnan().all())
    torch.testing.assert_close(
        value[[0, 2]], refine(lambda x: x[:, :2].tanh() * 2, start, start, goal, 5)[[0, 2]]
    )


@pytest.mark.parametrize("rows", [0, 64])
def test_large_outputs_are_refined_by_products(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(stepping, "ROWS", rows)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    anchor = torch.randn(8, 12).double()
    goal = model(anchor + 0.3 * torch.randn_like(anchor)).detach()
    value = refine(model, anchor, anchor, goal, 10)
    with torch.no_grad():
        assert float(relative(model(value) - goal, goal).max()) <= TOLERANCE
    start, wanted = torch.randn(3, 4), torch.ones(3, 2)
    assert torch.equal(refine(lambda x: x[:, :2].detach(), start, start, wanted, 5), start)


def test_a_sample_that_stagnates_starts_again_from_its_anchor() -> None:
    """On the far side of a bump the error only falls towards a plateau; from the anchor it falls to nothing."""

    def bump(x: Tensor) -> Tensor:
        return torch.where(x > 1, 1.5 + 0.1 * torch.exp(1 - x), x)

    start, anchor = torch.tensor([[3.0], [0.1]]).double(), torch.tensor([[-1.0], [-1.0]]).double()
    goal = torch.tensor([[0.7], [0.7]]).double()
    assert bool((bump(start) - goal).abs()[0] < (bump(anchor) - goal).abs()[0]), "the anchor must look worse"
    value = refine(bump, start, anchor, goal, 10)
    assert float(relative(bump(value) - goal, goal).max()) <= TOLERANCE


@pytest.mark.parametrize("state", ["early", "converged"])
def test_refined_targets_of_the_cnn_reach_the_output_target(state: str) -> None:
    digits, model = zoo.digits(), zoo.load("digits_cnn", state)
    wrong = model(digits.x_test).argmax(1) != digits.y_test
    x, y = digits.x_test[wrong], digits.y_test[wrong]
    plain = fxinvert.invert(model, x[:2])(x, y)
    rec = fxinvert.invert(model, x[:2], refine=10)(x, y)
    for name in rec.names:
        assert bool((rec.consistency(name) <= plain.consistency(name) + 1e-6).all())
        reached = float((rec.consistency(name) <= 1.01 * TOLERANCE).float().mean())
        assert reached >= 0.99, name
        torch.testing.assert_close(rec.certificates[name].residual, rec.consistency(name), rtol=0, atol=1e-5)
        assert torch.equal(rec.anchors[name], plain.anchors[name])
    assert torch.equal(rec.output_target, plain.output_target)
    assert float((plain.consistency("conv2") <= TOLERANCE).float().mean()) < 0.1


def test_samples_that_stick_at_kinks_get_there_on_the_smoothed_model(data: tuple[Tensor, Tensor]) -> None:
    model = zoo.load("digits_cnn", "converged")
    inverse = fxinvert.invert(model, data[0][:2], output_target="margin", refine=20)
    values, (node,) = inverse.forward(data[0]), _nodes(inverse, "relu1")
    start = values[node].flatten(1)
    with torch.no_grad():
        goal = _goal(inverse, values, data[1])
        miss = Miss(Rest(inverse.graph, values, node), replace(goal, project=None))
        assert miss.rest.has_kinks
        found, error = stepped(miss, start, start, 20, miss.of)
        assert float((error <= TOLERANCE).float().mean()) < 0.97
        around = refinement.refine(miss, start, start, 20)
        assert float((miss(around).norm(dim=1) <= TOLERANCE).float().mean()) > 0.99
        hopeless = torch.ones_like(error, dtype=torch.bool)
        assert torch.equal(refinement.refine(miss, start, start, 20, hopeless), found)


def _goal(inverse: fxinvert.InverseGraph, values: Mapping[fx.Node, Any], labels: Tensor) -> Goal:
    return Goal.of(inverse.output_target, inverse.output_node, values[inverse.output_node], labels)


def test_a_smoothed_model_approaches_the_model() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh()
    )
    x = 4 * torch.randn(7, 5)
    inverse = fxinvert.invert(model, x, output_target="regression")
    values = inverse.forward(x)
    rest = Rest(inverse.graph, values, next(iter(values)))
    with torch.no_grad():
        wide, narrow = ((rest(x, w) - model(x)).abs().max() for w in (0.3, 1e-6))
        assert float(wide) > 0.05
        assert float(narrow) < 1e-5
        assert torch.equal(rest.of(torch.tensor([4, 1]))(x[[4, 1]]), rest(x)[[4, 1]])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.LayerNorm(6)])
def test_what_lies_beyond_a_range_is_proven_to(activation: nn.Module) -> None:
    """Of targets that some values reach nothing is proven; of others less than what the best of many values misses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), activation, nn.Linear(6, 4)).double()
    x = torch.randn(20, 6).double()
    inverse = fxinvert.invert(model, x, output_target="regression")
    values = inverse.forward(x)
    with torch.no_grad():
        reachable = model(3 * torch.randn(20, 6).double())
        bound = attainable(inverse.graph, values, _goal(inverse, values, reachable))
        assert bound is not None
        assert bound.node.meta["path"] == "1"
        assert float(bound.least.max()) < 1e-6
        far = 5 * torch.randn(20, 4).double()
        bound = attainable(inverse.graph, values, _goal(inverse, values, far))
        assert bound is not None
        assert float(bound.least.max()) > 0.05
        tried = model(10 * torch.randn(5000, 1, 6).double())
        nearest = ((tried - far).norm(dim=2) / far.norm(dim=1)).min(0).values
        assert bool((bound.least <= nearest + 1e-9).all())
    smooth = fxinvert.invert(
        nn.Sequential(nn.Linear(6, 6), nn.Softplus()), x.float(), output_target="regression"
    )
    values = smooth.forward(x.float())
    assert attainable(smooth.graph, values, _goal(smooth, values, torch.ones(20, 6))) is None


def test_certificates_of_refined_targets_tell_why_one_is_missed(data: tuple[Tensor, Tensor]) -> None:
    model = zoo.load("digits_mlp", "converged")
    inverse = fxinvert.invert(model, data[0], output_target="margin")
    wanted = inverse.output_target(model(data[0]), data[1]).detach()
    rec = fxinvert.invert(model, data[0], output_target="regression", refine=10)(data[0], wanted)
    assert "beyond the range of 'tanh2' (tanh)" in str(rec.certificates["fc1"])
    assert not rec.certificates["tanh2"].reason
    assert rec.certificates["tanh2"].status is Status.EXACT


def _nodes(inverse: fxinvert.InverseGraph, *names: str) -> list[fx.Node]:
    return [node for node in inverse.graph.graph.nodes if node.meta.get("path") in names]


def test_refining_keeps_the_contracts(data: tuple[Tensor, Tensor]) -> None:
    inverse = fxinvert.invert(zoo.load("digits_cnn", "early"), data[0], refine=3)
    rec = inverse(*data)
    right = rec.anchors["fc2"].argmax(1) == data[1]
    for name in rec.names:
        assert torch.equal(rec.targets[name][right], rec.anchors[name][right])
        assert not rec.targets[name].requires_grad
    values = inverse.forward(data[0])
    nodes = [node for node in inverse.graph.graph.nodes if node.meta.get("path") in ("conv2", "fc2")]
    for node, target in inverse.targets(values, data[1], nodes).items():
        assert torch.equal(target, rec.targets[node.name])
    same = fxinvert.invert(inverse.graph, output_target=lambda outputs, labels: outputs, refine=3)(*data)
    assert all(torch.equal(same.targets[name], same.anchors[name]) for name in same.names)
    assert all(p.grad is None and p.requires_grad for p in inverse.graph.parameters())


def test_saturated_units_start_again_from_the_anchor(data: tuple[Tensor, Tensor]) -> None:
    """Where the node-by-node target lies on a plateau of tanh no step leads off it, but one leads from the anchor."""
    model = zoo.load("digits_mlp", "early")
    wrong = model(data[0]).argmax(1) != data[1]

    def target(outputs: Tensor, labels: Tensor) -> Tensor:
        return nearest(outputs, labels)  # this one point, and no other output in which the label leads

    plain, rec = (
        fxinvert.invert(model, data[0], output_target=target, refine=steps)(*data).consistency("fc1")[wrong]
        for steps in (0, 10)
    )
    assert float((plain <= TOLERANCE).float().mean()) < 0.7
    assert float((rec <= 1.01 * TOLERANCE).float().mean()) > 0.9


def test_a_refined_sample_does_not_depend_on_its_batch(data: tuple[Tensor, Tensor]) -> None:
    """On a smooth model; at a kink (a ReLU at 0) rounding may choose the side, and the side the steps."""
    x, y = data[0].double(), data[1]
    inverse = fxinvert.invert(zoo.load("digits_mlp", "early").double(), x, refine=3)
    rec = inverse(x, y)
    for i in range(0, len(x), 8):
        alone = inverse(x[i : i + 1], y[i : i + 1])
        for name in rec.names:
            difference = alone.targets[name] - rec.targets[name][i : i + 1]
            assert float(relative(difference, alone.targets[name])) < 1e-6


def test_linearized_targets_are_certified_when_somebody_looks(data: tuple[Tensor, Tensor]) -> None:
    """Running the rest of the model from every node costs as much as the square of the depth."""
    x, y = data[0].clone(), data[1]
    inverse = fxinvert.invert(zoo.load("digits_cnn", "early"), x, refine=1, reconstruction="linearized")
    rec = inverse(x, y)
    certificate, other = rec.certificates["conv2"], rec.certificates["conv1"]
    assert not certificate.is_measured
    torch.testing.assert_close(certificate.residual, rec.consistency("conv2"))
    x.add_(1.0)
    with pytest.raises(DataError, match="changed in place"):
        _ = other.residual


def test_dead_units_are_revived_by_rounding_off_their_kinks() -> None:
    """Pixels of a U-Net whose last ReLUs are off where they should be on, as one image has them in the training part."""
    samples = zoo.data_of("digits_unet").train
    images, labels = samples.inputs[0][35:36], samples.labels["output"][35:36]
    inverse = fxinvert.invert(
        zoo.load("digits_unet", "converged"), images, output_target="margin", reconstruction="linearized"
    )
    values, (node,) = inverse.forward(images), _nodes(inverse, "merge1.3")
    with torch.no_grad():
        start = inverse.targets(values, labels, [node])[node].flatten(1)
        miss, anchor = (
            Miss(Rest(inverse.graph, values, node), _goal(inverse, values, labels)),
            values[node].flatten(1),
        )
        _, error = stepped(miss, start, anchor, 20)
        around = refinement.refine(miss, start, anchor, 20)
        assert float(miss(around).norm(dim=1)) <= TOLERANCE < float(error)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cut"), [("digits_unet", "down1.0"), ("char_transformer", "blocks.0.add")])
@pytest.mark.parametrize("output_target", ["nearest", "margin"])
def test_labels_lead_at_every_position(name: str, cut: str, output_target: str) -> None:
    """From the first values on, of hundreds of logits; by half of the margin where all of it is out of reach."""
    samples = zoo.data_of(name).train
    inputs, labels = samples.inputs[0][:2], samples.labels["output"][:2]
    inverse = fxinvert.invert(
        zoo.load(name, "converged"), inputs, output_target=output_target, reconstruction="linearized", refine=40
    )  # fmt: skip
    values, (node,) = inverse.forward(inputs), _nodes(inverse, cut)
    with torch.no_grad():
        goal, _ = within_reach(inverse.graph, values, _goal(inverse, values, labels))
        assert bool((goal.share < 1).all()) == (name == "char_transformer" and output_target == "margin")
        target = inverse.targets(values, labels, [node])[node]
        missed = Miss(Rest(inverse.graph, values, node), goal)(target)
    assert bool((missed.norm(dim=1) <= 1.01 * TOLERANCE).all())


def test_many_outputs_are_right_where_the_label_is_to_lead(data: tuple[Tensor, Tensor]) -> None:
    """What an output misses is its distance from them, and no other point of theirs is nearer."""
    model = zoo.load("digits_mlp", "converged")
    inverse = fxinvert.invert(model, data[0], output_target="margin")
    with torch.no_grad():
        values = inverse.forward(data[0])
        goal = _goal(inverse, values, data[1])
        own = goal.outputs
        assert torch.equal(goal.nearest(own), goal.target)
        other = own + 3 * torch.randn_like(own)
        right = goal.nearest(other)
        torch.testing.assert_close(goal.nearest(right), right)
        torch.testing.assert_close(goal.missed(goal.target), torch.zeros_like(own), rtol=0, atol=1e-6)
        between = right + 0.5 * (goal.target - right)
        assert bool(((other - right).norm(dim=1) <= (other - between).norm(dim=1) + 1e-5).all())
        rows = torch.tensor([5, 2])
        torch.testing.assert_close(goal.samples(rows).missed(other[rows]), goal.missed(other)[rows])
        half = goal.eased(torch.full_like(goal.share, 0.5))
        assert bool((half.missed(other).norm(dim=1) <= goal.missed(other).norm(dim=1) + 1e-6).all())


def test_of_several_outputs_each_is_right_in_its_way() -> None:
    """Class numbers are to lead, numbers are reached."""
    samples = zoo.data_of("digits_two_head").train
    inputs = tuple(values[:8] for values in samples.inputs)
    labels = {name: own[:8] for name, own in samples.labels.items()}
    graph = fxinvert.trace(zoo.load("digits_two_head", "converged"), inputs, output=tuple(labels))
    inverse = fxinvert.invert(graph, output_target="margin")
    values = inverse.forward(inputs)
    with torch.no_grad():
        goal = Goal.of(inverse.output_target, inverse.output_node, values[inverse.output_node], labels)
        other = goal.outputs + torch.randn_like(goal.outputs)
        digits = nearest(
            other[:, :10], labels["digit"], automatic_margin(goal.outputs[:, :10], labels["digit"])
        )
        torch.testing.assert_close(goal.nearest(other), torch.cat([digits, labels["offset"]], 1))


def test_a_margin_that_is_out_of_reach_is_halved() -> None:
    """Logits tanh(x) spread by less than 1: a label leads by no more than 2."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
    model[1].load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    x, labels = 0.9 * torch.eye(4).repeat(2, 1), torch.arange(8) % 4
    wrong = (labels + torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])) % 4
    for size, share in ((1.5, 1.0), (3.0, 0.5), (40.0, 0.0)):
        inverse = fxinvert.invert(
            model, x, output_target=OutputTarget("lead", partial(margin, size=size), partial(_lead, size)), refine=20
        )  # fmt: skip
        values = inverse.forward(x)
        goal, bound = within_reach(inverse.graph, values, _goal(inverse, values, wrong))
        assert bound is not None
        assert not bool(bound.proven.any())
        assert bool((goal.share == share).all())
        rec = inverse(x, wrong)
        name = rec.names[0]
        reached = rec.targets[name].tanh()
        leads = reached.gather(1, wrong[:, None]) - reached.scatter(1, wrong[:, None], -9.0).amax(
            1, keepdim=True
        )
        assert float(leads.min()) >= share * size - 1e-2 * size
        assert ("of the margin" in rec.certificates[name].reason) == (share < 1)


def _lead(size: float, outputs: Tensor, labels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return nearest(other, labels, size * share)


def test_certificates_tell_where_the_derivative_shows_no_way_on() -> None:
    """A square is never negative: from its least value, 0, no correction lowers the error, to first order."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1], x[:, 1:] * x[:, 1:]], 1)

    x, goal = torch.tensor([[1.0, 0.5], [1.0, 0.5]]), torch.tensor([[3.0, -1.0], [3.0, 4.0]])
    rec = fxinvert.invert(Square(), x, output_target="regression", refine=20)(x, goal)
    certificate = rec.certificates[rec.names[0]]
    assert bool((certificate.residual > TOLERANCE).equal(torch.tensor([True, False])))
    assert "1 of 1 are approached to 3.2e-01 at worst and stationary there" in certificate.reason


@pytest.mark.parametrize("rank", [2, 3])
def test_the_first_order_error_is_that_of_the_longest_correction(rank: int) -> None:
    """For an affine model: what every correction on the ball of that length leaves is no less."""
    factors = torch.randn(3, rank), torch.randn(rank, 5)
    model = nn.Linear(5, 3)
    model.weight.data = factors[0] @ factors[1]
    x, goal = torch.randn(4, 5), 5 * torch.randn(4, 3)
    inverse = fxinvert.invert(model, x, output_target="regression")
    values = inverse.forward(x)
    with torch.no_grad():
        miss = Miss(Rest(inverse.graph, values, next(iter(values))), _goal(inverse, values, goal))
        least = first_order_error(miss, x)
        step = torch.randn(2000, 4, 5)
        step = REACH * step / step.norm(dim=2, keepdim=True) * x.norm(dim=1)[None, :, None]
        tried = (model(x + step) - goal).norm(dim=2) / goal.norm(dim=1)
    assert bool((least <= tried.amin(0) + 1e-6).all())
    assert bool((least >= 0.9 * tried.amin(0) - 1e-3).all())
