"""Output targets: exact projections, bounds that hold, and labels that do not fit refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.labels import class_axis
from fxinvert.output_target import (
    FUNCTIONS,
    LEAD,
    OutputTarget,
    automatic,
    cross_entropy,
    margin,
    max_assign,
    nearest,
    one_hot,
    output_target,
    regression,
    soft,
)

#: values on a grid, so that ties are frequent
GRID = st.integers(-8, 8).map(lambda i: i / 4)
LOGITS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=GRID)
SIZES = st.sampled_from([0.0, 0.25, 1.0, 3.0])
CLASSIFICATION = ("nearest", "margin", "cross_entropy", "max_assign", "one_hot")


def labels_for(logits: np.ndarray, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, logits.shape[1], len(logits)))


def projected_by_pooling(o: np.ndarray, y: int, m: float) -> np.ndarray:
    """Projection onto {z_y ≥ z_j + m for all j}, by trying every number of pooled logits; quadratic and obvious."""
    others = sorted((float(v) for j, v in enumerate(o) if j != y), reverse=True)
    candidates = []
    for k in range(len(others) + 1):
        level = (o[y] - m + sum(others[:k])) / (k + 1)
        z = np.minimum(o, level)
        z[y] = level + m
        candidates.append(z)
    feasible = [z for z in candidates if all(z[j] + m <= z[y] + 1e-12 for j in range(len(o)) if j != y)]
    if all(o[j] + m <= o[y] for j in range(len(o)) if j != y):
        return o
    return min(feasible, key=lambda z: float(((z - o) ** 2).sum()))


def projected_by_optimizer(o: np.ndarray, y: int, m: float) -> np.ndarray:
    rows = np.array([np.eye(len(o))[y] - np.eye(len(o))[j] for j in range(len(o)) if j != y])
    found = minimize(
        lambda z: 0.5 * ((z - o) ** 2).sum(),
        o,
        jac=lambda z: z - o,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda z: rows @ z - m, "jac": lambda z: rows},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.asarray(found.x)


# --- nearest and margin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_papers_example(dtype: torch.dtype) -> None:
    outputs = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    target = nearest(outputs, torch.tensor([0]))
    assert target.dtype == dtype
    assert torch.equal(target, torch.tensor([[2.0, 2.0, 2.0]], dtype=dtype))


@given(LOGITS, SIZES, st.integers(0, 99))
@example(np.zeros((2, 3)), 0.0, 0)
@example(np.array([[1.0, 1.0, 0.0]]), 1.0, 1)
@example(np.array([[0.0, 2.0, 2.0, 2.0]]), 0.0, 3)
def test_nearest_is_the_euclidean_projection(logits: np.ndarray, size: float, seed: int) -> None:
    labels = labels_for(logits, seed)
    target = nearest(torch.from_numpy(logits), labels, size).numpy()
    for o, y, z in zip(logits, labels.tolist(), target, strict=True):
        np.testing.assert_allclose(z, projected_by_pooling(o, y, size), atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 0.7])
def test_nearest_agrees_with_a_general_optimizer(size: float) -> None:
    logits = torch.randn(20, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (20,))
    target = nearest(logits, labels, size)
    for o, y, z in zip(logits.numpy(), labels.tolist(), target.numpy(), strict=True):
        np.testing.assert_allclose(z, projected_by_optimizer(o, y, size), atol=1e-5)


@given(LOGITS, SIZES, st.integers(0, 99))
def test_nearest_is_idempotent_and_keeps_what_satisfies(logits: np.ndarray, size: float, seed: int) -> None:
    outputs, labels = torch.from_numpy(logits), labels_for(logits, seed)
    once = nearest(outputs, labels, size)
    torch.testing.assert_close(nearest(once, labels, size), once, rtol=0, atol=1e-14)
    if size == 0:
        assert torch.equal(nearest(once, labels), once)
    rival = outputs.scatter(1, labels[:, None], -torch.inf).amax(1)
    satisfied = outputs.gather(1, labels[:, None])[:, 0] - size >= rival
    assert torch.equal(once[satisfied], outputs[satisfied])
    assert not (once[~satisfied] == outputs[~satisfied]).all(1).any()


@given(LOGITS, st.integers(0, 99))
def test_margin_is_reached_and_auto_is_the_samples_own_spread(logits: np.ndarray, seed: int) -> None:
    outputs, labels = torch.from_numpy(logits), labels_for(logits, seed)
    target = margin(outputs, labels)
    rival = target.scatter(1, labels[:, None], -torch.inf).amax(1)
    lead = target.gather(1, labels[:, None])[:, 0] - rival
    size = LEAD * outputs.shape[1] ** 0.5 * outputs.std(1)
    assert bool((lead >= size - 1e-12).all())
    alone = [margin(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(outputs))]
    torch.testing.assert_close(torch.cat(alone), target, rtol=0, atol=1e-14)
    assert torch.equal(margin(outputs, labels, 0.0), nearest(outputs, labels))
    assert torch.equal(margin(outputs, labels, 1.5), nearest(outputs, labels, 1.5))


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_automatic_margin_can_be_satisfied(classes: int) -> None:
    outputs, labels = torch.eye(classes, dtype=torch.float64) * 3 - 1, torch.arange(classes)
    assert torch.equal(margin(outputs, labels), outputs), "nobody can be surer"
    assert not torch.equal(margin(outputs.roll(1, 0), labels), outputs.roll(1, 0))


def test_nearest_reaches_float32_accuracy() -> None:
    logits, labels = torch.randn(200, 50), torch.randint(0, 50, (200,))
    exact = nearest(logits.double(), labels)
    torch.testing.assert_close(nearest(logits, labels).double(), exact, rtol=1e-6, atol=1e-6)


def test_a_row_that_is_not_a_number_leaves_the_others_alone() -> None:
    logits, labels = torch.randn(4, 5), torch.randint(0, 5, (4,))
    broken = logits.clone()
    broken[1, 2] = torch.nan
    rest = torch.tensor([0, 2, 3])
    for name in CLASSIFICATION:
        assert torch.equal(FUNCTIONS[name](broken, labels)[rest], FUNCTIONS[name](logits, labels)[rest])


# --- cross-entropy and assignments --------------------------------------------------------------------------


@given(LOGITS, hnp.arrays(np.float64, 6, elements=GRID), st.integers(0, 99))
def test_cross_entropy_target_minimizes_a_quadratic_upper_bound(
    logits: np.ndarray, direction: np.ndarray, seed: int
) -> None:
    outputs, labels = torch.from_numpy(logits), labels_for(logits, seed)
    target = cross_entropy(outputs, labels)
    loss = partial(F.cross_entropy, reduction="none")
    # CE(o + d) ≤ CE(o) + ∇·d + ¼‖d‖², whose minimizer is o − 2∇: any fit nearer to the target than o lowers CE
    other = outputs + torch.from_numpy(direction[: logits.shape[1]])
    nearer = (other - target).norm(dim=1) <= (outputs - target).norm(dim=1)
    assert bool((loss(other, labels) <= loss(outputs, labels) + 1e-12)[nearer].all())
    assert bool((loss(target, labels) <= loss(outputs, labels) + 1e-12).all())
    decrease = 0.25 * (target - outputs).square().sum(1)
    assert bool((loss(target, labels) <= loss(outputs, labels) - decrease + 1e-12).all())


def test_least_squares_fit_to_the_cross_entropy_target_cannot_raise_the_loss() -> None:
    features = torch.cat([torch.randn(60, 5, dtype=torch.float64), torch.ones(60, 1, dtype=torch.float64)], 1)
    weight, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (60,))
    losses = [float(F.cross_entropy(features @ weight, labels))]
    for _ in range(20):
        weight = torch.linalg.lstsq(features, cross_entropy(features @ weight, labels)).solution
        losses.append(float(F.cross_entropy(features @ weight, labels)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_cross_entropy_is_one_gradient_step() -> None:
    outputs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (6,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), outputs)
    torch.testing.assert_close(cross_entropy(outputs, labels, 3.0), outputs - 3 * gradient)


def test_max_assign_changes_the_labels_logit_only() -> None:
    outputs, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    target = max_assign(outputs, labels)
    own = torch.zeros_like(outputs, dtype=torch.bool).scatter(1, labels[:, None], True)
    assert torch.equal(target[own], outputs.amax(1))
    assert torch.equal(target[~own], outputs[~own])


def test_one_hot() -> None:
    labels = torch.tensor([2, 0])
    assert torch.equal(one_hot(torch.randn(2, 3), labels), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))


# --- class axis ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3), 1), ((2, 3, 4, 5), 1), ((2, 5, 3), 2), ((2, 3, 5), 1), ((2, 4, 5, 3), 3)]
)
def test_every_position_is_a_sample_of_its_own(name: str, shape: tuple[int, ...], axis: int) -> None:
    outputs = torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(0, 3, shape[:axis] + shape[axis + 1 :])
    assert class_axis(outputs, labels) == axis
    target = output_target(name)(outputs, labels)
    assert target.shape == outputs.shape
    rows, row_labels = outputs.movedim(axis, -1).reshape(-1, 3), labels.reshape(-1)
    expected = FUNCTIONS[name](rows, row_labels)
    torch.testing.assert_close(target.movedim(axis, -1).reshape(-1, 3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1], dtype=t) for t in (torch.int32, torch.uint8)])
def test_any_integer_type_is_a_class_number(labels: Tensor) -> None:
    outputs = torch.randn(2, 3)
    assert torch.equal(nearest(outputs, labels), nearest(outputs, labels.long()))


# --- regression, soft, custom -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [((4, 3), (4, 3)), ((4, 1), (4,)), ((4,), (4, 1)), ((4, 2, 2), (4, 2, 2)), ((4,), (4,))],
)
def test_regression_takes_the_label(outputs: tuple[int, ...], labels: tuple[int, ...]) -> None:
    wanted = torch.randn(labels, dtype=torch.float64)
    target = regression(torch.zeros(outputs), wanted)
    assert target.shape == outputs
    assert target.dtype == torch.float32
    assert torch.equal(target, wanted.float().reshape(outputs))


def test_soft_takes_logits_as_they_are() -> None:
    logits = torch.randn(5, 4)
    assert torch.equal(soft(torch.randn(5, 4), logits), logits)
    assert torch.equal(soft(torch.randn(5), logits[:, 0]), logits[:, 0])


@pytest.mark.parametrize(("shape", "axis"), [((5, 4), 1), ((2, 4, 3, 3), 1), ((2, 6, 4), 2)])
def test_soft_turns_probabilities_into_logits_of_the_same_mean(shape: tuple[int, ...], axis: int) -> None:
    outputs = torch.randn(shape)
    wanted = torch.randn(shape).softmax(axis)
    target = soft(outputs, wanted)
    torch.testing.assert_close(target.softmax(axis), wanted)
    torch.testing.assert_close(target.mean(axis), outputs.mean(axis))


def test_soft_decides_for_every_sample_by_itself() -> None:
    outputs, logits, wanted = (
        torch.randn(1, 3),
        torch.tensor([[1.0, -2.0, 0.5]]),
        torch.tensor([[0.5, 0.0, 0.5]]),
    )
    both = soft(torch.cat([outputs, outputs]), torch.cat([logits, wanted]))
    assert torch.equal(both, torch.cat([soft(outputs, logits), soft(outputs, wanted)]))
    assert bool(torch.isfinite(both).all())


def test_a_callable_is_an_output_target() -> None:
    def doubled(outputs: Tensor, labels: Tensor) -> Tensor:
        return (2 * outputs).double()

    made = output_target(doubled)
    assert made.name == "doubled"
    outputs = torch.randn(2, 3)
    assert torch.equal(made(outputs, torch.zeros(2)), 2 * outputs)
    assert made(outputs, torch.zeros(2)).dtype == torch.float32
    assert output_target(made) is made
    assert output_target(partial(nearest, margin=1.0)).name == "custom"


@pytest.mark.parametrize("wrong", [lambda o, y: o[:, :1], lambda o, y: None, lambda o, y: 1.0])
def test_a_callable_that_returns_another_shape_is_refused(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(DataError, match=r"returned .*; the outputs have shape \(2, 3\)"):
        OutputTarget("mine", wrong)(torch.randn(2, 3), torch.zeros(2))


def test_auto_chooses_from_what_fits_the_labels() -> None:
    assert [target.name for target in automatic(torch.zeros(3))] == ["regression"]
    outputs, labels = torch.randn(4, 3), torch.randint(0, 3, (4,))
    candidates = automatic(labels)
    assert len({target.name for target in candidates}) == len(candidates) > 1
    assert all(target(outputs, labels).shape == outputs.shape for target in candidates)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["closest", "auto", None, 3, ["nearest"]])
def test_an_unknown_name_is_refused_with_the_known_ones(choice: object) -> None:
    with pytest.raises(
        DataError, match=r"unknown output target .*nearest, margin, cross_entropy.*or a callable"
    ):
        output_target(choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"labels range from 0 to 3; the model has 3 classes, 0 to 2"),
        (torch.tensor([-1, 2]), r"labels range from -1 to 2"),
        (
            torch.tensor([0, 1, 2]),
            r"labels of shape \(3,\) do not fit outputs of shape \(2, 3\).*here \(2,\)",
        ),
        (torch.tensor([[0], [1]]), r"labels of shape \(2, 1\) do not fit"),
        (torch.tensor(1), r"labels of shape \(\) do not fit"),
        (torch.tensor([0.0, 1.0]), r"torch.float32; class numbers are integers"),
        (torch.tensor([True, False]), r"are truth values; outputs of shape \(2, 3\) need one for each logit"),
        ([0, 1], r"labels of type list; a tensor is needed"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: str, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        output_target(name)(torch.randn(2, 3), labels)


@pytest.mark.parametrize("name", ["regression", "soft"])
@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(3, 2), torch.tensor(1.0), 0.5])
def test_labels_of_another_shape_are_refused(name: str, labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"labels of (shape|type)"):
        output_target(name)(torch.randn(2, 3), labels)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_an_empty_batch_has_an_empty_target(name: str) -> None:
    target = output_target(name)(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert target.shape == (0, 3)
