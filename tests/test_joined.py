"""Batches that are joined along the batch axis, and cut apart again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, nn
from torch.testing import assert_close

import fxinvert

aten = torch.ops.aten


def siamese(cut: Any, batches: int = 2, shared: Any = None) -> Model:
    """A network that computes on several views of a sample `(B, batches, 4)` in one call; `cut` tells them apart."""

    def forward(self: Any, x: Tensor) -> Any:
        views = x.unbind(1)
        found = self.shared(torch.cat(views)).tanh()
        return self.last(torch.cat(tuple(cut(found, len(views), views[0].shape[0])), 1))

    return Model(forward, shared=shared or nn.Linear(4, 5), last=nn.Linear(5 * batches, 2))


def by_chunk(x: Tensor, batches: int, rows: int) -> Any:
    return x.chunk(batches)


def by_split(x: Tensor, batches: int, rows: int) -> Any:
    return torch.split(x, rows)


def by_slices(x: Tensor, batches: int, rows: int) -> Any:
    return [x[i * rows : (i + 1) * rows] for i in range(batches)]


def by_view(x: Tensor, batches: int, rows: int) -> Any:
    return x.view(batches, rows, -1).unbind()


def later(x: Tensor, batches: int, rows: int) -> Any:
    return (torch.unflatten(x, 0, (batches, rows)) * 2).unbind()


def moved(x: Tensor, batches: int, rows: int) -> Any:
    """Not all rows are treated alike."""
    return (x + torch.arange(batches).repeat_interleave(rows)[:, None]).chunk(batches)


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("cut", [by_chunk, by_split, by_slices, by_view, later, moved])
def test_they_are_captured_for_any_batch_size(cut: Any, batches: int) -> None:
    model = siamese(cut, batches)
    graph = fxinvert.trace(model, torch.randn(3, batches, 4))
    for rows in (1, 2, 5):
        x = torch.randn(rows, batches, 4)
        assert_close(graph(x), model(x))


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("cut", [by_chunk, by_split, by_slices, by_view, later])
def test_what_computes_on_them_has_rows_of_every_sample(cut: Any, batches: int) -> None:
    graph = fxinvert.trace(siamese(cut, batches), torch.randn(3, batches, 4))
    segments = fxinvert.partition(graph).segments
    assert [op for segment in segments for op in segment.trained] == ["shared", "last"]
    shared, last = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert (shared.meta["rows"], last.meta["rows"]) == (batches, 1)


def test_they_are_inverted_and_trained_as_if_each_were_given_alone() -> None:
    def alone(self: Any, x: Tensor) -> Any:
        return self.last(torch.cat([self.shared(view).tanh() for view in x.unbind(1)], 1))

    joined = siamese(by_chunk)
    model = Model(alone, shared=joined.shared, last=joined.last)
    x = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0, 0] > x[:, 1, 0]).long()
    both = fxinvert.invert(joined, x)(x, labels).targets, fxinvert.invert(model, x)(x, labels).targets
    assert_close(both[0]["tanh"], torch.stack([both[1]["tanh"], both[1]["tanh_1"]], 1).flatten(0, 1))
    trained = fxinvert.post_train(joined, [(x, labels)], method="closed_form", progress=False).model
    assert not torch.equal(trained.get_parameter("shared.weight"), joined.get_parameter("shared.weight"))


def test_slices_by_the_batch_size_are_told_from_equal_values() -> None:
    """Also where the example's batches are the same, and several layers compute on them."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(20, 2)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            x, n = torch.cat([a, b]), a.shape[0]
            x = torch.cat([self.first(x).relu(), self.second(x).tanh()], 1)
            return self.last(torch.cat([x[n:], x[:n]], 1))

    model, x = Pairs(), torch.randn(3, 4)
    graph = fxinvert.trace(model, (x, x))
    segments = fxinvert.partition(graph).segments
    assert [op for segment in segments for op in segment.trained] == ["first", "second", "last"]
    for rows in (1, 2, 5):
        views = tuple(torch.randn(2, rows, 4))
        assert_close(graph(*views), model(*views))
