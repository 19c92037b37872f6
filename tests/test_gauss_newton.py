"""Gauss–Newton: its system is that of the loss's second-order model, however data are cut and whichever side is solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runs import network, train, weights
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import fxinvert
from fxinvert import DataError
from fxinvert.training import GaussNewton
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.curvature import Curvature, changed_by, curvature, joined
from fxinvert.training.data import Batches
from fxinvert.training.jacobian_rows import JacobianRows
from fxinvert.training.loss_metric import answers, directions
from fxinvert.training.metrics import losses_of

ALL = 10**6


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return value


def classes(*shape: int, count: int = 3) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(1))


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def padded() -> Tensor:
    labels = classes(9, 5)
    labels[:, 3:] = -100
    return labels


CASES: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "one layer": (nn.Linear(6, 3), some(9, 6), classes(9)),
    "linear layers": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), some(9, 6), classes(9)),
    "no bias": (nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), some(9, 6), classes(9)),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(),
            nn.Linear(128, 3),
        ),
        some(9, 2, 4, 4), classes(9),
    ),
    "norms": (
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.BatchNorm1d(5).eval(), nn.Linear(5, 3)),
        some(9, 6), classes(9),
    ),
    "one layer, used twice": (Twice(), some(9, 6), classes(9)),
    "an answer at every position, some ignored": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), some(9, 5, 6), padded()),
    "truth values": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), some(9, 6), classes(9, 2, count=2).bool()),
    "numbers": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), some(9, 6), some(9, 2)),
}  # fmt: skip


def context_of(model: nn.Module, x: Tensor, y: Tensor) -> Context:
    return Context(model.double().eval(), {"train": source_of([(x, y)])})


def of(
    context: Context, x: Tensor, y: Tensor, sizes: Sequence[int] = (), share: float = 1.0, count: int = ALL
) -> Curvature:
    """Over samples in batches of some sizes."""
    sizes = sizes or [len(x)]
    batches = Batches(
        list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True)), x.device
    )
    paths = [path for segment in fxinvert.partition(context.graph).segments for path in segment.trained]
    return curvature(context, batches, paths=paths, share=share, count=count)


def dense(context: Context, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """−∂ℓ/∂θ and JᵀHJ, summed over samples, from derivatives of the whole function."""
    paths = [path for segment in fxinvert.partition(context.graph).segments for path in segment.trained]
    parameters = {name: context.tensors[name].detach() for name in changed_by(context, paths)}
    sizes = [value.numel() for value in parameters.values()]

    def output(flat: Tensor, one: Tensor) -> Tensor:
        parts = zip(parameters.items(), torch.split(flat, sizes), strict=True)
        value: Tensor = functional_call(
            context.graph, {name: part.reshape(like.shape) for (name, like), part in parts}, (one,)
        )
        return value

    theta = torch.cat([value.flatten() for value in parameters.values()])
    gradient, gram = torch.zeros_like(theta), torch.zeros(len(theta), len(theta)).double()
    for one, label in zip(torch.split(x, 1), torch.split(y, 1), strict=True):
        reached = output(theta, one)
        jacobian = jacrev(output)(theta, one).flatten(0, -2)

        def loss(value: Tensor, label: Tensor = label) -> Tensor:
            return losses_of(value, label, 1).sum()

        gradient -= jacobian.T @ torch.func.grad(loss)(reached).flatten()
        curved = hessian(loss)(reached).reshape(reached.numel(), -1)
        gram += jacobian.T @ curved @ jacobian
    return gradient, gram, parameters


def in_order(rows: JacobianRows, parameters: dict[str, Tensor]) -> Tensor:
    """The columns of `rows.dense()` in the order of the parameters."""
    numbers = torch.arange(rows.size).double()
    named = rows.by_name(numbers, parameters)
    return torch.cat([named[name].flatten() for name in parameters]).long()


@pytest.mark.parametrize("case", CASES)
def test_the_system_is_that_of_the_loss(case: str) -> None:
    model, x, y = CASES[case]
    context = context_of(model, x, y)
    found, (gradient, gram, parameters) = of(context, x, y), dense(context, x, y)
    columns = in_order(found.rows, parameters)
    own = found.rows.dense()[:, columns]
    torch.testing.assert_close(own.T @ own, gram)
    torch.testing.assert_close(found.rows.flat(found.descent)[columns], gradient)
    assert found.samples == found.drawn == len(x)


@pytest.mark.parametrize(
    ("case", "left"), [("one layer", True), ("linear layers", False), ("convolutions", False)]
)
def test_a_step_solves_the_damped_system_on_either_side(case: str, left: bool) -> None:
    model, x, y = CASES[case]
    context = context_of(model, x, y)
    found = of(context, x, y)
    own, gradient = found.rows.dense(), found.rows.flat(found.descent)
    assert (own.shape[1] <= len(own)) == left
    gram = own.T @ own / len(x)
    mean = float(gram.trace()) / min(own.shape)
    (solved,) = found.rows.solve(gradient, [0.1], 1 / len(x), 1.0)
    expected = torch.linalg.solve(gram + 0.1 * mean * torch.eye(len(gram)).double(), gradient)
    torch.testing.assert_close(solved.change[0, 0], expected)
    removed = 2 * expected @ gradient - expected @ gram @ expected
    assert solved.explained == pytest.approx(float(removed))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_it_does_not_matter_how_samples_are_cut_and_ordered(share: float) -> None:
    model, x, y = CASES["convolutions"]
    context = context_of(model, x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    whole = of(context, x, y, share=share, count=2)
    cut = of(context, x[order], y[order], [1, 5, 3], share=share, count=2)
    assert 0 < whole.drawn == cut.drawn
    assert (whole.drawn < len(x)) == (share < 1)
    torch.testing.assert_close(
        cut.rows.dense().T @ cut.rows.dense(), whole.rows.dense().T @ whole.rows.dense()
    )
    torch.testing.assert_close(cut.descent, whole.descent)
    parts = joined(
        [of(context, x[:4], y[:4], share=share, count=2), of(context, x[4:], y[4:], share=share, count=2)]
    )
    torch.testing.assert_close(parts.rows.dense(), whole.rows.dense())


def test_random_directions_have_the_curvature_on_average() -> None:
    samples = 20_000
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]]).double().expand(samples, -1)
    (asked,) = [answers(logits, classes(samples))]
    p = logits[0].softmax(0)
    for count in (1, 3):
        found = sum(s.T @ s for (s,) in directions([asked], torch.arange(samples), count)) / samples
        torch.testing.assert_close(found, p.diag() - p.outer(p), atol=0.01, rtol=0)


def test_random_directions_follow_from_the_samples() -> None:
    logits = some(4, 5)
    asked = [answers(logits, classes(4))]
    hashes = torch.tensor([7, 7, 8, 9])
    (first,), (second,) = directions(asked, hashes, 2)
    assert not torch.equal(first, second)
    (again, _) = directions(asked, hashes, 2)
    torch.testing.assert_close(again, [first])


def test_an_affine_network_is_solved_in_a_step() -> None:
    x, weight = some(60, 6), some(6, 2)
    y = x @ weight + 0.1 * some(60, 2)
    result = fxinvert.post_train(
        nn.Linear(6, 2).double(), [(x, y)], validation_data=[(x, y)], method=GaussNewton(damping=1e-9, steps=1),
        sweeps=1,
    )  # fmt: skip
    features = torch.cat([x, torch.ones(60, 1).double()], 1)
    least = (y - features @ torch.linalg.lstsq(features, y).solution).square().mean()
    assert result.final.loss == pytest.approx(float(least), rel=1e-6)


def test_what_stays_zero_is_solved_without() -> None:
    model = network().double()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, :3] = 0
    x, y = some(50, 6), classes(50)
    zeros = Context(model.eval(), {"train": source_of([(x, y)])}, keep_zeros=True)
    rows = of(zeros, x, y).rows
    assert not rows.whole["0.weight"][..., :3].any()
    assert rows.whole["0.weight"][..., 3:].any()


def test_segments_that_are_left_out_stay() -> None:
    model = network()
    result = train(method="gauss_newton", only="2")
    before, after = model.state_dict(), result.model.state_dict()
    assert all(torch.equal(before[name], after[name]) == name.startswith("0") for name in before)


def test_later_steps_follow_from_the_damping_that_was_taken() -> None:
    records = train(method=GaussNewton(damping=1.0, steps=2), sweeps=1).history
    first, second = (next(iter(record.damping.values())) for record in records)
    assert first in (1.0, pytest.approx(0.1))
    assert second in (pytest.approx(3 * first), pytest.approx(first / 3))


def test_of_many_samples_some_are_drawn() -> None:
    few, many = (train(method=GaussNewton(rows=rows, steps=1), sweeps=1) for rows in (50, 1000))
    assert few.final.loss < few.baseline.loss
    assert weights(few) != weights(many)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping=0.0; a number above 0"),
        ({"steps": 0}, "steps=0; a whole number of at least 1"),
        ({"rows": 0}, "rows=0; a whole number of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        GaussNewton(**settings)


def test_the_limit_of_memory_bounds_the_rows() -> None:
    whole = train(method="gauss_newton", sweeps=1)
    little = train(method="gauss_newton", sweeps=1, memory_limit=2**20)
    assert weights(whole) != weights(little)
    assert little.final.loss < little.baseline.loss
