"""Labels: truth values are two classes, what is ignored asks for nothing, and each is measured as torch measures it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.labels import IGNORED, shares
from fxinvert.output_target import FUNCTIONS, cross_entropy, nearest, output_target
from fxinvert.report.answers import answers
from fxinvert.training.batch import Batch
from fxinvert.training.metrics import Tally, sample_losses, task_loss
from fxinvert.training.sizes import _of_head

CLASSIFICATION = ("nearest", "margin", "cross_entropy", "max_assign", "one_hot")
SINGLE = Heads(())


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- truth values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_truth_value_is_measured_by_the_binary_cross_entropy(shape: tuple[int, ...]) -> None:
    outputs, labels = logits(6, 1), (logits(6) > 0.3).reshape(shape)
    batch = Batch((outputs,), labels)
    expected = F.binary_cross_entropy_with_logits(outputs, labels.reshape(6, 1).double(), reduction="none")
    torch.testing.assert_close(sample_losses(outputs, batch, SINGLE), expected[:, 0])
    torch.testing.assert_close(task_loss(outputs, labels), expected.mean())
    metrics = Tally.of(outputs, batch).metrics
    assert metrics.accuracy == ((outputs > 0).flatten() == labels.flatten()).double().mean()


def test_several_truth_values_per_sample_are_averaged() -> None:
    outputs, labels = logits(5, 4), logits(5, 4) > 0
    expected = F.binary_cross_entropy_with_logits(outputs, labels.double(), reduction="none").mean(1)
    torch.testing.assert_close(sample_losses(outputs, Batch((outputs,), labels), SINGLE), expected)


def test_truth_values_of_two_logits_are_class_numbers() -> None:
    outputs, labels = logits(5, 2), torch.tensor([True, False, True, True, False])
    for name in CLASSIFICATION:
        assert torch.equal(FUNCTIONS[name](outputs, labels), FUNCTIONS[name](outputs, labels.long())), name


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_nearest_right_output_is_on_the_labels_side(margin: float) -> None:
    outputs = torch.tensor([[-2.0, 0.2, 3.0], [1.0, -0.1, 0.0]])
    labels = torch.tensor([[True, True, True], [False, False, False]])
    sign = torch.where(labels, 1.0, -1.0)
    assert torch.equal(
        nearest(outputs, labels, margin), sign * torch.maximum(sign * outputs, torch.tensor(margin))
    )


def test_the_step_of_the_cross_entropy_minimizes_an_upper_bound() -> None:
    """o + 4(y − σ(o)): the binary cross-entropy's second derivative is at most ¼, so the loss never rises."""
    outputs, labels = 4 * logits(200, 1), logits(200, 1) > 0
    target = cross_entropy(outputs, labels)
    torch.testing.assert_close(target, outputs + 4 * (labels.double() - outputs.sigmoid()))
    before, after = (
        F.binary_cross_entropy_with_logits(o, labels.double(), reduction="none") for o in (outputs, target)
    )
    assert (after <= before).all()


def test_a_network_with_one_logit_learns_to_say_yes_and_no() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 6)
    labels = x[:, 0] > x[:, 1].square() - 0.5
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    result = fxinvert.post_train(model, (x, labels))
    assert result.final.accuracy is not None
    assert result.final.accuracy > 0.8
    explained = fxinvert.explain(model, x[:2], labels[:2])
    assert explained.classes is not None


# --- what is ignored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_where_nothing_is_asked_the_output_stays(name: str) -> None:
    outputs, labels = logits(4, 3, 5), torch.randint(0, 3, (4, 5))
    ignored = torch.rand(4, 5) < 0.4
    target = output_target(name)(outputs, labels.masked_fill(ignored, IGNORED))
    kept = ignored[:, None].expand_as(outputs)
    assert torch.equal(target[kept], outputs[kept])
    assert torch.equal(target[~kept], output_target(name)(outputs, labels)[~kept])


