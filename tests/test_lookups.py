"""Tables of which rows are looked up, trained in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.training.lookups import LookupEquations
from fxinvert.training.statistics import NormalEquations

F64 = torch.float64
WORDS, PADDING, UNSEEN = 12, 0, 11


class Bag(nn.Module):
    """The mean of a text's words, and what class it says."""

    def __init__(self, padding: int | None = None, *, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 6, padding_idx=padding)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, WORDS if tied else 3)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.table(words).mean(1)).tanh())
        return scores


def texts(count: int = 200) -> tuple[Tensor, Tensor]:
    """Words of which the last never occurs, and labels that they tell."""
    torch.manual_seed(1)
    words = torch.randint(0, UNSEEN, (count, 5))
    return words, F.one_hot(words % 3, 3).sum(1).argmax(1)


def trained(model: nn.Module, batch: int = 40, **options: Any) -> fxinvert.Result:
    words, labels = texts()
    batches = [(words[i : i + batch], labels[i : i + batch]) for i in range(0, len(words), batch)]
    return fxinvert.post_train(
        model,
        batches,
        method="closed_form",
        sweeps=1,
        progress=False,
        **options,
    )


@settings(deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 1e-2, 1.0]), st.integers(-1, 3))
def test_it_is_the_dense_solution_and_rows_that_never_occur_stay(
    seed: int, damping: float, padding: int
) -> None:
    torch.manual_seed(seed)
    indices, errors = torch.randint(0, 7, (6, 4)), torch.randn(1, 24, 3, dtype=F64)
    weights = torch.rand(6, dtype=F64) + 0.1
    rows = F.one_hot(indices.reshape(-1), 9).double()
    if padding >= 0:
        rows[:, padding] = 0
    expected = NormalEquations.of(rows[None], errors, weights).solve(damping)
    known = LookupEquations.of(indices, 9, errors, weights, padding)
    solved = known.solve(damping)
    torch.testing.assert_close(solved.change, expected.change)
    assert solved.explained == pytest.approx(expected.explained)
    assert solved.dead == expected.dead >= 2
    assert not solved.change[..., 7:].any()


@given(st.integers(0, 24), st.integers(0, 2**16))
def test_sums_of_parts_are_the_sums_of_the_whole(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    indices, errors = torch.randint(0, 5, (24,)), torch.randn(1, 24, 3, dtype=F64)
    weights = torch.rand(24, dtype=F64)

    def of(part: slice) -> LookupEquations:
        return LookupEquations.of(indices[part], 5, errors[:, part], weights[part])

    whole, parts = of(slice(None)), of(slice(cut))
    parts += of(slice(cut, None))
    assert parts.rows == whole.rows == 24
    assert parts.error == pytest.approx(whole.error)
    torch.testing.assert_close(parts.diagonal, whole.diagonal)
    torch.testing.assert_close(parts.cross, whole.cross)


@pytest.mark.parametrize("padding", [None, PADDING])
def test_a_table_is_trained_and_what_says_nothing_stays(padding: int | None) -> None:
    torch.manual_seed(0)
    model = Bag(padding)
    before = model.table.weight.detach().clone()
    result = trained(model)
    after = result.model.table.weight.detach()
    assert "table.weight" in result.changed
    assert "table.weight" in result.plan.segments[0].parameters
    assert result.final.loss < result.baseline.loss
    stays = [UNSEEN] if padding is None else [UNSEEN, padding]
    moved = (after != before).any(1)
    assert not moved[stays].any()
    assert moved.sum() == WORDS - len(stays)
    assert torch.equal(model.table.weight, before)


def test_neither_batches_nor_workers_change_the_result() -> None:
    torch.manual_seed(0)
    model = Bag()
    one, workers, batches = (
        trained(model),
        trained(model, executor="processes", workers=1),
        trained(model, batch=13),
    )
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, workers.model.state_dict()[name])
        torch.testing.assert_close(value, batches.model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_table_that_is_the_output_layer_too_is_trained_with_that() -> None:
    torch.manual_seed(0)
    model = Bag(tied=True)
    result = trained(model)
    ops = [path for segment in result.plan.segments for path in segment.trained]
    assert ops == ["norm", "head"]
    changed = result.model
    assert isinstance(changed, Bag)
    assert changed.head.weight is changed.table.weight
    assert result.final.loss < result.baseline.loss


@pytest.mark.parametrize("method", ["joint", "gradient"])
def test_methods_that_follow_gradients_train_a_table_too(method: str) -> None:
    torch.manual_seed(0)
    result = fxinvert.post_train(Bag(), [texts()], method=method, sweeps=1, progress=False)
    assert result.final.loss < result.baseline.loss
    assert "table.weight" in result.changed