def test_what_is_ignored_is_not_measured() -> None:
    outputs, labels = logits(3, 4, 7), torch.randint(0, 7, (3, 4))
    labels[0, 2:], labels[2] = IGNORED, IGNORED
    batch = Batch((outputs,), labels)
    expected = torch.stack(
        [F.cross_entropy(outputs[i], labels[i]) for i in range(2)] + [outputs.new_zeros(())]
    )
    torch.testing.assert_close(sample_losses(outputs, batch, SINGLE), expected)
    tally = Tally.of(outputs, batch)
    assert tally.answers == 6
    assert tally.hits == int((outputs.argmax(-1) == labels).sum())
    torch.testing.assert_close(
        task_loss(outputs, labels), F.cross_entropy(outputs.flatten(0, 1), labels.flatten())
    )
    assert task_loss(outputs, torch.full_like(labels, IGNORED)) == 0


@pytest.mark.parametrize("kind", ["ignored", "truth"])
def test_the_quadratic_model_is_that_of_the_loss(kind: str) -> None:
    """Against derivatives by autograd, in the multiples s of the effects."""
    if kind == "truth":
        outputs, effects, labels = logits(4, 3), logits(2, 4, 3), logits(4, 3) > 0
    else:
        outputs, effects, labels = logits(4, 5, 3), logits(2, 4, 5, 3), torch.randint(0, 3, (4, 5))
        labels[1, :3], labels[3] = IGNORED, IGNORED

    def loss(sizes: Tensor) -> Tensor:
        moved = outputs + torch.tensordot(sizes, effects, 1)
        return sample_losses(moved, Batch((moved,), labels), SINGLE).sum()

    zero = torch.zeros(2, dtype=torch.float64)
    found = _of_head(outputs, labels, effects)
    torch.testing.assert_close(found.slope, torch.func.grad(loss)(zero))
    torch.testing.assert_close(found.curvature, torch.func.hessian(loss)(zero))


class Shifter(nn.Module):
    """Tells every token's successor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.answer = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        answered: Tensor = self.answer(torch.relu(self.hidden(self.embed(x))))
        return answered


def test_padded_sequences_are_post_trained_and_reported() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (120, 6))
    labels = ((tokens + 1) % 9).masked_fill(torch.arange(6) >= torch.randint(2, 7, (120, 1)), IGNORED)
    model = Shifter()
    result = fxinvert.post_train(model, (tokens, labels))
    assert result.final.accuracy is not None
    assert result.final.accuracy > 0.9
    found = answers(fxinvert.trace(result.model, tokens[:2]), [Batch((tokens,), labels)])
    (head,) = found.heads
    confusion = head.confusion()
    assert confusion is not None
    assert sum(map(sum, confusion)) == int((labels != IGNORED).sum())
    rec = fxinvert.invert(model, tokens[:4], output_target="margin")(tokens[:4], labels[:4])
    assert all(target.isfinite().all() for target in rec.targets.values())


@pytest.mark.parametrize(
    ("classes", "expected"),
    [([[0, 1], [2, 1]], [0.5] * 4), ([[0, IGNORED], [IGNORED, IGNORED]], [1.0, 0.0, 0.0, 0.0])],
)
def test_shares_of_a_sample_add_up_to_one_or_nothing(classes: list[Any], expected: list[float]) -> None:
    assert shares(torch.tensor(classes).flatten(), 2).tolist() == expected


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), r"single logit .*labels\.bool\(\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), r"truth values: labels\.bool\(\)"),
        (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), "leave out the axis of length 1"),
        (torch.zeros(4, 3), torch.full((4,), -1), r"where none is asked for, the label is -100"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_advice(
    outputs: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        nearest(outputs, labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_numbers_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    outputs, labels = logits(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = sample_losses(outputs, Batch((outputs,), labels), SINGLE)
    assert torch.equal(sample_losses(outputs, Batch((outputs,), labels.to(dtype)), SINGLE), expected)
